"""Plain convolutional networks: VGGSNN, SNN6, VGG16, and any layout of the same kind."""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from ranvier.models.network import Network
from ranvier.nn import LIF, Readout, TimeFolded
from ranvier.nn.normalization import Statistics
from ranvier.nn.structure import Chain, NeuronFactory, activation, conv_norm, linear

Layout = Sequence[int | Literal["A"]]
"""Channels of a 3x3 convolution with normalisation and neuron, or `"A"` for 2x2 average pooling."""

CONV4_LAYOUT: Layout = (32, "A", 64, "A", 128, 128, "A")
VGGSNN_LAYOUT: Layout = (64, 128, "A", 256, 256, "A", 512, 512, "A", 512, 512, "A")
SNN6_LAYOUT: Layout = (64, 128, "A", 256, "A", 512, "A", 512, "A")
VGG16_LAYOUT: Layout = (64, 64, "A", 128, 128, "A", 256, 256, 256, "A", 512, 512, 512, "A", 512, 512, 512, "A")


def vgg(
    layout: Layout,
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    hidden: Sequence[int] = (),
    neuron: NeuronFactory = LIF,
    statistics: Statistics = "per_step",
    gain: float = 1.0,
) -> Network:
    """Convolutions and poolings as `layout` says, then a linear readout.

    Args:
        layout: Channels of each convolution, `"A"` where to pool; starts with a convolution.
        num_classes: K.
        in_channels: Channels of the images.
        image_size: Height and width of the images.
        hidden: Widths of fully connected layers with neurons before the readout.
        neuron: Activation, called with its channel count.
        statistics: Batch statistics over all steps (`folded`, tdBN) or each step (`per_step`, as published).
        gain: Initial scale of the normalisation; tdBN uses `alpha * v_threshold`.

    Returns:
        A network on `[B, C, H, W]` or `[T, B, C, H, W]`.

    Raises:
        ValueError: The layout does not start with a convolution, or pools the image away.

    >>> import torch
    >>> net = vgg((8, "A", 16, "A"), num_classes=10, in_channels=1, image_size=8)
    >>> net(torch.zeros(2, 1, 8, 8), steps=4).shape
    torch.Size([4, 2, 10])
    """
    if not layout or layout[0] == "A":
        raise ValueError(f"layout is {list(layout)}, but must start with the channels of a convolution.")
    side = image_size // 2 ** list(layout).count("A")
    if side < 1:
        raise ValueError(
            f"layout pools {list(layout).count('A')} times, which leaves nothing of a {image_size}x{image_size} image. "
            "Use fewer poolings or larger images."
        )
    first, *rest = layout
    channels = int(first)
    encoder = conv_norm(in_channels, channels, statistics=statistics, gain=gain)
    layers: list[nn.Module] = [activation(neuron, channels)]
    for entry in rest:
        if entry == "A":
            layers.append(TimeFolded(nn.AvgPool2d(2)))
        else:
            width = int(entry)
            layers += [
                conv_norm(channels, width, statistics=statistics, gain=gain),
                activation(neuron, width),
            ]
            channels = width
    features = channels * side * side
    layers.append(TimeFolded(nn.Flatten(1)))
    for width in hidden:
        layers += [TimeFolded(linear(features, width)), activation(neuron, width)]
        features = width
    return Network(encoder, Chain(*layers), Readout(features, num_classes), image_size=image_size)


def vggsnn(
    num_classes: int = 10,
    in_channels: int = 2,
    *,
    image_size: int = 48,
    neuron: NeuronFactory = LIF,
    statistics: Statistics = "per_step",
    gain: float = 1.0,
) -> Network:
    """VGGSNN: 64C3-128C3-AP2-256C3-256C3-AP2-512C3-512C3-AP2-512C3-512C3-AP2-FC.

    9.27 million parameters for 10 classes and two input channels of 48x48. Arguments as in `vgg`.

    Source: Deng et al. 2022 (TET); Zhao et al. 2025 (temporal consistency).
    """
    return vgg(
        VGGSNN_LAYOUT,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        neuron=neuron,
        statistics=statistics,
        gain=gain,
    )


def snn6(
    num_classes: int = 10,
    in_channels: int = 2,
    *,
    image_size: int = 48,
    neuron: NeuronFactory = LIF,
    statistics: Statistics = "per_step",
    gain: float = 1.0,
) -> Network:
    """SNN6, also called SNN7 or VGG7: 64C3-128C3-AP2-256C3-AP2-512C3-AP2-512C3-AP2-FC.

    3.96 million parameters for 10 classes and two input channels of 48x48. Arguments as in `vgg`.

    Source: Shen et al. 2025 (burst neuron).
    """
    return vgg(
        SNN6_LAYOUT,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        neuron=neuron,
        statistics=statistics,
        gain=gain,
    )


def vgg16(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    image_size: int = 32,
    hidden: Sequence[int] = (4096, 4096),
    neuron: NeuronFactory = LIF,
    statistics: Statistics = "per_step",
    gain: float = 1.0,
) -> Network:
    """VGG16 with batch normalisation and average pooling: 13 convolutions, two hidden layers of 4096, readout.

    Arguments as in `vgg`.

    Source: Simonyan & Zisserman 2015, configuration D, in the CIFAR form of Bu et al. 2022 (QCFS).
    """
    return vgg(
        VGG16_LAYOUT,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        hidden=hidden,
        neuron=neuron,
        statistics=statistics,
        gain=gain,
    )


def conv4(
    num_classes: int = 10,
    in_channels: int = 1,
    *,
    image_size: int = 28,
    neuron: NeuronFactory = LIF,
    statistics: Statistics = "folded",
    gain: float = 1.0,
) -> Network:
    """Four convolutions for a CPU: 32C3-AP2-64C3-AP2-128C3-128C3-AP2-FC.

    14.7 million multiply-accumulates a step for 28x28 images of one channel. Arguments as in `vgg`.
    """
    return vgg(
        CONV4_LAYOUT,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        neuron=neuron,
        statistics=statistics,
        gain=gain,
    )
