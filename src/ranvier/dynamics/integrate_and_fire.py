"""Integrate-and-fire neurons: IF, LIF, and LIF with a learned time constant (PLIF)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ranvier.checks import check_number, check_positive
from ranvier.dynamics.reset import Reset, check_reset, reset
from ranvier.dynamics.scan import NeuronState, scan
from ranvier.dynamics.surrogate import Surrogate, Triangle, spike


@dataclass(frozen=True)
class Firing:
    """When a neuron fires and what that does: shared by all neurons of this module.

    Attributes:
        v_threshold: Potential at which the neuron fires; a tie fires.
        reset: `hard` (to 0) or `soft` (subtract the threshold).
        detach_reset: Whether the gradient ignores the reset.
        surrogate: Gradient of the spike function.
    """

    v_threshold: float = 0.5
    reset: Reset = "hard"
    detach_reset: bool = True
    surrogate: Surrogate = field(default_factory=Triangle)

    def __post_init__(self) -> None:
        check_positive("v_threshold", self.v_threshold)
        check_reset(self.reset)


@dataclass(frozen=True)
class IFParams(Firing):
    """Parameters of `if_step`: those of `Firing`."""


@dataclass(frozen=True)
class LIFParams(Firing):
    """Parameters of `lif_step`: those of `Firing` and `tau`, the membrane time constant [steps, >= 1]."""

    tau: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau", self.tau)
        if not self.tau >= 1:
            raise ValueError(
                f"tau is {self.tau} steps, but must be at least 1: below that the Euler step overshoots its target. "
                "tau = 1 forgets everything at each step; the default is 2."
            )


@dataclass(frozen=True)
class PLIFParams(Firing):
    """Parameters of `plif_step`: those of `Firing`. The time constant is learned."""


def if_step(x: Tensor, v: Tensor, params: IFParams) -> tuple[Tensor, Tensor]:
    """One step of integrate-and-fire without leak: `h = v + x`, fire, reset."""
    h = v + x
    return _fire(h, params)


def lif_step(x: Tensor, v: Tensor, params: LIFParams) -> tuple[Tensor, Tensor]:
    """One step of leaky integrate-and-fire: `h = v + (x - v) / tau`, fire, reset."""
    h = v + (x - v) / params.tau
    return _fire(h, params)


def plif_step(x: Tensor, v: Tensor, params: PLIFParams, decay: Tensor) -> tuple[Tensor, Tensor]:
    """One step of leaky integrate-and-fire with learned leak: `h = v + (x - v) sigmoid(decay)`, fire, reset."""
    h = v + (x - v) * torch.sigmoid(decay)
    return _fire(h, params)


def _fire(h: Tensor, params: Firing) -> tuple[Tensor, Tensor]:
    s = spike(h - params.v_threshold, params.surrogate)
    return s, reset(h, s, params.v_threshold, params.reset, params.detach_reset)


def if_scan(current: Tensor, state: NeuronState | None, params: IFParams) -> tuple[Tensor, NeuronState]:
    """Integrate-and-fire neurons over all time steps.

        h[t] = v[t-1] + current[t]                  charge
        s[t] = 1 if h[t] >= v_threshold else 0      fire (gradient: params.surrogate)
        v[t] = h[t] (1 - s[t])                      hard reset; soft: h[t] - v_threshold s[t]

    Args:
        current: Input, `[T, B, ...]`, same unit as `v_threshold`.
        state: Carried from an earlier call, or None for v = 0. Not modified.
        params: Threshold, reset, surrogate.

    Returns:
        Spikes `[T, B, ...]` in {0, 1}, dtype of `current`; the state after step T.

    Raises:
        ValueError: `current` has fewer than 2 dimensions or no steps, or `state.v` is not `[B, ...]`.

    >>> if_scan(torch.full((4, 1, 1), 0.25), None, IFParams())[0].flatten().tolist()
    [0.0, 1.0, 0.0, 1.0]
    """
    return scan(if_step, current, state, params)


def lif_scan(current: Tensor, state: NeuronState | None, params: LIFParams) -> tuple[Tensor, NeuronState]:
    """Leaky integrate-and-fire neurons over all time steps.

        h[t] = v[t-1] + (current[t] - v[t-1]) / tau   charge
        s[t] = 1 if h[t] >= v_threshold else 0        fire (gradient: params.surrogate)
        v[t] = h[t] (1 - s[t])                        hard reset; soft: h[t] - v_threshold s[t]

    Args:
        current: Input, `[T, B, ...]`, same unit as `v_threshold`.
        state: Carried from an earlier call, or None for v = 0. Not modified.
        params: `tau` [steps], threshold, reset, surrogate.

    Returns:
        Spikes `[T, B, ...]` in {0, 1}, dtype of `current`; the state after step T.

    Raises:
        ValueError: `current` has fewer than 2 dimensions or no steps, or `state.v` is not `[B, ...]`.

    Source: Zhao et al. 2025, "Improving Stability and Performance of Spiking Neural Networks through Enhancing Temporal
    Consistency", Pattern Recognition 159, 111094. Differs from it in: a tie fires.

    >>> spikes, state = lif_scan(torch.full((3, 1, 1), 0.6), None, LIFParams(tau=2.0, v_threshold=0.5))
    >>> spikes.flatten().tolist()
    [0.0, 0.0, 1.0]
    """
    return scan(lif_step, current, state, params)


def plif_scan(
    current: Tensor, state: NeuronState | None, params: PLIFParams, decay: Tensor
) -> tuple[Tensor, NeuronState]:
    """Leaky integrate-and-fire neurons whose time constant is learned, one for the layer.

        h[t] = v[t-1] + (current[t] - v[t-1]) sigmoid(decay)    charge, 1 / tau = sigmoid(decay)
        s[t], v[t]                                              as in lif_scan

    Args:
        current: Input, `[T, B, ...]`, same unit as `v_threshold`.
        state: Carried from an earlier call, or None for v = 0. Not modified.
        params: Threshold, reset, surrogate.
        decay: Learned scalar; `tau = 1 + exp(-decay)` is above 1 whatever its value.

    Returns:
        Spikes `[T, B, ...]` in {0, 1}, dtype of `current`; the state after step T.

    Raises:
        ValueError: `current` has fewer than 2 dimensions or no steps, or `state.v` is not `[B, ...]`.

    Source: Fang et al. 2021, "Incorporating Learnable Membrane Time Constant to Enhance Learning of Spiking Neural
    Networks" (PLIF).
    """
    return scan(plif_step, current, state, params, decay)
