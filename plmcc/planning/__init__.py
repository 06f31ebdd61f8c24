"""`plmcc plan`, `match` and `diff`: computed on the meta device."""
