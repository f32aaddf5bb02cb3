"""Normalisation and neuron that keep one tensor for backward instead of two."""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ranvier.nn.normalization import BatchNorm


def recomputed(norm: BatchNorm, neuron: nn.Module, x: Tensor) -> Tensor:
    """`neuron(norm(x))`, of which only `x` is kept: backward normalises again.

    Values and gradients are those of the plain call, bit for bit, and running averages move once.

    Args:
        norm: Normalisation in training.
        neuron: Without randomness and without a state of its own.
        x: `[T, B, C, ...]`.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _SameBatchAgain(norm)

    spikes: Tensor = checkpoint(
        lambda current: neuron(norm(current)), x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return spikes


class _SameBatchAgain(AbstractContextManager[None]):
    """In training as the first time, but the running averages have taken in this batch already. Entered many times."""

    def __init__(self, norm: BatchNorm) -> None:
        self.norm = norm
        self.before: list[tuple[bool, float]] = []

    def __enter__(self) -> None:
        self.before.append((self.norm.training, self.norm.momentum))
        self.norm.training, self.norm.momentum = True, 0.0

    def __exit__(self, *_: object) -> None:
        self.norm.training, self.norm.momentum = self.before.pop()
