"""A readout that forgets: logits whose mean over the steps so far leans on the latest of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from ranvier.checks import shape_of


class LeakyMeanState(NamedTuple):
    """What a leaky mean carries from step to step; zeros at rest."""

    total: Tensor
    """Leaky sum of the inputs so far, float32 or float64, `[B, K]`."""
    sent: Tensor
    """Sum of the outputs so far, likewise."""
    weight: Tensor
    """Leaky count of the steps so far, `[]`."""
    steps: Tensor
    """Steps so far, `[]`, of the same type."""


def leaky_mean(logits: Tensor, decay: float, state: LeakyMeanState | None = None) -> tuple[Tensor, LeakyMeanState]:
    """Logits whose mean over the first t steps is the leaky average of those that come in.

        S[t] = decay S[t-1] + x[t],   Z[t] = decay Z[t-1] + 1,   u[t] = S[t] / Z[t]
        y[t] = t u[t] - (t - 1) u[t-1],   so that   (y[1] + ... + y[t]) / t = u[t]

    What the last layer of a converted network says at the first steps is made of the few spikes that have come that
    far. It tells little, and the mean of all steps gives it as much weight as the rest. Each answer leans on the latest
    steps, however many follow, so that the first t steps of a longer run are a run of t steps.

    Args:
        logits: `[T, B, K]`.
        decay: From 0, the last step alone, to 1, the plain mean.
        state: From the steps before; None at rest. Not modified.

    Returns:
        `[T, B, K]` in float32 at least, as differences of sums in half precision would lose the last steps; the state.
        T calls of one step give what one call of T steps gives, bit for bit.

    Raises:
        TypeError: `state` is not what an earlier call returned.
        ValueError: It was of logits of another shape.

    Note: the mean of the outputs is u[t] up to rounding, so that classes that tie in u[t] need not tie in it. Logits of
    different histories tie where they have no bias and nothing has come since, which takes a silent last layer.

    Source: own. Weights of 0 and then 1 are delayed evaluation, Hwang et al. 2021, "Low-Latency Spiking Neural Networks
    Using Pre-Charged Membrane Potential and Delayed Evaluation", Front. Neurosci. 15, 629000.

    >>> x = torch.tensor([0.0, 3.0, 3.0]).view(3, 1, 1)
    >>> y, _ = leaky_mean(x, 0.5)
    >>> (y.cumsum(0).flatten() / torch.arange(1, 4)).double().round(decimals=4).tolist()  # 3 / 1.5, (3/2 + 3) / 1.75
    [0.0, 2.0, 2.5714]
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    if state is not None and not isinstance(state, LeakyMeanState):
        raise TypeError(
            f"state is a {type(state).__name__}, but must be what an earlier call returned, or None to start from rest."
        )
    if state is not None and state.total.shape != logits.shape[1:]:
        raise ValueError(
            f"state is of logits of shape {shape_of(state.total)}, but these are {shape_of(logits[0])} at each step. "
            "Keep batch and classes while streaming, or pass None to start from rest."
        )
    if state is None:
        rest, none = torch.zeros_like(logits[0], dtype=wide), logits.new_zeros((), dtype=wide)
        state = LeakyMeanState(rest, rest, none, none)
    total, sent, weight, steps = state
    after = []
    for x in logits.unbind(0):
        total = decay * total + x.to(wide)
        weight = decay * weight + 1
        steps = steps + 1
        due = total * (steps / weight)
        after.append(due - sent)
        sent = due
    return torch.stack(after), LeakyMeanState(total, sent, weight, steps)
