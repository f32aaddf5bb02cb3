"""Copies of weights in the order in which a kernel reads them, made once."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Packed:
    """What is made of a weight at the first call, and again after the weight was replaced or written to.

    It cannot be copied or pickled with its owner, whose copies make their own.
    """

    def __init__(self) -> None:
        self._known: tuple[Tensor, int, Tensor] | None = None

    def __call__(self, weight: Tensor, pack: Callable[[], Tensor]) -> Tensor:
        """What `pack` made of `weight` as it is now."""
        known, version = self._known, 0 if weight.is_inference() else weight._version
        # Holding what it was made of keeps its address from being used again.
        same = known is not None and known[0].data_ptr() == weight.data_ptr() and known[0].dtype == weight.dtype
        if known is None or not same or known[1] != version:
            known = weight.detach(), version, pack()
            self._known = known  # at once: another thread may be calling
        return known[2]

    def __reduce__(self) -> tuple[Any, ...]:
        return Packed, ()
