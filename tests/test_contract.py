"""What every pass must satisfy, on every tiny architecture. A new pass needs no edit here.

A pass whose defaults do not fit models of width 32 with 99 tokens says so in its own test file:
`tests/passes/test_<name>.py` assigns a literal `OPTIONS = {...}`, which is read from there.
"""

from __future__ import annotations

import ast
import copy
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny import GENERATIVE, NAMES, inputs, prompt, tiny
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, Trainer, TrainingArguments

from plmcc import artifact, catalog, rewrite, size, verify
from plmcc.api import Hard, Pass, Site
from plmcc.diagnostics import PlmccError
from plmcc.program import Program
from plmcc.recipe import Recipe, parse_recipe

# What prepares model and tokenizer before anything is matched rewrites no module.
PASSES = [name for name in catalog.names() if catalog.load(name).prepare is Pass.prepare]
LOWER_PRECISION = ("bert", "gpt2", "t5", "mbart")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@dataclass(frozen=True)
class Case:
    """A pass on a model. `str(case)` is the test's id."""

    name: str
    model: str
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __str__(self) -> str:
        return "-".join(
            (self.name, self.model, str(self.dtype).removeprefix("torch."), self.device)
        )

    def original(self) -> PreTrainedModel:
        model: Any = tiny(self.model)
        placed: PreTrainedModel = model.to(device=self.device, dtype=self.dtype)
        return placed

    def inputs(self) -> dict[str, Tensor]:
        return self._placed(inputs(self.model))

    def prompt(self) -> dict[str, Tensor]:
        return self._placed(prompt(self.model))

    def labelled(self) -> dict[str, Tensor]:
        given = self.inputs()
        source = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
        return given | {"labels": given[source]}

    def _placed(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for name, value in given.items()
        }


@dataclass(frozen=True)
class Written:
    """A hardened model in memory, its sites, and the folder it was saved to."""

    case: Case
    model: PreTrainedModel
    sites: tuple[Site, ...]
    folder: Path

    def rewritten(self) -> Iterator[tuple[Site, nn.Module]]:
        for site in self.sites:
            yield site, self.model.get_submodule(site.path)

    def hard(self) -> Iterator[tuple[Site, Hard]]:
        """The sites that are modules of a pass; a rewritten layer stays the model's own class."""
        for site, module in self.rewritten():
            if site.roles[0] != "layer":
                assert isinstance(module, Hard)
                yield site, module


CASES = [
    *(Case(name, model) for name in PASSES for model in NAMES),
    *(Case(name, model, torch.bfloat16) for name in PASSES for model in LOWER_PRECISION),
    *(
        Case(name, model, dtype, "cuda")
        for name in PASSES
        for model in LOWER_PRECISION
        for dtype in (torch.float32, torch.bfloat16)
        if "cuda" in DEVICES
    ),
]
on_every_case = pytest.mark.parametrize("written", CASES, ids=str, indirect=True)
on_a_few = pytest.mark.parametrize(
    "written",
    [Case(name, model) for name in PASSES for model in ("bert", "gpt2", "mbart", "llama")],
    ids=str,
    indirect=True,
)


def file_of(name: str) -> Path:
    return Path(__file__).parent / "passes" / f"test_{name}.py"


@functools.cache
def small(name: str) -> Pass:
    """A pass with options that fit tiny models."""
    file = file_of(name)
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OPTIONS":
            return catalog.load(name)(**ast.literal_eval(node.value))
    return catalog.load(name)()


@functools.cache
def refusal(name: str, model: str) -> str:
    """Why a pass does not fit a model; empty where it does."""
    try:
        rewrite.match(tiny(model), [small(name)])
    except PlmccError as problem:
        return problem.diagnostics[0].render()
    return ""


def matched(case: Case, model: PreTrainedModel) -> rewrite.Matched:
    return rewrite.match(model, [small(case.name)])


def fitting(name: str, device: str = "cpu") -> Case:
    """An architecture that the pass fits, a generating one if there is any."""
    order = sorted(NAMES, key=lambda model: model not in ("gpt2", "mbart", "llama"))
    return Case(name, next(m for m in order if not refusal(name, m)), device=device)


