"""The neurons of NIR, the exchange format: leaky or not, firing or not, with parameters for each neuron."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ranvier.checks import shape_of
from ranvier.dynamics.reset import Reset, check_reset
from ranvier.dynamics.scan import NeuronState, check_scan, scan
from ranvier.dynamics.surrogate import Surrogate, Triangle, spike


@dataclass(frozen=True)
class AffineParams:
    """Parameters of `affine_step` that all neurons share."""

    leaky: bool = True
    """Whether the potential decays. If not, `tau` and `v_leak` have no meaning."""
    ties_fire: bool = False
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
    tau: Tensor,
    r: Tensor,
    v_leak: Tensor,
    v_threshold: Tensor,
    v_reset: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of `affine_scan`: charge, fire, reset."""
    # In this order the charge rounds as that of `lif_step`, where r = 1 and v_leak = 0, and of `if_step`, where r = 1.
    h = v + (v_leak - v + r * x) / tau if params.leaky else v + r * x
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
    """Neurons of NIR, whose charge is any affine function of potential and input, over all time steps.

        h[t] = v[t-1] + (v_leak - v[t-1] + r current[t]) / tau   charge; without leak v[t-1] + r current[t]
        s[t] = 1 if h[t] > v_threshold else 0                    fire; from v_threshold on where ties fire
        v[t] = h[t] (1 - s[t]) + v_reset s[t]                    hard reset; soft: h[t] - v_threshold s[t]
        v[-1] = v_leak                                           rest; without leak v_reset

    These are forward Euler steps of tau dv/dt = v_leak - v + r x, with `tau` in steps, and of dv/dt = r x, with `r` per
    step. A neuron that does not fire sends h.

    Args:
        current: Input, `[T, B, ...]`.
        state: Carried from an earlier call, or None for rest. Not modified.
        params: Leak, ties, reset, surrogate.
        constants: tau [steps, >= 1], r, v_leak, v_threshold and v_reset, for each neuron, `[...]`, or broadcastable to
            that.

    Returns:
        Spikes `[T, B, ...]`, or potentials; the state after step T.

    Raises:
        ValueError: `current` has fewer than 2 dimensions or no steps, or the constants or `state` are for others.

    Source: Pedersen et al. 2024, "Neuromorphic intermediate representation", LIF, IF, LI and I. Differs from it in:
    steps instead of continuous time; a start from rest, of which NIR says nothing.

    >>> constants = [torch.tensor(value) for value in (2.0, 1.0, 0.0, 0.5, 0.0)]
    >>> affine_scan(torch.tensor([0.6, 0.6, 1.0, 1.2]).view(4, 1, 1), None, AffineParams(), *constants)[0].tolist()
    [[[0.0]], [[0.0]], [[1.0]], [[1.0]]]
    """
    state, constants = begin(current, state, params, *constants)
    return scan(affine_step, current, state, params, *constants)


def begin(
    current: Tensor, state: NeuronState | None, params: AffineParams, *constants: Tensor
) -> tuple[NeuronState, tuple[Tensor, ...]]:
    """Check a call; the state that it starts from, and the constants in the precision of the potential."""
    check_scan(current, state)
    for constant in constants:
        if not _fits(constant, current):
            raise ValueError(
                f"current has shape {shape_of(current)}, but the neurons are {shape_of(constant)}, which need "
                f"[T, B, {', '.join(map(str, constant.shape))}]."
            )
    dtype = torch.promote_types(current.dtype, torch.float32)
    constants = tuple(constant.to(dtype) for constant in constants)
    if state is None:
        _, _, v_leak, _, v_reset = constants
        rest = v_leak if params.leaky else v_reset
        state = NeuronState(torch.empty_like(current[0], dtype=dtype).copy_(rest.expand(current.shape[1:])))
    return state, constants


def _fits(constant: Tensor, current: Tensor) -> bool:
    """Whether a constant has one value for each neuron, or for all of an axis."""
    shape = current.shape[2:]
    own = constant.shape
    return len(own) <= len(shape) and all(
        size in (1, there) for size, there in zip(reversed(own), reversed(shape), strict=False)
    )
