"""Convolutions of float32 that are computed in float32, on GPUs too."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class _Settings(NamedTuple):
    """How cuDNN takes float32."""

    older: bool | None
    """`allow_tf32`; None where it cannot be read, since the two that follow differ."""
    convolutions: str
    recurrent: str

    @classmethod
    def now(cls) -> "_Settings":
        """As they are."""
        cudnn: Any = torch.backends.cudnn
        try:
            older = cudnn.allow_tf32
        except RuntimeError:
            older = None
        return cls(older, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)

    def put_back(self) -> None:
        """Set them as they were."""
        cudnn: Any = torch.backends.cudnn
        if self.older is not None:
            cudnn.allow_tf32 = self.older
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = self.convolutions, self.recurrent


_LOCK = threading.Lock()
_inside = 0  # blocks, of all threads: the settings are those of the process
_before = _Settings(None, "none", "none")


@contextmanager
def full_float32() -> Iterator[None]:
    """Let cuDNN take float32 without rounding it to TF32.

    Blocks may overlap, in one thread or several: what was set before the first is set again after the last.

    TF32 is torch's default for convolutions on a GPU. It keeps 10 bits of each factor: a network whose normalisation
    was folded into its weights then differs from the same network without that by about 1e-3 of its largest output,
    where float32 differs by 1e-6. No effect on a CPU, nor on bfloat16 and float64. Also a decorator.

    Recurrent layers, and the older `torch.backends.cudnn.allow_tf32`, are set alike: torch refuses to read the latter,
    which `torch.backends.cudnn.flags` does, where they differ.

    >>> with full_float32():
    ...     torch.backends.cudnn.conv.fp32_precision
    'ieee'
    """
    global _inside, _before
    cudnn: Any = torch.backends.cudnn  # the stub of the module lacks what is set here
    with _LOCK:
        if _inside == 0:
            _before = _Settings.now()
        if _before.older is not None:
            cudnn.allow_tf32 = False
            cudnn.rnn.fp32_precision = "ieee"
        cudnn.conv.fp32_precision = "ieee"
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if _inside == 0:
                _before.put_back()
