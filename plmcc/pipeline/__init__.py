"""`plmcc apply`: prepare, stages, the cache for `--resume`, output, reproduce."""
