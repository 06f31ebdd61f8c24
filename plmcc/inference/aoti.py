"""The programs of an encoder-decoder, compiled by AOTInductor."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind
from transformers import PreTrainedModel

from plmcc.inference.beam_attention import shares_keys
from plmcc.inference.cuda_graphs import Run, load
from plmcc.inference.programs import DecoderStep, EncoderProgram, recorded

# Freezing packs the weights of linear layers for oneDNN. On 2 cores of an EPYC 9004, the linear
# layers of a step took 2.0 ms so and 2.9 ms through MKL at one row, 2.2 and 4.4 ms at four.
# Shapes are dynamic, since a bucket would be a program more to compile (20 to 40 s); what static
# shapes would gain has not been measured.
_OPTIONS = {"freezing": True, "cpp.dynamic_threads": True}


class CompiledPrograms:
    """Programs of a model, each compiled when it is first needed (`decode.Programs`).

    Weights are copied when a program is compiled: what is trained later does not reach it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._encode: Run | None = None
        self._steps: dict[int, Run] = {}

    @cached_property
    def restrictions(self) -> tuple[tuple[int, ...], bool]:
        """What the model's generation config forbids to write; its steps are compiled for that."""
        return restrictions_of(self.model)

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """Heads and width of each self-attention cache."""
        return cache_shapes(self.model)

    def encode(self, source_BS: Tensor, mask_BS: Tensor) -> list[Tensor]:
        """Read the source."""
        if self._encode is None:
            self._encode = _compiled(lambda: encode_program(self.model))
        return self._encode([source_BS, mask_BS])

    def step(self, candidates: int, inputs: list[Tensor]) -> list[Tensor]:
        """Read one target token in each beam."""
        size = room_for(candidates)
        if size not in self._steps:
            self._steps[size] = _compiled(
                lambda: step_program(self.model, size, self.restrictions), True
            )
        return self._steps[size](inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledPrograms:
        # A copy of the model may be changed: it compiles programs of its own.
        return CompiledPrograms(copy.deepcopy(self.model, memo))


def room_for(candidates: int) -> int:
    """Return how many candidates the program for `candidates` of them has: few programs serve all
    beam sizes."""
    return 1 if candidates == 1 else max(8, 1 << (candidates - 1).bit_length())


def cache_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Return heads and width of each self-attention cache: keys of all layers, then values."""
    return [(c.shape[1], c.shape[3]) for c in _caches(model, 2, 2)[0]]


def has_programs(model: PreTrainedModel) -> bool:
    """Return whether a model can be run as `plmcc.inference.programs` runs it: its attention has to
    be exchangeable, and its decoder has to take caches and encoder states of the usual form."""
    if not shares_keys(model):
        return False
    try:
        cache_shapes(model)
    except (AttributeError, KeyError, TypeError, ValueError):
        return False  # mixtures of experts want the encoder's router logits, pairs of models ...
    except RuntimeError:
        return False  # its code looks at values, which the meta device does not have
    return True


@torch.no_grad()
def _caches(model: PreTrainedModel, rows: int, source: int) -> tuple[list[Tensor], list[Tensor]]:
    token_R = torch.zeros(rows, dtype=torch.long, device=model.device)
    size = (rows, source, model.config.hidden_size)
    hidden_RSE = torch.zeros(size, dtype=model.dtype, device=model.device)
    return recorded(model, token_R, hidden_RSE, hidden_RSE.new_zeros(rows, 1, 1, source))


Program = tuple[torch.nn.Module, tuple[Any, ...], Any]
"""A module, example inputs, and the dynamic shapes of the inputs."""


def encode_program(model: PreTrainedModel) -> Program:
    """Return the program that reads the source."""
    ids_BS = torch.ones(2, 8, dtype=torch.long, device=model.device)
    shape = {0: Dim("B", min=1), 1: Dim("S", min=2)}
    return EncoderProgram(model), (ids_BS, ids_BS.clone()), (shape, shape)


def restrictions_of(model: PreTrainedModel) -> tuple[tuple[int, ...], bool]:
    """Return the `Search.restrictions` of a model's generation config."""
    words = model.generation_config.bad_words_ids or []
    eos = model.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    banned = {word[0] for word in words if len(word) == 1 and word[0] not in ends}
    return tuple(sorted(banned)), bool(model.generation_config.renormalize_logits)


def step_program(
    model: PreTrainedModel, candidates: int, restrictions: tuple[tuple[int, ...], bool]
) -> Program:
    """Return the program that reads one token."""
    sentences, beams, source, room = 2, 1 if candidates == 1 else 3, 8, 16
    own, cross = _caches(model, sentences, source)
    caches = [c.new_zeros(sentences, c.shape[1], room, beams, c.shape[3]) for c in own]
    caches += [cache.contiguous() for cache in cross]
    token_AN = torch.zeros(sentences, beams, dtype=torch.long, device=model.device)
    slots_ANT = token_AN[:, :, None].expand(-1, -1, room).contiguous()
    position = torch.zeros(1, dtype=torch.long, device=model.device)
    inputs = (token_AN, slots_ANT, position, caches[0].new_zeros(sentences, 1, 1, source), caches)
    A, S, T = Dim("A", min=1), Dim("S", min=2), Dim("T", min=2)
    at_beams = {} if beams == 1 else {1: Dim("N", min=2)}
    at_places = {0: A, 2: T} | ({} if beams == 1 else {3: at_beams[1]})
    shapes = [at_places for _ in own] + [{0: A, 2: S} for _ in cross]
    return (
        DecoderStep(model, candidates, restrictions),
        inputs,
        ({0: A, **at_beams}, {0: A, 2: T, **at_beams}, {}, {0: A, 3: S}, shapes),
    )


def package(program: Program, file: Path) -> None:
    """Compile a program and write it as an AOTInductor package."""
    module, inputs, shapes = program
    cpu = inputs[0].device.type == "cpu"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its tree specs
        traced = export(module.eval(), inputs, dynamic_shapes=shapes, strict=False)
        torch._inductor.aoti_compile_and_package(
            _pruned(traced), package_path=str(file), inductor_configs=_OPTIONS if cpu else {}
        )


def _pruned(traced: ExportedProgram) -> ExportedProgram:
    """Drop the weights that a program does not use, which AOTInductor would store: those of the
    decoder in `Encode`, those of the encoder in `Step`."""
    traced = traced.run_decompositions({})  # in-place writes become outputs: the rest is dead
    graph, specs = traced.graph_module.graph, traced.graph_signature.input_specs
    graph.eliminate_dead_code()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node, spec in list(zip(inputs, specs, strict=True)):
        if spec.kind is not InputKind.USER_INPUT and not node.users:
            graph.erase_node(node)
            specs.remove(spec)
            traced.state_dict.pop(spec.target, None)
    traced.graph_module.recompile()
    return traced


def _compiled(make: Callable[[], Program], replayed: bool = False) -> Run:
    # Quantized weights (tensor subclasses) cannot be traced in the inference mode of the caller.
    with torch.inference_mode(False), TemporaryDirectory(prefix="plmcc-") as folder:
        file, program = Path(folder) / "program.pt2", make()
        package(program, file)
        return load(file, str(program[1][0].device), replayed)
