"""Names for types that many modules share."""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]
"""Values by name, of types that only the reader knows: JSON objects, keyword arguments, configs."""
