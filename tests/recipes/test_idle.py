"""Settings without effect are told when a run begins, once, and nowhere else."""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ranvier.conversion import Settings
from ranvier.recipes import (
    AnnRecipe,
    EventRecipe,
    FinetuneRecipe,
    NetworkSettings,
    ProxySettings,
    Recipe,
    SimulatedEventRecipe,
    digits,
    digits_ann,
    evaluate,
    fashion_mnist,
    fashion_mnist_proxy,
    load_trained,
    nmnist,
    run,
    simulated_digits_dvs,
)
from ranvier.recipes.catalogue import ANN_RECIPES, RECIPES
from ranvier.recipes.idle import warn_of_idle_conversion_settings, warn_of_idle_settings
from ranvier.recipes.recipe import read_recipe
from ranvier.training import DirectLoss


def told(recipe: Recipe | AnnRecipe | FinetuneRecipe) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_idle_settings(recipe)
    return [str(one.message) for one in found]


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (digits, {"neuron": "if", "tau": 3.0}, "tau=3.0 has no effect with neuron if."),
        (digits, {"burst_init": 1.0}, "burst_init=1.0 has no effect with neuron lif."),
        (digits, {"hidden": (3,)}, "hidden=(3,) has no effect with model conv4."),
        (digits, {"model": "mlp", "gain": 0.5}, "gain=0.5 has no effect with model mlp."),
        (digits, {"model": "mlp", "statistics": "per_step"}, "statistics=per_step has no effect with model mlp."),
        (digits, {"image_size": 16}, "image_size=16 has no effect with the bundled digits, which stay 8x8."),
        (digits, {"optimizer": "sgd", "betas": (0.8, 0.9)}, "betas=(0.8, 0.9) has no effect with optimizer sgd."),
        (digits, {"method": "direct", "temperature": 2.0}, "temperature=2.0 has no effect with method direct."),
        (digits, {"method": "direct", "consistency_weight": 2.0}, "consistency_weight=2.0 has no effect with method"),
        (digits, {"tet_weight": 0.1}, "tet_weight=0.1 has no effect with method etc."),
        (digits, {"method": "direct", "logit_scale": 2.0}, "proxy learning have no effect with method direct."),
        (digits, {"method": "proxy", "neuron": "lifb"}, "neuron=lifb has no effect with method proxy."),
        (digits, {"method": "proxy", "tau": 3.0}, "tau=3.0 has no effect with method proxy."),
        (digits, {"method": "proxy", "v_threshold": 1.0}, "v_threshold=1.0 has no effect with method proxy."),
        (digits, {"method": "proxy", "label_smoothing": 0.1}, "label_smoothing=0.1 has no effect with method proxy."),
        (digits, {"method": "proxy", "statistics": "folded"}, "statistics=folded has no effect with method proxy."),
        (
            digits,
            {"method": "proxy", "target": "rates", "logit_scale": 2.0},
            "logit_scale=2.0 has no effect with target rates.",
        ),
        (digits_ann, {"activation": "relu", "levels": 4}, "levels=4 has no effect with activation relu."),
        (digits_ann, {"activation": "relu", "ceiling_init": 8.0}, "ceiling_init=8.0 has no effect with activation"),
        (digits_ann, {"hidden": (3,)}, "hidden=(3,) has no effect with model conv4."),
        (fashion_mnist, {"method": "proxy", "neuron": "lif"}, "neuron=lif has no effect with method proxy."),
        (simulated_digits_dvs, {"recordings": "dvs-gesture"}, "recordings=dvs-gesture has no effect with simulated"),
        (simulated_digits_dvs, {"download": True}, "download=True has no effect with simulated recordings."),
    ],
)
def test_each_setting_is_named_with_what_makes_it_idle(
    make: Callable[..., Any], settings: dict[str, Any], message: str
) -> None:
    (found,) = told(make(**settings))
    assert message in found


@pytest.mark.parametrize(
    "recipe",
    [
        *(make() for make in (*RECIPES.values(), *ANN_RECIPES.values())),
        fashion_mnist(method="proxy"),  # its burst neurons are not the user's choice
        fashion_mnist_proxy(method="direct"),
        digits(neuron="lifb", burst_init=1.0, tau=3.0, gain=0.5),
        digits(model="mlp", hidden=(3,)),
        digits(method="tet", tet_weight=0.1, label_smoothing=0.1),
        digits(method="proxy", logit_scale=2.0, gain=0.5),
        digits(method="proxy", model="resnet19", v_threshold=1.0),  # scales its normalisation
        simulated_digits_dvs(image_size=8),
        nmnist(download=True, recordings="nmnist", bins="count"),
        FinetuneRecipe(start="runs/a", steps=2, surrogate_width=0.5),
        AnnRecipe("mine", "data"),
        Recipe("mine", "data", loss=DirectLoss("proxy"), proxy=ProxySettings("published")),
    ],
    ids=lambda recipe: f"{recipe.name}-{recipe.label}",
)
def test_what_has_an_effect_or_comes_with_the_recipe_is_not_told(recipe: Any) -> None:
    assert told(recipe) == []


