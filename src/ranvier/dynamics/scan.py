"""The loop over time that turns one step of a neuron into all steps.

A neuron is a pure function of one step,

    step(current, v, params, *learned) -> (spikes, v)

with `current` and `v` of shape `[B, ...]`, `params` a frozen dataclass of plain numbers, and `learned` the tensors that
train. Everything else (the loop here, compilation in `ranvier.kernels`) is shared by all neurons, and by a user's own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ranvier.checks import check_sequence, shape_of

Step = Callable[..., tuple[Tensor, Tensor]]


class NeuronState(NamedTuple):
    """What a neuron remembers between calls: the potential `v`, `[B, ...]`, float32 (float64 for float64 input)."""

    v: Tensor

    def detach(self) -> "NeuronState":
        """The same state without its past: what truncated backpropagation through time passes on."""
        return NeuronState(self.v.detach())


def scan(
    step: Step, current: Tensor, state: NeuronState | None, params: Any, *learned: Tensor
) -> tuple[Tensor, NeuronState]:
    """Run `step` over the leading time axis.

        s[t], v[t] = step(current[t], v[t-1], params, *learned),    v[-1] = 0 or state.v

    The potential is kept in float32 whatever the dtype of the input, because at bfloat16 a leak of 1/tau would be
    rounded away. Time is unbound once: indexing `current[t]` inside the loop would make autograd add up a full
    `[T, ...]` tensor per step, which is quadratic in T.

    Args:
        step: Pure function of one step, see the module's docstring.
        current: Input, `[T, B, ...]`.
        state: Carried from an earlier call, or None for rest, v = 0. Not modified.
        params: Passed on to `step`.
        learned: Passed on to `step`.

    Returns:
        Spikes `[T, B, ...]` in the dtype of `current`; the state after step T.

    Raises:
        ValueError: `current` has no time axis or no steps, or `state.v` does not fit it.

    >>> from ranvier.dynamics import LIFParams, lif_step
    >>> spikes, state = scan(lif_step, torch.full((3, 1, 1), 0.6), None, LIFParams(tau=2.0, v_threshold=0.5))
    >>> spikes.flatten().tolist()
    [0.0, 0.0, 1.0]
    """
    check_scan(current, state)
    dtype = torch.promote_types(current.dtype, torch.float32)
    v = torch.zeros_like(current[0], dtype=dtype) if state is None else state.v
    spikes = []
    for x in current.unbind(0):
        s, v = step(x.to(dtype), v, params, *learned)
        spikes.append(s.to(current.dtype))
    return torch.stack(spikes), NeuronState(v)


def check_scan(current: Tensor, state: NeuronState | None) -> None:
    """Raise unless `current` is `[T, B, ...]` and `state.v`, if given, is `[B, ...]`."""
    check_sequence("current", current)
    if not current.dtype.is_floating_point:
        raise ValueError(
            f"current has dtype {current.dtype}, but a membrane potential needs a floating type. Pass current.float()."
        )
    if state is not None and not isinstance(state, NeuronState):
        raise TypeError(
            f"state is a {type(state).__name__}, but must be the NeuronState that an earlier call returned, or None."
        )
    if state is not None and state.v.shape != current.shape[1:]:
        raise ValueError(
            f"state.v has shape {shape_of(state.v)} but current is {shape_of(current)} ([T, B, ...]). "
            "Pass state=None at the start of a new batch, or keep the batch size while streaming."
        )


def per_channel(parameter: Tensor, like: Tensor) -> Tensor:
    """View `[C]` so that it broadcasts along the channel axis of one step, `[B, C, ...]`."""
    return parameter.view(-1, *[1] * (like.ndim - 2))
