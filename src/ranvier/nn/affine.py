"""The neuron of foreign files as a module."""

import torch
from torch import Tensor

from ranvier import kernels
from ranvier.checks import shape_of
from ranvier.dynamics import AffineParams, NeuronState, Reset, Surrogate, Triangle, affine_step
from ranvier.dynamics.affine import begin
from ranvier.kernels.dispatch import Implementation
from ranvier.nn.neurons import Neuron


class AffineIF(Neuron):
    """Neuron of NIR, with parameters of its own for each: `ranvier.dynamics.affine_scan` as a module.

        h = v + (v_leak - v + r x) / tau;  s = (h > v_threshold);  v = v_reset after a spike

    What `ranvier.export.from_nir` makes of the neurons of other tools. Parameters are buffers: one number for all
    neurons, or one for each, `[...]`.

    Args:
        num_channels: Not used; accepted so that models can build any neuron alike.
        tau: Membrane time constant [steps, >= 1]; None for a neuron without leak, `h = v + r x`.
        r: Times the input.
        v_leak: Potential to which it decays, and from which it starts.
        v_threshold: Firing threshold.
        v_reset: Potential after a spike (hard reset); a neuron without leak starts from it.
        ties_fire: Whether a potential equal to the threshold fires. In NIR it does not.
        reset: `hard` or `soft`.
        fires: False for a neuron that sends its potential.
        surrogate: Gradient of the spike.
        implementation: `auto`, `reference` or `compiled`.

    Raises:
        ValueError: `tau` is below 1, or no number.

    >>> AffineIF(tau=None, r=0.5, v_threshold=1.0)(torch.ones(3, 1, 1)).flatten().tolist()
    [0.0, 0.0, 1.0]
    """

    params: AffineParams
    tau: Tensor
    r: Tensor
    v_leak: Tensor
    v_threshold: Tensor
    v_reset: Tensor

    def __init__(
        self,
        num_channels: int | None = None,
        *,
        tau: float | Tensor | None = 2.0,
        r: float | Tensor = 1.0,
        v_leak: float | Tensor = 0.0,
        v_threshold: float | Tensor = 0.5,
        v_reset: float | Tensor = 0.0,
        ties_fire: bool = False,
        reset: Reset = "hard",
        fires: bool = True,
        surrogate: Surrogate | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__(implementation, num_channels)
        self.params = AffineParams(tau is not None, ties_fire, reset, fires, surrogate or Triangle())
        given = {
            "tau": 1.0 if tau is None else tau,
            "r": r,
            "v_leak": v_leak,
            "v_threshold": v_threshold,
            "v_reset": v_reset,
        }
        for name, value in given.items():
            self.register_buffer(name, value.clone() if isinstance(value, Tensor) else torch.tensor(float(value)))
        if not bool((self.tau >= 1).all()):
            raise ValueError(
                f"tau is {float(self.tau.min()):.6g} steps for some neuron, but must be at least 1: below that the "
                "Euler step overshoots its target."
            )

    @property
    def fires(self) -> bool:
        """Whether it sends spikes, and not its potential."""
        return self.params.fires

    def scan(self, current: Tensor, state: NeuronState | None) -> tuple[Tensor, NeuronState]:
        """Run `affine_step` over time."""
        own = (self.tau, self.r, self.v_leak, self.v_threshold, self.v_reset)
        state, constants = begin(current, state, self.params, *own)
        return kernels.scan(affine_step, current, state, self.params, *constants, implementation=self.implementation)

    def extra_repr(self) -> str:
        """Settings, as printed."""
        names = ("tau", "r", "v_leak") if self.params.leaky else ("r",)
        numbers = [(name, getattr(self, name)) for name in (*names, *("v_threshold", "v_reset") * self.params.fires)]
        shown = [
            f"{name}={value.item():.6g}" if value.ndim == 0 else f"{name}={shape_of(value)}" for name, value in numbers
        ]
        return ", ".join([*shown, super().extra_repr()])
