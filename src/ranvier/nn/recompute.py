"""Normalisation and activation that keep one tensor for backward instead of two."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ranvier.nn.normalization import BatchNorm


def recomputed(norm: BatchNorm, activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`activation(norm(x))`, of which only `x` is kept: backward normalises again.

    Values and gradients are those of the plain call, bit for bit, and running averages move once.

    Args:
        norm: Normalisation, in training or evaluation.
        activation: Anything without randomness and without state of its own.
        x: `[T, B, C, ...]`.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _averages_at_rest(norm)

    spikes: Tensor = checkpoint(
        lambda current: activation(norm(current)), x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return spikes


@contextmanager
def _averages_at_rest(norm: BatchNorm) -> Iterator[None]:
    """The second forward pass sees the same batch, which the running averages have taken in already."""
    momentum, norm.momentum = norm.momentum, 0.0
    try:
        yield
    finally:
        norm.momentum = momentum
