"""Class labels of a set of samples: what they must be, and how a part is split off."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ranvier.checks import shape_of


def check_labels(labels: Tensor, count: int, classes: tuple[str, ...], name: str, of: str) -> None:
    """Check that there is one class index for each sample.

    Args:
        labels: What should be int64 `[count]`, each in `0 .. len(classes) - 1`.
        count: Number of samples.
        classes: Name of each class.
        name: What the set is called in messages.
        of: What one sample is called in messages.

    Raises:
        TypeError: `labels` is not int64.
        ValueError: another shape, no samples, or a label outside the classes.
    """
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: labels have dtype {labels.dtype}, expected torch.int64. Convert with labels.long().")
    if labels.ndim != 1 or len(labels) != count:
        raise ValueError(
            f"{name}: labels have shape {shape_of(labels)} but there are {count} {of}s; expected [{count}]. "
            f"Pass one class index for each {of}."
        )
    if count == 0:
        raise ValueError(f"{name}: the set is empty. Pass at least one {of}.")
    wrong = (labels < 0) | (labels >= len(classes))
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: label {int(labels[index])} at index {index} is outside 0..{len(classes) - 1} "
            f"({len(classes)} classes). Name every class, and choose a split that has labels "
            "(-1 usually marks a split published without them)."
        )


def stratified_split(labels: Tensor, count: int, seed: int, name: str, of: str) -> tuple[Tensor, Tensor]:
    """Split off `count` samples, with every class represented in proportion.

    Args:
        labels: Class indices, int64 `[N]`.
        count: Samples to hold out, `1 .. N - 1`.
        seed: The same seed gives the same split, on every machine.
        name: What the set is called in messages.
        of: What one sample is called in messages.

    Returns:
        Indices of the rest and of the held-out samples, int64, both ascending.

    Raises:
        ValueError: `count` leaves one of the two parts empty.

    >>> stratified_split(torch.tensor([0, 0, 1, 1]), 2, seed=0, name="pets", of="image")
    (tensor([0, 3]), tensor([1, 2]))
    """
    if not 1 <= count < len(labels):
        raise ValueError(f"{name}: cannot hold out {count} of {len(labels)} {of}s. Pass 1..{len(labels) - 1}.")
    random = np.random.RandomState(seed)  # its stream is frozen by NumPy, unlike that of default_rng
    numbers = labels.cpu().numpy()
    _, inverse, sizes = np.unique(numbers, return_inverse=True, return_counts=True)
    shares = sizes * count / len(numbers)
    quotas = np.floor(shares).astype(int)
    # Largest remainders get the images that rounding down left over; a stable sort settles ties by class index.
    quotas[np.argsort(quotas - shares, kind="stable")[: count - quotas.sum()]] += 1
    held_out = np.zeros(len(numbers), dtype=bool)
    for position, quota in enumerate(quotas):
        held_out[random.permutation(np.flatnonzero(inverse == position))[:quota]] = True
    return torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(np.flatnonzero(held_out))
