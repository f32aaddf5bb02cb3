"""Connections of a layer with weights: which outputs its inputs reach."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ranvier.conversion.vocabulary import LAYERS


def reach(layer: nn.Module, shape: Sequence[int]) -> Tensor:
    """How many outputs a layer's inputs reach: `[H W]` for each place of a channel, or `[1]` where all reach as many.

        reach[i] = out_channels / groups  prod over axes  number of (o, k) with stride o + dilation k - padding = i

    with outputs o and taps k along an axis: padding is no input, and reaches nothing.

    Args:
        layer: A convolution or linear layer; anything else has one connection for each value.
        shape: Of one sample of its input, `[C, H, W]`.

    Returns:
        float64, on the CPU.

    >>> reach(nn.Conv1d(1, 2, 3, padding=1), [1, 4]).tolist()
    [4.0, 6.0, 6.0, 4.0]
    """
    if not isinstance(layer, LAYERS):
        return torch.ones(1, dtype=torch.float64)
    if isinstance(layer, nn.Linear):
        return torch.full((1,), layer.out_features, dtype=torch.float64)
    found = torch.full((1,), layer.out_channels // layer.groups, dtype=torch.float64)
    for axis, size in enumerate(shape[1:]):
        kernel, stride, dilation = (int(setting[axis]) for setting in (layer.kernel_size, layer.stride, layer.dilation))
        before, both = _padding(layer, axis)
        outputs = (size + both - dilation * (kernel - 1) - 1) // stride + 1
        places = stride * torch.arange(outputs).unsqueeze(1) + dilation * torch.arange(kernel) - before
        inside = places[(places >= 0) & (places < size)]
        found = torch.outer(found, torch.bincount(inside, minlength=size).double()).flatten()
    return found


def connections(layer: nn.Module, shape: Sequence[int]) -> int:
    """Connections of a layer whose samples have this shape.

    >>> connections(nn.Conv1d(3, 2, 3, padding=1), [3, 4])
    60
    """
    found = reach(layer, shape)
    return round(float(found.sum())) * (torch.Size(shape).numel() // len(found))


def _padding(layer: nn.Conv1d | nn.Conv2d, axis: int) -> tuple[int, int]:
    """Padding before an axis, and before and behind it."""
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        both = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        return both // 2, both
    before = int(layer.padding[axis])
    return before, 2 * before
