"""One parse: a recipe that was read without torch gets the code of its passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from plmcc.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_it_is_the_recipe_that_is_read_with_torch(file: Path) -> None:
    light, real = load_recipe(file), load_recipe(file, load_torch=True)
    found = light.with_code()
    assert found == real
    passes = [[chosen for stage in one.steps() for chosen in stage.passes] for one in (found, real)]
    assert [type(chosen) for chosen in passes[0]] == [type(chosen) for chosen in passes[1]]
    assert [p.model_fields_set for p in passes[0]] == [p.model_fields_set for p in passes[1]]
    assert found.location(("name",)) == real.location(("name",))
    assert type(light.steps()[0]) is type(found.steps()[0])
