"""A spiking neuron whose charge is any affine function of potential and input, with parameters for each neuron."""

from dataclasses import dataclass, field

from torch import Tensor

from ranvier.dynamics.reset import Reset, check_reset
from ranvier.dynamics.scan import NeuronState, scan
from ranvier.dynamics.surrogate import Surrogate, Triangle, spike


@dataclass(frozen=True)
class AffineParams:
    """Parameters of `affine_step` that all neurons share."""

    ties_fire: bool = True
    """Whether a potential equal to the threshold fires."""
    reset: Reset = "hard"
    """`hard` sets the potential to `v_reset`; `soft` subtracts the threshold."""
    fires: bool = True
    """False for a neuron that sends its potential and never fires."""
    surrogate: Surrogate = field(default_factory=Triangle)

    def __post_init__(self) -> None:
        check_reset(self.reset)


def affine_step(
    x: Tensor,
    v: Tensor,
    params: AffineParams,
    decay: Tensor,
    drive: Tensor,
    gain: Tensor,
    v_threshold: Tensor,
    v_reset: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of `affine_scan`: charge, fire, reset."""
    h = decay * v + drive + gain * x
    if not params.fires:
        return h, h
    s = spike(h - v_threshold, params.surrogate)
    if not params.ties_fire:
        s = s * (h != v_threshold).to(s.dtype)
    fired = s.detach()
    return s, h - v_threshold * fired if params.reset == "soft" else h * (1 - fired) + v_reset * fired


def affine_scan(
    current: Tensor, state: NeuronState | None, params: AffineParams, *constants: Tensor
) -> tuple[Tensor, NeuronState]:
    """Neurons with an affine charge over all time steps: the leaky and other neurons of foreign files.

        h[t] = decay v[t-1] + drive + gain current[t]        charge
        s[t] = 1 if h[t] > v_threshold else 0                fire; from v_threshold on where ties fire
        v[t] = h[t] (1 - s[t]) + v_reset s[t]                hard reset; soft: h[t] - v_threshold s[t]

    A leaky neuron tau dv/dt = v_leak - v + r x in steps of dt has decay 1 - dt/tau, drive v_leak dt/tau and gain
    r dt/tau; one without leak, dv/dt = r x, has 1, 0 and r dt. A neuron that does not fire sends h.

    Args:
        current: Input, `[T, B, ...]`.
        state: Carried from an earlier call, or None for v = 0. Not modified.
        params: Ties, reset, surrogate.
        constants: decay, drive, gain, v_threshold and v_reset, for each neuron, `[...]`, or broadcastable to that.

    Returns:
        Spikes `[T, B, ...]`; the state after step T.

    >>> import torch
    >>> constants = [torch.tensor(value) for value in (0.5, 0.0, 0.5, 0.5, 0.0)]
    >>> affine_scan(torch.tensor([0.6, 0.6, 0.6, 1.0]).view(4, 1, 1), None, AffineParams(), *constants)[0].tolist()
    [[[0.0]], [[0.0]], [[1.0]], [[1.0]]]
    """
    return scan(affine_step, current, state, params, *constants)
