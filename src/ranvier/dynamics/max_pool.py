"""Max-pooling of what reaches converted neurons: of running sums, so that it is right on average over time."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class SummedState(NamedTuple):
    """What max-pooling of running sums carries from step to step."""

    total: Tensor
    """Sum of all inputs so far, float32 or float64, `[B, ...]`."""


def max_pool_of_sums(
    x: Tensor, pool: Callable[[Tensor], Tensor], state: SummedState | None = None
) -> tuple[Tensor, SummedState]:
    """Max-pooling whose mean over time is that of the means.

        S[t] = x[1] + ... + x[t]
        y[t] = maxpool(S[t]) - maxpool(S[t - 1]),    so that  y[1] + ... + y[t] = maxpool(S[t])

    The largest value of each step, `maxpool(x[t])`, is too large on average wherever another place is largest at
    another step, as with currents that spikes make, and more steps do not mend that.

    Args:
        x: `[T, B, ...]`.
        pool: A max-pooling of `[B, ...]`, for which padding is never the maximum.
        state: From the steps before; None at rest.

    Returns:
        `[T, B, ...]` of the dtype of `x`, and the state. T calls of one step give what one call of T steps gives, bit
        for bit. Sums are in float32 at least: differences of sums in half precision would lose the last steps.

    Source: own. Rueckauer et al. 2017, "Conversion of continuous-valued deep networks to efficient event-driven
    networks", Front. Neurosci. 11, 682, let the spikes of that neuron pass which has sent most so far.

    >>> x = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])  # the means are 1/3 and 2/3
    >>> y, _ = max_pool_of_sums(x, lambda sums: sums.amax(1))
    >>> y.flatten().tolist(), x.amax(2).flatten().tolist()
    ([1.0, 0.0, 1.0], [1.0, 1.0, 1.0])
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    total = None if state is None else state.total
    sums = []
    for current in x.unbind(0):
        total = current.to(wide) if total is None else total + current
        sums.append(total)
    assert total is not None
    pooled = pool(torch.cat(sums)).unflatten(0, (len(sums), -1))  # one call; `cat` keeps channels-last
    first = torch.zeros_like(pooled[:1]) if state is None else pool(state.total).unsqueeze(0)
    return (pooled - torch.cat((first, pooled[:-1]))).to(x.dtype), SummedState(total)
