"""From a recipe and a model to a verified artifact, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel, set_seed

from plmcc.api import Pass
from plmcc.catalog import registry as catalog
from plmcc.diagnostics import did_you_mean, error
from plmcc.models.new import new_source
from plmcc.models.source import Source, load_source
from plmcc.pipeline import cache
from plmcc.pipeline.datasets import infer_label_space
from plmcc.pipeline.output import write
from plmcc.pipeline.run import run
from plmcc.pipeline.verifier import Dump
from plmcc.recipe.load import Calibrate, Recipe, Scratch, Train
from plmcc.report.result import Log, Result
from plmcc.report.words import megabytes
from plmcc.utils import distributed
from plmcc.utils.files import check_outside
from plmcc.utils.outputs import claim, free


@dataclass(frozen=True)
class Pipeline:
    """Passes composed in Python: `Pipeline([CompositionalCodes(codebooks=32)])(model)` rewrites in
    place.

    With `train`, the model is fine-tuned between rewriting and hardening; `calibrate` is what
    passes measure it on. Both need a `source` with a tokenizer unless the data is synthetic.
    """

    passes: Sequence[Pass]
    train: Train | None = None
    calibrate: Calibrate | None = None
    seed: int = 0

    def __call__(self, model: PreTrainedModel | Source) -> PreTrainedModel:
        """Rewrite a model and return it; `save_pretrained` then writes an artifact.

        Raises:
            PlmccError: a pass does not fit the model, or training fails.
        """
        source = model if isinstance(model, Source) else Source.of(model)
        recipe = Recipe(
            passes=list(self.passes), train=self.train, calibrate=self.calibrate, seed=self.seed
        )
        return run(recipe, source, lambda _: None).model


def apply(
    recipe: Recipe,
    model: str | Path | PreTrainedModel | Source | None = None,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    base: Path | None = None,
    dump_after: Sequence[str] = (),
    keep_code: bool = False,
    log: Log = lambda _: None,
) -> Result:
    """Apply a recipe to a model and write the artifact.

    Args:
        recipe: with passes of real classes (`load_recipe(path, load_torch=True)`).
        model: a directory, a hub id, or a model in memory, alone or in a `Source` with its
            tokenizer; by default the recipe's `model`.
        output: the artifact directory; None writes nothing.
        overwrite: replace an existing directory.
        resume: use again what an earlier run with this output has finished, as far as nothing that
            decides on it has changed.
        base: the folder that relative data paths may start at besides the current one.
        dump_after: names of passes after which the model is written as text, into `OUTPUT.dumps`.
        keep_code: copy the Python files of the model's directory into the artifact. They are not
            run.
        log: called with every line for the user.

    Raises:
        PlmccError: anything wrong with the recipe, the model, the data, the training or the result.
            The output directory then does not exist, or is as it was before.
    """
    distributed.init()  # first: it says which GPU is whose
    target = free(Path(output), overwrite) if output is not None else None
    name = model or recipe.model
    if target is not None and isinstance(name, (str, Path)):
        check_outside(target, Path(name))
    dump = _dump(recipe, dump_after, target)
    source = replace(source_of(recipe, name, base), keep_code=keep_code)
    if target is None:
        return run(recipe, source, log, base, dump=dump)
    with claim(target) if distributed.is_main_process() else nullcontext():
        return _applied(recipe, source, target, overwrite, resume, base, dump, log)


def _applied(
    recipe: Recipe,
    source: Source,
    target: Path,
    overwrite: bool,
    resume: bool,
    base: Path | None,
    dump: Dump | None,
    log: Log,
) -> Result:
    folder = cache.folder_of(target)
    if distributed.is_main_process():
        free(target, overwrite)  # again: another process may have written it before the claim
        cache.prepare(target, resume, overwrite)
    distributed.barrier()
    try:
        result = run(recipe, source, log, base, cache_dir=folder, dump=dump)
    except BaseException:
        if distributed.is_main_process():
            cache.tidy(folder)
        raise
    if distributed.is_main_process():
        log("writing and verifying")
        write(recipe, result, target, overwrite)
        cache.finish(folder, recipe)
        if folder.exists():
            log(f"finished stages are kept for `--resume` in {folder}: {_size(folder)}")
    distributed.barrier()
    return result


def _size(folder: Path) -> str:
    return megabytes(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))


def _dump(recipe: Recipe, names: Sequence[str], target: Path | None) -> Dump | None:
    """Return where dumps go.

    Raises:
        PlmccError: the recipe has no pass of a name, or no output.
    """
    known = [catalog.name_of(type(p)) for stage in recipe.steps() for p in stage.passes]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known, "name a pass of the recipe")
            raise error("PLM502", f"the recipe has no pass `{name}`", "--dump-after", hint=hint)
    if names and target is None:
        raise error("PLM502", "dumps are written beside the output, and none is given", "output")
    if not names or target is None or not distributed.is_main_process():
        return None
    return Dump(names, target.with_name(f"{target.name}.dumps"))


def source_of(
    recipe: Recipe,
    name: str | Path | PreTrainedModel | Source | Scratch | None,
    base: Path | None = None,
) -> Source:
    """Load the model that a recipe is applied to, or make a new one.

    Raises:
        PlmccError: no model is given, or it cannot be loaded.
    """
    if name is None:
        hint = "add MODEL to the command line, or `model:` to the recipe"
        raise error("PLM502", "no model is given", f"recipe {recipe.name}", hint=hint)
    if isinstance(name, PreTrainedModel):
        return Source.of(name)
    if isinstance(name, Source):
        return name
    if isinstance(name, Scratch):
        return new_source(recipe, base)
    set_seed(recipe.seed)  # a head that the checkpoint lacks is random
    return load_source(name, recipe.task, infer_label_space(recipe, base))
