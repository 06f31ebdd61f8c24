"""All that the author of a pass needs: passes, sites, programs, and what sites become.

A pass is one file in `passes/`. `match` finds sites in a `Program`, `replace` turns a site into a
`Soft` module that can be trained, `Soft.harden` turns that into the `Hard` module that is saved and
deployed. Saving, loading, size accounting and contracts are generic: a pass writes no code for
them.
"""

from __future__ import annotations

from plmcc.diagnostics import Location, PlmccError, did_you_mean, error, listing
from plmcc.ir.calibration import Calibration, CalibrationData, Call
from plmcc.ir.forms import Bars, Hard, Layout, Objective, Planned, Points, Soft, State
from plmcc.ir.pretrained import Preparation, Pretrained
from plmcc.ir.program import Program
from plmcc.ir.site import (
    AttentionSite,
    FeedForwardSite,
    LinearSite,
    Miss,
    Site,
    StackSite,
    TableSite,
)
from plmcc.pass_base import Pass, refuse_unused
from plmcc.utils.types import Values

__all__ = [
    "AttentionSite",
    "Bars",
    "Calibration",
    "CalibrationData",
    "Call",
    "FeedForwardSite",
    "Hard",
    "Layout",
    "LinearSite",
    "Location",
    "Miss",
    "Objective",
    "Pass",
    "Planned",
    "PlmccError",
    "Points",
    "Preparation",
    "Pretrained",
    "Program",
    "Site",
    "Soft",
    "StackSite",
    "State",
    "TableSite",
    "Values",
    "did_you_mean",
    "error",
    "listing",
    "refuse_unused",
]
