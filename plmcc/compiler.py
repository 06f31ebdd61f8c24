"""From a recipe and a model to a verified artifact, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, set_seed

from plmcc import artifact, catalog, question_answering, ranks, rewrite, stages
from plmcc.api import Pass
from plmcc.bench import measure
from plmcc.data import Rows
from plmcc.diagnostics import error
from plmcc.evaluate import Evaluator
from plmcc.lessons import evaluation_rows, head_shown, lesson_of, with_teacher
from plmcc.output import free, write
from plmcc.preparing import check_lower, check_trained, prepare, prepares, widen
from plmcc.probes import probe_inputs
from plmcc.provenance import model_digest
from plmcc.recipe import Evaluate, Recipe, Scratch, Train
from plmcc.result import Result, Say
from plmcc.scratch import new_source
from plmcc.shown import Shown
from plmcc.size import Inventory, component_bytes
from plmcc.source import Source, load_source, outside
from plmcc.stage import match_stage, quantize, run_stage, timed
from plmcc.verify import check_cache, same_with_cache

_EVALUATED = 256  # tokens of a text that evaluation reads
_WINDOW = 384  # or of a window of a long context, as in the scripts of BERT


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
    try:
        result = run(recipe, source, say, base, kept=kept)
    except BaseException:
        if ranks.first():
            stages.tidy(kept)
        raise
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
    matched = match_stage(recipe, model, 0, shown)
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
    work = None if kept is None else stages.Stages(kept, stages.keys(recipe, source, lessons))
    done = 0 if work is None else work.restore(result)
    for index, stage in enumerate(recipe.steps()):
        if index < done:
            say(f"stage {stage.name}: finished in an earlier run")
            continue
        set_seed(recipe.seed)  # a stage depends on nothing but what the one before it has left
        matched = matched if index == 0 else match_stage(recipe, model, index, shown)
        folder = None if work is None else work.training(index)
        if work is not None:
            given_digest = result.digests[-1]["output"] if result.digests else model_digest(model)
        run_stage(stage, matched, lessons.get(stage.name), result, say, steps, folder)
        if cached:
            check_cache(model, probe_inputs(model))
        if work is not None:
            names = [catalog.name_of(type(p)) for p in stage.passes]
            made = {"input": given_digest, "output": model_digest(model)}
            result.digests.append({"name": stage.name, "passes": names, **made})
            if ranks.first():
                work.write(index, result)
            ranks.wait()
    if recipe.lower is not None and recipe.lower.quantize is not None:
        quantize(recipe, recipe.lower.quantize, result, say)
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
    asked_for = bool(recipe.lower or recipe.evaluate) and not brief and ranks.first()
    if original is not None and asked_for:
        say("measuring latency")
        compiled = recipe.lower is not None and "compile" in recipe.lower.to
        result.latency = timed(
            lambda: measure(original, model, compiled=compiled), "latency", result
        )
    return result


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
