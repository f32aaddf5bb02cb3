"""Chains of networks that only run, in which a convolution and the neurons behind it are one kernel."""

from typing import Any

import torch
from torch import Tensor, nn

from ranvier.dynamics import NeuronState
from ranvier.export.byte_spikes import ByteConv2d
from ranvier.export.lean_neurons import LeanScan, takes_potential
from ranvier.export.prepacked import Prepacked
from ranvier.kernels import native_convolved_scan
from ranvier.kernels.fused_scan import nobody_watches
from ranvier.kernels.native_convolved_scan import Filters, PreparedConvolvedScan, pays
from ranvier.nn import Carry, TimeFolded, fold_time, unfold_time
from ranvier.nn.hooks import is_hooked
from ranvier.nn.structure import Activation, Chain, run_part

MOST_SIZES = 64
"""Sizes of input of which a pair remembers whether its kernel pays; with more of them they are forgotten."""


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
            x = pair.run(x, filters, carry, added if ends else None)
            added = None if ends else added
        return x if added is None else x + added

    @property
    def can_add(self) -> bool:
        """Whether it ends in neurons that may write the sum."""
        return len(self.layers) > 1 and self.pairs()[-2] is not None and not is_hooked(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without the pairs, which a copy finds again."""
        return {name: value for name, value in vars(self).items() if name != "_known"}


class Pair:
    """A convolution and the neurons behind it; no module, so that the two stay where they are.

    Args:
        layers: From the layer of the chain to the convolution, each the only one within the one before.
        activation: Of lean neurons.
    """

    def __init__(self, layers: list[nn.Module], activation: Activation) -> None:
        self.conv: Any = layers[-1]
        self.neuron: Any = activation.neuron
        parents = [*layers, activation]
        children = [*layers[1:], None, self.neuron]
        if isinstance(self.conv, Prepacked):
            children[len(layers) - 1] = self.conv.layer
        self._within = [
            (parent._modules, [child]) for parent, child in zip(parents, children, strict=True) if child is not None
        ]
        self._watched = [*parents, *(child for child in children if child is not None)]
        self._takes = torch.bfloat16 if isinstance(self.conv, Prepacked) else torch.uint8
        self._pays: dict[tuple[torch.Size, torch.Size], bool] = {}
        self._scan: PreparedConvolvedScan | None = None

    def is_there(self) -> bool:
        """Whether modules are where they were found."""
        return all(list(modules.values()) == found for modules, found in self._within)

    def filters_for(self, x: Tensor) -> Filters | None:
        """What the kernel needs to know of the convolution; None where it does not fit this input, or does not pay."""
        if x.ndim != 5 or x.dtype != self._takes or x.device.type != "cpu" or not nobody_watches(x) or x.numel() == 0:
            return None
        if any(map(is_hooked, self._watched)) or not self.neuron.is_native:
            return None
        sizes = x.shape[2:], self.conv.shape
        known = self._pays.get(sizes)
        if known is None:
            if len(self._pays) >= MOST_SIZES:
                self._pays = {}
            known = self._pays[sizes] = pays(*sizes, self.conv.geometry)
        return self.conv.filters() if known else None

    def run(self, x: Tensor, filters: Filters, carry: Carry | None, added: Tensor | None) -> Tensor:
        """Spikes and what is added to them, `[T, B, O, H', W']`."""
        if carry is None:
            return self._run(x, filters, None, added, return_state=False)[0]
        return carry.through(lambda state: self._run(x, filters, state, added, return_state=True))

    def _run(
        self, x: Tensor, filters: Filters, state: Any, added: Tensor | None, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        scan = self._prepared(x, filters, state, added)
        if scan is None:
            spikes, after = self.neuron(unfold_time(self.conv(fold_time(x)), len(x)), state, return_state=True)
            return (spikes if added is None else spikes + added), after
        v = None if state is None else state.v
        rate, excess = self.neuron.learned()
        spikes, end = scan(x, filters, v, rate, excess, added, return_end=return_state)
        return spikes, None if end is None else NeuronState(end)

    def _prepared(self, x: Tensor, filters: Filters, state: Any, added: Tensor | None) -> PreparedConvolvedScan | None:
        """The prepared kernel; None where it does not fit, and the neurons say what is wrong if something is."""
        if state is not None and not (isinstance(state, NeuronState) and takes_potential(state.v)):
            return None
        alone = self.neuron.prepared(filters.like)
        if alone is None:
            return None
        scan, geometry = self._scan, self.conv.geometry
        if scan is None or (scan.kind, scan.sends_bytes, scan.geometry) != (alone.kind, alone.sends_bytes, geometry):
            scan = self._scan = PreparedConvolvedScan(alone.kind, geometry, alone.sends_bytes)
        if state is None and added is None:
            return scan
        shape = scan.shape(x, filters)
        adds = added is None or (added.shape == shape and added.dtype == scan.dtype)
        return scan if adds and (state is None or state.v.shape == shape[1:]) else None


def _pair_of(layer: nn.Module, behind: nn.Module) -> Pair | None:
    """The pair of a layer that only holds a convolution and the neurons behind it; None if they are something else."""
    if native_convolved_scan.obstacle() is not None:
        return None
    if type(behind) is not Activation or not isinstance(behind.neuron, LeanScan):
        return None
    layers = [layer]
    while type(layers[-1]) in (nn.Sequential, TimeFolded) and len(layers[-1]) == 1:  # type: ignore[arg-type]
        layers.append(layers[-1][0])  # type: ignore[index]
    conv, folded = layers[-1], any(type(each) is TimeFolded for each in layers)
    known = isinstance(conv, ByteConv2d) or (isinstance(conv, Prepacked) and conv.layer.weight.dtype == torch.bfloat16)
    return Pair(layers, behind) if folded and known else None
