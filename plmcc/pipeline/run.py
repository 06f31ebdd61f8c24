"""From a loaded model to the compressed one in memory, in phases that return what they found:
check, prepare, data, match, stages, judge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, set_seed

from plmcc import rewrite
from plmcc.artifact import format as artifact
from plmcc.artifact.size import Inventory, component_bytes
from plmcc.artifact.stock import needs_plmcc
from plmcc.artifact.verify import caches_exactly, check_cache
from plmcc.catalog import registry as catalog
from plmcc.data.tasks import LANGUAGE
from plmcc.ir.probes import probe_inputs
from plmcc.models.reduced import Reducible
from plmcc.models.source import Source
from plmcc.pipeline.cache import StageCache, stage_keys
from plmcc.pipeline.datasets import StageData, load_data
from plmcc.pipeline.expected import Expected, check_made, expected_sites
from plmcc.pipeline.judge import Judge, missed_speeds
from plmcc.pipeline.prepare import CHECKS, narrow, prepare, retokenizes, widen
from plmcc.pipeline.stage import match_stage, run_stage, timed
from plmcc.pipeline.trial import try_out
from plmcc.pipeline.untrained import bits_note, loss_before, loss_note
from plmcc.pipeline.verifier import Dump
from plmcc.recipe.load import Recipe
from plmcc.recipe.metrics import RELATIVE
from plmcc.recipe.needs import check_calibrated
from plmcc.report.provenance import FilesRead, model_digest
from plmcc.report.result import Log, Result
from plmcc.utils import distributed

_LISTED = 4  # sites of a pass that are logged one by one


def run(
    recipe: Recipe,
    source: Source,
    log: Log,
    base: Path | None = None,
    *,
    schedule_steps: int | None = None,
    cache_dir: Path | None = None,
    dry: bool = False,
    dump: Dump | None = None,
) -> Result:
    """Rewrite, train and harden a loaded model in place, and evaluate it.

    Args:
        recipe: with passes of real classes.
        source: the model; it is changed.
        log: called with every line for the user.
        base: the folder that relative data paths may start at besides the current one.
        schedule_steps: how many steps the objectives assume, where a stage has fewer: a dry run
            then has the schedules of the whole training.
        cache_dir: where finished stages are written, and those of an earlier run are read.
        dry: measure neither the original nor latency.
        dump: after which passes the model is written as text, and where.

    Raises:
        PlmccError: the recipe does not fit the model or the data, or training fails.
    """
    set_seed(recipe.seed)
    read = FilesRead.of(recipe, base) if cache_dir is not None else FilesRead()
    sizes = Inventory.of(source.model.eval())
    source = widen(recipe, source)
    for check in CHECKS:
        check(recipe, source)
    judge = Judge.of(recipe, source, base)
    # Random weights, or a random head, have no baseline.
    compares = bool(judge.rows) and not (source.scratch or source.new_head or dry)
    # The original has to be measured with its own tokenizer.
    early = compares and retokenizes(recipe)
    baseline = _evaluated(judge, source, source, log, "the original") if early else []
    reference = _reference(recipe, source) if retokenizes(recipe) else None
    prepared = prepare(recipe, source, base, log)
    data = load_data(recipe, prepared.source, base)
    source = data.source
    matched = match_stage(recipe, source.model, 0, data.calibration)
    check_calibrated(recipe)
    has_cache = caches_exactly(source.model, probe_inputs(source.model))
    expected = expected_sites(recipe, source.model)
    try_out(recipe, Reducible.of(source.model))
    planned = [(stage, site) for (stage, _), site in expected.items()]
    source = replace(source, notes=(*source.notes, *bits_note(recipe, source, planned)))
    _announce(recipe, source, matched, has_cache, log)
    loss = loss_before(recipe, source, data)
    original = _original(recipe, source)
    data = data.with_teachers(original)
    if compares and not early:
        baseline = _evaluated(judge, source, source, log, "the original")
    result = Result(source.model, source, sites=prepared.sites, seconds=prepared.seconds, read=read)
    cache = StageCache(cache_dir, stage_keys(recipe, data)) if cache_dir is not None else None
    _run_stages(
        recipe, matched, expected, data, result, cache, has_cache, schedule_steps, log, dump
    )
    _say(result, loss_note(recipe, result.model, data, loss), log)
    narrow(source)
    _finish(recipe, result, sizes)
    if source.stored is not None:
        result.model.float()  # processors compute slowly in 16 bits; the values stay
    _judge(judge, result, baseline, original, reference, dry, log)
    narrow(source)
    read.check()
    return result


def _run_stages(
    recipe: Recipe,
    matched: rewrite.Matched,
    expected: Expected,
    data: StageData,
    result: Result,
    cache: StageCache | None,
    has_cache: bool,
    schedule_steps: int | None,
    log: Log,
    dump: Dump | None,
) -> None:
    """Run the stages that the cache does not have; `matched` is of the first."""
    model, done = result.model, cache.restore(result) if cache is not None else 0
    for index, stage in enumerate(recipe.steps()):
        if index < done:
            log(f"stage {stage.name}: finished in an earlier run")
            continue
        set_seed(recipe.seed)  # a stage depends on nothing but what the one before it has left
        if index > 0:
            matched = match_stage(recipe, model, index, data.calibration)
        digest = _last_digest(result) if cache is not None else ""
        folder = cache.training(index) if cache is not None else None
        training = data.training.get(stage.name)
        run_stage(stage, matched, training, result, log, schedule_steps, folder, dump)
        check_made(expected, stage.name, model, [site.path for _, site in matched.sites])
        if has_cache:
            check_cache(model, probe_inputs(model))
        if cache is None:
            continue
        names = [catalog.name_of(type(chosen)) for chosen in stage.passes]
        digests = {"input": digest, "output": model_digest(model)}
        result.digests.append({"name": stage.name, "passes": names, **digests})
        if distributed.is_main_process():
            cache.write(index, result)
        distributed.barrier()


def _last_digest(result: Result) -> str:
    last: str = result.digests[-1]["output"] if result.digests else model_digest(result.model)
    return last


def _finish(recipe: Recipe, result: Result, sizes: Inventory) -> None:
    """Make the model an artifact, and note its sizes."""
    model = result.model
    already = artifact.method_of(model.config) == artifact.METHOD
    own = type(model.config).__module__.startswith("plmcc.")  # word vectors, static models
    if own or (result.records and (already or needs_plmcc(model))):
        artifact.adopt(model, result.records)
    rewritten = [item.paths[0] for item in result.records]
    result.bytes_before = sizes.by_component(rewritten)
    result.bytes_after = component_bytes(result.model, rewritten)


def _judge(
    judge: Judge,
    result: Result,
    baseline: list[float],
    original: PreTrainedModel | None,
    reference: Source | None,
    dry: bool,
    log: Log,
) -> None:
    if reference is None and original is not None:
        reference = replace(result.source, model=original)
    after = _evaluated(judge, result.source, reference, log, "the result")
    before: list[float | None] = [*baseline] or [None] * len(after)
    result.metrics = [
        {"metric": asked.metric, "data": asked.data, "before": b, "after": a}
        for asked, b, a in zip(judge.recipe.evaluate, before, after, strict=False)
    ]
    asks = bool(judge.recipe.lower or judge.recipe.evaluate)
    if original is not None and asks and not dry and distributed.is_main_process():
        log("measuring latency")
        work = lambda: judge.latency(original, result.model)  # noqa: E731
        result.latency = timed(work, "latency", result)
    if original is not None and not dry and distributed.is_main_process():
        _say(result, missed_speeds(judge.recipe, original, result.model), log)


def _say(result: Result, notes: list[str], log: Log) -> None:
    for note in notes:
        log(f"note: {note}")
        result.source = replace(result.source, notes=(*result.source.notes, note))


def _evaluated(
    judge: Judge, source: Source, original: Source | None, log: Log, what: str
) -> list[float]:
    if judge.rows:
        log(f"evaluating {what}")
    return judge.metrics(source, original)


def _original(recipe: Recipe, source: Source) -> PreTrainedModel | None:
    """Return a copy of the model where a teacher, a metric or a measurement needs it."""
    taught = any(stage.train and stage.train.distill for stage in recipe.steps())
    fast = any(p.speed_target() for stage in recipe.steps() for p in stage.passes)
    needed = taught or fast or bool(recipe.evaluate) or recipe.lower is not None
    return source.original() if needed and not source.scratch else None


def _reference(recipe: Recipe, source: Source) -> Source | None:
    """Return a copy of a model whose tokenizer will change, for metrics that compare with it. Of a
    language model there is none: other tokens cannot be compared one by one."""
    relative = any(asked.metric in RELATIVE for asked in recipe.evaluate)
    needed = relative and source.task not in LANGUAGE
    return replace(source, model=source.original()) if needed else None


def _announce(
    recipe: Recipe, source: Source, matched: rewrite.Matched, has_cache: bool, log: Log
) -> None:
    model: object = source.model
    log(f"recipe {recipe.name} on {source.name} ({type(model).__name__}, task {source.task})")
    for note in dict.fromkeys(source.notes):  # two stages may have the same
        log(f"  note: {note}")
    if not has_cache:  # M2M100 and FSMT number a start token that is padding in two ways
        log("  note: the original computes something else with its cache than without")
    if recipe.search is not None:
        log("  note: `search` is for `plmcc search`; the recipe's own values are used")
    for stage in recipe.steps():
        trained = f"{stage.train.data.train}" if stage.train else "no training"
        passes = ", ".join(type(p).__name__ for p in stage.passes) or "no passes"
        log(f"  stage {stage.name}: {passes}; {trained}")
    for index in range(len(matched.passes)):
        sites = [site for at, site in matched.sites if at == index]
        for site in sites[:_LISTED]:
            also = f" (tied: {', '.join(site.paths[1:])})" if len(site.paths) > 1 else ""
            log(f"  will rewrite {site.path}{also}")
        if len(sites) > _LISTED:
            log(f"  ... and {len(sites) - _LISTED} more")
    for _, miss in matched.misses:
        log(f"  leaves {miss.path}: {miss.reason}")
