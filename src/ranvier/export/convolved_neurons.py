"""A convolution and the neurons behind it, in networks that only run: one kernel where it fits and pays, else two."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ranvier.dynamics import NeuronState
from ranvier.dynamics.converted import check_converted, check_num_channels
from ranvier.export.byte_spikes import ByteConv2d
from ranvier.export.lean_neurons import LeanConvertedIF, LeanScan, takes_potential
from ranvier.export.prepacked import Prepacked
from ranvier.kernels import converted, native_convolved_scan
from ranvier.kernels.converted import Converted
from ranvier.kernels.fused_scan import nobody_watches
from ranvier.kernels.native_convolved_scan import (
    Filters,
    PreparedConvolvedConverted,
    PreparedConvolvedScan,
    pays,
)
from ranvier.nn import Carry, fold_time, unfold_time
from ranvier.nn.hooks import is_hooked

P = TypeVar("P", PreparedConvolvedScan, PreparedConvolvedConverted)

MOST_SIZES = 64
"""Sizes of input of which it is remembered whether the kernel pays; with more of them they are forgotten."""


def can_be_one(conv: nn.Module | None, neuron: nn.Module | None) -> bool:
    """Whether a convolution and neurons may be one kernel on this machine, whatever comes."""
    if native_convolved_scan.obstacle() is not None or not isinstance(neuron, LeanScan | LeanConvertedIF):
        return False
    return isinstance(conv, ByteConv2d) or (isinstance(conv, Prepacked) and conv.layer.weight.dtype == torch.bfloat16)


def current_of(conv: nn.Module, x: Tensor, joined: Tensor | None) -> Tensor:
    """What neurons get, `[T, B, O, H', W']`, of a convolution that runs alone on `[T, B, C, H, W]`."""
    current = unfold_time(conv(fold_time(x)), len(x))
    return current if joined is None else current + joined


class ConvolvedNeurons:
    """A convolution and the neurons behind it; no module, so that the two stay where they are.

    Args:
        conv: Of `can_be_one`, as is `neuron`.
        neuron: Lean.
        around: Other modules that see what goes in or comes out of the two.
    """

    def __init__(self, conv: nn.Module, neuron: nn.Module, around: tuple[nn.Module, ...] = ()) -> None:
        self.conv: Any = conv
        self.neuron: Any = neuron
        self._watched = [*around, conv, *conv.children(), neuron]
        self._takes = torch.bfloat16 if isinstance(conv, Prepacked) else torch.uint8
        self._pays: dict[tuple[torch.Size, torch.Size], bool] = {}
        self._kernel: tuple[Any, ...] = (None,)

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

    def run(
        self,
        x: Tensor,
        filters: Filters,
        carry: Carry | None,
        added: Tensor | None = None,
        joined: Tensor | None = None,
    ) -> Tensor:
        """Spikes and what is added to them, `[T, B, O, H', W']`.

        Args:
            x: `[T, B, C, H, W]`.
            filters: From `filters_for`.
            carry: Of the network.
            added: What is sent beside the spikes, or None; not by converted neurons.
            joined: What the neurons get beside the convolution, or None.
        """
        if carry is None:
            return self._run(x, filters, None, added, joined, return_state=False)[0]
        return carry.through(lambda state: self._run(x, filters, state, added, joined, return_state=True))

    def _run(
        self,
        x: Tensor,
        filters: Filters,
        state: Any,
        added: Tensor | None,
        joined: Tensor | None,
        *,
        return_state: bool,
    ) -> tuple[Tensor, Any]:
        find = self._converted if isinstance(self.neuron, LeanConvertedIF) else self._scanned
        found = find(x, filters, state, added, joined, return_state)
        if found is not None:
            return found
        spikes, after = self.neuron(current_of(self.conv, x, joined), state, return_state=True)
        return (spikes if added is None else spikes + added), after

    def _scanned(
        self, x: Tensor, filters: Filters, state: Any, added: Tensor | None, joined: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Any] | None:
        """By the kernel; None where it does not fit, and the neurons say what is wrong if something is."""
        if state is not None and not (isinstance(state, NeuronState) and takes_potential(state.v)):
            return None
        alone = self.neuron.prepared(filters.like)
        if alone is None:
            return None
        kernel = self._prepared(PreparedConvolvedScan, alone.kind, self.conv.geometry, alone.sends_bytes)
        shape = kernel.shape(x, filters)
        if not _fits(joined, shape, torch.bfloat16) or not _fits(added, shape, kernel.dtype):
            return None
        if state is not None and state.v.shape != shape[1:]:
            return None
        v = None if state is None else state.v
        rate, excess = self.neuron.learned()
        spikes, end = kernel(x, filters, v, rate, excess, added=added, joined=joined, return_end=return_state)
        return spikes, None if end is None else NeuronState(end)

    def _converted(
        self, x: Tensor, filters: Filters, state: Any, added: Tensor | None, joined: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Any] | None:
        """As `_scanned`, of converted neurons."""
        neuron = self.neuron
        kind = neuron.signed, neuron.binary
        kernel = self._prepared(PreparedConvolvedConverted, *kind, self.conv.geometry, neuron.sends_bytes)
        shape = kernel.shape(x, filters)
        current = filters.like.new_empty(()).expand(shape)  # what the neurons get, but for its values
        neurons = Converted(neuron.threshold, neuron.bias, neuron.v_init, *kind)
        if added is not None or not _fits(joined, shape, torch.bfloat16):
            return None
        if converted.unfit(current, state, neurons) is not None:
            return None
        check_converted(current, state, neurons.bias, neurons.v_init, neurons.signed)
        check_num_channels("threshold", neurons.threshold, current)
        return kernel(x, filters, state, neurons, joined, return_state=return_state)

    def _prepared(self, make: type[P], *settings: Any) -> P:
        """The kernel with these settings, made again when they change."""
        kernel, *made_for = self._kernel
        if tuple(made_for) != settings:
            kernel = make(*settings)
            self._kernel = kernel, *settings
        found: P = kernel
        return found


def _fits(beside: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> bool:
    return beside is None or (beside.shape == shape and beside.dtype == dtype and nobody_watches(beside))
