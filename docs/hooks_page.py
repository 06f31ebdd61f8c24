"""Writes `hooks.md`: what the author of a pass overrides and calls, from the code.

python docs/hooks_page.py
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import FunctionType

from plmcc import api, kit

PAGE = Path(__file__).with_name("hooks.md")
WHEN = {
    "Pass.needs_training": "when a recipe is checked, before torch is imported",
    "Pass.needs_data": "when a recipe is checked, before torch is imported",
    "Pass.calibrates_on": "when the recipe's data is read, and by `check`",
    "Pass.speed_target": "before the run, to keep the original, and at its end",
    "Pass.reads": "when a run starts, for its provenance, and when a stage is looked for again",
    "Pass.prepare": "once, before data is encoded, with the loaded model and its tokenizer",
    "Pass.match": "when its stage begins, before any pass of the stage changes the model; also in "
    "`plan` and before the first stage, on a copy of the model on the meta device",
    "Pass.plan": "for each site, on the meta device: by `plan`, and by `apply` at its start",
    "Pass.replace": "once for each site that was matched, in their order; without `plan` also on "
    "the meta device",
    "Pass.objective": "for each site, directly after `replace`, with what that returned",
    "Soft.shares": "after `rewrite`, or when the module is in its place",
    "Soft.rewrite": 'after `objective`, for each path of a site of role "layer"',
    "Soft.harden": "once, when the training of the stage has ended",
    "Soft.statistics": "after `harden`, for report.json and report.html",
    "Soft.charts": "after `harden`, for report.html",
    "Hard.shares": "after `rewrite`, or when the module is in its place; also when loaded",
    "Hard.rewrite": 'after `Soft.harden`, for each path of a site of role "layer", and when an '
    "artifact is loaded, on the meta device",
    "Hard.check_loaded": "when the weights of an artifact have been loaded, before the first call",
    "Hard.parameter_count": "by `plan` and by `search`",
    "Hard.ideal_bits": "when the report is written",
    "Hard.binary_codes": "for nearest neighbors of word vectors by Hamming distance",
    "Objective.begin": "when the training of the stage starts, with its number of optimizer steps",
    "Objective.advance": "before every optimizer step",
    "Objective.loss": "for every batch, after the forward pass of the model and of the teacher",
    "Objective.metrics": "whenever the Trainer logs",
    "Objective.state": "when a checkpoint is written",
    "Objective.restore": "when a training continues from a checkpoint, before `begin`",
    "Objective.parameter_groups": "when the optimizer is made",
}
"""When plmcc calls a method that a pass overrides."""
_OVERRIDDEN = ("Pass", "Soft", "Hard", "Objective")
_RETURNED = ("Planned", "Preparation", "Bars", "Points")
_GIVEN = (
    "Program",
    "Calibration",
    "Call",
    "Site",
    "LinearSite",
    "TableSite",
    "AttentionSite",
    "FeedForwardSite",
    "StackSite",
    "Miss",
)


def page() -> str:
    """Return the text of the page."""
    parts = [
        "# Hooks",
        "Everything that the author of a pass overrides, returns and calls: `plmcc.api` and "
        "`plmcc.kit`. Written by `python docs/hooks_page.py` from the docstrings. "
        "[Writing a pass](writing-a-pass.md) shows how the parts go together.",
        "## What a pass overrides",
    ]
    for name in _OVERRIDDEN:
        parts += _class(name, getattr(api, name))
    parts.append("## What a pass returns")
    for name in _RETURNED:
        parts += _class(name, getattr(api, name))
    parts.append("## What a pass is given")
    for name in _GIVEN:
        parts += _class(name, getattr(api, name))
    parts.append("## Functions of `plmcc.api`")
    known = {*_OVERRIDDEN, *_RETURNED, *_GIVEN}
    parts += _functions(api, [name for name in api.__all__ if name not in known])
    parts.append("## Building blocks: `plmcc.kit`")
    parts += _functions(kit, kit.__all__)
    return "\n\n".join(parts) + "\n"


def _functions(module: object, names: list[str]) -> list[str]:
    parts: list[str] = []
    for name in names:
        value = getattr(module, name)
        if isinstance(value, FunctionType):
            parts.append(f"- `{name}{_signature(value)}`: {_text(value)}")
        elif isinstance(value, type):
            parts += _class(name, value)
    return parts


def _class(name: str, kind: type) -> list[str]:
    built = f"`{name}{_constructor(kind)}`. " if _constructor(kind) else ""
    parts = [f"### {name}", built + _text(kind)]
    rows = []
    for base in reversed(kind.__mro__):
        if not base.__module__.startswith("plmcc"):
            continue
        for member, value in vars(base).items():
            called = f" Called {WHEN[f'{name}.{member}']}." if f"{name}.{member}" in WHEN else ""
            if member.startswith("_") or member in ("model_config", "forward"):
                continue
            if isinstance(value, property):
                rows.append((member, f"- `{member}`: {_text(value)}{called}"))
            elif isinstance(value, FunctionType | classmethod):
                function = value.__func__ if isinstance(value, classmethod) else value
                shown = f"{member}{_signature(function)}"
                rows.append((member, f"- `{shown}`: {_text(function)}{called}"))
        for member, about in _fields(base).items():
            rows.append((member, f"- `{member}`: {about}"))
    last = dict(rows)  # of a member that is overridden, the own text
    return [*parts, "\n".join(last.values())] if last else parts


def _constructor(kind: type) -> str:
    """Return how an object is made; nothing for options, which are fields, and for what plmcc
    makes."""
    makers = [base for base in kind.__mro__ if "__init__" in vars(base)]
    own = makers and makers[0].__module__.startswith("plmcc") and not issubclass(kind, api.Pass)
    return _signature(makers[0].__init__).removesuffix(" -> None") if own else ""


def _fields(kind: type) -> dict[str, str]:
    """Return the attributes of a class that have a docstring below them."""
    import ast
    import textwrap

    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except OSError:
        return {}
    [found] = tree.body
    assert isinstance(found, ast.ClassDef)
    pairs = zip(found.body, found.body[1:], strict=False)
    fields: dict[str, str] = {}
    for one, two in [*pairs, (found.body[-1], None)]:
        if not isinstance(one, ast.AnnAssign) or ast.unparse(one.target).startswith("_"):
            continue
        about = isinstance(two, ast.Expr) and isinstance(two.value, ast.Constant)
        text = " ".join(str(two.value.value).split()) if about else ""
        fields[ast.unparse(one.target)] = f"{text} ({ast.unparse(one.annotation)})".strip()
    return fields


def _signature(function: FunctionType) -> str:
    shown = inspect.signature(function)
    kept = [p for p in shown.parameters.values() if p.name not in ("self", "cls")]
    text = str(shown.replace(parameters=kept)).replace("''", '""').replace("'", "")
    return re.sub(r"<function \S+ at 0x\w+>", "...", text)


def _text(value: object) -> str:
    about = inspect.getdoc(value) or ""
    return " ".join(about.split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
