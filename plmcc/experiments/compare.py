"""Recipes side by side: what each makes of a model, its size, and what else as many bytes could do
(`plmcc compare`).

Every recipe runs in memory, and is judged on labeled data. Beside it stand the baselines
(`plmcc.experiments.baselines`, and a vocabulary cut to the most frequent tokens) that take no more
bytes for the token table than it does, trained by its own `train` sections.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import set_seed

from plmcc.api import TableSite
from plmcc.artifact.size import component_bytes, module_bytes
from plmcc.catalog.registry import load as load_pass
from plmcc.data.classification import default_metric
from plmcc.data.rows import SYNTHETIC
from plmcc.data.tasks import EMBEDDING
from plmcc.diagnostics import PlmccError, error
from plmcc.evaluation.evaluator import Evaluator, check_metric
from plmcc.experiments.baselines import Baseline, baselines
from plmcc.ir.program import Program
from plmcc.kit.tables import common_layout, table_of
from plmcc.models.source import Source, is_vectors, load_source
from plmcc.pipeline.datasets import infer_label_space, source_rows, training_data_of, with_teacher
from plmcc.pipeline.run import run
from plmcc.recipe.load import Data, Evaluate, Recipe
from plmcc.recipe.metrics import lower_is_better
from plmcc.rewrite import splice
from plmcc.training.loop import train
from plmcc.utils.types import Values
from plmcc.vectors.keyed import evaluate
from plmcc.vectors.model import Compressed, WordVectors

Say = Callable[[str], None]
_LENGTH = 256
_ALIKE = 0.9
"""A baseline of one recipe stands for that of another whose bytes differ by less than a tenth."""


@dataclass(frozen=True)
class Compared:
    """One way to make a model smaller, and what came of it."""

    name: str
    kind: str
    """`original`, `recipe` or `baseline`."""
    settings: str
    table_bytes: int
    """Of the token table, with all that stands in its place."""
    model_bytes: int
    metrics: tuple[float, ...]
    """The metric on each data set, in their order."""
    trained: bool
    seconds: float
    front: bool = False
    """Whether nothing else is as small and as good: by the first data set and the table's bytes, or
    the model's where the table stays as it is."""

    def to_json(self) -> Values:
        """Return plain values."""
        return asdict(self) | {"metrics": list(self.metrics)}


@dataclass(frozen=True)
class Comparison:
    """What is compared on what. `recipes` are pairs of a name and a recipe of real passes."""

    recipes: Sequence[tuple[str, Recipe]]
    model: str
    data: Sequence[str]
    metric: str
    base: Path | None = None
    """The folder that relative paths of data may start at besides the current one."""

    def source(self, recipe: Recipe) -> Source:
        """Load the model anew."""
        return load_source(self.model, recipe.task, infer_label_space(recipe, self.base))

    def metrics(self, source: Source) -> tuple[float, ...]:
        """Judge a model by the metric, on each data set; word vectors as `plmcc vectors evaluate`
        does."""
        if isinstance(source.model, WordVectors):
            words = source.need_tokenizer("a comparison").get_vocab()
            names = sorted(words, key=words.__getitem__)
            vectors = Compressed(Path(source.name), source.model, names).vectors()
            return tuple(round(evaluate(vectors, file).score, 4) for file in self.data)
        check_metric(self.metric, source.task, "--metric", source.model.config)
        length, tokenizer = source.max_length(_LENGTH), source.need_tokenizer("a comparison")
        evaluator = Evaluator(source.model, tokenizer, source.pooling, None, length)
        columns = {"metric": self.metric, "data": "-", **columns_of(self.recipes)}
        asked = Evaluate.model_validate(columns)
        rows = [source_rows(source, asked, data, self.base) for data in self.data]
        vectors_of = source.task in EMBEDDING and self.metric in ("spearman", "pearson")
        for table in rows:
            if vectors_of and len(table.text) != 2:
                message = f"{self.metric} needs rows of two texts and a number"
                given, allowed = ", ".join(table.table.column_names), "label, text_a, text_b"
                hint = "use text pairs; for word similarities, MODEL must be a file of word vectors"
                raise error(
                    "PLM301",
                    message,
                    table.source,
                    got=f"the columns {given}",
                    allowed=allowed,
                    hint=hint,
                )
        return tuple(round(evaluator.compute(self.metric, table), 4) for table in rows)


