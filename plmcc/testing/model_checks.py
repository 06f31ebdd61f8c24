"""What a compressed model must satisfy, whichever passes made it: the contract of passes.

The tests run these checks for every pass on every small architecture, and `plmcc test` runs them on
what a recipe makes of a reduced copy of a model.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from plmcc.api import Hard
from plmcc.artifact import format as artifact
from plmcc.artifact import size, verify
from plmcc.artifact.stock import needs_plmcc
from plmcc.catalog import registry as catalog
from plmcc.export.encoder import Forward, encoder_program, example, write_encoder
from plmcc.export.runners import open_program
from plmcc.inference.aoti import Program as Traceable
from plmcc.inference.aoti import encode_program, step_program
from plmcc.inference.generate import compilable, translates
from plmcc.ir.blocks import linear_shape
from plmcc.ir.calibration import observing
from plmcc.ir.modules import checkpoint_activations, is_linear
from plmcc.ir.program import Program
from plmcc.rewrite import Record, build
from plmcc.utils.numerics import relative_difference
from plmcc.utils.text import first_line
from plmcc.utils.types import Values

_NEW_TOKENS = 6


class Broken(Exception):
    """A check failed; the sentence says what is not as it must be."""


class NotApplicable(Exception):
    """There is nothing to check; the sentence says why."""


@dataclass(frozen=True)
class Subject:
    """A compressed model in memory, what it was made from, and the folder that it was saved to.

    `inputs` are arguments of the model, `prompt` those of `generate`.
    """

    model: PreTrainedModel
    original: PreTrainedModel
    records: tuple[Record, ...]
    folder: Path
    inputs: dict[str, Tensor]
    prompt: dict[str, Tensor]

    def rewritten(self) -> Iterator[tuple[Record, nn.Module]]:
        """Yield every record with the module that is at its first path now."""
        for record in self.records:
            yield record, self.model.get_submodule(record.paths[0])

    def hard(self) -> Iterator[tuple[Record, Hard]]:
        """Yield the places that are modules of a pass; a rewritten layer stays the model's own."""
        for record, module in self.rewritten():
            if record.roles[0] != "layer":
                require(isinstance(module, Hard), f"{record.paths[0]} holds no Hard module")
                assert isinstance(module, Hard)
                yield record, module

    def width(self, record: Record) -> int:
        """Return the dimensions of a table that a record replaces."""
        weight = self.original.get_submodule(record.paths[0]).get_parameter("weight")
        return int(weight.shape[-1])


def require(condition: object, words: str) -> None:
    """Raise `Broken` with these words unless the condition holds."""
    if not condition:
        raise Broken(words)


