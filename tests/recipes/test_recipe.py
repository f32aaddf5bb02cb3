import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from ranvier.data import Augmentation
from ranvier.nn import LIFB, ConvertedIF, Neuron, ProxyNorm
from ranvier.recipes import (
    AnnRecipe,
    TrainingRecipe,
    cifar10_ann_full,
    digits,
    digits_ann,
    fashion_mnist_proxy,
    nmnist,
    simulated_digits_dvs,
)
from ranvier.recipes.catalogue import ANN_RECIPES, RECIPES
from ranvier.recipes.recipe import read_recipe
from ranvier.training import PUBLISHED_FORM, PUBLISHED_LOSS


@pytest.mark.parametrize("name", RECIPES)
def test_json_round_trip(name: str) -> None:
    recipe = RECIPES[name](seed=3, model="mlp", hidden=(7, 8))
    assert type(recipe).from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize("name", ANN_RECIPES)
def test_json_round_trip_of_anns(name: str) -> None:
    recipe = ANN_RECIPES[name](seed=3, model="mlp", hidden=(7, 8), label_smoothing=0.1)
    assert AnnRecipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize(
    "recipe",
    [
        digits(neuron="lifb"),
        digits_ann(levels=4),
        TrainingRecipe("mine", "/data"),
        nmnist(bins="count", shift=2),
        simulated_digits_dvs(path=((0.0, 0.0), (0.5, 0.5)), amplitude=3.0),
    ],
)
def test_a_card_tells_which_kind_of_recipe_it_holds(recipe: TrainingRecipe) -> None:
    read = read_recipe(json.loads(json.dumps(recipe.to_json())))
    assert read == recipe
    assert type(read) is type(recipe)


def test_override_reaches_every_part() -> None:
    recipe = digits().override(epochs=3, neuron="lifb", lr=0.5, temperature=2.0, cutout=2, precision="bfloat16")
    assert recipe.epochs == 3
    assert recipe.network.neuron == "lifb"
    assert recipe.optimization.lr == 0.5
    assert recipe.loss.temperature == 2.0
    assert recipe.augmentation.cutout == 2
    assert recipe.execution.precision == "bfloat16"
    assert digits().epochs != 3


def test_override_reaches_every_part_of_an_ann() -> None:
    recipe = digits_ann().override(epochs=3, levels=4, activation="qcfs", lr=0.5, label_smoothing=0.1, cutout=2)
    assert (recipe.epochs, recipe.network.levels, recipe.optimization.lr) == (3, 4, 0.5)
    assert recipe.loss.label_smoothing == 0.1
    assert recipe.augmentation.cutout == 2
    assert digits_ann().network.levels == 8


def test_an_ann_answers_once_and_learns_by_cross_entropy() -> None:
    recipe = digits_ann()
    assert recipe.steps == 1
    assert (recipe.loss.method, recipe.loss.label_smoothing) == ("direct", 0.0)
    assert "steps" not in recipe.to_json()
    for name in ("neuron", "steps", "method", "tau"):
        with pytest.raises(ValueError, match=f"a recipe has no field '{name}'"):
            digits_ann(**{name: 1})


def test_labels_name_what_is_trained() -> None:
    assert digits_ann().label == "conv4-qcfs8"
    assert digits_ann(levels=4, model="resnet20").label == "resnet20-qcfs4"
    assert digits_ann(activation="relu").label == "conv4-relu"
    assert digits(neuron="lifb", steps=2).label == "conv4-etc-lifb-T2"


def test_published_settings() -> None:
    """Bu et al. 2022: VGG16, 4 levels, 300 epochs of SGD at 0.1 with momentum 0.9, batch 300, weight decay 5e-4."""
    recipe = cifar10_ann_full()
    assert (recipe.network.model, recipe.network.activation, recipe.network.levels) == ("vgg16", "qcfs", 4)
    assert (recipe.epochs, recipe.batch_size) == (300, 300)
    optimization = recipe.optimization
    assert (optimization.optimizer, optimization.lr, optimization.weight_decay) == ("sgd", 0.1, 5e-4)
    assert (optimization.min_lr, optimization.warmup_epochs) == (0.0, 0.0)
    augmentation = recipe.augmentation
    assert (augmentation.crop_padding, augmentation.flip, augmentation.auto_augment) == (4, True, True)
    assert augmentation.cutout == 16


