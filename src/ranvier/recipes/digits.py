"""Handwritten digits that come with scikit-learn: nothing to download, seconds to train."""

from typing import Any

from ranvier.data import Augmentation
from ranvier.recipes.network import NetworkSettings
from ranvier.recipes.recipe import Recipe
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
