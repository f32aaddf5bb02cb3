"""The burst neuron LIFB: rest, spike or burst in one time step, with a learned burst strength per channel."""

from dataclasses import dataclass

from torch import Tensor

from ranvier.dynamics.integrate_and_fire import LIFParams
from ranvier.dynamics.reset import reset
from ranvier.dynamics.scan import NeuronState, per_channel, scan
from ranvier.dynamics.surrogate import spike

BURST_RATIO = 2.0
"""Burst threshold over firing threshold."""


@dataclass(frozen=True)
class LIFBParams(LIFParams):
    """Parameters of `lifb_step`: those of `LIFParams`. The burst threshold is `2 v_threshold`."""

    @property
    def v_burst(self) -> float:
        """Potential at which a spike becomes a burst; a tie bursts."""
        return BURST_RATIO * self.v_threshold


def lifb_step(x: Tensor, v: Tensor, params: LIFBParams, strength: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the burst neuron: charge as LIF, two comparators on one potential, reset by the lower one."""
    h = v + (x - v) / params.tau
    fired = spike(h - params.v_threshold, params.surrogate)
    burst = spike(h - params.v_burst, params.surrogate)
    s = fired + (per_channel(strength, h) - 1) * burst
    # The binary event resets. Resetting with the graded s would leave v (1 - strength) behind after a burst.
    return s, reset(h, fired, params.v_threshold, params.reset, params.detach_reset)


def lifb_scan(
    current: Tensor, state: NeuronState | None, params: LIFBParams, strength: Tensor
) -> tuple[Tensor, NeuronState]:
    """Burst neurons over all time steps.

        h[t] = v[t-1] + (current[t] - v[t-1]) / tau          charge
        f[t] = 1 if h[t] >= v_threshold else 0               fire
        b[t] = 1 if h[t] >= 2 v_threshold else 0             burst
        s[t] = f[t] + (strength - 1) b[t]                    in {0, 1, strength}
        v[t] = h[t] (1 - f[t])                               hard reset; soft: h[t] - v_threshold f[t]

    Gradients: ds/dh = q(h - v_threshold) + (strength - 1) q(h - 2 v_threshold) with q the surrogate's derivative, and
    ds/dstrength = b, summed over steps, batch and positions of the channel.

    Args:
        current: Input, `[T, B, C, ...]`, same unit as `v_threshold`.
        state: Carried from an earlier call, or None for v = 0. Not modified.
        params: `tau` [steps], threshold, reset, surrogate.
        strength: What a burst transmits, `[C]`, unconstrained (it may become negative).

    Returns:
        Spikes `[T, B, C, ...]` in {0, 1, strength}, dtype of `current`; the state after step T.

    Raises:
        ValueError: `current` is not `[T, B, C, ...]` with C = len(strength), has no steps, or does not fit `state`.

    Source: Shen et al. 2025, "Exploiting High Performance Spiking Neural Networks with Efficient Spiking Patterns",
    IEEE TETCI 9(2), 1480-1489, printed form. The published numbers suggest that a burst there transmits twice the
    printed strength, which is `burst_init=2` of `ranvier.nn.LIFB`. Differs from it in: ties fire; one gated triangle
    per comparator where the paper prints a sign.

    >>> import torch
    >>> lifb_scan(torch.tensor([0.5, 1.0, 2.0]).view(1, 1, 3), None, LIFBParams(), torch.full((3,), 1.5))[0].tolist()
    [[[0.0, 1.0, 1.5]]]
    """
    if current.ndim < 3 or current.shape[2] != len(strength):
        raise ValueError(
            f"current has shape {list(current.shape)}, but {len(strength)} burst strengths need "
            f"[T, B, {len(strength)}, ...]: the channel axis comes third. Build the neuron with its input's count."
        )
    return scan(lifb_step, current, state, params, strength)
