"""The burst neuron LIFB: rest, spike or burst in one time step; and the pair of LIF neurons that it is."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ranvier.dynamics.integrate_and_fire import LIFParams
from ranvier.dynamics.reset import reset
from ranvier.dynamics.scan import NeuronState, Step, per_channel, scan
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


@dataclass(frozen=True)
class LIFPairParams(LIFBParams):
    """Parameters of `lif_pair_step`: those of `LIFBParams`, and whether the first neuron also resets the second."""

    coupled: bool = True


def lif_pair_step(x: Tensor, v: Tensor, params: LIFPairParams) -> tuple[Tensor, Tensor]:
    """One step of two LIF neurons that reset together: their potentials never differ, so that one is kept for both."""
    h = v + (x - v) / params.tau
    fired = spike(h - params.v_threshold, params.surrogate)
    burst = spike(h - params.v_burst, params.surrogate)
    return torch.cat((fired, burst), 1), reset(h, fired, params.v_threshold, params.reset, params.detach_reset)


def free_pair_step(x: Tensor, v: Tensor, params: LIFPairParams) -> tuple[Tensor, Tensor]:
    """One step of two LIF neurons that reset each for itself: `x` holds their current twice, `v` both potentials."""
    h = v + (x - v) / params.tau
    lower, upper = h.chunk(2, 1)
    fired = spike(lower - params.v_threshold, params.surrogate)
    burst = spike(upper - params.v_burst, params.surrogate)
    lower = reset(lower, fired, params.v_threshold, params.reset, params.detach_reset)
    upper = reset(upper, burst, params.v_burst, params.reset, params.detach_reset)
    return torch.cat((fired, burst), 1), torch.cat((lower, upper), 1)


def lif_pair_scan(current: Tensor, state: NeuronState | None, params: LIFPairParams) -> tuple[Tensor, NeuronState]:
    """Two LIF neurons on one current over all time steps: together they tell what a burst neuron does.

        g[t] = v[t-1] + (current[t] - v[t-1]) / tau          charge of the first neuron
        h[t] = w[t-1] + (current[t] - w[t-1]) / tau          charge of the second
        f[t] = 1 if g[t] >= v_threshold else 0               the first fires
        b[t] = 1 if h[t] >= 2 v_threshold else 0             the second fires
        v[t] = g[t] (1 - f[t]),   w[t] = h[t] (1 - f[t])     hard reset; soft: - v_threshold f[t], both

    `f + (strength - 1) b` is then the output of `lifb_scan`, bit for bit. Without coupling the second neuron resets at
    its own spikes alone, `w[t] = h[t] (1 - b[t])`: after one step it differs, since it keeps a charge between the
    thresholds that the burst neuron loses.

    Args:
        current: Input, `[T, B, C, ...]`, same unit as `v_threshold`.
        state: Carried from an earlier call, or None for v = w = 0. Not modified.
        params: `tau` [steps], threshold, reset, surrogate, coupling.

    Returns:
        Spikes of the first neurons, then of the second, `[T, B, 2 C, ...]` in {0, 1}; the state after step T.

    Raises:
        ValueError: `current` has no channels, no steps, or does not fit `state`.

    Source: Shen et al. 2025 (LIFB), figure 3, which does not say how the second neuron resets; the coupling is ours.

    >>> lif_pair_scan(torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1), None, LIFPairParams())[0].flatten(1).tolist()
    [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
    """
    step, current = pair_of(params, current)
    return scan(step, current, state, params)


def pair_of(params: LIFPairParams, current: Tensor) -> tuple[Step, Tensor]:
    """The step of a pair, and the current that it takes: twice, `[T, B, 2 C, ...]`, where neurons reset each alone."""
    if current.ndim < 3:
        raise ValueError(f"current has shape {list(current.shape)}, but pairs need channels: [T, B, C, ...].")
    return (lif_pair_step, current) if params.coupled else (free_pair_step, torch.cat((current, current), 2))
