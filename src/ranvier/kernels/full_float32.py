"""Convolutions of float32 that are computed in float32, on GPUs too."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Let cuDNN take float32 without rounding it to TF32; what was set before is set again afterwards.

    TF32 is torch's default for convolutions on a GPU. It keeps 10 bits of each factor: a network whose normalisation
    was folded into its weights then differs from the same network without that by about 1e-3 of its largest output,
    where float32 differs by 1e-6. No effect on a CPU, nor on bfloat16 and float64. Also a decorator.

    Recurrent layers, and the older `torch.backends.cudnn.allow_tf32`, are set alike: torch refuses to read the latter,
    which `torch.backends.cudnn.flags` does, where they differ.

    >>> with full_float32():
    ...     torch.backends.cudnn.conv.fp32_precision
    'ieee'
    """
    cudnn: Any = torch.backends.cudnn  # the stub of the module lacks what is set here
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    try:
        allowed = cudnn.allow_tf32
    except RuntimeError:  # they differ already
        allowed = None
    if allowed is not None:
        cudnn.allow_tf32 = False
        cudnn.rnn.fp32_precision = "ieee"
    cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        if allowed is not None:
            cudnn.allow_tf32 = allowed
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before
