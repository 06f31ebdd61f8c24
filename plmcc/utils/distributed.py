"""Several processes under `torchrun` or `accelerate launch`: all compute, the first one writes.

Data is sharded by the Trainer. Passes fit on every process alike: they are seeded, so that all come
to the same, and no process would be faster for knowing less.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor

_PATIENCE = timedelta(hours=12)
"""How long a process waits for the others. The first one writes, hashes and proves a large model
while they wait, which takes longer than torch's 10 minutes."""


def world_size() -> int:
    """Return how many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def init() -> None:
    """Meet the other processes."""
    if world_size() > 1:
        PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)


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


def sum_over_processes(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, on the tensor's device.

    For what a pass computes from batches by itself: each process sees batches of its own, and
    PyTorch averages gradients only after tensor hooks have run.
    """
    if world_size() == 1 or not torch.distributed.is_initialized():
        return value
    summed: Tensor = reduce(value.to(PartialState().device), "sum")
    return summed.to(value.device)


def destroy() -> None:
    """Part in order: a process that ends without a word is taken for a crash."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
