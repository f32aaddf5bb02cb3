import json

import pytest

from ranvier.cli import RECIPES
from ranvier.recipes import Recipe, digits


@pytest.mark.parametrize("name", RECIPES)
def test_json_round_trip(name: str) -> None:
    recipe = RECIPES[name](seed=3, model="mlp", hidden=(7, 8))
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_override_reaches_every_part() -> None:
    recipe = digits().override(epochs=3, neuron="lifb", lr=0.5, temperature=2.0, cutout=2, precision="bfloat16")
    assert recipe.epochs == 3
    assert recipe.network.neuron == "lifb"
    assert recipe.optimization.lr == 0.5
    assert recipe.loss.temperature == 2.0
    assert recipe.augmentation.cutout == 2
    assert recipe.execution.precision == "bfloat16"
    assert digits().epochs != 3


def test_every_field_has_one_name() -> None:
    """Flags are field names without the part's name, so no two parts may share one."""
    from dataclasses import fields

    recipe = digits()
    parts = [getattr(recipe, field.name) for field in fields(recipe)]
    names = [inner.name for part in parts if hasattr(part, "__dataclass_fields__") for inner in fields(part)]
    names += [
        field.name for field in fields(recipe) if not hasattr(getattr(recipe, field.name), "__dataclass_fields__")
    ]
    assert len(names) == len(set(names))


def test_unknown_field_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="no field 'epoch'. Did you mean epochs"):
        digits(epoch=3)
    with pytest.raises(ValueError, match="Fields are: .*weight_decay"):
        digits(zzz=3)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"epochs": 0}, {"batch_size": -1}, {"model": "vgg"}, {"neuron": "lfi"}]
)
def test_wrong_values_are_refused_before_any_work(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        digits(**wrong)


def test_consistency_with_one_step_is_refused() -> None:
    with pytest.raises(ValueError, match="--steps 2 or more"):
        digits(steps=1, method="etc")
    assert digits(steps=1, method="direct").steps == 1


def test_identity_leaves_out_what_may_change_between_resumes() -> None:
    one = digits(data="/here", device="cpu", checkpoint_seconds=1.0, tensorboard=True)
    assert one.identity() == digits(data="/there").identity()
    assert digits(lr=0.1).identity() != digits().identity()
    assert digits(precision="bfloat16").identity() != digits().identity()


def test_cards_of_other_versions_are_refused() -> None:
    content = digits().to_json()
    content["network"]["colour"] = "blue"
    with pytest.raises(ValueError, match="this version of ranvier.*colour"):
        Recipe.from_json(content)
    del content["network"]
    with pytest.raises(ValueError, match="this version"):
        Recipe.from_json(content)