@torch.no_grad()
def output(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return logits, or the last hidden states of a model without a head."""
    result: Any = model(**inputs)
    named = next((result[n] for n in ("logits", "last_hidden_state") if n in result), result[0])
    assert isinstance(named, Tensor)
    return named


def tokens(model: PreTrainedModel, prompt: dict[str, Tensor], **options: object) -> Tensor:
    """Return what greedy search generates."""
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": _NEW_TOKENS}
    settings |= {"pad_token_id": 0}
    made = model.generate(**prompt, **settings, **options)  # type: ignore[operator]
    assert isinstance(made, Tensor)
    return made


def reloaded(subject: Subject, kind: object = None) -> PreTrainedModel:
    """Load the saved model by its own class or another one."""
    loader: Any = kind or type(subject.model)
    attention = subject.model.config._attn_implementation
    loaded: Any = loader.from_pretrained(
        subject.folder, dtype=subject.model.dtype, attn_implementation=attention
    )
    placed: PreTrainedModel = loaded.to(subject.model.device)
    return placed


def require_same_state(one: nn.Module, two: nn.Module) -> None:
    """Require that two modules have the same tensors, bit for bit."""
    first, second = one.state_dict(), two.state_dict()
    odd = sorted(first.keys() ^ second.keys())
    require(not odd, f"only one of the models has {', '.join(odd[:4])}")
    for name, value in first.items():
        same = value.dtype == second[name].dtype and torch.equal(value.cpu(), second[name].cpu())
        require(same, f"{name} is another tensor")


# --- trainable forms


def tied_groups_are_one(subject: Subject) -> None:
    """A tied group has one set of parameters."""
    for record, hard in subject.hard():
        for path in record.paths[1:]:
            named = subject.model.get_submodule(path).named_parameters()
            own = {name for name, value in named if value.numel()}
            require(own <= {"bias"}, f"{path} keeps a copy")
        stored = [id(p) for p in subject.model.state_dict(keep_vars=True).values()]
        for name, tensor in hard.state_dict(keep_vars=True).items():
            count = stored.count(id(tensor))
            require(count == 1, f"{record.paths[0]}.{name} is stored {count} times")


def tied_groups_learn_together(subject: Subject) -> None:
    """An embedding and its tied head teach the same parameters."""
    if not any("head" in record.roles for record in subject.records):
        raise NotApplicable("no place has a tied head")
    model = copy.deepcopy(subject.model).train()
    for record in subject.records:
        if record.roles[0] == "layer":
            continue
        hard = model.get_submodule(record.paths[0])
        for path, role in zip(record.paths, record.roles, strict=True):
            module = model.get_submodule(path)
            model.zero_grad()
            given = torch.arange(3, 9, device=model.device)
            if role != "embedding":
                shape = (2, subject.width(record))
                given = torch.ones(shape, dtype=model.dtype, device=model.device)
            module(given).float().square().sum().backward()
            named = dict(model.named_parameters())
            taught = {n for n, p in named.items() if p.grad is not None and p.grad.any()}
            require(taught, f"{path} teaches nothing")
            own = {*(id(p) for p in hard.parameters()), *(id(p) for p in module.parameters())}
            require({id(named[n]) for n in taught} <= own, f"{path} teaches other parameters")
            shared = any(n.startswith(f"{record.paths[0]}.") for n in taught)
            require(shared, f"{path} does not teach {record.paths[0]}")


def weights_are_what_is_computed(subject: Subject) -> None:
    """`weight` is the matrix that a table or linear map computes with, and no bias is lost."""
    for record, hard in subject.hard():
        path, original = record.paths[0], subject.original.get_submodule(record.paths[0])
        if not isinstance(original, nn.Embedding) and not is_linear(original):
            continue
        with torch.no_grad():
            known: Any = hard
            weight: Tensor = known.weight * 1  # of a lazy one, the values
            pairs = _table_pairs(record, hard, original, weight)
            if is_linear(original):
                # A pass that has rewritten the layer before may have cut it.
                cut = any(path.startswith(f"{r.paths[0]}.") for r in subject.records)
                inputs = known.in_features if cut else linear_shape(original)[0]
                pairs = _linear_pairs(hard, original, weight, path, inputs)
        for what, (found, wanted) in pairs.items():
            require(found.shape == wanted.shape, f"{path}: {what} has the shape {found.shape}")
            difference = relative_difference(found, wanted)
            # Activations in 8 bits make up to some percent; a wrong matrix makes all of it.
            require(difference <= 0.1, f"{path}: {what} differs by {difference:.3g} from `weight`")


def _table_pairs(
    record: Record, hard: Any, original: nn.Module, weight: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return rows, and logits of a tied head, with what the weight (V, D) gives."""
    ids = torch.arange(3, min(len(weight), 64), device=weight.device)
    if not isinstance(original, nn.Embedding):
        return {}
    scale = original(ids).norm() / original.weight[ids].norm()
    found = {"the embedding of ids": (hard(ids), weight[ids] * scale)}
    if "head" in record.roles:
        hidden = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0))
        hidden = hidden.to(weight)
        found["`attend`"] = (hard.attend(hidden), hidden @ weight.T)
    return found


