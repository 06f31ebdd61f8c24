"""What every pass must satisfy, on every tiny architecture. A new pass needs no edit here.

A pass whose defaults do not fit models of width 32 with 99 tokens says so in its own test file:
`tests/passes/test_<name>.py` (or a file of `tests/passes/<name>/`) assigns a literal
`OPTIONS = {...}`, which is read from there.
"""

from __future__ import annotations

import functools
import json
import os
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
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, Trainer, TrainingArguments

from plmcc import rewrite
from plmcc.api import Pass, Site
from plmcc.artifact.stock import needs_plmcc
from plmcc.catalog import registry as catalog
from plmcc.diagnostics import PlmccError
from plmcc.ir.program import Program
from plmcc.testing import model_checks as contract
from plmcc.testing import pass_checks as pass_contract
from support.pass_options import TESTS, options_of
from support.tiny_models import NAMES, inputs, prompt, tiny

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

    def labeled(self) -> dict[str, Tensor]:
        given = self.inputs()
        source = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
        return given | {"labels": given[source]}

    def kit(self) -> pass_contract.Case:
        return pass_contract.Case(small(self.name), self.original, self.inputs(), self.labeled())

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

    def subject(self) -> contract.Subject:
        records = tuple(self.model.config.quantization_config.records())
        case = self.case
        return contract.Subject(
            self.model, case.original(), records, self.folder, case.inputs(), case.prompt()
        )

    def rewritten(self) -> Iterator[tuple[Site, nn.Module]]:
        for site in self.sites:
            yield site, self.model.get_submodule(site.path)


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


def small(name: str) -> Pass:
    """A pass with options that fit tiny models."""
    return catalog.load(name)(**options_of(name))


@functools.cache
def refusal(name: str, model: str) -> str:
    """Why a pass does not fit a model; empty where it does."""
    try:
        rewrite.match(tiny(model), [small(name)])
    except PlmccError as problem:
        return problem.diagnostics[0].render()
    return ""


def fitting(name: str, device: str = "cpu") -> Case:
    """An architecture that the pass fits, a generating one if there is any."""
    order = sorted(NAMES, key=lambda model: model not in ("gpt2", "mbart", "llama"))
    return Case(name, next(m for m in order if not refusal(name, m)), device=device)


def skip_unless_it_fits(case: Case) -> None:
    if reason := refusal(case.name, case.model):
        pytest.skip(reason)


def hardened(case: Case) -> tuple[PreTrainedModel, tuple[Site, ...]]:
    skip_unless_it_fits(case)
    model, done, _ = case.kit().hardened()
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


def reloaded(written: Written, kind: Any = None) -> PreTrainedModel:
    return contract.reloaded(written.subject(), kind)


def assert_same_state(one: nn.Module, two: nn.Module) -> None:
    contract.require_same_state(one, two)


# --- what a pass says of itself


@pytest.mark.parametrize(
    "name", [n for n in PASSES if catalog.entry(n).module == f"plmcc.passes.{n}"]
)
def test_a_shipped_pass_has_tests_of_its_own(name: str) -> None:
    assert (TESTS / f"test_{name}.py").exists() or list((TESTS / name).glob("test_*.py"))


@pytest.mark.parametrize("check", pass_contract.ALONE)
@pytest.mark.parametrize("name", PASSES)
def test_the_contract_of_a_pass(name: str, check: str) -> None:
    for chosen in (catalog.load(name)(), small(name)):
        pass_contract.ALONE[check](chosen)


@pytest.mark.parametrize("model", NAMES)
@pytest.mark.parametrize("name", PASSES)
def test_refusals_are_sentences_with_a_place(name: str, model: str) -> None:
    pass_contract.sites_are_places(Case(name, model).kit())


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_fits_some_architecture(name: str) -> None:
    assert any(not refusal(name, model) for model in NAMES)


ON_ONE = ("wrong_uses_are_errors", "layouts_are_json", "it_works_without_data")
IN_FLOAT32 = ("sites_have_all_tied_paths", "hardening_keeps_the_function")


@pytest.mark.parametrize("check", ON_ONE)
@pytest.mark.parametrize("name", PASSES)
def test_the_contract_of_a_pass_on_a_model_that_it_fits(name: str, check: str) -> None:
    pass_contract.CHECKS[check](fitting(name).kit())


@pytest.mark.parametrize(
    ("case", "check"),
    [
        (case, check)
        for case in CASES
        for check in pass_contract.CHECKS
        if check not in (*ON_ONE, "sites_are_places")
        and (case.dtype == torch.float32 or check not in IN_FLOAT32)
    ],
    ids=str,
)
def test_the_contract_of_a_pass_on_every_model(case: Case, check: str) -> None:
    skip_unless_it_fits(case)
    pass_contract.CHECKS[check](case.kit())


# --- the compressed model and its artifact


@pytest.mark.parametrize("check", [n for n in contract.CHECKS if n != "fresh_processes_agree"])
@on_every_case
def test_the_contract(check: str, written: Written) -> None:
    try:
        contract.CHECKS[check](written.subject())
    except contract.NotApplicable as reason:
        pytest.skip(str(reason))


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
@on_a_few
def test_a_reloaded_model_trains_under_trainer(written: Written, tmp_path: Path) -> None:
    case, model = replace(written.case), reloaded(written)
    batch = case.labeled()
    rows = [
        {name: value[row] for name, value in batch.items()} for row in range(len(batch["labels"]))
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=8,
        per_device_train_batch_size=3,
        learning_rate=5e-3,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=case.device == "cpu",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows).with_format("torch")
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for site, hard in written.rewritten():
        now = dict(model.get_submodule(site.path).named_parameters())
        for name, parameter in hard.named_parameters():
            if not parameter.numel():
                continue  # by which peft finds a table
            assert not torch.equal(parameter, now[name].cpu()), f"{name} did not move"
    trainer.save_model(str(tmp_path / "saved"))
    again = type(model).from_pretrained(tmp_path / "saved")
    assert_same_state(again, model)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PASSES)
def test_hard_modules_compile_to_one_graph(
    name: str, device: str, backend: str, keep: Callable[[Case], Written]
) -> None:
    case = fitting(name, device)
    written = keep(case)
    contract.modules_compile(written.subject(), backend)


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
    # A shorter stack, or narrower layers of which the configuration says the width, have all of
    # their own weights: a concrete class loads them as they are, rightly.
    cases = [
        made
        for made in cases
        if any(site.kind != "stack" for site in made.sites) or Program(made.model).sharing()
    ]
    cases = [made for made in cases if needs_plmcc(made.model)]
    tiny("bert").save_pretrained(tmp_path)
    asked = [(str(tmp_path), "BertForMaskedLM")]
    asked += [(str(made.folder), type(made.model).__name__) for made in cases]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, json.dumps(asked)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    plain = {key: reason for key, reason in found.items() if key.startswith(str(tmp_path))}
    assert set(plain.values()) == {""}, "the check itself is broken: a plain model does not load"
    loaded = [key for key, reason in found.items() if key not in plain and not reason]
    assert loaded == [], "these load without plmcc, with random weights"
    assert len(found) == 2 * len(asked)


@pytest.mark.parametrize("name", PASSES)
def test_a_fresh_process_repeats_the_outputs(name: str, keep: Callable[[Case], Written]) -> None:
    contract.fresh_processes_agree(keep(fitting(name)).subject())


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