def skip_unless_it_fits(case: Case) -> None:
    if reason := refusal(case.name, case.model):
        pytest.skip(reason)


def softened(case: Case) -> tuple[PreTrainedModel, list[rewrite.Replacement]]:
    skip_unless_it_fits(case)
    model = case.original()
    return model, rewrite.replace_all(model, matched(case, model))


def hardened(case: Case) -> tuple[PreTrainedModel, tuple[Site, ...]]:
    model, done = softened(case)
    artifact.adopt(model, rewrite.harden_all(model, done))
    return model, tuple(replacement.site for replacement in done)


@pytest.fixture(scope="module")
def keep(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Written]:
    """Compresses and saves each case once in the module."""

    @functools.cache
    def make(case: Case) -> Written:
        model, sites = hardened(case)
        folder = tmp_path_factory.mktemp(str(case))
        model.save_pretrained(folder)
        return Written(case, model, sites, folder)

    return make


@pytest.fixture
def written(request: pytest.FixtureRequest, keep: Callable[[Case], Written]) -> Written:
    skip_unless_it_fits(request.param)
    return keep(request.param)


@torch.no_grad()
def output(case: Case, model: PreTrainedModel) -> Tensor:
    return _first(model(**case.inputs()))


def _first(result: Any) -> Tensor:
    found = result["logits"] if "logits" in result else result["last_hidden_state"]
    assert isinstance(found, Tensor)
    return found


def tokens(case: Case, model: PreTrainedModel, **options: Any) -> Tensor:
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": 6, "pad_token_id": 0}
    made = model.generate(**case.prompt(), **settings, **options)  # type: ignore[operator]
    assert isinstance(made, Tensor)
    return made


def reloaded(written: Written, kind: Any = None) -> PreTrainedModel:
    loader: Any = kind or type(written.model)
    loaded: Any = loader.from_pretrained(
        written.folder, dtype=written.case.dtype, attn_implementation="eager"
    )
    placed: PreTrainedModel = loaded.to(written.case.device)
    return placed


def assert_same_state(one: nn.Module, two: nn.Module) -> None:
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value.cpu(), second[name].cpu()), name


# --- what a pass says of itself


@pytest.mark.parametrize(
    "name", [n for n in PASSES if catalog.entry(n).module == f"plmcc.passes.{n}"]
)
def test_a_shipped_pass_has_tests_of_its_own(name: str) -> None:
    assert file_of(name).exists()


@pytest.mark.parametrize("name", PASSES)
def test_options_survive_json_and_recipes(name: str) -> None:
    for chosen in (catalog.load(name)(), small(name)):
        assert type(chosen).model_validate_json(chosen.model_dump_json()) == chosen
        recipe = Recipe(passes=[chosen])
        again = parse_recipe(recipe.to_yaml(), real=True)
        assert (again.passes[0], again.digest()) == (chosen, recipe.digest())
        assert type(again.passes[0]) is type(chosen)


@pytest.mark.parametrize("name", PASSES)
def test_unknown_options_and_changes_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="no_such_option"):
        catalog.load(name)(no_such_option=1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="frozen"):
        small(name).targets = "linears"  # type: ignore[misc]


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_describes_itself(name: str) -> None:
    kind = catalog.load(name)
    assert kind.__doc__
    assert kind.paper
    assert kind.preserves in ("exact", "within", "lossy")
    assert (kind.tolerance > 0) == (kind.preserves == "within")
    assert all(is_sentence(hazard) for hazard in kind.hazards)
    for option, about in kind.model_fields.items():
        assert about.description, f"{option} is not described"


def is_sentence(text: str) -> bool:
    """Several words, and nothing that only a programmer reads."""
    return len(text.split()) >= 4 and not re.search(r" at 0x|Traceback|Error\(|<class", text)