@pytest.mark.parametrize("make", [digits, digits_ann])
def test_every_field_has_one_name(make: Callable[[], TrainingRecipe]) -> None:
    """Flags are field names without the part's name, so no two parts may share one."""
    from dataclasses import fields

    recipe = make()
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


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"model": "spikformer"},  # no ANN with ReLU
        {"activation": "gelu"},
        {"levels": 0},
        {"levels": 1.5},
        {"ceiling_init": 0.0},
        {"label_smoothing": 1.5},
    ],
)
def test_wrong_values_of_anns_are_refused_before_any_work(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        digits_ann(**wrong)


def test_proxy_learning_is_a_method_of_any_recipe() -> None:
    recipe = digits(method="proxy", steps=1, normalization="separate", logit_scale=2.0)
    assert (recipe.objective.logit_scale, recipe.objective.target) == (2.0, "cross_entropy")  # type: ignore[union-attr]
    model = recipe.build(10, 1, 8)
    assert {type(module) for module in model.modules() if isinstance(module, Neuron)} == {ConvertedIF}
    assert any(module.separate for module in model.modules() if isinstance(module, ProxyNorm))
    assert recipe.label == "conv4-proxy-T1"
    assert read_recipe(json.loads(json.dumps(recipe.to_json()))) == recipe
    other = digits(neuron="lifb")
    assert other.objective is other.loss
    assert any(isinstance(module, LIFB) for module in other.build(10, 1, 8).modules())
    assert digits_ann().objective == digits_ann().loss


def test_published_settings_of_proxy_learning() -> None:
    """Kheradpisheh et al. 2022, the released notebook."""
    recipe = fashion_mnist_proxy()
    assert (recipe.steps, recipe.epochs, recipe.batch_size, recipe.seed) == (15, 100, 100, 2020)
    assert recipe.augmentation == Augmentation(crop_padding=1)
    optimization = recipe.optimization
    assert (optimization.optimizer, optimization.betas, optimization.weight_decay) == ("adam", (0.8, 0.99), 1e-6)
    assert {optimization.learning_rate(step, 100, 10) for step in (0, 5, 50, 99)} == {1e-4}
    assert recipe.objective == PUBLISHED_LOSS
    assert recipe.proxy.form == PUBLISHED_FORM
    shapes = [tuple(p.shape) for p in recipe.build(10, 1, 28).parameters() if p.ndim > 1]
    convolutions = [(128, 1, 3, 3), (128, 128, 3, 3), (128, 128, 3, 3)]
    assert shapes == [*convolutions, (2560, 6272), (1152, 2560), (256, 1152), (10, 256)]
    assert recipe.label == "conv3-proxy-published-T15"


def test_each_setting_of_a_variant_can_be_changed() -> None:
    recipe = fashion_mnist_proxy(proxy_threshold=1.0, target="rates", pooling="average", freeze_epoch=3)
    assert recipe.proxy.form == replace(PUBLISHED_FORM, v_threshold=1.0, pooling="average")
    assert recipe.proxy.loss == replace(PUBLISHED_LOSS, target="rates", freeze_epoch=3)
    with pytest.raises(ValueError, match="discards what exceeds"):
        digits(method="proxy", proxy_reset="hard")
    hard = digits(method="proxy", proxy_reset="hard", v_init=0.0, worth="one")
    assert hard.proxy.form.reset == "hard"


def test_recipes_from_before_proxy_learning_still_load_and_resume() -> None:
    content = digits().to_json()
    del content["proxy"]
    assert read_recipe(content) == digits()
    assert "proxy" not in digits().identity()
    assert digits(method="proxy").identity() != digits(method="proxy", v_init=0.0).identity()


def test_consistency_with_one_step_is_refused() -> None:
    with pytest.raises(ValueError, match="--steps 2 or more"):
        digits(steps=1, method="etc")
    assert digits(steps=1, method="direct").steps == 1


def test_identity_leaves_out_what_may_change_between_resumes() -> None:
    one = digits(data="/here", device="cpu", checkpoint_seconds=1.0, tensorboard=True)
    assert one.identity() == digits(data="/there").identity()
    assert digits(lr=0.1).identity() != digits().identity()
    assert digits(precision="bfloat16").identity() != digits().identity()

    assert digits_ann(data="/here").identity() == digits_ann(data="/there").identity()
    assert digits_ann(levels=4).identity() != digits_ann().identity()
    assert digits_ann(label_smoothing=0.1).identity() != digits_ann().identity()


@pytest.mark.parametrize("recipe", [digits(), digits_ann()])
def test_cards_of_other_versions_are_refused(recipe: TrainingRecipe) -> None:
    content = recipe.to_json()
    content["network"]["colour"] = "blue"
    with pytest.raises(ValueError, match="this version of ranvier.*colour"):
        read_recipe(content)
    del content["network"]
    with pytest.raises(ValueError, match="this version"):
        type(recipe).from_json(content)
