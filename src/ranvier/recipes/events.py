"""Event cameras: recordings that can be downloaded, and *simulated* recordings of image sets that are at hand."""

from typing import Any

from ranvier.data import SaccadeSettings
from ranvier.data.events import FrameAugmentation
from ranvier.recipes.network import NetworkSettings
from ranvier.recipes.recipe import EventRecipe, EventSettings, SimulatedEventRecipe
from ranvier.training import DirectLoss, Execution, Optimization


def nmnist(**overrides: Any) -> EventRecipe:
    """N-MNIST: ten digits seen by a moving camera, 34x34 pixels; four convolutions, minutes on two cores."""
    return EventRecipe(
        name="nmnist",
        data="",
        epochs=20,
        batch_size=64,
        augmentation=FrameAugmentation(crop_padding=2),
        network=NetworkSettings(model="conv4"),
        loss=DirectLoss("etc"),
        optimization=Optimization(lr=2e-3, warmup_epochs=1, clip_norm=5.0),
        events=EventSettings("nmnist"),
    ).override(**overrides)


def dvs_cifar10(**overrides: Any) -> EventRecipe:
    """CIFAR10-DVS at 48x48 pixels on VGGSNN with temporal consistency, for a GPU; published with 600 epochs."""
    return EventRecipe(
        name="dvs-cifar10",
        data="",
        epochs=200,
        batch_size=128,
        image_size=48,
        augmentation=FrameAugmentation(crop_padding=4, flip=True),
        network=NetworkSettings(model="vggsnn"),
        loss=DirectLoss("etc"),
        optimization=Optimization(lr=1e-3, warmup_epochs=5, min_lr=1e-5),
        events=EventSettings("cifar10-dvs"),
    ).override(**overrides)


def ncaltech101(**overrides: Any) -> EventRecipe:
    """N-Caltech101 at 48x48 pixels on VGGSNN, classes drawn equally often, for a GPU; published with 600 epochs."""
    return EventRecipe(
        name="ncaltech101",
        data="",
        epochs=200,
        batch_size=128,
        image_size=48,
        augmentation=FrameAugmentation(crop_padding=4),
        network=NetworkSettings(model="vggsnn"),
        loss=DirectLoss("etc"),
        optimization=Optimization(lr=1e-3, warmup_epochs=5, min_lr=1e-5),
        events=EventSettings("ncaltech101", balanced=True),
    ).override(**overrides)


def dvs_gesture(**overrides: Any) -> EventRecipe:
    """DVS128-Gesture at 48x48 pixels on VGGSNN, for a GPU; gestures have a side, so none is mirrored."""
    return EventRecipe(
        name="dvs-gesture",
        data="",
        epochs=200,
        batch_size=32,
        image_size=48,
        augmentation=FrameAugmentation(crop_padding=4),
        network=NetworkSettings(model="vggsnn"),
        loss=DirectLoss("etc"),
        optimization=Optimization(lr=1e-3, warmup_epochs=5, min_lr=1e-5),
        events=EventSettings("dvs-gesture"),
    ).override(**overrides)


def simulated_digits_dvs(**overrides: Any) -> SimulatedEventRecipe:
    """Simulated recordings of the bundled digits, 16x16 pixels: nothing to download, a minute on two cores."""
    return SimulatedEventRecipe(
        name="simulated-digits-dvs",
        data="digits",
        epochs=15,
        batch_size=64,
        augmentation=FrameAugmentation(crop_padding=1),
        network=NetworkSettings(model="conv4"),
        loss=DirectLoss("etc"),
        optimization=Optimization(lr=2e-3),
        # Compiling takes longer than the whole training.
        execution=Execution(precision="float32", implementation="reference"),
        saccades=SaccadeSettings(sensor=16, amplitude=4.0),
    ).override(**overrides)


def simulated_fashion_mnist_dvs(**overrides: Any) -> SimulatedEventRecipe:
    """Simulated recordings of Fashion-MNIST, 34x34 pixels, on four convolutions: full size for two cores."""
    return SimulatedEventRecipe(
        name="simulated-fashion-mnist-dvs",
        data="zalando-datasets/fashion_mnist",
        epochs=10,
        batch_size=128,
        augmentation=FrameAugmentation(crop_padding=1, flip=True),
        network=NetworkSettings(model="conv4"),
        loss=DirectLoss("etc"),
        optimization=Optimization(lr=3e-3, warmup_epochs=0.5, clip_norm=5.0),
    ).override(**overrides)


def simulated_cifar10_dvs(**overrides: Any) -> SimulatedEventRecipe:
    """Simulated recordings of CIFAR-10, 48x48 pixels, on VGGSNN: a stand-in for CIFAR10-DVS; for a GPU."""
    return SimulatedEventRecipe(
        name="simulated-cifar10-dvs",
        data="uoft-cs/cifar10",
        epochs=60,
        batch_size=128,
        augmentation=FrameAugmentation(crop_padding=4, flip=True),
        network=NetworkSettings(model="vggsnn"),
        loss=DirectLoss("etc"),
        optimization=Optimization(lr=1e-3, warmup_epochs=2, min_lr=1e-5),
        saccades=SaccadeSettings(sensor=48, amplitude=8.0, surround="edge"),  # a black frame would make most events
    ).override(**overrides)