@pytest.mark.parametrize("model", NAMES)
@pytest.mark.parametrize("name", PASSES)
def test_refusals_are_sentences_with_a_place(name: str, model: str) -> None:
    whole = tiny(model)
    try:
        found = rewrite.match(whole, [small(name)])
    except PlmccError as problem:
        for diagnostic in problem.diagnostics:
            assert diagnostic.code in ("PLM201", "PLM203")
            assert is_sentence(diagnostic.message)
            assert is_sentence(diagnostic.given or diagnostic.cure)
        return
    assert found.sites
    for _, miss in found.misses:
        assert is_sentence(miss.reason), miss
        whole.get_submodule(miss.path)
    for _, site in found.sites:
        assert len(site.paths) == len(site.roles) == len(site.modules)
        assert all(whole.get_submodule(path) is module for path, module in zip(
            site.paths, site.modules, strict=True
        ))  # fmt: skip


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_fits_some_architecture(name: str) -> None:
    assert any(not refusal(name, model) for model in NAMES)


@pytest.mark.parametrize("name", PASSES)
def test_targets_that_name_nothing_are_an_error(name: str) -> None:
    chosen = small(name).model_copy(update={"targets": "no.such.module"})
    with pytest.raises(PlmccError) as caught:
        rewrite.match(tiny("bert"), [chosen])
    assert caught.value.diagnostics[0].code == "PLM201"


@pytest.mark.parametrize("name", PASSES)
def test_another_count_than_expected_is_an_error(name: str) -> None:
    chosen = small(name).model_copy(update={"expect": 77})
    with pytest.raises(PlmccError, match="expected 77"):
        rewrite.match(fitting(name).original(), [chosen])


@pytest.mark.parametrize("case", [c for c in CASES if c.device == "cpu"], ids=str)
def test_matching_changes_nothing(case: Case) -> None:
    skip_unless_it_fits(case)
    model, untouched = case.original(), case.original()
    names = [(path, type(module)) for path, module in model.named_modules()]
    matched(case, model)
    assert names == [(path, type(module)) for path, module in model.named_modules()]
    assert_same_state(model, untouched)


@pytest.mark.parametrize("name", PASSES)
def test_the_same_pass_twice_is_an_error(name: str) -> None:
    case = fitting(name)
    with pytest.raises(PlmccError) as caught:
        rewrite.match(case.original(), [small(name), small(name)])
    assert caught.value.diagnostics[0].code == "PLM204"


# --- the trainable form


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == torch.float32], ids=str)
def test_hardening_keeps_the_function(case: Case) -> None:
    model, done = softened(case)
    soft = output(case, model)
    rewrite.harden_all(model, done)
    hard = output(case, model)
    assert torch.isfinite(hard).all()
    bound = max(1e-4, small(case.name).tolerance) * float(soft.abs().max())
    assert float((soft - hard).abs().max()) <= bound


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_pass_preserves(case: Case) -> None:
    chosen = small(case.name)
    original, (model, _) = case.original(), hardened(case)
    before, after = output(case, original), output(case, model)
    assert before.shape == after.shape
    assert before.dtype == after.dtype
    if chosen.preserves != "lossy":
        rounding = 1e-5 if case.dtype == torch.float32 else 2e-2
        bound = max(rounding, chosen.tolerance) * float(before.abs().max())
        assert float((before - after).abs().max()) <= bound


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_trainable_form_learns(case: Case) -> None:
    model, done = softened(case)
    model.train()(**case.labelled()).loss.backward()
    for replacement in done:
        path = replacement.site.path
        learned = []
        for name, parameter in model.get_submodule(path).named_parameters():
            assert parameter.grad is not None, f"{path}.{name}"
            assert torch.isfinite(parameter.grad).all(), f"{path}.{name}"
            learned.append(bool(parameter.grad.any()))
        assert any(learned) or not learned, path


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fitting_is_the_same_every_time(case: Case) -> None:
    torch.manual_seed(1)
    one, _ = hardened(case)
    torch.manual_seed(2)
    two, _ = hardened(case)
    assert_same_state(one, two)


