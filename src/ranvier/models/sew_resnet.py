"""Residual networks that add spikes: SEW ResNet-18 and -34."""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from ranvier.checks import check_choice
from ranvier.models.network import Network
from ranvier.models.resnet import BlockShape, block_shapes
from ranvier.nn import LIF, Readout, TimeFolded
from ranvier.nn.normalization import Statistics
from ranvier.nn.structure import Chain, NeuronFactory, Residual, activation, conv_norm

Stem = Literal["cifar", "imagenet"]
"""`cifar`: a 3x3 convolution that keeps the image size; `imagenet`: 7x7 and max-pooling, which quarter it."""


def sew_resnet18(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    neuron: NeuronFactory = LIF,
    stem: Stem = "cifar",
    statistics: Statistics = "per_step",
) -> Network:
    """SEW ResNet-18: 2 blocks each of 64, 128, 256 and 512 channels, which add spikes to spikes.

        y = neuron(BN(conv(neuron(BN(conv(x)))))) + shortcut(x)

    The shortcut is the identity, or `neuron(BN(conv(x)))` with a 1x1 convolution where the shape changes. A sum of
    spikes is graded: it takes values 0, 1, 2, ..., that grow along a stage. 11.69 million parameters with the
    `imagenet` stem, three input channels and 1000 classes; images of any size.

    Args:
        num_classes: K.
        in_channels: Channels of the images.
        neuron: Activation, called with its channel count.
        stem: First layer, for small images (`cifar`) or large ones (`imagenet`).
        statistics: Batch statistics over all steps (`folded`) or each step (`per_step`, as published).

    Returns:
        A network on `[B, C, H, W]` or `[T, B, C, H, W]`.

    Source: Fang et al. 2021 (SEW ResNet, element-wise function ADD), in the form that Zhao et al. 2025 (temporal
    consistency) released. Differs from the former in: the `imagenet` stem pools before it normalises, where Fang et al.
    pool the spikes of the first neuron; so the pooling, too, runs once on a constant image.

    >>> import torch
    >>> sew_resnet18()(torch.zeros(2, 3, 8, 8), steps=4).shape
    torch.Size([4, 2, 10])
    """
    return _sew_resnet((2, 2, 2, 2), num_classes, in_channels, neuron, stem, statistics)


def sew_resnet34(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    neuron: NeuronFactory = LIF,
    stem: Stem = "cifar",
    statistics: Statistics = "per_step",
) -> Network:
    """SEW ResNet-34: as `sew_resnet18`, with 3, 4, 6 and 3 blocks.

    21.80 million parameters with the `imagenet` stem, three input channels and 1000 classes. Arguments and source as in
    `sew_resnet18`.

    >>> import torch
    >>> sew_resnet34(100)(torch.zeros(2, 3, 8, 8), steps=4).shape
    torch.Size([4, 2, 100])
    """
    return _sew_resnet((3, 4, 6, 3), num_classes, in_channels, neuron, stem, statistics)


def _sew_resnet(
    depths: Sequence[int],
    num_classes: int,
    in_channels: int,
    neuron: NeuronFactory,
    stem: Stem,
    statistics: Statistics,
) -> Network:
    layers: list[nn.Module] = [activation(neuron, 64)]
    layers += [_block(shape, neuron, statistics) for shape in block_shapes(64, (64, 128, 256, 512), depths)]
    layers.append(TimeFolded(nn.AdaptiveAvgPool2d(1)))
    return Network(_encoder(in_channels, stem, statistics), Chain(*layers), Readout(512, num_classes))


def _encoder(in_channels: int, stem: Stem, statistics: Statistics) -> nn.Sequential:
    check_choice("stem", stem, ("cifar", "imagenet"))
    if stem == "cifar":
        return conv_norm(in_channels, 64, statistics=statistics)
    conv, norm = conv_norm(in_channels, 64, kernel_size=7, stride=2, statistics=statistics)
    return nn.Sequential(conv, TimeFolded(nn.MaxPool2d(3, stride=2, padding=1)), norm)


def _block(shape: BlockShape, neuron: NeuronFactory, statistics: Statistics) -> Residual:
    """Two convolutions, each with its neuron; their spikes join those of the shortcut."""
    channels, width = shape.in_channels, shape.out_channels
    branch = Chain(
        conv_norm(channels, width, stride=shape.stride, statistics=statistics),
        activation(neuron, width),
        conv_norm(width, width, statistics=statistics),
        activation(neuron, width),
    )
    shortcut = Chain()
    if shape.changes:
        project = conv_norm(channels, width, kernel_size=1, stride=shape.stride, statistics=statistics)
        shortcut = Chain(project, activation(neuron, width))
    return Residual(branch, shortcut)
