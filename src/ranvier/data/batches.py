"""Batches of images for training and evaluation, reproducible from any point on and for any number of processes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ranvier.data.augment import Augmentation, Normalization
from ranvier.data.autoaugment import to_device
from ranvier.data.images import ImageSet, StreamedImages


class Batches:
    """Image batches, each a pure function of the settings, the epoch and the batch's number.

    No random state exists: the order follows from (seed, epoch), the augmentation from (seed, epoch, batch). So
    training resumes at any batch without stored state, bit for bit, and each of several processes sees exactly its
    slice of what one process would see.

    An `ImageSet` is moved to `device` once and stays there; no batch waits for the device. `StreamedImages` are decoded
    by worker processes.

    Args:
        images: What to take batches from.
        batch_size: Images in a *global* batch, over all processes; a multiple of `world`.
        augment: Random changes; None for evaluation.
        normalization: Applied last; None scales pixels to [0, 1].
        shuffle: Take the images in a new random order each epoch.
        seed: Decides order and augmentation.
        rank: This process, `0 .. world - 1`. It gets rows `rank * b // world` up to `(rank + 1) * b // world` of each
            global batch of b images.
        world: Number of processes.
        drop_last: Leave out a last batch that is incomplete. If it is kept, b may not be a multiple of `world`: slices
            then differ by at most one row, and are empty for some ranks where b < world.
        device: Where batches are wanted; None keeps an `ImageSet` where it is and streams to the CPU.
        num_workers: Processes that decode `StreamedImages`; an `ImageSet` needs none.

    Raises:
        ValueError: a size is out of range, `batch_size` is not a multiple of `world`, or `drop_last` leaves no batch.

    >>> pixels, labels = torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.zeros(10, dtype=torch.long)
    >>> batches = Batches(ImageSet(pixels, labels, ("one",), "zeros"), batch_size=4)
    >>> [len(labels) for images, labels in batches]
    [4, 4, 2]
    """

    def __init__(
        self,
        images: ImageSet | StreamedImages,
        batch_size: int,
        *,
        augment: Augmentation | None = None,
        normalization: Normalization | None = None,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        device: torch.device | str | None = None,
        num_workers: int = 2,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1.")
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of world {world}, expected 0 <= rank < world.")
        if batch_size % world:
            raise ValueError(
                f"batch_size {batch_size} cannot be split evenly over {world} processes. It is the global batch size: "
                f"pass a multiple of {world}, such as {world * math.ceil(batch_size / world)}."
            )
        if drop_last and len(images) < batch_size:
            raise ValueError(
                f"drop_last leaves no batch: {images.name} has {len(images)} images, batch_size is {batch_size}. "
                "Pass a smaller batch_size or drop_last=False."
            )
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected at least 0.")
        self.images = images.to(device) if isinstance(images, ImageSet) and device is not None else images
        self.batch_size = batch_size
        self.augment = augment
        self.normalization = normalization
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world = world
        self.drop_last = drop_last
        self.device = torch.device(device) if device is not None else self._device_of_images()
        self.num_workers = num_workers

    def _device_of_images(self) -> torch.device:
        return self.images.images.device if isinstance(self.images, ImageSet) else torch.device("cpu")

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        count = len(self.images) / self.batch_size
        return math.floor(count) if self.drop_last else math.ceil(count)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over epoch 0, which is the whole set in order unless `shuffle` is set."""
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over this process's part of one epoch.

        Args:
            epoch: Number of the epoch, from 0.
            start: Number of the first batch, `0 .. len(self)`; the batches before it are not computed.

        Yields:
            Images float32 `[b, C, H, W]`, normalised, and labels int64 `[b]`.

        Raises:
            ValueError: `epoch` or `start` is out of range.
        """
        if epoch < 0 or not 0 <= start <= len(self):
            raise ValueError(f"epoch is {epoch}, start {start}; expected epoch >= 0 and start in 0..{len(self)}.")
        return self._epoch(epoch, start)  # a generator of its own, so that the check above runs at the call

    def _epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        if self.shuffle:
            order = torch.randperm(len(self.images), generator=_generator(self.seed, epoch))
        else:
            order = torch.arange(len(self.images))
        sizes = [min(self.batch_size, len(order) - batch * self.batch_size) for batch in range(len(self))]
        slices = [slice(self.rank * size // self.world, (self.rank + 1) * size // self.world) for size in sizes]
        indices = [order[batch * self.batch_size :][: sizes[batch]][slices[batch]] for batch in range(start, len(self))]
        for batch, (images, labels) in enumerate(self._fetch(indices), start):
            if self.augment is not None:
                draws = self.augment.draw(sizes[batch], _generator(self.seed, epoch, batch))
                images = self.augment.apply(images, draws[slices[batch]])
            yield self.normalization(images) if self.normalization is not None else images / 255, labels

    def _fetch(self, indices: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Bytes and labels on the device, batch by batch."""
        if isinstance(self.images, ImageSet):
            for index in indices:
                index = to_device(index, self.device)
                yield self.images.images[index], self.images.labels[index]
            return
        loader = DataLoader(
            _Rows(self.images),
            sampler=[index.tolist() for index in indices],
            batch_size=None,
            num_workers=min(self.num_workers, os.cpu_count() or 1),  # torch warns about more
            generator=torch.Generator(),  # or the loader would take a number from the global one
        )
        for images, labels in loader:
            yield to_device(images, self.device), to_device(labels, self.device)


class _Rows(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Lets a `DataLoader` ask for a list of rows at once."""

    def __init__(self, images: StreamedImages) -> None:
        self.images = images

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        pixels = [self.images[row][0] for row in rows]
        stacked = torch.stack(pixels) if pixels else torch.empty(0, *self.images.shape, dtype=torch.uint8)
        return stacked, self.images.labels[rows]


def _generator(seed: int, *key: int) -> torch.Generator:
    """A generator seeded with a hash of all numbers; no two keys of any lengths are related."""
    hashed = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(hashed))
