"""The shipped recipes (YAML)."""
