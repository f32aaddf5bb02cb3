"""CIFAR-10 by the recipe of the temporal-consistency paper."""

from typing import Any

from ranvier.data import Augmentation
from ranvier.recipes.network import NetworkSettings
from ranvier.recipes.recipe import Recipe
from ranvier.training import DirectLoss, Optimization


def cifar10(**overrides: Any) -> Recipe:
    """SEW-ResNet-18, AdamW, warm-up and cosine, crop, flip, AutoAugment and cutout; for a GPU.

    600 epochs and weight decay 1e-4 as the paper prints; learning rate (5e-3 x batch / 1024 at a batch of 128), warm-up
    and floor as in its released code. Another batch size does not change the learning rate by itself.
    """
    return Recipe(
        name="cifar10",
        data="uoft-cs/cifar10",
        epochs=600,
        batch_size=128,
        augmentation=Augmentation(crop_padding=4, flip=True, auto_augment=True, cutout=16),
        network=NetworkSettings(model="sew-resnet18"),
        loss=DirectLoss("etc"),
        optimization=Optimization(lr=6.25e-4, warmup_epochs=5, min_lr=1e-5),
    ).override(**overrides)
