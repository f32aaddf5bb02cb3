"""Networks that compute exactly: weights, images and thresholds are multiples of small powers of two.

Sums of few such numbers are exact in float32, in whatever order and batch they are added, so that what should be the
same is the same bit for bit, ties included.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ranvier.conversion import ConvertedSNN, observe, trace
from ranvier.conversion.spiking import spiking
from ranvier.conversion.vocabulary import SITES
from ranvier.nn import ConvertedIF


def dyadic(*shape: int, seed: int = 0, low: int = -8, high: int = 8) -> Tensor:
    """Multiples of 1/8 from `low` / 8 to `high` / 8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator) / 8


def images(*shape: int, seed: int = 100) -> Tensor:
    """Multiples of 1/8 in [0, 1]."""
    return dyadic(*shape, seed=seed, low=0)


def exact(ann: nn.Module, seed: int = 0) -> nn.Module:
    """Give a network random weights that are multiples of 1/8, in evaluation mode."""
    with torch.no_grad():
        for number, parameter in enumerate(ann.parameters()):
            parameter.copy_(dyadic(*parameter.shape, seed=1000 * seed + number))
    return ann.eval()


def twins(ann: nn.Module, x: Tensor, *, steps: int = 4, signed: bool = False) -> tuple[fx.GraphModule, ConvertedSNN]:
    """The traced ANN and its spiking network, each threshold the power of two at or above the largest activation."""
    graph = trace(ann, x)
    sites = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    sites = [name for name in sites if isinstance(graph.get_submodule(name), SITES)]
    with torch.no_grad():
        tops = {name: seen.top for name, seen in observe(graph, sites, [x]).items()}
    network = spiking(graph, {name: ConvertedIF(len(top), signed=signed) for name, top in tops.items()})
    snn = ConvertedSNN(network, steps, x.ndim)
    for name, neuron in snn.neurons.items():
        neuron.threshold.copy_(tops[name].clamp_min(1 / 8).log2().ceil().exp2())
        neuron.v_init.copy_(neuron.threshold / 2)
    return graph, snn


class Net(nn.Module):
    """Something on images `[B, 2, 6, 6]`; `self.act` is its only activation."""

    def __init__(self) -> None:
        super().__init__()
        self.act: Callable[[Tensor], Tensor] = F.relu
        self.enter = nn.Conv2d(2, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def end(self, x: Tensor) -> Tensor:
        return self.head(x.sum((2, 3)))  # a mean would divide by 36, which is no power of two


class Plain(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.act(self.conv(self.act(self.enter(x)))))


class Residual(Net):
    """A sum after the activation."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.enter(x))
        return self.end(self.act(self.conv(x)) + x)


class Twice(nn.Module):
    """One activation, and one layer, in several places."""

    def __init__(self) -> None:
        super().__init__()
        self.act: Callable[[Tensor], Tensor] = nn.ReLU(inplace=True)
        self.enter, self.same, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.enter(x))
        for _ in range(3):
            x = self.act(self.same(x))
        return self.head(x)


class Joined(Net):
    """What comes from the image alone is joined to what spikes, before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        still = self.enter(x)
        spikes = self.act(self.conv(still))
        return self.end(self.act(self.mix(torch.cat([still, spikes], 1))))


class SkipFromInput(Net):
    """The image itself enters a later sum, and the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(4, 2, 1)
        self.last = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(self.act(self.enter(x))) + x
        y = self.act(y) + x
        return self.last(y.sum((2, 3)))


class Constants(Net):
    """Constants of all ranks scale and shift the image, currents and activations."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", dyadic(1, 2, 1, 1, seed=7))
        self.register_buffer("gain", dyadic(4, 1, 1, seed=8))
        self.register_buffer("map", dyadic(1, 4, 6, 6, seed=9))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.enter(x - self.shift) * self.gain + 0.5)
        return self.end(self.act(self.conv(x) + self.map) * 2 - self.gain)


NETS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "plain": (Plain, (2, 6, 6)),
    "residual": (Residual, (2, 6, 6)),
    "twice": (Twice, (6,)),
    "joined": (Joined, (2, 6, 6)),
    "skip_from_input": (SkipFromInput, (2, 6, 6)),
    "constants": (Constants, (2, 6, 6)),
}
"""Class and shape of an image by name. `exact(kind())` is the network."""