@on_every_case
def test_a_tied_group_has_one_set_of_parameters(written: Written) -> None:
    for site, hard in written.hard():
        for path in site.paths[1:]:
            own = dict(written.model.get_submodule(path).named_parameters())
            assert own.keys() <= {"bias"}, f"{path} keeps a copy"
        stored = [id(p) for p in written.model.state_dict(keep_vars=True).values()]
        for tensor in hard.state_dict(keep_vars=True).values():
            assert stored.count(id(tensor)) == 1


@on_every_case
def test_head_and_embedding_teach_the_same_parameters(written: Written) -> None:
    case = written.case
    if not any(site.roles.count("head") for site in written.sites):
        pytest.skip("no site has a tied head")
    model = copy.deepcopy(written.model).train()
    for site in written.sites:
        for path, role in zip(site.paths, site.roles, strict=True):
            module, hard = model.get_submodule(path), model.get_submodule(site.path)
            width = int(site.facts["embedding_dim"])
            model.zero_grad()
            if role == "embedding":
                module(torch.arange(3, 9, device=case.device)).float().square().sum().backward()
            else:
                hidden = torch.ones(2, width, dtype=case.dtype, device=case.device)
                module(hidden).float().square().sum().backward()
            named = dict(model.named_parameters())
            taught = {n for n, p in named.items() if p.grad is not None and p.grad.any()}
            assert taught, path
            assert {id(named[n]) for n in taught} <= {
                *(id(p) for p in hard.parameters()),
                *(id(p) for p in module.parameters()),
            }
            assert any(n.startswith(f"{site.path}.") for n in taught)


# --- the model stays a transformers model


@on_every_case
def test_cached_and_uncached_generation_agree(written: Written) -> None:
    if written.case.model not in GENERATIVE:
        pytest.skip("the model does not generate")
    cached = tokens(written.case, written.model, use_cache=True)
    uncached = tokens(written.case, written.model, use_cache=False)
    assert torch.equal(cached, uncached)
    beams = written.model.generate(  # type: ignore[operator]
        **written.case.prompt(), num_beams=2, do_sample=False, max_new_tokens=4, pad_token_id=0
    )
    assert len(beams) == len(cached)


@on_every_case
def test_hidden_states_are_as_many_as_before(written: Written) -> None:
    case, before = written.case, written.case.original()
    with torch.no_grad():
        results = [m(**case.inputs(), output_hidden_states=True) for m in (before, written.model)]
    for key in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
        one, two = (result.get(key) for result in results)
        assert (one is None) == (two is None)
        if one is not None:
            # One for each layer: as many fewer as a pass has taken out.
            stack = key.removesuffix("hidden_states").removesuffix("_")
            paths = [Program(m).layer_paths() for m in (before, written.model)]
            gone = [p for p in set(paths[0]) - set(paths[1]) if stack in p]
            assert [s.shape for s in two] == [s.shape for s in one][: len(one) - len(gone)]


@on_every_case
def test_gradient_checkpointing_gives_the_same_gradients(written: Written) -> None:
    plain, checkpointed = (copy.deepcopy(written.model) for _ in range(2))
    if not checkpointed.supports_gradient_checkpointing:
        pytest.skip("the architecture has no gradient checkpointing")
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        model.train()(**written.case.labelled(), use_cache=False).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    assert any(grad is not None for grad in expected.values())
    for name, parameter in checkpointed.named_parameters():
        grad = expected[name]
        assert (grad is None) == (parameter.grad is None), name
        if grad is not None:
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5)


@on_every_case
def test_a_deep_copy_is_independent(written: Written) -> None:
    case, copied = written.case, copy.deepcopy(written.model)
    before = output(case, written.model)
    assert torch.equal(output(case, copied), before)
    for site, _ in written.rewritten():
        for value in copied.get_submodule(site.path).parameters():
            value.data.mul_(3)
        for path, role in zip(site.paths, site.roles, strict=True):
            given = torch.ones(1, int(site.facts.get("embedding_dim", 0)), dtype=case.dtype)
            if role == "head":
                given = given.to(case.device)
                models = (written.model, copied)
                one, two = (model.get_submodule(path)(given) for model in models)
                assert not torch.equal(one, two), f"{path} of the copy still uses the original"
    assert torch.equal(output(case, written.model), before)


