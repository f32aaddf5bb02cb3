"""Handwritten digits that come with scikit-learn: nothing to download, seconds to train."""

from typing import Any

from ranvier.data import Augmentation
from ranvier.recipes.network import AnnSettings, NetworkSettings
from ranvier.recipes.recipe import AnnRecipe, Recipe
from ranvier.training import Execution, Optimization


def digits(**overrides: Any) -> Recipe:
    """The bundled 8x8 digits (1197 to train, 600 to test) on a four-convolution network."""
    return Recipe(
        name="digits",
        data="digits",
        epochs=15,
        batch_size=64,
        augmentation=Augmentation(crop_padding=1),
        network=NetworkSettings(model="conv4"),
        optimization=Optimization(lr=2e-3),
        # Compiling takes longer than the whole training.
        execution=Execution(precision="float32", implementation="reference"),
    ).override(**overrides)


def digits_ann(**overrides: Any) -> AnnRecipe:
    """An ANN to convert on the bundled digits: four convolutions, QCFS with 8 levels, seconds to train."""
    return AnnRecipe(
        name="digits",
        data="digits",
        epochs=15,
        batch_size=64,
        augmentation=Augmentation(crop_padding=1),
        network=AnnSettings(model="conv4"),
        optimization=Optimization(lr=2e-3),
        # Compiling takes longer than the whole training.
        execution=Execution(precision="float32", implementation="reference"),
    ).override(**overrides)
