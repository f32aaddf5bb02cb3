"""Frames of recordings with class labels: what networks are trained on.

Shapes: `N` recordings, `T` steps, `C` polarity channels, `H` height and `W` width [pixels].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ranvier.checks import shape_of
from ranvier.data.labels import check_labels, stratified_split

DTYPES = (torch.uint8, torch.int16, torch.float16, torch.float32)
"""What frames may be kept as: counts, or counts after resizing."""


@dataclass(frozen=True)
class FrameSet:
    """Labelled frames, in memory or in a file that is mapped into it.

    A part of a set, such as `hold_out` gives, is the same `frames` with a list of rows: nothing is copied.

    Args:
        frames: All frames there are, `[M, T, C, H, W]`. Read them through `read`, which knows the rows.
        labels: Class indices of the N recordings of this set, int64 `[N]`, each in `0 .. len(classes) - 1`.
        classes: Name of each class; its position is the class index.
        name: What to call the set in messages and reports.
        rows: Which of `frames` are in the set and in what order, int64 `[N]`; None is all, so that N = M.

    Raises:
        TypeError: `frames`, `labels` or `rows` has another dtype.
        ValueError: wrong rank, unequal lengths, no recordings, a label outside the classes, or a row outside `frames`.

    >>> counts = torch.zeros(3, 10, 2, 34, 34, dtype=torch.uint8)
    >>> digits = FrameSet(counts, torch.tensor([0, 1, 1]), ("zero", "one"), "n-mnist")
    >>> len(digits), digits.steps, digits.shape, len(digits.first(2))
    (3, 10, (2, 34, 34), 2)
    """

    frames: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        """Check ranks, types, lengths and ranges."""
        if self.frames.dtype not in DTYPES:
            raise TypeError(
                f"{self.name}: frames have dtype {self.frames.dtype}, expected one of {', '.join(map(str, DTYPES))}. "
                "Convert counts with frames.to(torch.int16)."
            )
        if self.frames.ndim != 5 or 0 in self.frames.shape[1:]:
            raise ValueError(
                f"{self.name}: frames have shape {shape_of(self.frames)}, expected [N, T, C, H, W]. "
                "Recordings come first, then steps; to_frames gives one recording's [T, C, H, W]."
            )
        if self.rows is not None:
            _check_rows(self.rows, len(self.frames), self.name)
        count = len(self.frames if self.rows is None else self.rows)
        check_labels(self.labels, count, self.classes, self.name, of="recording")

    def __len__(self) -> int:
        """Return the number of recordings."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def steps(self) -> int:
        """Number of frames of a recording, T."""
        return self.frames.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one frame, `(C, H, W)`."""
        channels, height, width = self.frames.shape[2:]
        return channels, height, width

    @property
    def num_bytes(self) -> int:
        """Memory that the frames of this set take [bytes]."""
        return len(self) * math.prod(self.frames.shape[1:]) * self.frames.element_size()

    def read(self, indices: Tensor) -> Tensor:
        """Frames of the recordings at `indices` (int64 `[b]`, in any order): a copy, `[b, T, C, H, W]`."""
        return self.frames[indices if self.rows is None else self.rows[indices]]

    def to(self, device: torch.device | str) -> FrameSet:
        """Return the set on `device`, with the frames of its own rows only; itself where it is there already."""
        if self.frames.device == torch.empty(0, device=device).device:
            return self
        frames = self.frames if self.rows is None else self.frames[self.rows]
        return replace(self, frames=frames.to(device), labels=self.labels.to(device), rows=None)

    def hold_out(self, count: int, seed: int) -> tuple[FrameSet, FrameSet]:
        """Split off `count` recordings, with every class represented in proportion.

        Args:
            count: Recordings to hold out, `1 .. len(self) - 1`.
            seed: The same seed gives the same split, on every machine.

        Returns:
            The rest, and the held-out recordings; both keep the original order.

        Raises:
            ValueError: `count` leaves one of the two parts empty.
        """
        rest, held_out = stratified_split(self.labels, count, seed, self.name, of="recording")
        return self.take(rest), self.take(held_out)

    def folds(self, k: int, seed: int) -> Iterator[tuple[FrameSet, FrameSet]]:
        """Cross-validation: cut the set into k parts, and yield each as the test set of the others.

        Each recording is tested once. The parts, and the recordings of each class in them, differ by at most one.

        Args:
            k: Number of parts, `2 .. len(self)`.
            seed: The same seed gives the same parts, on every machine.

        Yields:
            The training and the test set of each part; both keep the original order.

        Raises:
            ValueError: `k` is out of range.

        >>> frames = torch.zeros(5, 1, 2, 4, 4)
        >>> [len(test) for _, test in FrameSet(frames, torch.zeros(5).long(), ("one",), "dots").folds(2, seed=0)]
        [3, 2]
        """
        if not 2 <= k <= len(self):
            raise ValueError(f"{self.name}: cannot make {k} folds of {len(self)} recordings. Pass 2..{len(self)}.")
        random = np.random.RandomState(seed)  # its stream is frozen by NumPy, unlike that of default_rng
        shuffled = random.permutation(len(self))
        # Dealt out like cards, class after class: the next class goes on at the part where the one before ended.
        dealt = shuffled[np.argsort(self.labels.cpu().numpy()[shuffled], kind="stable")]
        part = np.empty(len(self), dtype=np.int64)
        part[dealt] = np.arange(len(self)) % k
        return ((self._where(part != number), self._where(part == number)) for number in range(k))

    def first(self, count: int) -> FrameSet:
        """The first `count` recordings, at least 1; all if there are fewer."""
        return self.take(torch.arange(min(max(count, 1), len(self))))

    def take(self, indices: Tensor) -> FrameSet:
        """The recordings at `indices` (int64 `[n]`) as a set of their own, on the same frames."""
        indices = indices.to(self.labels.device)
        rows = indices if self.rows is None else self.rows[indices]
        return replace(self, labels=self.labels[indices], rows=rows)

    def first_steps(self, steps: int) -> FrameSet:
        """The first `steps` frames of every recording, on the same frames.

        Raises:
            ValueError: there are fewer.
        """
        if not 1 <= steps <= self.steps:
            raise ValueError(
                f"{self.name} has {self.steps} frames of each recording, but {steps} steps were asked for. Pass 1 to "
                f"{self.steps}; a network for more needs recordings cut into more frames, and so another training."
            )
        return replace(self, frames=self.frames[:, :steps])

    def _where(self, mask: np.ndarray) -> FrameSet:
        return self.take(torch.from_numpy(np.flatnonzero(mask)))


@dataclass(frozen=True)
class FrameSplits:
    """The training and the test part of one data set."""

    train: FrameSet
    test: FrameSet


def _check_rows(rows: Tensor, count: int, name: str) -> None:
    if rows.dtype != torch.int64:
        raise TypeError(f"{name}: rows have dtype {rows.dtype}, expected torch.int64. Convert with rows.long().")
    if rows.ndim != 1:
        raise ValueError(f"{name}: rows have shape {shape_of(rows)}, expected [N]: numbers of recordings in frames.")
    wrong = (rows < 0) | (rows >= count)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: row {int(rows[index])} at index {index} is outside 0..{count - 1} ({count} recordings). "
            "Number rows from 0."
        )
