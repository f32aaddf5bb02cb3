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
from ranvier.nn.structure import Activation, Block, Chain

MOST_SIZES = 64
"""Sizes of input of which a pair remembers whether its kernel pays; with more of them they are forgotten."""


def use_convolved_scans(network: nn.Module) -> None:
    """Let convolutions and the neurons behind them, in the chains of a network, be one kernel, in place.

    Modules keep their places and names. Where one is hooked, and where the kernel does not fit an input, they run one
    after the other. It takes a matrix unit (AMX); elsewhere nothing changes.

    Args:
        network: Made ready otherwise, with lean neurons.
    """
    if native_convolved_scan.obstacle() is not None:
        return
    for chain in list(network.modules()):
        if type(chain) is Chain and any(_pairs_of(chain)):
            chain.__class__ = ConvolvedChain


class ConvolvedChain(Chain):
    """A chain that only runs."""

    _parts: "list[tuple[nn.Module, Pair | None]] | None" = None

    @property
    def parts(self) -> "list[tuple[nn.Module, Pair | None]]":
        """The layers, each with the pair that begins with it."""
        if self._parts is None:
            self._parts = list(zip(self.layers, _pairs_of(self), strict=True))
        return self._parts

    def forward(self, x: Tensor, carry: Carry | None = None, added: Tensor | None = None) -> Tensor:
        """Run the layers in order on `[T, B, ...]`; `added` is added to what comes out."""
        index, parts = 0, self.parts
        while index < len(parts):
            layer, pair = parts[index]
            if pair is not None and pair.fits(x):
                index += 2
                ends = index == len(parts)
                x = pair(x, carry, added if ends else None)
                added = None if ends else added
            else:
                index += 1
                x = layer(x, carry) if isinstance(layer, Block) else layer(x)
        return x if added is None else x + added

    @property
    def can_add(self) -> bool:
        """Whether it ends in neurons that may write the sum."""
        return len(self.layers) > 1 and self.parts[-2][1] is not None and not is_hooked(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without the pairs, which a copy finds again."""
        return {**vars(self), "_parts": None}


class Pair:
    """A convolution and the neurons behind it; no module, so that the two stay where they are.

    Args:
        layers: From the layer of the chain to the convolution, each within the one before.
        activation: Of lean neurons.
    """

    def __init__(self, layers: list[nn.Module], activation: Activation) -> None:
        self.conv: Any = layers[-1]
        self.neuron: Any = activation.neuron
        inner = [self.conv.layer] if isinstance(self.conv, Prepacked) else []
        self.watched = [*layers, *inner, activation, self.neuron]
        self.takes = torch.bfloat16 if isinstance(self.conv, Prepacked) else torch.uint8
        self._sizes: dict[torch.Size, bool] = {}
        self._prepared: PreparedConvolvedScan | None = None

    def fits(self, x: Tensor) -> bool:
        """Whether the kernel can run on this input, and pays."""
        if x.ndim != 5 or x.dtype != self.takes or x.device.type != "cpu" or not nobody_watches(x):
            return False
        if any(map(is_hooked, self.watched)):
            return False
        known = self._sizes.get(x.shape)
        if known is None:
            if len(self._sizes) >= MOST_SIZES:
                self._sizes = {}
            filters = self.conv.filters()
            known = filters is not None and pays(x, filters.shape, self.conv.geometry)
            self._sizes[x.shape] = known
        return known

    def __call__(self, x: Tensor, carry: Carry | None, added: Tensor | None) -> Tensor:
        """Spikes and what is added to them, `[T, B, O, H', W']`."""
        if carry is None:
            return self._run(x, None, added, return_state=False)[0]
        return carry.through(lambda state: self._run(x, state, added, return_state=True))

    def _run(self, x: Tensor, state: Any, added: Tensor | None, *, return_state: bool) -> tuple[Tensor, Any]:
        filters: Filters = self.conv.filters()
        scan = self._scan(x, filters, state, added)
        if scan is None:
            spikes, after = self.neuron(unfold_time(self.conv(fold_time(x)), len(x)), state, return_state=True)
            return (spikes if added is None else spikes + added), after
        v = None if state is None else state.v
        rate, excess = self.neuron.learned()
        spikes, end = scan(x, filters, v, rate, excess, added, return_end=return_state)
        return spikes, None if end is None else NeuronState(end)

    def _scan(self, x: Tensor, filters: Filters, state: Any, added: Tensor | None) -> PreparedConvolvedScan | None:
        """The prepared kernel; None where it does not fit, and the neurons say what is wrong if something is."""
        if state is not None and not (isinstance(state, NeuronState) and takes_potential(state.v)):
            return None
        alone = self.neuron.prepared(filters.like)
        if alone is None:
            return None
        scan = self._prepared
        if scan is None or scan.kind is not alone.kind or scan.sends_bytes != alone.sends_bytes:
            scan = self._prepared = PreparedConvolvedScan(alone.kind, self.conv.geometry, alone.sends_bytes)
        if state is None and added is None:
            return scan
        shape = scan.shape(x, filters)
        adds = added is None or (added.shape == shape and added.dtype == scan.dtype)
        return scan if adds and (state is None or state.v.shape == shape[1:]) else None


def _pairs_of(chain: Chain) -> list[Pair | None]:
    layers = list(chain.layers)
    return [*map(_pair_of, layers, layers[1:]), None][: len(layers)]


def _pair_of(layer: nn.Module, behind: nn.Module) -> Pair | None:
    """The pair of a layer that only holds a convolution and the neurons behind it; None if they are something else."""
    if type(behind) is not Activation or not isinstance(behind.neuron, LeanScan):
        return None
    layers = [layer]
    while type(layers[-1]) in (nn.Sequential, TimeFolded) and len(layers[-1]) == 1:  # type: ignore[arg-type]
        layers.append(layers[-1][0])  # type: ignore[index]
    conv, folded = layers[-1], any(type(each) is TimeFolded for each in layers)
    known = isinstance(conv, ByteConv2d) or (isinstance(conv, Prepacked) and conv.layer.weight.dtype == torch.bfloat16)
    return Pair(layers, behind) if folded and known else None
