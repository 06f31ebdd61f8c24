"""The acceptance facts of movement pruning that concern scores, masks, schedules and training."""

from __future__ import annotations

OPTIONS = {
    "method": "magnitude",
    "granularity": {"hybrid": [4, 4]},
    "density": 0.5,
    "storage": "bitmask",
}
