"""`plmcc search` (optuna) and `plmcc compare` (baselines of the same size)."""
