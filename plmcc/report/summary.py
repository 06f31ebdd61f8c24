"""A run in a few rows: components, metrics, speed, and the verdict in one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from plmcc.recipe.metrics import lower_is_better
from plmcc.report.words import dataset_names, number, signed, times

_OWN_ROW = 3
"""Up to how many rewritten modules of one kind have rows of their own."""
_FASTER, _SLOWER = 0.97, 1.03
REST = "everything else"


class Component(NamedTuple):
    """A part of the model: a module, or all modules of one kind that the same passes rewrote."""

    name: str
    passes: str
    before: int
    """Bytes."""
    after: int
    paths: tuple[str, ...]

    @property
    def label(self) -> str:
        """The name with the passes."""
        return f"{self.name} ({self.passes})" if self.passes else self.name


class Measured(NamedTuple):
    """A metric on a dataset."""

    metric: str
    data: str
    before: float | None
    after: float

    @property
    def label(self) -> str:
        """The metric and its dataset."""
        return f"{self.metric} on {self.data}"

    @property
    def change(self) -> str:
        """The signed difference, or nothing without a `before`."""
        return "" if self.before is None else signed(self.after - self.before)

    @property
    def loss(self) -> float:
        """How much worse than before it is."""
        difference = 0.0 if self.before is None else self.before - self.after
        return -difference if lower_is_better(self.metric) else difference


class Speed(NamedTuple):
    """The time of one setting, relative to the original's."""

    mode: str
    batch: int
    length: int
    original: float
    """Seconds."""
    compressed: float
    ratio: float
    spread: float

    @property
    def setting(self) -> str:
        """Batch, tokens and mode."""
        return f"batch {self.batch} x {self.length} tokens, {self.mode}"

    @property
    def change(self) -> str:
        """The ratio with its spread."""
        return f"x {self.ratio:.2f} ± {self.spread:.2f}"

    @property
    def effect(self) -> str:
        """What the spread allows to claim: "faster", "slower" or "same"."""
        if self.ratio + self.spread < _FASTER:
            return "faster"
        return "slower" if self.ratio - self.spread > _SLOWER else "same"

    @property
    def words(self) -> str:
        """The effect with its factor."""
        if self.effect == "faster":
            return f"{1 / self.ratio:.2f} times as fast"
        return f"{self.ratio:.2f} times as slow" if self.effect == "slower" else "no speed-up"


class Summary(NamedTuple):
    """What the closing table and the card of the page show."""

    components: tuple[Component, ...]
    before: int
    """Bytes."""
    after: int
    metrics: tuple[Measured, ...]
    speed: tuple[Speed, ...]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Summary:
        """Summarize what `plmcc.report.documents.report` returns."""
        before, after = values["bytes_before"], values["bytes_after"]
        names = dataset_names(values["metrics"])
        metrics = [
            Measured(one["metric"], name, one["before"], one["after"])
            for one, name in zip(values["metrics"], names, strict=True)
        ]
        rows = tuple(Speed(**row) for row in values["latency"])
        parts = tuple(components(before, after, values["sites"]))
        return cls(parts, sum(before.values()), sum(after.values()), tuple(metrics), rows)

    def verdict(self) -> str:
        """Return size, quality and speed in one sentence."""
        size = times(self.before, self.after)
        parts = [size[0].upper() + size[1:], *self._quality(), *self._speed()]
        return "; ".join(parts) + "."

    def _quality(self) -> Iterator[str]:
        known = [one for one in self.metrics if one.before is not None]
        if not known:
            yield from (f"{one.label} {number(one.after)}" for one in self.metrics[:1])
            return
        worst = max(known, key=lambda one: one.loss)
        most = "" if len(known) == 1 else "at worst "
        yield f"{most}{worst.label} {number(worst.after)} ({worst.change})"

    def _speed(self) -> Iterator[str]:
        """Every measured setting, those of one effect together."""
        if not self.speed:
            yield "speed not measured"
        for effect in ("faster", "slower", "same"):
            rows = [row for row in self.speed if row.effect == effect]
            if effect == "same" and rows:
                where = "" if len(rows) == len(self.speed) else f" at batch {_batches(rows)}"
                yield f"no speed-up{where}"
            elif rows:
                yield ", ".join(f"{row.words} at batch {row.batch}" for row in rows)


def _batches(rows: Sequence[Speed]) -> str:
    return " and ".join(str(batch) for batch in dict.fromkeys(row.batch for row in rows))


def components(
    before: Mapping[str, int], after: Mapping[str, int], sites: Sequence[Mapping[str, Any]]
) -> Iterator[Component]:
    """Yield components, the largest first: modules of one kind that the same passes rewrote are one
    component, and so is everything that no pass rewrote and whose size is the same."""
    groups: dict[tuple[str, str], list[str]] = {}
    rest: list[str] = []
    for name in {**before, **after}:
        inside = [site for site in sites if _is_in(site["paths"][0], name)]
        own = any(site["paths"][0] == name for site in sites)
        if own:
            passes = ", ".join(dict.fromkeys(site["pass"] for site in inside))
            groups.setdefault((passes, _kind(name, inside)), []).append(name)
        elif before.get(name) == after.get(name):
            rest.append(name)
        else:
            groups[name, ""] = [name]

    def made(name: str, passes: str, paths: Sequence[str]) -> Component:
        old, new = (sum(size.get(path, 0) for path in paths) for size in (before, after))
        return Component(name, passes, old, new, tuple(paths))

    found = []
    for (passes, kind), paths in groups.items():
        passes = passes if kind else ""
        if len(paths) > _OWN_ROW:
            found.append(made(f"{len(paths)} {kind}", passes, paths))
        else:
            found += [made(path, passes, [path]) for path in paths]
    yield from sorted(found, key=lambda part: -max(part.before, part.after))
    if rest:
        yield made(REST if len(rest) > 1 or found else rest[0], "", rest)


def _is_in(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _kind(path: str, sites: Sequence[Mapping[str, Any]]) -> str:
    """What the modules of a group are called."""
    layout = next(site["layout"] for site in sites if site["paths"][0] == path)
    if "num_embeddings" in layout:
        return "embedding tables"
    if path.rpartition(".")[2].isdigit():
        return "layers"
    return "linear layers" if "in_features" in layout else "modules"
