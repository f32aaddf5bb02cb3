"""Neurons of networks that only run: the same spikes and states, with less work around the kernel of each call."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ranvier import dynamics
from ranvier.dynamics import NeuronState
from ranvier.dynamics.scan import check_scan
from ranvier.kernels.fused_scan import DTYPES, Kind, nobody_watches, unfit
from ranvier.kernels.native_scan import PreparedScan
from ranvier.nn import IF, LIF, LIFB, PLIF, Neuron


class Lean(Neuron):
    """A neuron that only runs.

    Attributes:
        sends_bytes: Whether spikes, 0 or 1, leave as uint8.
        is_native: Whether it runs the kernels for CPUs, prepared, where they fit; else it runs as it was made.
    """

    sends_bytes: bool = False
    is_native: bool = False
    _prepared: "_Prepared | None" = None

    def forward(self, current: Tensor, state: Any = None, *, return_state: bool = False) -> Any:
        """Spikes `[T, B, ...]`, with `return_state` also the state, as those of the neuron that it was."""
        run = self._run(current, state)
        if run is not None:
            check_scan(current, state)
            spikes, end = run(current, None if state is None else state.v, *self.learned())
            return (spikes, NeuronState(end)) if return_state else spikes
        spikes, after = self.scan(current, state)
        spikes = as_bytes(spikes) if self.sends_bytes else spikes
        return (spikes, after) if return_state else spikes

    def _run(self, current: Tensor, state: Any) -> PreparedScan | None:
        """The prepared kernel; None where this call wants another."""
        v = None if state is None else state.v
        if not self.is_native or not nobody_watches(current, v) or current.device.type != "cpu":
            return None
        if current.dtype not in DTYPES["native"]:
            return None
        if v is not None and (v.dtype != torch.float32 or v.device != current.device):
            return None
        known = self._prepared
        if known is None or known.params is not self.params or known.sends_bytes != self.sends_bytes:
            step = STEPS[type(self)]
            fits = unfit("native", step, current, state, self.params, list(self.parameters())) is None
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


class LeanIF(Lean, IF):
    """`IF` that only runs."""


class LeanLIF(Lean, LIF):
    """`LIF` that only runs."""


class LeanPLIF(Lean, PLIF):
    """`PLIF` that only runs."""

    def learned(self) -> tuple[Tensor | None, Tensor | None]:
        """The leak."""
        return torch.sigmoid(self.decay).float().reshape(1), None


class LeanLIFB(Lean, LIFB):
    """`LIFB` that only runs."""

    def takes(self, current: Tensor) -> bool:
        """Whether it has as many channels as there are burst strengths."""
        return current.ndim >= 3 and current.shape[2] == len(self.strength)

    def learned(self) -> tuple[Tensor | None, Tensor | None]:
        """What a burst sends beyond a spike."""
        return None, (self.strength - 1).float()


STEPS: dict[type[Neuron], Any] = {
    LeanIF: dynamics.if_step,
    LeanLIF: dynamics.lif_step,
    LeanPLIF: dynamics.plif_step,
    LeanLIFB: dynamics.lifb_step,
}
LEAN: dict[type[Neuron], type[Lean]] = {IF: LeanIF, LIF: LeanLIF, PLIF: LeanPLIF, LIFB: LeanLIFB}


def make_lean(neuron: Neuron, *, is_native: bool) -> None:
    """Have a neuron, if it is one of these, only run from now on, in place."""
    if type(neuron) in LEAN:
        neuron.__class__ = LEAN[type(neuron)]
        assert isinstance(neuron, Lean)
        neuron.is_native = is_native


def as_bytes(spikes: Tensor) -> Tensor:
    """Spikes, 0 or 1, as bytes.

    >>> as_bytes(torch.tensor([0.0, 1.0], dtype=torch.bfloat16))
    tensor([0, 1], dtype=torch.uint8)
    """
    if spikes.dtype != torch.bfloat16:
        return spikes.to(torch.uint8)
    # 1.0 is 0x3F80, whose lower byte is 128. Whole numbers are converted ten times as fast as bfloat16.
    return spikes.view(torch.int16).to(torch.uint8).bitwise_right_shift_(7)