# --- the artifact


@on_every_case
def test_an_artifact_is_the_model_bit_for_bit(written: Written) -> None:
    loaded = reloaded(written)
    assert not loaded.training
    assert_same_state(loaded, written.model)
    assert torch.equal(output(written.case, loaded), output(written.case, written.model))
    if written.case.model in GENERATIVE:
        expected = tokens(written.case, written.model)
        assert torch.equal(tokens(written.case, loaded), expected)


@on_every_case
def test_a_resaved_artifact_is_the_same_artifact(written: Written, tmp_path: Path) -> None:
    again = reloaded(written)
    again.save_pretrained(tmp_path)
    one, two = (json.loads((f / "config.json").read_text()) for f in (written.folder, tmp_path))
    assert one == two
    assert one["model_type"] == "plmcc"
    first, second = (load_file(f / "model.safetensors") for f in (written.folder, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_same_state(type(again).from_pretrained(tmp_path), again)


@on_every_case
def test_bytes_of_the_modules_are_bytes_in_the_file(written: Written) -> None:
    stored = load_file(written.folder / "model.safetensors")
    for site, hard in written.rewritten():
        inside = [value for key, value in stored.items() if key.startswith(f"{site.path}.")]
        assert size.module_bytes(hard) == sum(value.nbytes for value in inside)
    paths = [site.path for site in written.sites]
    sizes = size.component_bytes(written.model, paths)
    size.check_file(written.folder, sizes)
    assert all(sizes[site.path] == size.module_bytes(hard) for site, hard in written.rewritten())


@on_every_case
def test_layouts_are_json_and_rebuild_the_module(written: Written) -> None:
    for record in written.model.config.quantization_config.records():
        again = rewrite.Record.from_json(json.loads(json.dumps(record.to_json())))
        assert again == record
        hard = written.model.get_submodule(record.paths[0])
        built = rewrite.build(record)
        if record.roles[0] == "layer":
            continue
        assert built.layout == hard.layout
        shapes = {name: value.shape for name, value in hard.state_dict().items()}
        assert {name: value.shape for name, value in built.state_dict().items()} == shapes
        assert all(value.is_meta for value in built.state_dict().values())


@on_every_case
def test_a_reloaded_model_has_the_same_ideal_size(written: Written) -> None:
    loaded = reloaded(written)
    for site, hard in written.hard():
        again = loaded.get_submodule(site.path)
        assert isinstance(again, Hard)
        bits = hard.ideal_bits()
        assert again.ideal_bits() == bits
        assert bits is None or bits > 0


@on_every_case
def test_the_model_without_its_head_loads_too(written: Written) -> None:
    if written.case.model == "whisper":
        pytest.skip("the bare model is tried with text inputs")
    case, base = written.case, reloaded(written, AutoModel)
    with torch.no_grad():
        states = base(**case.inputs()).last_hidden_state
        whole = written.model(**case.inputs(), output_hidden_states=True)
        again = reloaded(written)(**case.inputs(), output_hidden_states=True)
    key = "decoder_hidden_states" if "decoder_hidden_states" in whole else "hidden_states"
    assert torch.equal(again[key][-1], whole[key][-1])
    assert torch.equal(states, whole[key][-1])


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
@on_a_few
def test_a_reloaded_model_trains_under_trainer(written: Written, tmp_path: Path) -> None:
    case, model = replace(written.case), reloaded(written)
    batch = case.labelled()
    rows = [
        {name: value[row] for name, value in batch.items()} for row in range(len(batch["labels"]))
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=8, per_device_train_batch_size=3,
        learning_rate=5e-3, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True, use_cpu=case.device == "cpu", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows).with_format("torch")
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for site, hard in written.rewritten():
        now = dict(model.get_submodule(site.path).named_parameters())
        for name, parameter in hard.named_parameters():
            assert not torch.equal(parameter, now[name].cpu()), f"{name} did not move"
    trainer.save_model(str(tmp_path / "saved"))
    again = type(model).from_pretrained(tmp_path / "saved")
    assert_same_state(again, model)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PASSES)
def test_hard_modules_compile_to_one_graph(name: str, device: str, backend: str) -> None:
    case = fitting(name, device)
    model, sites = hardened(case)
    check_compiled(case, model, sites[0], backend)


def check_compiled(case: Case, model: PreTrainedModel, site: Site, backend: str) -> None:
    hard = model.get_submodule(site.path)
    if isinstance(hard, torch.nn.ModuleList):  # a stack is called layer by layer
        hard = hard[0]
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = hard.register_forward_pre_hook(
        lambda _, args, options: seen.append((args, options)), with_kwargs=True
    )
    with torch.no_grad():
        # A cache would grow with every call that is compared.
        model(**case.inputs(), **({"use_cache": False} if case.model in GENERATIVE else {}))
    hook.remove()
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [(hard.forward, *seen[0])]
    if "head" in site.roles:
        hidden = torch.randn(2, 3, int(site.facts["embedding_dim"]), device=case.device)
        calls.append((hard.attend, (hidden,), {}))
    torch.compiler.reset()
    with torch.no_grad():
        for function, arguments, options in calls:
            compiled: Any = torch.compile(function, fullgraph=True, backend=backend)
            expected = function(*arguments, **options)
            made: Any = compiled(*arguments, **options)
            torch.testing.assert_close(made, expected)


# --- fresh processes

_WITHOUT = """
import json, sys
import transformers
found = {}
for folder, kind in json.loads(sys.argv[1]):
    for name in ("AutoModel", kind):
        try:
            getattr(transformers, name).from_pretrained(folder)
            found[f"{folder} {name}"] = ""
        except Exception as problem:
            found[f"{folder} {name}"] = f"{type(problem).__name__}: {problem}" or "?"
assert "plmcc" not in sys.modules
print(json.dumps(found))
"""


@pytest.mark.parametrize("name", PASSES)
def test_without_plmcc_nothing_loads(
    name: str, keep: Callable[[Case], Written], tmp_path: Path
) -> None:
    cases = [keep(Case(name, model)) for model in NAMES if not refusal(name, model)]
    # A shorter stack has all of its own weights: a concrete class loads it as it is, rightly.
    cases = [made for made in cases if any(site.kind != "stack" for site in made.sites)]
    tiny("bert").save_pretrained(tmp_path)
    asked = [(str(tmp_path), "BertForMaskedLM")]
    asked += [(str(made.folder), type(made.model).__name__) for made in cases]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, json.dumps(asked)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    plain = {key: reason for key, reason in found.items() if key.startswith(str(tmp_path))}
    assert set(plain.values()) == {""}, "the check itself is broken: a plain model does not load"
    loaded = [key for key, reason in found.items() if key not in plain and not reason]
    assert loaded == [], "these load without plmcc, with random weights"
    assert len(found) == 2 * len(asked)


@pytest.mark.parametrize("name", PASSES)
def test_a_fresh_process_repeats_the_outputs(name: str, keep: Callable[[Case], Written]) -> None:
    made = keep(fitting(name))
    verify.record(made.model, made.folder)
    assert verify.in_fresh_process(made.folder) <= 1e-6


@pytest.mark.parametrize("written", [Case(name, "bert") for name in PASSES], ids=str, indirect=True)
def test_a_base_model_gets_a_new_head(written: Written, tmp_path: Path) -> None:
    base = reloaded(written, AutoModel)
    base.save_pretrained(tmp_path)
    torch.manual_seed(0)
    classifier = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, attn_implementation="eager"
    )
    given = written.case.inputs()
    with torch.no_grad():
        assert classifier(**given).logits.shape == (3, 3)
        states = classifier.bert(**given).last_hidden_state
        assert torch.equal(states, base(**given).last_hidden_state)