def _linear_pairs(
    hard: Any, original: nn.Module, weight: Tensor, path: str, inputs: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return products with what the weight (O, I) gives."""
    require(weight.dim() == 2, f"{path}: `weight` has {weight.dim()} dimensions")
    x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(0)).to(weight)
    bias = hard(torch.zeros_like(x))
    had = dict(original.named_parameters()).get("bias")
    if had is not None and had.any():
        require(bias.any(), f"{path}: the bias of the original is lost: `take_bias` copies it")
    require(weight.shape[1] == inputs, f"{path}: `weight` is not (out, in): {tuple(weight.shape)}")
    return {"the product": (hard(x) - bias, x @ weight.T)}


# --- the model stays a transformers model


def caches_agree(subject: Subject) -> None:
    """Generation with and without cache gives the same tokens, and beam search runs."""
    if not subject.model.can_generate():
        raise NotApplicable("the model does not generate")
    if not verify.caches_exactly(subject.original, subject.prompt):
        raise NotApplicable("the original itself generates other tokens without its cache")
    cached, uncached = (
        tokens(subject.model, subject.prompt, use_cache=use) for use in (True, False)
    )
    require(
        torch.equal(cached, uncached),
        "generation with the cache and without it gives different tokens",
    )
    options = {"num_beams": 2, "do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    beams = subject.model.generate(**subject.prompt, **options)  # type: ignore[operator]
    require(len(beams) == len(cached), "beam search returns another number of rows")


def hidden_states_are_complete(subject: Subject) -> None:
    """There are as many hidden states as before, one fewer for each layer that was taken out."""
    models = (subject.original, subject.model)
    with torch.no_grad():
        results = [m(**subject.inputs, output_hidden_states=True) for m in models]
    for key in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
        one, two = (result.get(key) for result in results)
        require((one is None) == (two is None), f"only one of the models returns {key}")
        if one is not None:
            stack = key.removesuffix("hidden_states").removesuffix("_")
            paths = [Program(m).layer_paths() for m in models]
            gone = [p for p in set(paths[0]) - set(paths[1]) if stack in p]
            expected = [s.shape for s in one][: len(one) - len(gone)]
            require([s.shape for s in two] == expected, f"{key} are not those of the layers")


def checkpointing_keeps_gradients(subject: Subject) -> None:
    """Gradient checkpointing gives the same gradients."""
    plain, checkpointed = (copy.deepcopy(subject.model) for _ in range(2))
    if not checkpointed.supports_gradient_checkpointing:
        raise NotApplicable("the architecture has no gradient checkpointing")
    checkpoint_activations(checkpointed)
    for model in (plain, checkpointed):
        _learn(model, subject)
    expected = {name: p.grad for name, p in plain.named_parameters()}
    require(any(grad is not None for grad in expected.values()), "nothing has a gradient")
    for name, parameter in checkpointed.named_parameters():
        grad = expected[name]
        require((grad is None) == (parameter.grad is None), f"{name}: only one has a gradient")
        if grad is not None and parameter.grad is not None:
            difference = relative_difference(parameter.grad, grad)
            require(difference <= 1e-4, f"{name} has another gradient")


def _learn(model: PreTrainedModel, subject: Subject) -> None:
    options = {"use_cache": False} if model.can_generate() else {}
    torch.manual_seed(0)  # dropout
    result: Any = model.train()(**subject.inputs, **options)
    named = next((result[n] for n in ("logits", "last_hidden_state") if n in result), result[0])
    named.float().square().sum().backward()


def copies_are_independent(subject: Subject) -> None:
    """A deep copy computes the same, and changing it leaves the model as it was."""
    copied, inputs = copy.deepcopy(subject.model), subject.inputs
    before = output(subject.model, inputs)
    require(torch.equal(output(copied, inputs), before), "a deep copy computes something else")
    for record, _ in subject.rewritten():
        for value in copied.get_submodule(record.paths[0]).parameters():
            value.data.mul_(3)
        for path, role in zip(record.paths, record.roles, strict=True):
            if role == "head":
                given = torch.ones(1, subject.width(record)).to(before)
                one, two = (m.get_submodule(path)(given) for m in (subject.model, copied))
                require(not torch.equal(one, two), f"{path} of the copy still uses the original")
    after = output(subject.model, inputs)
    require(torch.equal(after, before), "changing a deep copy changes the model")


# --- the artifact


def reloading_is_exact(subject: Subject) -> None:
    """A reloaded model is the same, bit for bit, and so is what it generates."""
    loaded = reloaded(subject)
    require(not loaded.training, "the reloaded model is in training mode")
    require_same_state(loaded, subject.model)
    one, two = (output(m, subject.inputs) for m in (loaded, subject.model))
    require(torch.equal(one, two), "the reloaded model computes something else")
    if subject.model.can_generate():
        first, second = (tokens(m, subject.prompt) for m in (subject.model, loaded))
        require(torch.equal(first, second), "the reloaded model generates other tokens")


def resaving_is_exact(subject: Subject) -> None:
    """A reloaded model that is saved again is the same artifact."""
    again = reloaded(subject)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        again.save_pretrained(folder)
        pair = (subject.folder, folder)
        one, two = (json.loads((f / "config.json").read_text(encoding="utf-8")) for f in pair)
        require(one == two, "config.json is another one")
        wanted = [artifact.METHOD]
        if not needs_plmcc(subject.model):  # it may be an ordinary checkpoint
            wanted.append(subject.original.config.model_type)
        require(one["model_type"] in wanted, f"config.json says {one['model_type']}")
        first, second = (load_file(f / "model.safetensors") for f in pair)
        same = first.keys() == second.keys() and all(
            torch.equal(first[n], second[n]) for n in first
        )
        require(same, "the weight file holds other tensors")
        require_same_state(type(again).from_pretrained(folder), again)


def bytes_are_counted(subject: Subject) -> None:
    """The bytes of the modules are the bytes in the file."""
    stored = load_file(subject.folder / "model.safetensors")
    for record, module in subject.rewritten():
        path = record.paths[0]
        inside = sum(v.nbytes for key, v in stored.items() if key.startswith(f"{path}."))
        counted = size.module_bytes(module)
        require(counted == inside, f"{path}: {counted} bytes counted, {inside} in the file")
    paths = [record.paths[0] for record in subject.records]
    sizes = size.component_bytes(subject.model, paths)
    size.check_file(subject.folder, sizes)
    for record, module in subject.rewritten():
        path = record.paths[0]
        if any(path.startswith(f"{other}.") for other in paths):
            continue  # it is counted with the layer that another pass has rewritten
        require(sizes[path] == size.module_bytes(module), f"{path} is counted twice or elsewhere")


def layouts_rebuild_modules(subject: Subject) -> None:
    """A record survives JSON, and its class and layout build the module again."""
    for record in subject.records:
        path = record.paths[0]
        again = Record.from_json(json.loads(json.dumps(record.to_json())))
        require(again == record, f"{path}: the layout does not survive JSON")
        hard, built = subject.model.get_submodule(path), build(record)
        if record.roles[0] == "layer":
            continue
        require(built.layout == hard.layout, f"{path}: the class changes its layout")
        shapes, rebuilt = (
            {name: value.shape for name, value in module.state_dict().items()}
            for module in (hard, built)
        )
        require(rebuilt == shapes, f"{path}: the layout builds tensors of other shapes")
        meta = all(value.is_meta for value in built.state_dict().values())
        require(meta, f"{path}: the constructor makes tensors on a device of its own")


def ideal_sizes_survive(subject: Subject) -> None:
    """A reloaded module has the same ideal size."""
    loaded = reloaded(subject)
    for record, hard in subject.hard():
        again, bits = loaded.get_submodule(record.paths[0]), hard.ideal_bits()
        same = isinstance(again, Hard) and again.ideal_bits() == bits
        require(same, f"{record.paths[0]} has another ideal size after loading")
        require(bits is None or bits > 0, f"{record.paths[0]} has an ideal size of {bits} bits")


def bare_models_load(subject: Subject) -> None:
    """The model without its head loads too, and computes the same states."""
    if "input_ids" not in subject.inputs:
        raise NotApplicable("the bare model is tried with text inputs")
    base = reloaded(subject, AutoModel)
    again = reloaded(subject)
    with torch.no_grad():
        states = base(**subject.inputs).last_hidden_state
        whole, other = (
            m(**subject.inputs, output_hidden_states=True) for m in (subject.model, again)
        )
    key = "decoder_hidden_states" if "decoder_hidden_states" in whole else "hidden_states"
    require(torch.equal(other[key][-1], whole[key][-1]), "the reloaded states are others")
    require(torch.equal(states, whole[key][-1]), "the bare model computes other states")


def fresh_processes_agree(subject: Subject) -> None:
    """A fresh process loads the folder by its Auto class and repeats the outputs."""
    if any(catalog.is_registered(record.name) for record in subject.records):
        raise NotApplicable("the pass is registered in this process only: install its package")
    verify.record(subject.model, subject.folder)
    difference = verify.in_fresh_process(subject.folder)
    require(
        difference <= 1e-6, f"a fresh process differs by {difference:.3g} of the outputs' scale"
    )


def modules_compile(subject: Subject, backend: str = "aot_eager") -> None:
    """Every kind of rewritten module is one graph for torch.compile, with the same outputs."""
    # As it is loaded: a model that was asked for hidden states keeps hooks that cannot be traced.
    subject = replace(subject, model=reloaded(subject))
    done: set[str] = set()
    for record, _ in subject.rewritten():
        if record.kind not in done:
            done.add(record.kind)
            _compile_one(subject, record, backend)


def programs_take_any_size(subject: Subject) -> None:
    """`torch.export` makes a program of the model that takes any batch and length."""
    # As it is loaded: a model that was asked for hidden states keeps hooks that cannot be traced.
    model = reloaded(subject).float()
    if translates(model) and compilable(model):
        for program in (encode_program(model), step_program(model, 1, ((), False))):
            _exported(program)
    elif model.can_generate() or "input_ids" not in subject.inputs:
        raise NotApplicable("models of this kind are not exported")
    else:
        module, inputs, shapes = encoder_program(model)
        exported = _exported((module, tuple(inputs.values()), tuple(shapes.values())))
        other = example(model, 3, 7)
        one, two = (run(*other.values()) for run in (exported.module(), module))
        for name, value in two.items():
            difference = relative_difference(one[name], value)
            require(difference <= 1e-5, f"the program differs by {difference:.3g} in {name}")


def _exported(program: Traceable) -> torch.export.ExportedProgram:
    module, inputs, shapes = program
    try:
        with torch.no_grad():
            return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as problem:
        raise Broken(f"it cannot be exported: {first_line(problem)}") from None


def programs_run(subject: Subject) -> None:
    """Exports to aoti and onnx compute what the model does."""
    model = reloaded(subject).float()
    if model.can_generate() or "input_ids" not in subject.inputs:
        raise NotApplicable("models of this kind are not exported")
    other = example(model, 3, 7)
    with torch.no_grad():
        expected = Forward(model)(**other)
    with tempfile.TemporaryDirectory() as name:
        for to in ("aoti", *(("onnx",) if find_spec("onnxruntime") else ())):
            own = write_encoder(model, Path(name), to, int8=False)
            ports = [[port["name"] for port in own[kind]] for kind in ("inputs", "outputs")]
            found = open_program(Path(name), to, "cpu", *ports)(list(other.values()))
            for value, wanted in zip(found, expected.values(), strict=True):
                difference = relative_difference(value, wanted)
                require(difference <= 1e-4, f"{to} differs by {difference:.3g} of the scale")


def _compile_one(subject: Subject, record: Record, backend: str) -> None:
    model = subject.model
    module = model.get_submodule(record.paths[0])
    if isinstance(module, nn.ModuleList):  # a stack is called layer by layer
        module = module[0]
    seen: list[Values] = []
    with torch.no_grad(), observing([module], lambda _, call: seen.append(call.arguments)):
        # A cache would grow with every call that is compared.
        model(**subject.inputs, **({"use_cache": False} if model.can_generate() else {}))
    calls: list[tuple[Any, tuple[object, ...], Values]] = [(module.forward, (), seen[0])]
    if "head" in record.roles:
        shape = (2, 3, subject.width(record))
        hidden = torch.randn(shape, device=model.device, dtype=model.dtype)
        calls.append((module.attend, (hidden,), {}))
    torch.compiler.reset()
    with torch.no_grad():
        for function, arguments, options in calls:
            compiled: Any = torch.compile(function, fullgraph=True, backend=backend)
            expected = function(*arguments, **options)
            try:
                torch.testing.assert_close(compiled(*arguments, **options), expected)
            except AssertionError as problem:
                raise Broken(f"{record.paths[0]} compiled: {first_line(problem)}") from None


CHECKS: dict[str, Callable[[Subject], None]] = {
    check.__name__: check
    for check in (
        tied_groups_are_one,
        tied_groups_learn_together,
        weights_are_what_is_computed,
        caches_agree,
        hidden_states_are_complete,
        checkpointing_keeps_gradients,
        copies_are_independent,
        reloading_is_exact,
        resaving_is_exact,
        bytes_are_counted,
        layouts_rebuild_modules,
        ideal_sizes_survive,
        bare_models_load,
        fresh_processes_agree,
    )
}
"""The checks by name, but for compilation, which takes long (`modules_compile`)."""
