"""Several processes under `torchrun` or `accelerate launch`: all compute, the first one writes.

Data is sharded by the Trainer. Passes fit on every process alike: they are seeded, so that all come
to the same, and no process would be faster for knowing less.
"""

from __future__ import annotations

import os

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast


def world_size() -> int:
    """Return how many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def init() -> None:
    """Meet the other processes."""
    if world_size() > 1:
        PartialState(cpu=not torch.cuda.is_available())


def is_main_process() -> bool:
    """Say whether this is the process that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def barrier() -> None:
    """Wait for the other processes."""
    if world_size() > 1:
        PartialState().wait_for_everyone()


def broadcast_from_main(value: bool) -> bool:
    """Return the first process's value on all of them."""
    if world_size() == 1:
        return value
    flag = torch.tensor([value], dtype=torch.uint8, device=PartialState().device)
    return bool(broadcast(flag).item())


def destroy() -> None:
    """Part in order: a process that ends without a word is taken for a crash."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
