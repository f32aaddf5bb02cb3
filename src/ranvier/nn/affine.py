"""The neuron of foreign files as a module."""

import torch
from torch import Tensor

from ranvier import kernels
from ranvier.dynamics import AffineParams, NeuronState, Reset, Surrogate, Triangle, affine_step
from ranvier.kernels.dispatch import Implementation
from ranvier.nn.neurons import Neuron


class AffineIF(Neuron):
    """Neuron with a charge of its own for each: `ranvier.dynamics.affine_scan` as a module.

        h = decay v + drive + gain x;  s = (h > v_threshold);  v = v_reset after a spike

    Args:
        decay: What is left of the potential after a step; like the others for each neuron, `[...]`, or for all, `[]`.
        drive: What is added at each step.
        gain: Times the input.
        v_threshold: Firing threshold.
        v_reset: Potential after a spike (hard reset).
        ties_fire: Whether a potential equal to the threshold fires.
        reset: `hard` or `soft`.
        fires: False for a neuron that sends its potential.
        surrogate: Gradient of the spike.
        implementation: `auto`, `reference` or `compiled`.

    >>> AffineIF(torch.tensor(1.0), gain=torch.tensor(0.5))(torch.ones(3, 1, 1)).flatten().tolist()
    [0.0, 0.0, 1.0]
    """

    params: AffineParams
    decay: Tensor
    drive: Tensor
    gain: Tensor
    v_threshold: Tensor
    v_reset: Tensor

    def __init__(
        self,
        decay: Tensor,
        drive: Tensor | None = None,
        gain: Tensor | None = None,
        v_threshold: Tensor | None = None,
        v_reset: Tensor | None = None,
        *,
        ties_fire: bool = False,
        reset: Reset = "hard",
        fires: bool = True,
        surrogate: Surrogate | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__(implementation)
        self.params = AffineParams(ties_fire, reset, fires, surrogate or Triangle())
        for name, value, default in (
            ("decay", decay, 1.0),
            ("drive", drive, 0.0),
            ("gain", gain, 1.0),
            ("v_threshold", v_threshold, 1.0),
            ("v_reset", v_reset, 0.0),
        ):
            self.register_buffer(name, torch.full_like(decay, default) if value is None else value.clone())

    def scan(self, current: Tensor, state: NeuronState | None) -> tuple[Tensor, NeuronState]:
        """Run `affine_step` over time."""
        constants = (self.decay, self.drive, self.gain, self.v_threshold, self.v_reset)
        return kernels.scan(affine_step, current, state, self.params, *constants, implementation=self.implementation)