def comparison(
    recipes: Sequence[tuple[str, Recipe]],
    model: str,
    data: Sequence[str],
    metric: str | None = None,
    base: Path | None = None,
) -> Comparison:
    """Return a comparison by the metric that goes with the recipes' task, if none is given.

    Raises:
        PlmccError: the model cannot be loaded, or word vectors are to have a metric.
    """
    if is_vectors(Path(model)):  # there is nothing to train them on
        if metric is not None:
            message = "word vectors are evaluated as by `plmcc vectors evaluate`, without --metric"
            raise error("PLM502", message, "--metric", got=metric, hint="remove the option")
        recipes = [(name, _untrained(recipe)) for name, recipe in recipes]
        return Comparison(recipes, model, data, "score", base)
    if metric is None:
        known = load_source(model, recipes[0][1].task, meta=True)
        metric = default_metric(known.task, known.model.config)
    return Comparison(recipes, model, data, metric, base)


def columns_of(recipes: Sequence[tuple[str, Recipe]]) -> Values:
    """Return the columns of text and label that the first recipe which names some evaluates on, or
    trains on."""
    sections: list[Evaluate | Data] = [one for _, recipe in recipes for one in recipe.evaluate]
    steps = [stage for _, recipe in recipes for stage in recipe.steps()]
    sections += [stage.train.data for stage in steps if stage.train]
    for section in sections:
        named = {"text": section.text, "label": section.label}
        if any(named.values()):
            return {name: value for name, value in named.items() if value is not None}
    return {}


def _untrained(recipe: Recipe) -> Recipe:
    stages = [s.model_copy(update={"train": None}) for s in recipe.steps() if s.passes]
    update = {"stages": stages, "passes": [], "train": None, "lower": None}
    return recipe.model_copy(update=update)


def compare(
    asked: Comparison, with_baselines: bool = True, log: Say = lambda _: None
) -> list[Compared]:
    """Run everything and return the rows: the original, the recipes by size, then their baselines.

    Raises:
        PlmccError: something is wrong with a recipe, the model or the data; or a library that a
            baseline needs is not installed.
    """
    first = asked.recipes[0][1]
    log("the original")
    found = [original(asked, first)]
    made: list[tuple[Recipe, Compared]] = []
    for name, recipe in asked.recipes:
        log(f"recipe {name}")
        made.append((recipe, recipe_row(asked, name, recipe)))
    made.sort(key=lambda pair: pair[1].table_bytes)
    found += [row for _, row in made]
    if with_baselines:
        known: list[tuple[str, Compared]] = []
        for recipe, row in made:
            if row.table_bytes < found[0].table_bytes:
                known += baseline_rows(asked, recipe, row.table_bytes, known, log)
        found += [row for _, row in known]
    return fronted(found, lower_is_better(asked.metric))


def fronted(rows: Sequence[Compared], lower: bool) -> list[Compared]:
    """Mark the rows that no other row beats in size and quality (the Pareto front)."""
    sign = 1 if lower else -1
    locations = [(row.table_bytes, row.model_bytes, sign * row.metrics[0]) for row in rows]
    return [replace(row, front=best) for row, best in zip(rows, unbeaten(locations), strict=True)]


def unbeaten(locations: Sequence[Sequence[float]]) -> list[bool]:
    """Say of each place whether no other is as low in everything and lower in something (the Pareto
    front)."""

    def beats(one: Sequence[float], two: Sequence[float]) -> bool:
        return one != two and all(a <= b for a, b in zip(one, two, strict=True))

    return [not any(beats(other, location) for other in locations) for location in locations]


def original(asked: Comparison, recipe: Recipe) -> Compared:
    """Judge the model as it is."""
    start = time.perf_counter()
    source = asked.source(recipe)
    return _row(asked, source, "original", "original", "", False, start)


def recipe_row(asked: Comparison, name: str, recipe: Recipe) -> Compared:
    """Apply a recipe in memory, without its `evaluate` and `lower.to`, and judge the result."""
    start = time.perf_counter()
    source = asked.source(recipe)
    lower = recipe.lower
    quantized = lower is not None and lower.quantize is not None
    kept = lower.model_copy(update={"to": []}) if lower is not None and quantized else None
    bare = recipe.model_copy(update={"evaluate": [], "lower": kept})
    source = run(bare, source, lambda _: None, asked.base, dry=True).source
    passes = ", ".join(_shown(p) for stage in recipe.steps() for p in stage.passes)
    return _row(asked, source, name, "recipe", passes, _taught(recipe), start)


