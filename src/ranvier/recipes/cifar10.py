"""CIFAR-10 as in the temporal-consistency paper."""

from typing import Any

from ranvier.data import Augmentation
from ranvier.recipes.network import NetworkSettings
from ranvier.recipes.recipe import Recipe
from ranvier.training import DirectLoss, Optimization


def cifar10(**overrides: Any) -> Recipe:
    """SEW-ResNet-18, AdamW, warm-up and cosine, crop, flip, AutoAugment and cutout; for a GPU.

    Learning rate and floor are those of the released code, 5e-3 x batch / 1024; 600 epochs as published.
    """
    return Recipe(
        name="cifar10",
        data="uoft-cs/cifar10",
        epochs=600,
        batch_size=128,
        augmentation=Augmentation(crop_padding=4, flip=True, auto_augment=True, cutout=16),
        network=NetworkSettings(model="sew-resnet18", statistics="per_step"),
        loss=DirectLoss("etc"),
        optimization=Optimization(lr=6.25e-4, warmup_epochs=5, min_lr=1e-5),
    ).override(**overrides)
