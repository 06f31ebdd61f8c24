"""The page "Your data": every example of it is checked and applied."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from plmcc.cli.app import app
from plmcc.data.check import check_data
from plmcc.data.encoding import encode
from plmcc.evaluation.evaluator import Evaluator
from plmcc.models.source import load_source
from plmcc.pipeline.datasets import source_rows
from plmcc.recipe.load import Evaluate, load_recipe
from support.docs_examples import ROOT, blocks
from support.tiny_models import tiny
from support.tokenizers import words

PAGE = ROOT / "docs/guides/your-data.md"
MODELS = {"translation": "marian", "text-generation": "llama"}
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"


def examples() -> Iterator[tuple[str, dict[str, str]]]:
    """The name and the files of each example: its data, then its recipe."""
    files: dict[str, str] = {}
    for _, title, text in blocks(PAGE):
        if title:
            files[title] = text
        if title == "recipe.yaml":
            names = [name for name in files if name != title]
            yield "+".join(names), files
            files = {}


EXAMPLES = dict(examples())


def save_model(folder: Path, task: str) -> None:
    """A model without a head for the task, or one that generates."""
    model: Any = tiny(MODELS.get(task, "bert"))
    (model if task in MODELS else model.base_model).save_pretrained(folder)
    tokenizer = words()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_works(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for title, text in EXAMPLES[name].items():
        Path(title).write_text(text, encoding="utf-8")
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    save_model(tmp_path / "model", recipe["task"])
    rows = check_data(load_recipe(Path("recipe.yaml")), "model", None, large=True)
    assert rows > 1
    # Two steps, as on the page; on the CPU, as the tests of the Trainer.
    command = ["apply", "recipe.yaml", "model", "-o", "small", "--set"]
    done = CliRunner().invoke(app, [*command, "train.arguments.use_cpu=true"])
    assert done.exit_code == 0, (done.output, done.exception)
    report = json.loads(Path("small/report.json").read_text())
    asked = [one["metric"] for one in recipe["evaluate"]]
    assert [one["metric"] for one in report["metrics"]] == asked
    assert all(one["after"] is not None for one in report["metrics"])


def test_every_task_with_labels_has_an_example() -> None:
    recipes = [yaml.safe_load(files["recipe.yaml"]) for files in EXAMPLES.values()]
    assert {one["task"] for one in recipes} == {
        "sentence-similarity",
        "text-classification",
        "reranking",
        "token-classification",
        "question-answering",
        "translation",
        "text-generation",
    }


@pytest.mark.parametrize(
    ("content", "template", "message"),
    [
        ('{"messages": [{"role": "user"}]}\n', TEMPLATE, "line 1 is not a role and a content"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "", "has no chat template"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}\n',
            "{{ raise_exception('roles must alternate') }}",
            "roles must alternate",
        ),
    ],
)
def test_conversations_that_cannot_be_written_out(
    content: str, template: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text(content)
    Path("recipe.yaml").write_text(
        "plmcc: 1\npasses: [{drop_layers: {keep: 1, select: even}}]\n"
        "evaluate: [{metric: perplexity, data: chats.jsonl}]\n"
    )
    tiny("llama").save_pretrained("model")
    tokenizer = words()
    tokenizer.chat_template = template or None
    tokenizer.save_pretrained("model")
    done = CliRunner().invoke(app, ["apply", "recipe.yaml", "model", "-o", "small"])
    assert done.exit_code == 1
    assert message in str(done.exception)
    assert not Path("small").exists()


@pytest.mark.parametrize("begins", [True, False])
def test_a_conversation_has_the_tokens_of_its_template(
    begins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template writes the token of the beginning, or none: the tokenizer adds no other."""
    monkeypatch.chdir(tmp_path)
    tokenizer = words()
    tokenizer.bos_token = "[CLS]"
    tokenizer.chat_template = ("{{ bos_token }} " if begins else "") + TEMPLATE
    tiny("llama").save_pretrained("model")
    tokenizer.save_pretrained("model")
    messages = [{"role": "w1", "content": "w2 w3"}, {"role": "w4", "content": "w5"}]
    Path("chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    source = load_source("model")
    rows = source_rows(
        source, Evaluate(metric="perplexity", data="chats.jsonl"), "chats.jsonl", None
    )
    expected = tokenizer.apply_chat_template(messages, return_dict=False)
    assert encode(rows, source.task, tokenizer, 64)["input_ids"][0] == expected
    seen: list[Any] = []
    hook: Any = source.model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    for metric in ("perplexity", "fidelity", "kl_divergence"):
        Evaluator(source.model, tokenizer, source.pooling, source.model, 64).compute(metric, rows)
    hook.remove()
    assert all(ids == expected for ids in seen)
    assert len(seen) == 5
