"""How layers and neurons are put together: a block hands carried states on, everything else is an ordinary layer."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ranvier.checks import shape_of
from ranvier.nn.hooks import is_hooked
from ranvier.nn.neurons import IF, LIF, LIFB, PLIF
from ranvier.nn.normalization import BatchNorm, Statistics
from ranvier.nn.normalized import normalized
from ranvier.nn.recompute import recomputed
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
        if isinstance(neuron, nn.ReLU | nn.ReLU6) and not isinstance(neuron.inplace, bool):
            neuron.inplace = False  # type: ignore[unreachable]  # `neuron=nn.ReLU` was given the number of channels
        self.neuron = neuron

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        """Map currents `[T, B, ...]` to spikes `[T, B, ...]`."""
        return fire(self.neuron, x, carry)


def activation(neuron: NeuronFactory, num_channels: int) -> Activation:
    """What `neuron` builds for so many channels, as a block.

    Raises:
        TypeError: `neuron` builds no module: a name, a neuron instead of its class, or a function of something else.
    """
    is_one = isinstance(neuron, nn.Module) and type(neuron).__call__ is nn.Module.__call__
    built = neuron(num_channels) if callable(neuron) and not is_one else None
    if not isinstance(built, nn.Module):
        came = repr(neuron) if built is None else f"{neuron!r}, which made a {type(built).__name__}"
        raise TypeError(
            f"neuron is {came}, but must make a module from a channel count. Pass a class, neuron=LIF, or a function, "
            "neuron=lambda channels: LIF(channels, tau=4.0)."
        )
    return Activation(built)


class Chain(Block):
    """Layers and blocks one after the other.

    Attributes:
        recompute: Whether a normalisation before an activation is computed again in backward instead of kept, where the
            two are not one operator, which keeps neither. It has no effect on values, nor while states are carried or
            the network is compiled.
    """

    recompute = False

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, carry: Carry | None = None, added: Tensor | None = None) -> Tensor:
        """Run the layers in order on `[T, B, ...]`; `added` is added to what comes out, where neurons write it."""
        layers = list(self.layers)
        while layers:
            layer = layers.pop(0)
            norm = _last_norm(layer) if carry is None and layers else None
            if norm is None or not _is_plain(layers[0]):
                x = run_part(layer, x, carry)
                continue
            for part in list(layer._modules.values())[:-1]:  # children() would leave out what is there twice
                assert part is not None
                x = part(x)
            activation = layers.pop(0)
            assert isinstance(activation, Activation)
            x = self._fire(norm, activation, x, None if layers else added)
            added = added if layers else None
        return x if added is None else x + added

    @property
    def can_add(self) -> bool:
        """Whether it ends in a normalisation in training and neurons, which may be one operator that adds."""
        ends = len(self.layers) > 1 and _last_norm(self.layers[-2]) is not None and _is_plain(self.layers[-1])
        return type(self) is Chain and ends and not is_hooked(self)

    def _fire(self, norm: BatchNorm, activation: Activation, x: Tensor, added: Tensor | None) -> Tensor:
        """A normalisation in training and the neurons behind it."""
        spikes = normalized(norm, activation.neuron, x, added)
        if spikes is not None:
            return spikes
        if self.recompute and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            spikes = recomputed(norm, activation, x)
        else:
            spikes = run_part(activation, norm(x), None)
        return spikes if added is None else spikes + added


class Residual(Block):
    """A branch and a shortcut from one input, added: `y = branch(x) + shortcut(x)`.

    What is added, currents or spikes, depends on whether the two end in a neuron. An empty `Chain()` is the identity.
    """

    def __init__(self, branch: Block, shortcut: Block) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        """Run the branch, then the shortcut, on `[T, B, ...]`; the other way round where neurons write the sum."""
        if carry is None and isinstance(self.branch, Chain) and self.branch.can_add:
            return self.branch(x, added=self.shortcut(x))
        return self.branch(x, carry) + self.shortcut(x, carry)


class Concat(Block):
    """Branches from one input side by side: their outputs are concatenated along the channels.

        y[:, :, offset_i : offset_i + C_i] = branch_i(x),    offset_i = C_1 + ... + C_(i-1)

    Branches run, carry states and are concatenated in the order in which they are given. An empty `Chain()` or an
    `nn.Identity()` hands the input itself on. As in `Residual`, currents or spikes may come out, here also both.

    Args:
        branches: Blocks or ordinary layers, at least one, `[T, B, C, ...]` to `[T, B, C_i, ...]`. All axes but that of
            the channels have to agree.

    Raises:
        ValueError: No branches; in a call, outputs without channels or of sizes that do not fit.

    Source: Szegedy et al. 2015 (Inception); with an identity branch Huang et al. 2017 (DenseNet).

    >>> wider = Concat(Chain(), conv_norm(8, 4))
    >>> wider(torch.zeros(2, 3, 8, 5, 5)).shape
    torch.Size([2, 3, 12, 5, 5])
    """

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        if not branches:
            raise ValueError(
                "Concat got no branches, but concatenates at least one. Pass them: Concat(Chain(), layer)."
            )
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        """Run the branches in order on `[T, B, C, ...]`."""
        outputs = [run_part(branch, x, carry) for branch in self.branches]
        first = outputs[0].shape
        if len(first) < 3 or any((y.shape[:2], y.shape[3:]) != (first[:2], first[3:]) for y in outputs):
            raise ValueError(
                f"the branches of Concat give shapes {', '.join(map(shape_of, outputs))}, but must give "
                "[T, B, C, ...] that differ in C at most. Give all branches the same stride and padding."
            )
        return torch.cat(outputs, 2)


def _last_norm(layer: nn.Module) -> BatchNorm | None:
    """The batch normalisation in training that a plain sequence of layers ends with."""
    if type(layer) is not nn.Sequential or len(layer) == 0 or is_hooked(layer):
        return None
    last = layer[-1]
    return last if type(last) is BatchNorm and last.training and not is_hooked(last) else None


def _is_plain(layer: nn.Module) -> bool:
    """Whether a second call on the same input gives the same output: neurons of this library, without hooks."""
    plain = type(layer) is Activation and type(layer.neuron) in (IF, LIF, PLIF, LIFB)
    return plain and not any(is_hooked(part) for part in layer.modules())


def run_part(part: nn.Module, x: Tensor, carry: Carry | None) -> Tensor:
    """Run a block, which takes the carry, or an ordinary layer, which has no state."""
    y: Tensor = part(x, carry) if isinstance(part, Block) else part(x)
    return y


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
