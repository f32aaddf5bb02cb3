"""How layers and neurons are put together: a block hands carried states on, everything else is an ordinary layer."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from ranvier.nn.normalization import BatchNorm, Statistics
from ranvier.nn.time import Carry, TimeFolded, fire

NeuronFactory = Callable[[int], nn.Module]
"""Builds the activation for a channel count: a neuron class, or `lambda channels: LIFB(channels, burst_init=1.0)`."""


class Block(nn.Module, ABC):
    """A part of a network that contains neurons. Its `forward` hands the carry to them in a fixed order."""

    @abstractmethod
    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        """Map `[T, B, ...]` to `[T, B, ...]`."""


class Activation(Block):
    """Any activation as a block: a neuron of `ranvier.nn`, or a stateless one such as `nn.ReLU`."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        """Map currents `[T, B, ...]` to spikes `[T, B, ...]`."""
        return fire(self.neuron, x, carry)


class Chain(Block):
    """Layers and blocks one after the other."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        """Run the layers in order on `[T, B, ...]`."""
        for layer in self.layers:
            x = layer(x, carry) if isinstance(layer, Block) else layer(x)
        return x


class Residual(Block):
    """A branch and a shortcut from one input, added: `y = branch(x) + shortcut(x)`.

    What is added, currents or spikes, depends on whether the two end in a neuron. An empty `Chain()` is the identity.
    """

    def __init__(self, branch: Block, shortcut: Block) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        """Run the branch, then the shortcut, on `[T, B, ...]`."""
        return self.branch(x, carry) + self.shortcut(x, carry)


def linear(in_features: int, out_features: int, *, scale: float = 2.0) -> nn.Linear:
    """Linear layer that feeds neurons without a normalisation between.

    Weights start at N(0, scale^2 / in_features), biases at 0. Spikes are sparse and a leaky neuron halves its current,
    so at PyTorch's usual start, 3.5 times smaller, the second such layer of a network would not fire at all. Analog
    inputs of unit variance need less than spikes: sqrt(2).
    """
    layer = nn.Linear(in_features, out_features)
    nn.init.normal_(layer.weight, std=scale / math.sqrt(in_features))
    nn.init.zeros_(layer.bias)
    return layer


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    *,
    stride: int = 1,
    statistics: Statistics = "folded",
    gain: float = 1.0,
) -> nn.Sequential:
    """Convolution without bias that keeps the image size (at stride 1), then normalisation, on `[T, B, C, H, W]`."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(TimeFolded(conv), BatchNorm(out_channels, statistics=statistics, gain=gain))
