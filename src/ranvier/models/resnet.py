"""Residual networks: ResNet-19 for direct training, ResNet-20 for conversion, ResNet-9 for short training."""

from collections.abc import Iterator, Sequence
from math import sqrt
from typing import NamedTuple

from torch import nn

from ranvier.checks import check_positive
from ranvier.models.network import Network
from ranvier.nn import LIF, BatchNorm, Readout, TimeFolded
from ranvier.nn.normalization import Statistics
from ranvier.nn.structure import Chain, NeuronFactory, Residual, activation, conv_norm, linear


class BlockShape(NamedTuple):
    """Channels and stride of a residual block; `first` marks the first block of a stage."""

    in_channels: int
    out_channels: int
    stride: int
    first: bool

    @property
    def changes(self) -> bool:
        """Whether the output differs in shape from the input, so that the shortcut cannot be the identity."""
        return self.stride != 1 or self.in_channels != self.out_channels


def block_shapes(in_channels: int, widths: Sequence[int], depths: Sequence[int]) -> Iterator[BlockShape]:
    """Shapes of all residual blocks: every stage but the first halves the image in its first block.

    >>> [tuple(shape) for shape in block_shapes(16, widths=(16, 32), depths=(2, 1))]
    [(16, 16, 1, True), (16, 16, 1, False), (16, 32, 2, True)]
    """
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for index in range(depth):
            first = index == 0
            yield BlockShape(in_channels, width, stride=2 if first and stage > 0 else 1, first=first)
            in_channels = width


def resnet9(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    neuron: NeuronFactory = LIF,
    statistics: Statistics = "folded",
) -> Network:
    """ResNet-9, wide and shallow, which learns in few epochs: 64C3-128C3-MP2-R128-256C3-MP2-512C3-MP2-R512-FC.

        R:  y = x + neuron(BN(conv(neuron(BN(conv(x))))))

    Max-pooling takes the largest current, before the neuron; with ReLU that is the pooling of activations. 6.57 million
    parameters for 10 classes and three input channels; images of 8x8 pixels and more.

    Args:
        num_classes: K.
        in_channels: Channels of the images.
        neuron: Activation, called with its channel count.
        statistics: Batch statistics over all steps (`folded`) or each step (`per_step`).

    Returns:
        A network on `[B, C, H, W]` or `[T, B, C, H, W]`.

    Source: Page 2018, "How to Train Your ResNet" (DAWNBench). Differs from it in: spikes of a block are added (as in
    SEW), and the mean over the last 4x4 pixels stands for their maximum, which of spikes would mostly be 1.

    >>> import torch
    >>> resnet9()(torch.zeros(2, 3, 8, 8), steps=2).shape
    torch.Size([2, 2, 10])
    """

    def layer(inputs: int, outputs: int, *, pool: bool) -> list[nn.Module]:
        pooling = [TimeFolded(nn.MaxPool2d(2))] if pool else []
        return [conv_norm(inputs, outputs, statistics=statistics), *pooling, activation(neuron, outputs)]

    def block(width: int) -> Residual:
        return Residual(Chain(*layer(width, width, pool=False), *layer(width, width, pool=False)), Chain())

    layers: list[nn.Module] = [activation(neuron, 64), *layer(64, 128, pool=True), block(128)]
    layers += [*layer(128, 256, pool=True), *layer(256, 512, pool=True), block(512)]
    layers.append(TimeFolded(nn.AdaptiveAvgPool2d(1)))
    return Network(conv_norm(in_channels, 64, statistics=statistics), Chain(*layers), Readout(512, num_classes))