def baseline_rows(
    asked: Comparison,
    recipe: Recipe,
    limit: int,
    known: Sequence[tuple[str, Compared]] = (),
    log: Say = lambda _: None,
) -> list[tuple[str, Compared]]:
    """Return the baselines of at most `limit` bytes for the table, trained as the recipe says,
    with a key of that training; those like one in `known` are left out."""
    training = str([stage.train and stage.train.model_dump() for stage in recipe.steps()])
    done = [row for key, row in known if key == training]
    source = asked.source(recipe)
    site = token_table(source)
    rows, dims = site.num_embeddings, site.embedding_dim
    found = []
    for baseline in baselines(rows, dims, limit):
        alike = [r for r in done if r.name == baseline.name]
        if not any(_ALIKE * baseline.size <= r.table_bytes <= baseline.size for r in alike):
            log(f"baseline {baseline.name}, {baseline.settings}")
            found.append((training, baseline_row(asked, recipe, baseline)))
    alike = [r for r in done if r.name == PRUNED]
    if not any(_ALIKE * limit <= r.table_bytes <= limit for r in alike):
        log(f"baseline {PRUNED}")
        width = site.module.weight.element_size() * dims  # type: ignore[operator]
        row = pruned_row(asked, recipe, limit // width)
        new = row is not None and row.settings not in [r.settings for r in alike]
        if row is not None and new and row.table_bytes <= limit:
            found.append((training, row))
    return found


def token_table(source: Source) -> TableSite:
    """Return the table that reads the input ids.

    Raises:
        PlmccError: the model has none that could be replaced.
    """
    for site in Program(source.model).tables():
        if isinstance(site, TableSite) and site.is_input:
            return site
    raise error("PLM203", "the model has no token table to compare", source.name)


def baseline_row(asked: Comparison, recipe: Recipe, baseline: Baseline) -> Compared:
    """Put a baseline's table in, train as the recipe says, and judge the result."""
    start = time.perf_counter()
    source = asked.source(recipe)
    site = token_table(source)
    table = baseline.make(table_of(site), common_layout(site))
    program = Program(source.model)
    _trained(asked, recipe, source, lambda: splice(program, site.paths, site.roles, table))
    row = _row(asked, source, baseline.name, "baseline", baseline.settings, _taught(recipe), start)
    whole = row.model_bytes - row.table_bytes + baseline.size
    return replace(row, table_bytes=baseline.size, model_bytes=whole)


PRUNED = "vocabulary pruning"


def pruned_row(asked: Comparison, recipe: Recipe, keep: int) -> Compared | None:
    """Keep the most frequent tokens of the recipe's training texts; None if it has none, or
    nothing can go."""
    start = time.perf_counter()
    source = asked.source(recipe)
    texts = list(_texts(asked, recipe, source))
    if not texts or keep < 1:
        return None
    with tempfile.TemporaryDirectory(prefix="plmcc-compare-") as folder:
        file = Path(folder) / "texts.txt"
        file.write_text("\n".join(texts), encoding="utf-8")
        try:
            pruning: Any = load_pass("prune_vocabulary")
            done = pruning(text=str(file), keep=keep).prepare(source, None)
        except PlmccError as problem:
            if problem.diagnostics[0].code == "PLM203":
                return None
            raise
    source = replace(source, tokenizer=done.tokenizer, retokenized=True)
    _trained(asked, recipe, source, lambda: None)
    count = source.model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    return _row(asked, source, PRUNED, "baseline", f"{count} tokens", _taught(recipe), start)


def _texts(asked: Comparison, recipe: Recipe, source: Source) -> Iterator[str]:
    for stage in recipe.steps():
        data = stage.train.data if stage.train else None
        if data is None or data.train == SYNTHETIC:
            continue
        rows = source_rows(source, data, data.train, asked.base, data.target)
        for column in range(len(rows.text)):
            yield from (" ".join(text.split()) for text in rows.texts(column))


def _trained(asked: Comparison, recipe: Recipe, source: Source, change: Callable[[], None]) -> None:
    """Change a model, and train it by the `train` sections of a recipe."""
    set_seed(recipe.seed)
    source.model.eval()
    teacher = source.original()
    change()
    for stage in recipe.steps():
        if stage.train is not None:
            settings = stage.train.model_copy(update={"trainable": "all"})
            training_data, _ = training_data_of(stage, recipe, source, asked.base)
            train(
                source.model, settings, with_teacher(training_data, settings, teacher, source), []
            )


def _taught(recipe: Recipe) -> bool:
    return any(stage.train for stage in recipe.steps())


def _shown(chosen: Any) -> str:
    given = chosen.model_dump(exclude_unset=True, exclude={"targets", "expect", "text"})
    numbers = [f"{key} {value}" for key, value in given.items() if "rate" not in key]
    return " ".join([type(chosen).__name__, *numbers])


def _row(
    asked: Comparison,
    source: Source,
    name: str,
    kind: str,
    settings: str,
    trained: bool,
    start: float,
) -> Compared:
    table: Any = source.model.get_input_embeddings()
    sizes = module_bytes(table), sum(component_bytes(source.model).values())
    metrics = asked.metrics(source)
    seconds = round(time.perf_counter() - start, 1)
    return Compared(name, kind, settings, *sizes, metrics, trained, seconds)
