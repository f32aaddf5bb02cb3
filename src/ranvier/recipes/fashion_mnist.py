"""Fashion-MNIST: a network for two CPU cores, a full-size one, and an ANN to convert."""

from typing import Any

from ranvier.data import Augmentation
from ranvier.recipes.network import AnnSettings, NetworkSettings, ProxySettings
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


def fashion_mnist_proxy(**overrides: Any) -> Recipe:
    """Proxy learning by its released notebook: three convolutions of 128 channels, four linear layers; for a GPU.

    Adam at 1e-4 with betas (0.8, 0.99) and weight decay 1e-6, no schedule, batch 100, 100 epochs, T = 15. Differs from
    it in: crops shift by a pixel either way without a blank border; images have mean 0 and variance 1 instead of values
    from 0 to 1, which the normalisation after the first convolution undoes but at the border; weight decay leaves
    normalisation alone; ties and silent outputs are misses, where its last accuracy counts ties as hits.
    """
    return Recipe(
        name="fashion-mnist-proxy",
        data="zalando-datasets/fashion_mnist",
        epochs=100,
        batch_size=100,
        seed=2020,
        steps=15,
        augmentation=Augmentation(crop_padding=1),
        network=NetworkSettings(model="conv3"),
        loss=DirectLoss("proxy"),
        proxy=ProxySettings("published"),
        optimization=Optimization("adam", lr=1e-4, min_lr=1e-4, warmup_epochs=0, weight_decay=1e-6, betas=(0.8, 0.99)),
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
