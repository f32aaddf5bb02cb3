"""Convolutions of float32 that are computed in float32, on GPUs too."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Let cuDNN convolve float32 without rounding it to TF32; what was set before is set again afterwards.

    TF32 is torch's default for convolutions on a GPU. It keeps 10 bits of each factor: a network whose normalisation
    was folded into its weights then differs from the same network without that by about 1e-3 of its largest output,
    where float32 differs by 1e-6. No effect on a CPU, nor on bfloat16 and float64. Also a decorator.

    >>> with full_float32():
    ...     torch.backends.cudnn.conv.fp32_precision
    'ieee'
    """
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # the stub of the module lacks it
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before
