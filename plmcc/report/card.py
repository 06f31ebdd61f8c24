"""The model card: README.md of an artifact, with metadata for the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from plmcc.artifact.format import METHOD, method_of
from plmcc.data.tasks import auto_class
from plmcc.models.source import Source
from plmcc.recipe.load import Recipe
from plmcc.report.summary import Summary
from plmcc.report.words import megabytes, model_name, number, times

if TYPE_CHECKING:
    from plmcc.report.result import Result

_INTEGERS = (torch.uint8, torch.int8)


def model_card(recipe: Recipe, source: Source, result: Result, summary: Summary) -> str:
    """Return the text of the card."""
    head = metadata(recipe, source, result, summary).to_yaml(line_break="\n")
    return f"---\n{head}\n---\n" + "\n".join(_lines(recipe, source, result, summary)) + "\n"


def metadata(recipe: Recipe, source: Source, result: Result, summary: Summary) -> ModelCardData:
    """Return what the hub reads: tasks, the model it was made from, metrics."""
    base = hub_id(source)
    measured = [
        EvalResult(
            task_type=source.task,
            dataset_type=_dataset(values["data"] or one.metric),
            dataset_name=one.data or one.metric,
            metric_type=one.metric,
            metric_value=round(one.after, 4),
            metric_name=one.metric,
        )
        for one, values in zip(summary.metrics, result.metrics, strict=True)
    ]
    return ModelCardData(
        base_model=base,
        base_model_relation=_relation(result) if base else None,
        library_name="transformers",
        pipeline_tag=source.task,
        tags=["plmcc", "compression"] if result.records else ["plmcc"],
        model_name=recipe.name,
        eval_results=measured or None,
    )


def hub_id(source: Source) -> str | None:
    """Return the id of the original on the hub; None of a local directory, of a model made in
    Python and of one with new weights."""
    name = source.name
    if source.scratch or source.folder is None or Path(name).expanduser().exists():
        return None
    # A directory that was named with its path, and has gone since, is no id either.
    if Path(name).is_absolute() or source.folder == Path(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _relation(result: Result) -> str:
    """The hub's name for how a model follows from another: "quantized" where the rewritten modules
    are stored in integers for the larger part."""
    modules = dict(result.model.named_modules())
    integers, floats = 0, 0
    for path in {record.paths[0] for record in result.records} & modules.keys():
        for value in modules[path].state_dict().values():
            integers += value.nbytes if value.dtype in _INTEGERS else 0
            floats += value.nbytes if value.is_floating_point() else 0
    return "quantized" if integers > floats else "finetune"


def _dataset(data: str) -> str:
    """A dataset's id on the hub, or the name of a file in the form of one."""
    if data.startswith("hub:"):
        return data.removeprefix("hub:").partition("@")[0]
    return re.sub(r"[^\w.-]+", "-", Path(data).name).strip("-.") or "data"


def _lines(recipe: Recipe, source: Source, result: Result, summary: Summary) -> Iterator[str]:
    name = hub_id(source) or model_name(source.name)
    done = "compressed" if result.records else "trained"
    size = f"{megabytes(summary.before)} to {megabytes(summary.after)}"
    yield f"# {_escaped(recipe.name)}\n"
    yield f"{_escaped(name)}, {done} by plmcc: {size} of tensors. {_escaped(summary.verdict())}\n"
    yield "\n".join(["```python", *usage(source, "this directory"), "```", ""])
    sizes = [(part.label, part.before, part.after) for part in summary.components]
    sizes.append(("all tensors", summary.before, summary.after))
    rows = [
        (n, megabytes(before), megabytes(after), times(before, after)) for n, before, after in sizes
    ]
    yield from _table(("component", "before", "after", "change"), rows)
    metrics = [
        (one.metric, one.data, number(one.before), number(one.after), one.change)
        for one in summary.metrics
    ]
    if metrics:
        yield from _table(("metric", "dataset", "before", "after", "change"), metrics)
    yield (
        "The recipe is in `recipe.yaml`; everything measured is in `report.json`, and in "
        "`report.html` to look at."
    )


def usage(source: Source, folder: str) -> list[str]:
    """Return the lines of Python that load the result."""
    auto = auto_class(source.task, source.model.config).__name__
    needs = (
        ["import plmcc  # registers the format with transformers"] if needs_plmcc(source) else []
    )
    return [
        *needs,
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("{folder}")',
    ]


def needs_plmcc(source: Source) -> bool:
    """Return whether transformers alone cannot load the result."""
    return method_of(source.model.config) == METHOD


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(map(_escaped, row))} |"
    yield ""


def _escaped(text: str) -> str:
    """Markdown that shows the text as it is, on one line."""
    plain = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", plain)
