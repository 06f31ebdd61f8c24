"""Sites of movement pruning."""

from __future__ import annotations

from plmcc.api import Site
from plmcc.passes.movement_pruning.site import PrunableSite


def prunable(site: Site) -> PrunableSite:
    """Return the site as what the pass has made it."""
    assert isinstance(site, PrunableSite)
    return site
