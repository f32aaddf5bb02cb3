"""CIFAR-10: by the recipe of the temporal-consistency paper, as fast as it goes, and ANNs to convert."""

from typing import Any

from ranvier.data import Augmentation
from ranvier.recipes.network import AnnSettings, NetworkSettings
from ranvier.recipes.recipe import AnnRecipe, Recipe
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


def cifar10_sprint(**overrides: Any) -> Recipe:
    """ResNet-9 at T = 2, from random weights to good accuracy in few epochs of large batches; for a GPU.

    SGD and its schedule as such networks are trained without spikes (Page 2018): 40 epochs of batches of 512, learning
    rate 0.4, weight decay 5e-4, label smoothing, crop, flip and cutout of 8 pixels. An update takes 4.5 GFLOP an image,
    so that all 40 epochs are 9 PFLOP. How long that takes and where it ends has not been measured on a GPU yet.
    """
    return Recipe(
        name="cifar10-sprint",
        data="uoft-cs/cifar10",
        epochs=40,
        batch_size=512,
        steps=2,
        augmentation=Augmentation(crop_padding=4, flip=True, cutout=8),
        network=NetworkSettings(model="resnet9"),
        loss=DirectLoss("etc", label_smoothing=0.1),
        optimization=Optimization("sgd", lr=0.4, warmup_epochs=5, weight_decay=5e-4),
    ).override(**overrides)


def cifar10_ann(**overrides: Any) -> AnnRecipe:
    """An ANN to convert, for a quarter of an hour on two cores: ResNet-20, QCFS with 8 levels, SGD, crop and flip."""
    return AnnRecipe(
        name="cifar10",
        data="uoft-cs/cifar10",
        epochs=20,
        batch_size=125,
        augmentation=Augmentation(crop_padding=4, flip=True),
        optimization=Optimization("sgd", lr=0.2, warmup_epochs=4, weight_decay=5e-4),
    ).override(**overrides)


def cifar10_ann_full(**overrides: Any) -> AnnRecipe:
    """An ANN to convert, for a GPU: VGG16, QCFS with 4 levels, by the recipe of the QCFS paper.

    300 epochs of SGD at 0.1 with a batch of 300, weight decay 5e-4, crop, flip, AutoAugment and cutout of 16 pixels.
    Differs from the paper in: weight decay leaves normalisation, biases and ceilings alone.
    """
    return AnnRecipe(
        name="cifar10-full",
        data="uoft-cs/cifar10",
        epochs=300,
        batch_size=300,
        augmentation=Augmentation(crop_padding=4, flip=True, auto_augment=True, cutout=16),
        network=AnnSettings(model="vgg16", levels=4),
        optimization=Optimization("sgd", lr=0.1, warmup_epochs=0, weight_decay=5e-4),
    ).override(**overrides)
