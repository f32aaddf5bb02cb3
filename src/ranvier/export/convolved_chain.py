"""Chains of networks that only run, in which a convolution and the neurons behind it are one kernel."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ranvier.export.convolved_neurons import ConvolvedNeurons, can_be_one
from ranvier.export.prepacked import Prepacked
from ranvier.nn import Carry, TimeFolded
from ranvier.nn.hooks import is_hooked
from ranvier.nn.structure import Activation, Chain, run_part


def use_convolved_scans(network: nn.Module) -> None:
    """Let convolutions and the neurons behind them, in the chains of a network, be one kernel, in place.

    Modules keep their places and names, and may be replaced. Where one is hooked, or is no convolution of bfloat16 or
    bytes any more, and where a compiler or gradients watch, they run one after the other: currents are rounded to
    bfloat16 then, and single spikes differ. It takes a matrix unit (AMX); elsewhere nothing changes.

    Args:
        network: Made ready otherwise, with lean neurons.
    """
    for chain in list(network.modules()):
        if type(chain) is Chain and any(map(_pair_of, chain.layers, list(chain.layers)[1:])):
            chain.__class__ = ConvolvedChain


class ConvolvedChain(Chain):
    """A chain that only runs."""

    _known: "tuple[list[nn.Module], list[Pair | None]]" = [], []

    def pairs(self) -> "list[Pair | None]":
        """For each layer, the pair that begins with it."""
        if torch.compiler.is_compiling():
            return [None] * len(self.layers)
        layers, pairs = self._known
        if layers != list(self.layers._modules.values()) or not all(pair is None or pair.is_there() for pair in pairs):
            layers = list(self.layers)
            pairs = [*map(_pair_of, layers, layers[1:]), None][: len(layers)]
            self._known = layers, pairs
        return pairs

    def forward(self, x: Tensor, carry: Carry | None = None, added: Tensor | None = None) -> Tensor:
        """Run the layers in order on `[T, B, ...]`; `added` is added to what comes out."""
        pairs, layers, index = self.pairs(), list(self.layers), 0
        while index < len(layers):
            pair = pairs[index]
            filters = None if pair is None else pair.filters_for(x)
            if pair is None or filters is None:
                x = run_part(layers[index], x, carry)
                index += 1
                continue
            index += 2
            ends = index == len(layers)
            x = pair.run(x, filters, carry, added=added if ends else None)
            added = None if ends else added
        return x if added is None else x + added

    @property
    def can_add(self) -> bool:
        """Whether it ends in neurons that may write the sum."""
        return len(self.layers) > 1 and self.pairs()[-2] is not None and not is_hooked(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without the pairs, which a copy finds again."""
        return {name: value for name, value in vars(self).items() if name != "_known"}


class Pair(ConvolvedNeurons):
    """A convolution and the neurons behind it, where they were found.

    Args:
        layers: From the layer of the chain to the convolution, each the only one within the one before.
        activation: Of lean neurons.
    """

    def __init__(self, layers: list[nn.Module], activation: Activation) -> None:
        conv, neuron = layers[-1], activation.neuron
        super().__init__(conv, neuron, (*layers[:-1], activation))
        inside = conv.layer if isinstance(conv, Prepacked) else None
        held = [*pairwise([*layers, *([] if inside is None else [inside])]), (activation, neuron)]
        self._within = [(parent._modules, [child]) for parent, child in held]

    def is_there(self) -> bool:
        """Whether modules are where they were found."""
        return all(list(modules.values()) == found for modules, found in self._within)


def _pair_of(layer: nn.Module, behind: nn.Module) -> Pair | None:
    """The pair of a layer that only holds a convolution and the neurons behind it; None if they are something else."""
    layers = [layer]
    while type(layers[-1]) in (nn.Sequential, TimeFolded) and len(layers[-1]) == 1:  # type: ignore[arg-type]
        layers.append(layers[-1][0])  # type: ignore[index]
    if type(behind) is not Activation or not can_be_one(layers[-1], behind.neuron):
        return None
    return Pair(layers, behind) if any(type(each) is TimeFolded for each in layers) else None
