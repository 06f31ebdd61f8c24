"""Which sites a recipe's `targets` name: aliases, globs, regular expressions, class names."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import regex
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PreTrainedModel,
)

from plmcc.diagnostics import Location, did_you_mean, error, listing
from plmcc.ir.site import Miss, Site

_WHOLE_KINDS = {
    "embeddings": "embedding",
    "linears": "linear",
    "attention": "attention",
    "feed_forward": "feed_forward",
    "layers": "layer",
}
ALIASES = (*_WHOLE_KINDS, "input_embeddings", "output_embeddings", "encoder", "decoder")
"""Targets that are not patterns: whole kinds, the token tables, and the two stacks."""

_SECONDS = 1
"""For one path. Paths are short, and most expressions take microseconds."""

_Candidate = Site | Miss
_Rule = Callable[[_Candidate], bool]


@dataclass(frozen=True)
class Matches:
    """What targets match: sites, and places that were meant but refused. Iterates over both."""

    sites: list[Site]
    misses: list[Miss]

    def __iter__(self) -> Iterator[Site | Miss]:
        yield from self.sites
        yield from self.misses


@dataclass(frozen=True)
class Scope:
    """What targets select from: the candidates of one kind in a model; `place` is for errors."""

    model: PreTrainedModel
    kind: str
    candidates: Sequence[Site | Miss]
    location: Location | str = "targets"

    def paths(self) -> list[str]:
        """Return all paths of all candidates."""
        return [path for candidate in self.candidates for path in _paths(candidate)]

    def classes(self, candidate: Site | Miss) -> set[str]:
        """Return the class names of a candidate's modules, base classes included."""
        modules = [self.model.get_submodule(path) for path in _paths(candidate)]
        inner = (nn.Module, object)
        return {c.__name__ for m in modules for c in type(m).__mro__ if c not in inner}


def select(scope: Scope, targets: list[str]) -> Matches:
    """Return the candidates that any target names, in the order of the model.

    Raises:
        PlmccError: a target that matches nothing, or nothing but misses, or is not valid.
    """
    if not targets or not all(targets):
        raise error("PLM201", "no targets are given", scope.location, allowed=_allowed(scope))
    chosen: list[_Candidate] = []
    for target in targets:
        rule = rule_of(scope, target)
        found = [candidate for candidate in scope.candidates if rule(candidate)]
        if not any(isinstance(candidate, Site) for candidate in found):
            raise _nothing(scope, target, [c for c in found if isinstance(c, Miss)])
        chosen += found
    ordered = [c for c in scope.candidates if any(c is other for other in chosen)]
    sites = [candidate for candidate in ordered if isinstance(candidate, Site)]
    return Matches(sites, [candidate for candidate in ordered if isinstance(candidate, Miss)])


def rule_of(scope: Scope, target: str) -> _Rule:
    """Return the test that a target stands for.

    Raises:
        PlmccError: it is not a regular expression.
    """
    if target.startswith("re:"):
        pattern = _compiled(scope, target)
        return lambda c: any(_fits(scope, pattern, path) for path in _paths(c))
    if target.startswith("class:"):
        name = target.removeprefix("class:").strip()
        return lambda c: name in scope.classes(c)
    if target in _WHOLE_KINDS:
        return lambda c: scope.kind == _WHOLE_KINDS[target]
    if target in ("input_embeddings", "output_embeddings"):
        return _end_rule(scope, target)
    if target in ("encoder", "decoder"):
        if target == only_stack(scope.model):
            return lambda c: any(map(_in_stack, _paths(c)))
        return lambda c: any(target in path.split(".") for path in _paths(c))
    return lambda c: any(fnmatch.fnmatchcase(path, target) for path in _paths(c))


def only_stack(model: PreTrainedModel) -> str:
    """Return "encoder" or "decoder" for a model that has only this one; empty if it has both."""
    if model.config.is_encoder_decoder:
        return ""
    kind = type(model.config)
    writes = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    return "decoder" if writes or getattr(model.config, "is_decoder", False) else "encoder"


def _in_stack(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def _end_rule(scope: Scope, target: str) -> _Rule:
    """The table at one end of the model: whatever holds the module that transformers names."""
    model = scope.model
    is_input = target == "input_embeddings"
    head: nn.Module | None = model.get_output_embeddings()
    end = model.get_input_embeddings() if is_input else head
    return lambda c: any(model.get_submodule(path) is end for path in _paths(c))


def _compiled(scope: Scope, target: str) -> regex.Pattern[str]:
    try:
        return regex.compile(target.removeprefix("re:"))
    except (regex.error, RecursionError, OverflowError) as reason:
        raise error(
            "PLM107", f"not a regular expression: {reason}", scope.location, got=target
        ) from None


def _fits(scope: Scope, pattern: regex.Pattern[str], path: str) -> bool:
    try:
        return pattern.fullmatch(path, timeout=_SECONDS) is not None
    except TimeoutError:
        message = f"the regular expression takes more than {_SECONDS} s on `{path}`"
        hint = "parts such as `(a+)+` can match a text in too many ways"
        given = f"re:{pattern.pattern}"
        raise error("PLM107", message, scope.location, got=given, hint=hint) from None


def _nothing(scope: Scope, target: str, misses: list[Miss]) -> Exception:
    if misses:
        return error(
            "PLM203",
            f"the modules that `{target}` matches cannot be rewritten",
            scope.location,
            got=target,
            hint="; ".join(f"{miss.path}: {miss.reason}" for miss in misses),
        )
    return error(
        "PLM201",
        f"`{target}` matches nothing of the kind {scope.kind}",
        scope.location,
        got=target,
        allowed=_allowed(scope),
        hint=_nearest(scope, target),
    )


def _nearest(scope: Scope, target: str) -> str:
    if target.startswith("class:"):
        names = sorted(set().union(*(scope.classes(c) for c in scope.candidates), set()))
        name = target.removeprefix("class:").strip()
        return did_you_mean(name, names, f"the classes are {listing(names)}")
    known = [*ALIASES, *scope.paths()]
    known = [name for name in known if name != target]
    near = difflib.get_close_matches(target.removeprefix("re:"), known, n=3, cutoff=0.3)
    return f"nearest: {', '.join(near)}" if near else f"the paths are {listing(scope.paths())}"


def _allowed(scope: Scope) -> str:
    aliases = [a for a in ALIASES if a not in _WHOLE_KINDS or _WHOLE_KINDS[a] == scope.kind]
    return f"{listing(aliases)}, a glob over module paths, re:<regex>, class:<Name>"


def _paths(candidate: _Candidate) -> tuple[str, ...]:
    return candidate.paths if isinstance(candidate, Site) else (candidate.path,)
