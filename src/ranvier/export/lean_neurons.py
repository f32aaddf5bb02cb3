"""Neurons of networks that only run: the same spikes and states, with less work around the kernel of each call."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ranvier import dynamics
from ranvier.dynamics import NeuronState
from ranvier.dynamics.converted import check_converted, check_num_channels
from ranvier.dynamics.scan import check_scan
from ranvier.kernels import converted
from ranvier.kernels.converted import Converted
from ranvier.kernels.fused_scan import DTYPES, Kind, nobody_watches, unfit
from ranvier.kernels.native_converted import PreparedConverted
from ranvier.kernels.native_scan import PreparedScan
from ranvier.nn import IF, LIF, LIFB, PLIF, ConvertedIF, Neuron


class Lean(Neuron):
    """A neuron that only runs.

    Attributes:
        sends_bytes: Whether spikes, 0 or 1, leave as uint8.
        is_native: Whether it runs the kernels for CPUs, prepared, where they fit; else it runs as it was made.
    """

    sends_bytes: bool = False
    is_native: bool = False

    def forward(self, current: Tensor, state: Any = None, *, return_state: bool = False) -> Any:
        """Spikes `[T, B, ...]`, with `return_state` also the state, as those of the neuron that it was."""
        found = None
        if self.is_native and isinstance(current, Tensor) and current.device.type == "cpu":
            found = self.fast(current, state, return_state)
        if found is None:
            spikes, after = self.scan(current, state)
            found = (as_bytes(spikes) if self.sends_bytes else spikes), after
        return found if return_state else found[0]

    def fast(self, current: Tensor, state: Any, return_state: bool) -> tuple[Tensor, Any] | None:
        """Spikes of the prepared kernel, and the state or None; None where this call wants another kernel."""
        raise NotImplementedError


class LeanScan(Lean):
    """A neuron that only runs, of those with kernels of `native_scan`."""

    _prepared: "_Prepared | None" = None

    def fast(self, current: Tensor, state: Any, return_state: bool) -> tuple[Tensor, Any] | None:
        """Spikes of the prepared kernel, and the state or None; None where this call wants another kernel."""
        if state is not None and not (isinstance(state, NeuronState) and takes_potential(state.v)):
            return None
        run = self.prepared(current) if nobody_watches(current) else None
        if run is None:
            return None
        check_scan(current, state)
        v = None if state is None else state.v
        spikes, end = run(current, v, *self.learned(), return_end=return_state)
        return spikes, None if end is None else NeuronState(end)

    def prepared(self, current: Tensor) -> PreparedScan | None:
        """The kernel of these neurons; None where currents like this want another."""
        if current.dtype not in DTYPES["native"]:
            return None
        known = self._prepared
        if known is None or known.params is not self.params or known.sends_bytes != self.sends_bytes:
            step = STEPS[type(self)]
            fits = unfit("native", step, current, None, self.params, list(self.parameters())) is None
            scan = PreparedScan(Kind.of(step, self.params), self.sends_bytes) if fits else None
            known = self._prepared = _Prepared(self.params, self.sends_bytes, scan)
        return known.scan if self.takes(current) else None

    def takes(self, current: Tensor) -> bool:
        """Whether the kernel may run on a current of this shape."""
        return True

    def learned(self) -> tuple[Tensor | None, Tensor | None]:
        """Leak and excess of a burst, where the neuron has learned them; else None."""
        return None, None


class _Prepared(NamedTuple):
    params: Any
    sends_bytes: bool
    scan: PreparedScan | None


class LeanIF(LeanScan, IF):
    """`IF` that only runs."""


class LeanLIF(LeanScan, LIF):
    """`LIF` that only runs."""


class LeanPLIF(LeanScan, PLIF):
    """`PLIF` that only runs."""

    def learned(self) -> tuple[Tensor | None, Tensor | None]:
        """The leak."""
        return torch.sigmoid(self.decay).float().reshape(1), None


class LeanLIFB(LeanScan, LIFB):
    """`LIFB` that only runs."""

    def takes(self, current: Tensor) -> bool:
        """Whether it has as many channels as there are burst strengths."""
        return current.ndim >= 3 and current.shape[2] == len(self.strength)

    def learned(self) -> tuple[Tensor | None, Tensor | None]:
        """What a burst sends beyond a spike."""
        return None, (self.strength - 1).float()


class LeanConvertedIF(Lean, ConvertedIF):
    """`ConvertedIF` that only runs; one that sends bytes is binary, and not signed."""

    _prepared: PreparedConverted | None = None

    def fast(self, current: Tensor, state: Any, return_state: bool) -> tuple[Tensor, Any] | None:
        """Sent values of the prepared kernel, and the state or None; None where this call wants another kernel."""
        neurons = Converted(self.threshold, self.bias, self.v_init, self.signed, self.binary)
        if converted.unfit(current, state, neurons) is not None:
            return None
        check_converted(current, state, neurons.bias, neurons.v_init, neurons.signed)
        check_num_channels("threshold", neurons.threshold, current)
        if self._prepared is None or self._prepared.sends_bytes != self.sends_bytes:
            self._prepared = PreparedConverted(self.sends_bytes)
        return self._prepared(current, state, neurons, return_state=return_state)


STEPS: dict[type[Neuron], Any] = {
    LeanIF: dynamics.if_step,
    LeanLIF: dynamics.lif_step,
    LeanPLIF: dynamics.plif_step,
    LeanLIFB: dynamics.lifb_step,
}
LEAN: dict[type[Neuron], type[Lean]] = {
    IF: LeanIF,
    LIF: LeanLIF,
    PLIF: LeanPLIF,
    LIFB: LeanLIFB,
    ConvertedIF: LeanConvertedIF,
}


def make_lean(neuron: Neuron, *, is_native: bool) -> None:
    """Have a neuron, if it is one of these, only run from now on, in place."""
    if type(neuron) in LEAN:
        neuron.__class__ = LEAN[type(neuron)]
        assert isinstance(neuron, Lean)
        neuron.is_native = is_native


def takes_potential(v: Tensor) -> bool:
    """Whether prepared kernels may begin with this potential."""
    return v.dtype == torch.float32 and v.device.type == "cpu" and nobody_watches(v)


def as_bytes(spikes: Tensor) -> Tensor:
    """Spikes, 0 or 1, as bytes.

    >>> as_bytes(torch.tensor([0.0, 1.0], dtype=torch.bfloat16))
    tensor([0, 1], dtype=torch.uint8)
    """
    if spikes.dtype != torch.bfloat16:
        return spikes.to(torch.uint8)
    # 1.0 is 0x3F80, whose lower byte is 128. Whole numbers are converted ten times as fast as bfloat16.
    return spikes.view(torch.int16).to(torch.uint8).bitwise_right_shift_(7)