def test_of_recipes_of_ones_own_the_defaults_are_those_of_the_classes() -> None:
    mine = Recipe("mine", "data", network=NetworkSettings(neuron="lifb"), loss=DirectLoss("proxy"))
    assert told(mine) == ["neuron=lifb has no effect with method proxy."]
    assert told(replace(fashion_mnist(method="proxy"), name="mine")) == ["neuron=lifb has no effect with method proxy."]


def test_finetuning() -> None:
    idle = FinetuneRecipe(start="a").override(method="proxy", surrogate_width=0.5, label_smoothing=0.1)
    assert sorted(told(idle)) == [
        "label_smoothing=0.1 has no effect with method proxy.",
        "surrogate_width=0.5 has no effect with method proxy.",
    ]
    assert told(FinetuneRecipe(start="a").override(tet_weight=0.1)) == ["tet_weight=0.1 has no effect with method etc."]


@pytest.mark.parametrize(
    ("settings", "threshold", "bias", "message"),
    [
        ({"percentile": 99.0}, "max", "ftbc", "percentile=99.0 has no effect with threshold max."),
        ({"mmse_shift": 0.0}, "percentile", "ftbc", "mmse_shift=0.0 has no effect with threshold percentile."),
        ({"per_channel": False}, "qcfs", "ftbc", "per_channel=False has no effect with threshold qcfs."),
        ({"rounds": (3,)}, "max", "light", "rounds=(3,) has no effect with bias light."),
        ({"step_sizes": (0.2,)}, "max", "none", "step_sizes=(0.2,) has no effect with bias none."),
        ({"variant": "V3"}, "max", "potential", "variant=V3 has no effect with bias potential."),
    ],
)
def test_fine_print_of_a_conversion(settings: dict[str, Any], threshold: str, bias: str, message: str) -> None:
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        warn_of_idle_conversion_settings(Settings(**settings), 4, threshold, bias, leaky=True)
    (name,) = settings
    user = {"percentile": "percentile", "mmse_shift": "mmse"}.get(name, "max")
    for of_threshold, of_bias in ((user, "ftbc"), ("auto", "auto")):
        warn_of_idle_conversion_settings(Settings(**settings), 4, of_threshold, of_bias, leaky=None)


def test_readouts_that_forget_at_one_step_and_decays_that_are_not_tried() -> None:
    with pytest.warns(UserWarning, match="leaky=True has no effect with steps=1"):
        warn_of_idle_conversion_settings(Settings(), 1, "mmse", "ftbc", leaky=True)
    decays = Settings(readout_decays=(0.5,))
    for bias, leaky in (("ftbc", None), ("ftbc", False), ("auto", False)):
        with pytest.warns(UserWarning, match=r"readout_decays=\(0.5,\) has no effect without leaky=True or bias auto"):
            warn_of_idle_conversion_settings(decays, 4, "mmse", bias, leaky=leaky)
    for bias, leaky in (("ftbc", True), ("auto", None)):
        warn_of_idle_conversion_settings(decays, 4, "mmse", bias, leaky=leaky)


def test_recipes_are_told_apart_by_kind_and_name() -> None:
    made = [make() for make in (*RECIPES.values(), *ANN_RECIPES.values())]
    known = {(type(recipe), recipe.name) for recipe in made}
    assert len(made) == len(known)
    assert {EventRecipe, SimulatedEventRecipe} <= {kind for kind, _ in known}


def test_only_a_run_tells(tmp_path: Path) -> None:
    """In this suite warnings are errors, so what is not caught here says nothing."""
    idle = digits(model="mlp", hidden=(8,), epochs=1, device="cpu", burst_init=1.0, method="direct", temperature=2.0)
    assert read_recipe(json.loads(json.dumps(idle.to_json()))) == idle
    with pytest.warns(UserWarning, match="has no effect") as found:
        run(idle, tmp_path, quiet=True)
    assert sorted(str(one.message).split("=")[0] for one in found) == ["burst_init", "temperature"]
    assert {one.filename for one in found} == {__file__}  # who called it
    evaluate(tmp_path)
    load_trained(tmp_path).choosing()
