"""`plmcc bench` and `plmcc evaluate`: how fast models are, and how good."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from plmcc.cli.options import Artifact, Format, Output, print_json
from plmcc.cli.recipes import check_model
from plmcc.diagnostics import Diagnostic, PlmccError, did_you_mean, error

if TYPE_CHECKING:
    from rich.table import Table

    from plmcc.evaluation.benchmark import Benchmark, Footprint
    from plmcc.recipe.load import Evaluate

_MODES = ["eager", "compiled"]
_BATCHES, _LENGTHS = [1, 32], [32, 128]
_Baseline = Annotated[
    str, typer.Option("--baseline", metavar="MODEL", help="The model to compare with.")
]
_Batch = Annotated[list[int], typer.Option("--batch", min=1, help="Batch size; repeatable.")]
_Length = Annotated[
    list[int], typer.Option("--length", min=1, help="Sequence length in tokens; repeatable.")
]
_Mode = Annotated[list[str], typer.Option("--mode", help="eager or compiled; repeatable.")]
_Seconds = Annotated[float, typer.Option(min=0.1, help="Duration of each measurement.")]
_Threads = Annotated[
    int | None, typer.Option(min=1, help="Number of CPU threads; by default what torch chooses.")
]


def bench(
    artifact: Artifact,
    baseline: _Baseline,
    batch: _Batch = _BATCHES,
    length: _Length = _LENGTHS,
    mode: _Mode = _MODES,
    seconds: _Seconds = 4.0,
    threads: _Threads = None,
    output: Output = Format.text,
) -> None:
    """Measure latency and memory of a compressed model and a baseline, in one process."""
    for name in mode:
        if name not in _MODES:
            hint, allowed = did_you_mean(name, _MODES), ", ".join(_MODES)
            raise error("PLM502", "unknown mode", "--mode", got=name, allowed=allowed, hint=hint)
    if not artifact.is_dir():
        raise error("PLM401", "the directory does not exist", str(artifact))

    import torch

    from plmcc.evaluation import benchmark as engine
    from plmcc.utils.terminal import calm

    calm()
    if threads:
        torch.set_num_threads(threads)
    found = engine.bench(
        artifact, baseline, batch, length, mode, seconds, lambda line: typer.echo(line, err=True)
    )
    verdict = engine.verdict(found)
    if output is Format.json:
        print_json(found.to_json() | {"verdict": verdict})
    else:
        _print(found, verdict)


def _print(found: Benchmark, verdict: str) -> None:
    from rich.table import Table

    from plmcc.utils.terminal import console

    table = Table("", "batch", "tokens", "baseline", "compressed", "rows/s", "time", "spread")
    for row in found.rows:
        times = [f"{1000 * value:.2f} ms" for value in (row.original, row.compressed)]
        rate = f"{row.batch / row.compressed:,.0f}"
        sizes = str(row.batch), str(row.length)
        table.add_row(row.mode, *sizes, *times, rate, f"x{row.ratio:.3f}", f"{row.spread:.3f}")
    console().print(table)
    if found.decoding:
        console().print(_generation(found))
    typer.echo(f"baseline:   {_memory(found.baseline_footprint)}")
    typer.echo(f"compressed: {_memory(found.footprint)}")
    if any(row.mode == "compiled" for row in found.rows):
        typer.echo(f"compiled: {found.graph_breaks} graph breaks, {found.recompiles} recompiles")
    typer.echo(f"{found.device}, {found.threads} threads. {verdict}")


def _generation(found: Benchmark) -> Table:
    from rich.table import Table

    columns = ("generating", "batch", "prompt", "first token", "time", "tokens/s", "per token")
    table = Table(*columns)
    for row in found.decoding:
        first = " to ".join(f"{1000 * value:.1f}" for value in row.prefill)
        rates = " to ".join(f"{value:,.0f}" for value in row.tokens_per_second)
        ratios = f"x{row.prefill_ratio:.3f}", f"x{row.decode_ratio:.3f}"
        sizes = str(row.batch), str(row.length)
        table.add_row(row.mode, *sizes, f"{first} ms", ratios[0], rates, ratios[1])
    return table


def _memory(footprint: Footprint) -> str:
    peak = footprint.peak_bytes / 1e6
    return f"loads in {footprint.load_seconds:.2f} s, peak memory {peak:,.0f} MB"


_Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL [RESULT]",
        help="A model, or an original and its compressed result: directories or hub ids.",
    ),
]
_Data = Annotated[list[str] | None, typer.Option("--data", help="Labeled data; repeatable.")]
_Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        help="A metric; repeatable. By default that of the task. mteb:TASK and lm_eval:TASK are "
        "those of these libraries, and need no --data.",
    ),
]
_Tasks = Annotated[
    str | None,
    typer.Option("--tasks", metavar="DIR", help="Definitions of further tasks of lm_eval."),
]
_Texts = Annotated[
    list[str] | None,
    typer.Option("--text", help="The column that holds the text; twice for pairs."),
]
_Labels = Annotated[
    list[str] | None,
    typer.Option("--label", help="The column that holds the label; of several labels, repeatable."),
]
_Target = Annotated[
    str | None, typer.Option(help="Translations of the data, if they are a file of their own.")
]
_Task = Annotated[str, typer.Option(help="The task; by default what the model's head is for.")]
_Limit = Annotated[int | None, typer.Option(min=1, help="Use at most this many rows.")]
_Context = Annotated[
    int | None,
    typer.Option(min=2, help="Text generation: join the texts, in windows of so many tokens."),
]
_Stride = Annotated[
    int | None,
    typer.Option(min=1, help="With --context: tokens from one window to the next."),
]
_Beams = Annotated[int, typer.Option(min=1, help="For bleu and chrf: width of the beam search.")]


def evaluate(
    models: _Models,
    data: _Data = None,
    metric: _Metrics = None,
    text: _Texts = None,
    label: _Labels = None,
    target: _Target = None,
    task: _Task = "auto",
    limit: _Limit = None,
    num_beams: _Beams = 4,
    context: _Context = None,
    stride: _Stride = None,
    tasks: _Tasks = None,
    output: Output = Format.text,
) -> None:
    """Score a model on labeled data, or an original and its result side by side."""
    _check_evaluation(models, data or [], metric or [], task, text)
    metric = metric or (["ndcg"] if task == "reranking" else [])
    given: dict[str, object] = {"text": _one_or_more(text), "label": _one_or_more(label)}
    given |= {"limit": limit, "target": target, "context": context, "stride": stride}
    asked = functools.partial(_asked, metric or [], data or [], given, num_beams, tasks)
    try:
        chosen, values = _scores(models, task, asked)
    except PlmccError as problem:
        raise PlmccError(*map(_with_options, problem.diagnostics)) from problem.__cause__
    if output is Format.json:
        rows = [
            {"metric": one.metric, "data": one.data, "values": list(row)}
            for one, row in zip(chosen, zip(*values, strict=True), strict=True)
        ]
        print_json({"models": models, "metrics": rows})
    else:
        _print_scores(models, chosen, values)


def _scores(
    models: list[str], task: str, asked: Callable[[str, Any], list[Evaluate]]
) -> tuple[list[Evaluate], list[list[float]]]:
    """The metrics, and of each model their values. Wrong data is said before torch is imported."""
    from plmcc.data.check import check_evaluation, head_of

    for name in models:
        check_model(name)
    head = head_of(task, models[0])
    if head.task:
        check_evaluation(asked(head.task, head), models[0], task)

    from plmcc.pipeline import judge
    from plmcc.utils.terminal import calm

    calm()
    log = lambda line: typer.echo(line, err=True)  # noqa: E731
    return judge.evaluate(models, lambda s: asked(s.task, s.model.config), task, log)


def _with_options(found: Diagnostic) -> Diagnostic:
    """An error that names keys of a recipe, as one that names options."""
    keys = {"`text:`": "`--text`", "`label:`": "`--label`", "`target:`": "`--target`"}
    keys |= {"`label: COLUMN`": "`--label COLUMN`", "`task: auto`": "`--task auto`"}
    texts = [found.hint, found.allowed]
    for key, option in keys.items():
        texts = [text.replace(key, option) for text in texts]
    return replace(found, hint=texts[0], allowed=texts[1])


def _asked(
    metrics: list[str],
    data: list[str],
    given: dict[str, object],
    num_beams: int,
    tasks: str | None,
    task: str,
    config: Any,
) -> list[Evaluate]:
    """The metrics on each file; by default the usual one of the task and of what the head of a
    config predicts."""
    from pydantic import ValidationError

    from plmcc.data.classification import default_metric
    from plmcc.recipe.load import Evaluate
    from plmcc.recipe.metrics import library_of

    usual = default_metric(task, config)
    columns = {name: value for name, value in given.items() if value is not None}
    found = []
    for name in metrics or [usual]:
        beams = {"num_beams": num_beams} if name in ("bleu", "chrf") else {}
        values = {"metric": name, **columns, **beams}
        if library_of(name):
            values = {"metric": name} | {n: v for n, v in columns.items() if n == "limit"}
            values |= {"tasks": tasks} if tasks else {}
        for file in [""] if library_of(name) else data:
            try:
                found.append(Evaluate.model_validate(values | ({"data": file} if file else {})))
            except ValidationError as problem:
                first = problem.errors()[0]
                at, got = first["loc"] or first.get("ctx", {}).get("at", ()), repr(first["input"])
                place = f"--{at[0]}" if at else "--metric"
                got = "" if not first["loc"] else got
                raise error("PLM502", first["msg"], place, got=got) from None
    return found


def _one_or_more(given: list[str] | None) -> str | list[str] | None:
    return given[0] if given is not None and len(given) == 1 else given or None


def _check_evaluation(
    models: list[str], data: list[str], metrics: list[str], task: str, texts: list[str] | None
) -> None:
    """Refuse what can be known before anything is imported."""
    from plmcc.recipe.metrics import METRICS_OF_TASKS, RELATIVE, Metric, check_name, library_of
    from plmcc.utils.files import matching_files

    if len(texts or ()) > 2:
        raise error("PLM502", "a row has one or two texts", "--text", got=" ".join(texts or ()))
    if len(models) > 2:
        message, hint = "more than two models were given", "`plmcc compare` tries several recipes"
        raise error("PLM502", message, "MODEL", got=" ".join(models), hint=hint)
    tasks = [*METRICS_OF_TASKS, "auto"]
    if task not in tasks:
        allowed, near = ", ".join(tasks), did_you_mean(task, tasks)
        raise error("PLM502", "unknown task", "--task", got=task, allowed=allowed, hint=near)
    known = METRICS_OF_TASKS.get(task, get_args(Metric))
    for name in metrics:
        of_task = "" if task == "auto" else f"{name} is not a metric of {task}"
        check_name(name, "--metric", known, of_task)
        if name in RELATIVE and len(models) == 1:
            message = f"`{name}` compares two models, and one was given"
            hint = "name the original first, then its result"
            raise error("PLM502", message, "--metric", got=name, hint=hint)
    if not data and not (metrics and all(map(library_of, metrics))):
        raise error("PLM502", "there is no data", "--data", hint="add --data FILE")
    for file in data:
        if not file.startswith("hub:"):
            matching_files(file, None)


def _print_scores(models: list[str], asked: list[Evaluate], values: list[list[float]]) -> None:
    from rich.table import Table

    from plmcc.recipe.metrics import lower_is_better
    from plmcc.report.words import dataset_names, number, signed
    from plmcc.utils.terminal import console

    names = [Path(name).name or name for name in models]
    heads = names if len(set(names)) == len(names) else models
    table = Table("metric", "data", *heads, *(["change"] if len(models) == 2 else []))
    files = dataset_names([{"metric": one.metric, "data": one.data} for one in asked])
    for index, (one, file) in enumerate(zip(asked, files, strict=True)):
        row = [column[index] for column in values]
        change = [signed(row[1] - row[0])] if len(row) == 2 else []
        table.add_row(one.metric, file, *map(number, row), *change)
    console().print(table)
    for name in sorted({one.metric for one in asked if lower_is_better(one.metric)}):
        typer.echo(f"{name}: lower is better")
