"""From a recipe and a model to a verified artifact, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from plmcc import artifact, catalog, question_answering, ranks, rewrite, stages
from plmcc.api import Pass
from plmcc.bench import Latency, measure
from plmcc.data import Rows
from plmcc.diagnostics import PlmccError, error
from plmcc.evaluate import Evaluator
from plmcc.export import check_export
from plmcc.lessons import evaluation_rows, head_shown, lesson_of, with_teacher
from plmcc.output import free, write
from plmcc.pictures import Pictured
from plmcc.probes import probe_inputs
from plmcc.provenance import model_digest
from plmcc.recipe import Evaluate, Recipe, Scratch, Stage, Train
from plmcc.scratch import new_source
from plmcc.shown import Shown
from plmcc.size import Inventory, component_bytes
from plmcc.source import Source, load_source, outside
from plmcc.train import Lesson, train
from plmcc.verify import check_cache, outputs, same_with_cache

Say = Callable[[str], None]
_EVALUATED = 256  # tokens of a text that evaluation reads
_WINDOW = 384  # or of a window of a long context, as in the scripts of BERT
_HARDEN_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass
class Result:
    """What `apply` did: the compressed model, and everything that was measured. Sizes are bytes,
    times seconds."""

    model: PreTrainedModel
    records: list[rewrite.Record] = field(default_factory=list)
    sites: list[dict[str, Any]] = field(default_factory=list)
    misses: list[dict[str, str]] = field(default_factory=list)
    bytes_before: dict[str, int] = field(default_factory=dict)
    bytes_after: dict[str, int] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    latency: list[Latency] = field(default_factory=list)
    pictures: list[Pictured] = field(default_factory=list)
    training: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    digests: list[dict[str, Any]] = field(default_factory=list)
    """Of each stage its name, its passes, and the digests of the model before and after it."""
    reload_difference: float = 0.0
    """Largest difference of the probe outputs after reloading, relative to their scale."""
    folder: Path | None = None
    base: Path | None = None
    """Where relative paths of data start besides the current folder."""


@dataclass(frozen=True)
class Pipeline:
    """Passes composed in Python: `Pipeline([CompositionalCodes(codebooks=32)])(model)` rewrites in
    place.

    With `train`, the model is fine-tuned between rewriting and hardening; that needs a `source`
    with a tokenizer unless the data is synthetic.
    """

    passes: Sequence[Pass]
    train: Train | None = None
    seed: int = 0

    def __call__(self, model: PreTrainedModel | Source) -> PreTrainedModel:
        """Rewrite a model and return it; `save_pretrained` then writes an artifact.

        Raises:
            PlmccError: a pass does not fit the model, or training fails.
        """
        source = model if isinstance(model, Source) else Source.of(model)
        recipe = Recipe(passes=list(self.passes), train=self.train, seed=self.seed)
        return run(recipe, source, lambda _: None).model


def apply(
    recipe: Recipe,
    model: str | Path | PreTrainedModel | Source | None = None,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    base: Path | None = None,
    say: Say = lambda _: None,
) -> Result:
    """Apply a recipe to a model and write the artifact.

    Args:
        recipe: with passes of real classes (`load_recipe(path, real=True)`).
        model: a directory, a hub id, or a model in memory, alone or in a `Source` with its
            tokenizer; by default the recipe's `model`.
        output: the artifact directory; None writes nothing.
        overwrite: replace an existing directory.
        resume: use again what an earlier run with this output has finished, as far as nothing that
            decides on it has changed.
        base: the folder that relative data paths may start at besides the current one.
        say: called with every line for the user.

    Raises:
        PlmccError: anything wrong with the recipe, the model, the data, the training or the result.
            The output directory then does not exist, or is as it was before.
    """
    ranks.join()  # first: it says which GPU is whose
    target = free(Path(output), overwrite) if output is not None else None
    name = model or recipe.model
    if target is not None and isinstance(name, (str, Path)):
        outside(target, Path(name))
    source = source_of(recipe, name, base)
    if target is None:
        return run(recipe, source, say, base)
    kept = stages.folder_of(target)
    if ranks.first():
        stages.prepare(target, resume, overwrite)
    ranks.wait()
    result = run(recipe, source, say, base, kept=kept)
    if ranks.first():
        say("writing and verifying")
        write(recipe, source, result, target)
        stages.finish(kept, recipe)
    ranks.wait()
    return result


def source_of(
    recipe: Recipe,
    name: str | Path | PreTrainedModel | Source | Scratch | None,
    base: Path | None = None,
) -> Source:
    """Load the model that a recipe is applied to, or make a new one.

    Raises:
        PlmccError: no model is named, or it cannot be loaded.
    """
    if name is None:
        cure = "add MODEL to the command line, or `model:` to the recipe"
        raise error("PLM502", "no model is named", f"recipe {recipe.name}", cure=cure)
    if isinstance(name, PreTrainedModel):
        return Source.of(name)
    if isinstance(name, Source):
        return name
    if isinstance(name, Scratch):
        return new_source(recipe, base)
    set_seed(recipe.seed)  # a head that the checkpoint lacks is random
    return load_source(name, recipe.task, head_shown(recipe, base))


def run(
    recipe: Recipe,
    source: Source,
    say: Say,
    base: Path | None = None,
    *,
    steps: int | None = None,
    kept: Path | None = None,
    brief: bool = False,
) -> Result:
    """Rewrite, train and harden a loaded model in place, and evaluate it.

    `steps` is how many steps objectives are told that a stage has, if that is not how many there
    are: their schedules then run as in the long training that this is a trial of. In the folder
    `kept` finished stages are written, and those that are there are used; without it nothing is
    written. `brief` leaves out the figures of the original, and how long both take.
    """
    set_seed(recipe.seed)
    model = source.model.eval()
    result, given = Result(model, base=base), Inventory.of(model)
    widen(recipe, source)
    check_lower(recipe, model)
    check_trained(recipe)
    rows = evaluation_rows(recipe, source, base)
    # What random weights translate means nothing.
    judged = rows and not source.scratch and not brief
    changed = any(prepares(p) for stage in recipe.steps() for p in stage.passes)
    before = figures(recipe, source, rows, None, say, "the original") if judged and changed else []
    prepare(recipe, source, base, result, say)
    taught = [stage for stage in recipe.steps() if stage.train]
    drafts = [(stage, lesson_of(stage, recipe, source, base)) for stage in taught]
    shown = {stage.name: Shown.of(lesson) for stage, lesson in drafts}
    matched = _matched(recipe, model, 0, shown)
    cached = same_with_cache(model, probe_inputs(model))
    if not cached:  # M2M100 and FSMT number a start token that is padding in two ways
        source.notes += ("the original generates other tokens with its cache than without",)
    _announce(recipe, source, matched, say)
    original = source.original() if _needs_original(recipe) and not source.scratch else None
    lessons = {
        stage.name: with_teacher(lesson, stage.train, original, source)
        for stage, lesson in drafts
        if stage.train
    }
    if judged and not changed:
        before = figures(recipe, source, rows, original, say, "the original")
    work, done = None, 0
    if kept is not None:
        work = stages.Stages(kept, stages.keys(recipe, source, lessons))
        done = work.restore(result)
    for index, stage in enumerate(recipe.steps()):
        if index < done:
            say(f"stage {stage.name}: finished in an earlier run")
            continue
        set_seed(recipe.seed)  # a stage depends on nothing but what the one before it has left
        matched = matched if index == 0 else _matched(recipe, model, index, shown)
        folder = work.training(index) if work is not None else None
        before_it = model_digest(model) if kept is not None else ""
        _stage(stage, matched, lessons.get(stage.name), result, say, steps, folder)
        if kept is not None:
            names = [catalog.name_of(type(p)) for p in stage.passes]
            made = {"input": before_it, "output": model_digest(model)}
            result.digests.append({"name": stage.name, "passes": names, **made})
        if cached:
            check_cache(model, probe_inputs(model))
        if work is not None and ranks.first():
            work.write(index, result)
        ranks.wait()
    if recipe.lower is not None and recipe.lower.quantize is not None:
        _quantize(recipe, recipe.lower.quantize, result, say)
    if result.records:  # a model without passes stays one that transformers loads alone
        artifact.adopt(model, result.records)
    rewritten = [item.paths[0] for item in result.records]
    result.bytes_before = given.by_component(rewritten)
    result.bytes_after = component_bytes(model, rewritten)
    after = figures(recipe, source, rows, original, say, "the result") if rows else []
    known: list[float | None] = [*before] or [None] * len(after)
    result.metrics = [
        {"metric": asked.metric, "data": asked.data, "before": b, "after": a}
        for asked, b, a in zip(recipe.evaluate, known, after, strict=False)
    ]
    timed = bool(recipe.lower or recipe.evaluate) and not brief and ranks.first()
    if original is not None and timed:
        say("measuring latency")
        compiled = recipe.lower is not None and "compile" in recipe.lower.to
        result.latency = _timed(
            lambda: measure(original, model, compiled=compiled), "latency", result
        )
    return result


def prepares(chosen: Pass) -> bool:
    """Say whether a pass changes tokenizer and model before data is encoded."""
    return type(chosen).prepare is not Pass.prepare


def prepare(recipe: Recipe, source: Source, base: Path | None, result: Result, say: Say) -> None:
    """Let passes that change the tokenizer do so, before any data is encoded.

    Raises:
        PlmccError: a pass does not fit, or comes too late.
    """
    places = [(n, i, p) for n, s in enumerate(recipe.steps()) for i, p in enumerate(s.passes)]
    for number, index, chosen in places:
        if prepares(chosen) and number > 0:
            message = "it changes what data is made of, which has been encoded by then"
            place, given = recipe.pass_place(number, index), recipe.steps()[number].name
            raise error("PLM303", message, place, given=given, cure="move it to the first stage")
    seen: set[type[Pass]] = set()
    for number, index, chosen in places:
        if prepares(chosen):
            name, place = catalog.name_of(type(chosen)), recipe.pass_place(number, index)
            if type(chosen) in seen:
                cure = "keep one, with all that the other has"
                raise error("PLM204", f"`{name}` stands here for the second time", place, cure=cure)
            seen.add(type(chosen))
            say(f"{name}: looking at the text")
            start = time.perf_counter()
            try:
                figures = chosen.prepare(source, base) or {}
            except PlmccError as problem:
                # What a pass says of itself stands in the recipe; files have places of their own.
                found = [d if d.place else replace(d, place=place) for d in problem.diagnostics]
                raise PlmccError(*found) from None
            result.seconds[f"{name}.prepare"] = round(time.perf_counter() - start, 3)
            record = {"pass": name, "paths": ["tokenizer"], "figures": figures, "layout": {}}
            result.sites.append(record)


def widen(recipe: Recipe, source: Source) -> None:
    """Put float16 weights that are trained into float32, whose range the gradients need."""
    if source.model.dtype is torch.float16 and any(step.train for step in recipe.steps()):
        source.model.float()
        source.notes += ("its float16 weights are trained, and saved, in float32",)


def check_lower(recipe: Recipe, model: PreTrainedModel) -> None:
    """Check that the result can be compiled, exported and rounded as asked.

    Raises:
        PlmccError: it cannot, or what that needs is not installed.
    """
    for index, to in enumerate(recipe.lower.to if recipe.lower is not None else ()):
        if to == "compile":
            continue
        try:
            check_export(model, to)
        except PlmccError as problem:
            place = recipe.place(("lower", "to", index))
            raise PlmccError(*(replace(d, place=place) for d in problem.diagnostics)) from None
    if recipe.lower is not None and recipe.lower.quantize is not None:
        own = quantization(recipe.lower.quantize).passes[0]
        for chosen in (one for stage in recipe.steps() for one in stage.passes):
            if type(chosen) is type(own) and chosen.targets == own.targets:
                message = "`quantized_linears` leaves no linear layer that is not rounded"
                raise error("PLM303", message, recipe.place(("lower", "quantize")),
                            given=recipe.lower.quantize, cure="keep one of the two")  # fmt: skip


def check_trained(recipe: Recipe) -> None:
    """Check that stages train what has to be trained.

    Raises:
        PlmccError: one does not.
    """
    for number, stage in enumerate(recipe.steps()):
        for index, chosen in enumerate(stage.passes):
            reason = chosen.needs_training() if stage.train is None else ""
            if reason:
                cure = "add a `train` section to this stage"
                place = recipe.pass_place(number, index)
                raise error("PLM303", reason, place, given="no `train`", cure=cure)


def _timed(work: Callable[[], Any], name: str, result: Result) -> Any:
    start = time.perf_counter()
    done = work()
    result.seconds[name] = round(time.perf_counter() - start, 3)
    return done


def _matched(
    recipe: Recipe, model: PreTrainedModel, stage: int, shown: dict[str, Shown]
) -> rewrite.Matched:
    step = recipe.steps()[stage]
    chosen = [(i, p) for i, p in enumerate(step.passes) if not prepares(p)]
    places = [recipe.pass_place(stage, index, "targets") for index, _ in chosen]
    # A stage that only rewrites is shown the data of the next one that trains.
    names = [later.name for later in recipe.steps()[stage:]]
    data = next((shown[name] for name in names if name in shown), Shown())
    return rewrite.match(model, [p for _, p in chosen], places, data.batches, data.counts)


def _stage(
    stage: Stage,
    matched: rewrite.Matched,
    lesson: Lesson | None,
    result: Result,
    say: Say,
    steps: int | None,
    folder: Path | None = None,
) -> None:
    """Replace, train with checkpoints in the folder, harden."""
    model = result.model
    say(f"stage {stage.name}: rewriting {len(matched.sites)} site(s)")
    for _, site in matched.sites:
        if site.warning:
            say(f"  warning: {site.path}: {site.warning}")
    inputs = probe_inputs(model)
    before = outputs(model, inputs)["output"]
    done = _timed(lambda: rewrite.replace_all(model, matched), f"{stage.name}.replace", result)
    promised = [p.tolerance for p in matched.passes if p.preserves != "lossy"]
    if len(promised) == len(matched.passes):
        after = outputs(model, inputs)["output"]
        _check_equal(before, after, sum(promised), f"stage {stage.name}: the passes")
    result.misses += [{"path": miss.path, "reason": miss.reason} for _, miss in matched.misses]
    settings = stage.train
    if settings is not None and lesson is not None:
        say(f"stage {stage.name}: training on {len(lesson.train)} rows")
        log = _timed(
            lambda: train(model, settings, lesson, done, steps, folder),
            f"{stage.name}.train",
            result,
        )
        result.training[stage.name] = log
    model.eval()
    soft = outputs(model, inputs)["output"]
    records = rewrite.harden_all(model, done)
    allowed = _HARDEN_TOLERANCE.get(model.dtype, 5e-2)
    hard = outputs(model, inputs)["output"]
    _check_equal(soft, hard, allowed, f"stage {stage.name}: hardening")
    result.records += records
    result.pictures += [
        Pictured(stage.name, d.site.path, picture) for d in done for picture in d.soft.pictures()
    ]
    result.sites += [
        {"pass": d.name, "paths": list(d.site.paths), "figures": d.soft.facts(), "layout": r.layout}
        | ({"warning": d.site.warning} if d.site.warning else {})
        for d, r in zip(done, records, strict=True)
    ]


def quantization(scheme: str) -> Stage:
    """Return the last stage of a recipe whose `lower` section has `quantize`."""
    chosen: Any = catalog.load("quantized_linears")
    return Stage(name="quantize", passes=[chosen(scheme=scheme)])


def _quantize(recipe: Recipe, scheme: str, result: Result, say: Say) -> None:
    """Round the linear layers that are left."""
    stage, place = quantization(scheme), recipe.place(("lower", "quantize"))
    matched = rewrite.match(result.model, stage.passes, [place])
    _stage(stage, matched, None, result, say, None)


def _check_equal(before: torch.Tensor, after: torch.Tensor, allowed: float, what: str) -> None:
    scale = float(before.abs().max().clamp(min=1e-6))
    difference = float((before - after).abs().max()) / scale
    if not difference <= allowed:
        message = f"{what} changed the outputs by {difference:.3g} of their scale"
        raise error("PLM402", message, allowed=f"at most {allowed:g}")


def _needs_original(recipe: Recipe) -> bool:
    taught = any(stage.train and stage.train.distill for stage in recipe.steps())
    return taught or bool(recipe.evaluate) or recipe.lower is not None


def figures(
    recipe: Recipe,
    source: Source,
    rows: list[Rows],
    original: PreTrainedModel | None,
    say: Say,
    what: str,
) -> list[float]:
    """Return the figures of a recipe for a model as it is, on the rows of each."""
    say(f"evaluating {what}")
    tokenizer = source.need_tokenizer("evaluation")
    length = source.max_length(_WINDOW if source.task == question_answering.TASK else _EVALUATED)
    asked: list[tuple[Evaluate, Rows]] = list(zip(recipe.evaluate, rows, strict=True))

    def evaluator(figure: Evaluate) -> Evaluator:
        search = (figure.num_beams, figure.max_new_tokens)
        return Evaluator(source.model, tokenizer, source.pooling, original, length, *search)

    return [evaluator(figure).compute(figure.metric, table) for figure, table in asked]


def _announce(recipe: Recipe, source: Source, matched: rewrite.Matched, say: Say) -> None:
    say(
        f"recipe {recipe.name} on {source.name} ({type(source.model).__name__}, task {source.task})"
    )
    for note in dict.fromkeys(source.notes):  # stages may say the same
        say(f"  note: {note}")
    if recipe.search is not None:
        say("  note: `search` is for `plmcc search`; the values stand as they are in the recipe")
    for stage in recipe.steps():
        trained = f"{stage.train.data.train}" if stage.train else "no training"
        passes = ", ".join(type(p).__name__ for p in stage.passes) or "no passes"
        say(f"  stage {stage.name}: {passes}; {trained}")
    for _, site in matched.sites:
        also = f" (tied: {', '.join(site.paths[1:])})" if len(site.paths) > 1 else ""
        say(f"  will rewrite {site.path}{also}")
    for _, miss in matched.misses:
        say(f"  leaves {miss.path}: {miss.reason}")
