"""Fashion-MNIST: a network for two CPU cores, a full-size one, and an ANN to convert."""

from typing import Any

from ranvier.data import Augmentation
from ranvier.recipes.network import AnnSettings, NetworkSettings
from ranvier.recipes.recipe import AnnRecipe, Recipe
from ranvier.training import DirectLoss, Optimization


def fashion_mnist(**overrides: Any) -> Recipe:
    """Burst neurons in four convolutions, 15 million multiply-accumulates a step: minutes on two CPU cores."""
    return Recipe(
        name="fashion-mnist",
        data="zalando-datasets/fashion_mnist",
        epochs=18,
        batch_size=128,
        augmentation=Augmentation(crop_padding=1, flip=True),
        network=NetworkSettings(model="conv4", neuron="lifb"),
        loss=DirectLoss("etc"),
        optimization=Optimization(lr=3e-3, warmup_epochs=0.5, clip_norm=5.0),
    ).override(**overrides)


def fashion_mnist_full(**overrides: Any) -> Recipe:
    """SNN6 at full width, for a GPU."""
    return Recipe(
        name="fashion-mnist-full",
        data="zalando-datasets/fashion_mnist",
        epochs=100,
        batch_size=128,
        augmentation=Augmentation(crop_padding=2, flip=True, cutout=8),
        network=NetworkSettings(model="snn6"),
        loss=DirectLoss("etc"),
        optimization=Optimization(lr=1e-3, warmup_epochs=5, min_lr=1e-5),
    ).override(**overrides)


def fashion_mnist_ann(**overrides: Any) -> AnnRecipe:
    """An ANN to convert, for minutes on two cores: four convolutions, QCFS with 8 levels."""
    return AnnRecipe(
        name="fashion-mnist",
        data="zalando-datasets/fashion_mnist",
        epochs=10,
        batch_size=125,
        augmentation=Augmentation(crop_padding=1, flip=True),
        network=AnnSettings(model="conv4"),
        optimization=Optimization("sgd", lr=0.1, warmup_epochs=2, weight_decay=5e-4),
    ).override(**overrides)
