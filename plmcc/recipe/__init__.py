"""Recipes: YAML parsed into frozen objects; every error has its location.

Imports neither torch nor transformers.
"""

from plmcc.recipe.load import (
    Calibrate,
    Data,
    Distill,
    Evaluate,
    Lower,
    Range,
    Recipe,
    Scratch,
    Sequences,
    Stage,
    Synthetic,
    Train,
    TrainTokenizer,
    load_recipe,
    parse_recipe,
    varied,
)

__all__ = [
    "Calibrate",
    "Data",
    "Distill",
    "Evaluate",
    "Lower",
    "Range",
    "Recipe",
    "Scratch",
    "Sequences",
    "Stage",
    "Synthetic",
    "Train",
    "TrainTokenizer",
    "load_recipe",
    "parse_recipe",
    "varied",
]
