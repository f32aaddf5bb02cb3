"""Multilayer perceptron."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from ranvier.models.network import Network
from ranvier.nn import LIF, Readout, TimeFolded
from ranvier.nn.structure import Chain, NeuronFactory, activation, linear


def mlp(sizes: Sequence[int], *, neuron: NeuronFactory = LIF) -> Network:
    """Fully connected network.

    Args:
        sizes: Features of the input, of each hidden layer, and number of classes: `[64, 32, 10]`.
        neuron: Activation of the hidden layers, called with their width.

    Returns:
        A network on `[B, K]` or images `[B, C, H, W]` (flattened), or on sequences of either.

    >>> import torch
    >>> mlp([64, 32, 10])(torch.zeros(5, 64), steps=4).shape
    torch.Size([4, 5, 10])
    """
    if len(sizes) < 3:
        raise ValueError(
            f"sizes is {list(sizes)}, but a spiking MLP needs input, at least one hidden layer, and classes: "
            "[64, 32, 10]."
        )
    first, *hidden, num_classes = sizes
    widths = list(hidden)
    layers: list[nn.Module] = [activation(neuron, widths[0])]
    for narrow, wide in pairwise(widths):
        layers += [TimeFolded(linear(narrow, wide)), activation(neuron, wide)]
    encoder = TimeFolded(nn.Flatten(1), linear(first, widths[0], scale=math.sqrt(2)))
    return Network(encoder, Chain(*layers), Readout(widths[-1], num_classes), frame_dims=(2, 4))
