"""What is made of tensors once and used in many calls: weights in the order in which a kernel reads them, tables."""

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Derived(Generic[T]):
    """What is made of tensors at the first call, and again after one of them was replaced or written to.

    Not after one was written to in a way that torch does not count: through `.data`, or in inference mode into a tensor
    that was made there. It cannot be copied or pickled with its owner, whose copies make their own.

    >>> import torch
    >>> weight, doubled = torch.ones(2), Derived[Tensor]()
    >>> doubled((weight,), lambda: 2 * weight)
    tensor([2., 2.])
    >>> doubled((weight,), lambda: 3 * weight)
    tensor([2., 2.])
    """

    def __init__(self) -> None:
        self._known: tuple[Hashable, tuple[Tensor, ...], T] | None = None

    def __call__(self, sources: tuple[Tensor, ...], make: Callable[[], T], *settings: Hashable) -> T:
        """What `make` made of `sources` as they are now, and of other settings."""
        versions = (0 if each.is_inference() else each._version for each in sources)
        made_of = *map(id, sources), *(each.data_ptr() for each in sources), *versions, *settings
        known = self._known
        if known is None or known[0] != made_of:
            # While the tensors and their memory are held, nothing else gets their ids and addresses.
            held = *sources, *(each.detach() for each in sources)
            known = self._known = made_of, held, make()  # at once: another thread may be calling
        return known[2]

    def __reduce__(self) -> tuple[Any, ...]:
        return Derived, ()
