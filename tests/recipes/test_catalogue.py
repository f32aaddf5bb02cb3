"""Every recipe goes by the name under which it is listed, and can be written down and read."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from ranvier.recipes.catalogue import ANN_RECIPES, RECIPES
from ranvier.recipes.recipe import read_recipe

ALL = [
    pytest.param(name, make, id=f"{kind} {name}")
    for kind, some in (("snn", RECIPES), ("ann", ANN_RECIPES))
    for name, make in some.items()
]


@pytest.mark.parametrize(("name", "make"), ALL)
def test_names_and_files(name: str, make: Callable[[], Any]) -> None:
    recipe = make()
    assert recipe.name == name
    assert read_recipe(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert recipe.epochs >= 1
    assert recipe.label  # what folders of runs are named for