def resnet19(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    neuron: NeuronFactory = LIF,
    statistics: Statistics = "folded",
    v_threshold: float = 0.5,
) -> Network:
    """ResNet-19: stem of 128 channels, 3 blocks of 128, 3 of 256, 2 of 512, a hidden layer of 256, readout.

        y = neuron(BN(conv(neuron(BN(conv(x))))) + shortcut(x))

    12.70 million parameters for 10 classes and three input channels; images of any size.

    Args:
        num_classes: K.
        in_channels: Channels of the images.
        neuron: Activation, called with its channel count.
        statistics: Batch statistics over all steps (`folded`, tdBN, as published) or each step (`per_step`).
        v_threshold: Threshold of the neurons, to whose scale the normalisation brings the currents. Its gain starts at
            `v_threshold`; in the stem, and where two currents add up, at `sqrt(1/2) v_threshold`.

    Returns:
        A network on `[B, C, H, W]` or `[T, B, C, H, W]`.

    Source: Zheng et al. 2021 (tdBN), in the form that Zhao et al. 2025 (temporal consistency) released: the first block
    of every stage normalises its shortcut, in the first stage without a convolution.

    >>> import torch
    >>> resnet19()(torch.zeros(2, 3, 8, 8), steps=4).shape
    torch.Size([4, 2, 10])
    """
    check_positive("v_threshold", v_threshold)
    summand = sqrt(0.5) * v_threshold
    layers: list[nn.Module] = [activation(neuron, 128)]
    for shape in block_shapes(128, widths=(128, 256, 512), depths=(3, 3, 2)):
        shortcut = _shortcut(shape, statistics, summand)
        if shape.first and not shape.changes:
            shortcut = Chain(BatchNorm(shape.out_channels, statistics=statistics, gain=summand))
        layers.append(_block(shape, shortcut, neuron, statistics, gain=v_threshold, summand_gain=summand))
    layers += [
        TimeFolded(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), linear(512, 256)),
        activation(neuron, 256),
    ]
    encoder = conv_norm(in_channels, 128, statistics=statistics, gain=summand)
    return Network(encoder, Chain(*layers), Readout(256, num_classes))


def resnet20(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    neuron: NeuronFactory = LIF,
    statistics: Statistics = "folded",
) -> Network:
    """ResNet-20 for small images: stem of 16 channels, 3 blocks of 16, 3 of 32, 3 of 64, readout.

        y = neuron(BN(conv(neuron(BN(conv(x))))) + shortcut(x))

    0.27 million parameters and 688 neuron channels for 10 classes and three input channels; images of any size.

    Args:
        num_classes: K.
        in_channels: Channels of the images.
        neuron: Activation, called with its channel count.
        statistics: Batch statistics over all steps (`folded`) or each step (`per_step`).

    Returns:
        A network on `[B, C, H, W]` or `[T, B, C, H, W]`.

    Source: He et al. 2016, section 4.2, in the form of Bu et al. 2022 (QCFS). Differs from the former in: where the
    shape changes, the shortcut is a 1x1 convolution with normalisation instead of padding with zeros.

    >>> import torch
    >>> resnet20()(torch.zeros(2, 3, 8, 8), steps=4).shape
    torch.Size([4, 2, 10])
    """
    layers: list[nn.Module] = [activation(neuron, 16)]
    layers += [
        _block(shape, _shortcut(shape, statistics), neuron, statistics)
        for shape in block_shapes(16, widths=(16, 32, 64), depths=(3, 3, 3))
    ]
    layers.append(TimeFolded(nn.AdaptiveAvgPool2d(1)))
    encoder = conv_norm(in_channels, 16, statistics=statistics)
    return Network(encoder, Chain(*layers), Readout(64, num_classes))


def _shortcut(shape: BlockShape, statistics: Statistics, gain: float = 1.0) -> Chain:
    """The identity where that is possible, else a 1x1 convolution with normalisation."""
    if not shape.changes:
        return Chain()
    project = conv_norm(
        shape.in_channels, shape.out_channels, kernel_size=1, stride=shape.stride, statistics=statistics, gain=gain
    )
    return Chain(project)


def _block(
    shape: BlockShape,
    shortcut: Chain,
    neuron: NeuronFactory,
    statistics: Statistics,
    gain: float = 1.0,
    summand_gain: float = 1.0,
) -> Chain:
    """Two convolutions whose current joins that of the shortcut; the sum drives the second neuron."""
    width = shape.out_channels
    branch = Chain(
        conv_norm(shape.in_channels, width, stride=shape.stride, statistics=statistics, gain=gain),
        activation(neuron, width),
        conv_norm(width, width, statistics=statistics, gain=summand_gain),
    )
    return Chain(Residual(branch, shortcut), activation(neuron, width))
