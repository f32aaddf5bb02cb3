"""Rectification and clipping as ANNs use them, whose gradients need no mask.

Where the layer behind sees another shape of the activation, as between layers that see steps apart, torch.compile keeps
a boolean tensor for what autograd derives, and on a CPU it writes and reads that slowly: a training step of a ReLU
ResNet-20 in bfloat16 spent two thirds of its time on it. The sign of what is kept anyway says the same.
"""

from typing import Any

import torch
from torch import Tensor


def relu(x: Tensor) -> Tensor:
    """Rectification, `torch.relu` with another backward pass.

        y = max(x, 0),   dy/dx = sign(y)

    For backward it keeps its output, which the layer behind keeps, too.

    Args:
        x: Any shape.

    Returns:
        Shape and dtype of `x`. The gradient is that of `torch.relu`, 0 at 0; an infinite upstream gradient becomes NaN
        where there should be 0.

    >>> relu(torch.tensor([-1.0, 0.0, 2.0])).tolist()
    [0.0, 0.0, 2.0]
    """
    return _ReLU.apply(x) if _learns(x) else torch.relu(x)


def clip(x: Tensor, low: float, high: float) -> Tensor:
    """Values between two bounds, `torch.clamp` with another backward pass.

        y = min(max(x, low), high),   dy/dx = 1 - |sign(x - y)|

    Args:
        x: Any shape.
        low: Least value.
        high: Largest value.

    Returns:
        Shape and dtype of `x`. The gradient is that of `torch.clamp`, 1 on both bounds; an infinite upstream gradient
        becomes NaN where there should be 0.

    >>> clip(torch.tensor([-1.0, 0.5, 2.0]), 0, 1).tolist()
    [0.0, 0.5, 1.0]
    """
    return _Clip.apply(x, low, high) if _learns(x) else x.clamp(low, high)


def _learns(x: Tensor) -> bool:
    # Elsewhere torch's own, which exporters and the tracing of conversions know.
    return torch.is_grad_enabled() and x.requires_grad


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * y.sign()


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
        x, *ctx.bounds = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return grad * (1 - (x - x.clamp(*ctx.bounds)).sign().abs()), None, None
