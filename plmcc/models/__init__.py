"""The model that a recipe is applied to: loaded, or new."""
