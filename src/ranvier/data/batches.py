"""Batches of images or frames, reproducible from any point of the training on and for any number of processes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ranvier.checks import check_count
from ranvier.data.augment import Augmentation, Normalization
from ranvier.data.autoaugment import to_device
from ranvier.data.events.event_mix import EventMix
from ranvier.data.events.frame_augment import FrameAugmentation
from ranvier.data.events.frame_set import FrameSet
from ranvier.data.images import ImageSet, StreamedImages

_SHARE_OF_MEMORY = 0.25  # of what a GPU has free when a set of frames moves there: networks need the rest
_CACHED = 64, 32  # images of 32x32 times time steps, and images, that stay in the caches of a CPU, for each thread
_SMALLEST, _LARGEST = 8, 500  # in smaller batches calls cost more than caches save; larger ones gain nothing
_MIX = 1  # ends the key of the randomness of a mix, so that it is none of the augmentation's


def evaluation_batch_size(
    steps: int, device: torch.device | str = "cpu", *, image_size: int | Sequence[int] = 32
) -> int:
    """Images per batch at which convolutional networks of T steps run fastest without gradients.

    On a CPU as many as keep what a layer writes in the caches, and in memory that the process has already:

        B = threads min(32, 64 / T) 32^2 / pixels        at least 8, at most 500

    Measured on two threads with images of 32x32: see `docs/results/speed.md`. On a GPU 500.

    Args:
        steps: T.
        device: Where the network runs.
        image_size: Height and width, or one number for both; `()` for features without places.

    Raises:
        ValueError: `steps` is no whole number of at least 1.

    >>> evaluation_batch_size(4, "cuda")
    500
    """
    steps = check_count("steps", steps)
    if torch.device(device).type != "cpu":
        return _LARGEST
    pixels = image_size**2 if isinstance(image_size, int) else math.prod(image_size)
    together, images = (count * 32**2 * torch.get_num_threads() // max(pixels, 1) for count in _CACHED)
    return min(_LARGEST, max(_SMALLEST, min(images, together // steps)))


class Batches:
    """Batches of images, or of frames of recordings: each a pure function of the settings, the epoch and its number.

    No random state exists: the order follows from (seed, epoch), augmentation and mix from (seed, epoch, batch). So
    training resumes at any batch without stored state, bit for bit, and each of several processes sees exactly its
    slice of what one process would see.

    An `ImageSet` is moved to `device` once and stays there; no batch waits for the device. `StreamedImages` are decoded
    by worker processes. A `FrameSet` moves to a GPU if it takes at most a quarter of the free memory; otherwise each
    batch is read from the file and moved by itself, in any order equally fast.

    Args:
        images: What to take batches from.
        batch_size: Images (or recordings) in a *global* batch, over all processes; a multiple of `world`.
        augment: Random changes, a `FrameAugmentation` for a `FrameSet`; None for evaluation.
        mix: Put parts of recordings into others of the same global batch, after `augment`; for a `FrameSet`. A process
            also reads those that its own are mixed with. Labels are then targets, the shares of the classes.
        normalization: Applied last; None scales pixels to [0, 1]. Frames are raw counts, and have none.
        shuffle: Take the images in a new random order each epoch.
        balanced: Draw the images of each epoch anew, with replacement, so that all classes come equally often in the
            mean. An epoch has as many as before; this goes before `shuffle`.
        seed: Decides order and augmentation.
        rank: This process, `0 .. world - 1`. It gets rows `rank * b // world` up to `(rank + 1) * b // world` of each
            global batch of b images.
        world: Number of processes.
        drop_last: Leave out a last batch that is incomplete. If it is kept, b may not be a multiple of `world`: slices
            then differ by at most one row, and are empty for some ranks where b < world.
        device: Where batches are wanted; None keeps an `ImageSet` where it is and streams to the CPU.
        num_workers: Processes that decode `StreamedImages`; the others need none.

    Raises:
        TypeError: the augmentation is one for the other kind of set, or images are to be mixed.
        ValueError: a size is out of range, `batch_size` is not a multiple of `world`, `drop_last` leaves no batch, or
            frames are to be normalised.

    >>> pixels, labels = torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.zeros(10, dtype=torch.long)
    >>> batches = Batches(ImageSet(pixels, labels, ("one",), "zeros"), batch_size=4)
    >>> [len(labels) for images, labels in batches]
    [4, 4, 2]
    """

    def __init__(
        self,
        images: ImageSet | StreamedImages | FrameSet,
        batch_size: int,
        *,
        augment: Augmentation | FrameAugmentation | None = None,
        mix: EventMix | None = None,
        normalization: Normalization | None = None,
        shuffle: bool = False,
        balanced: bool = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        device: torch.device | str | None = None,
        num_workers: int = 2,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1.")
        what = "recordings" if isinstance(images, FrameSet) else "images"
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of world {world}, expected 0 <= rank < world.")
        if batch_size % world:
            raise ValueError(
                f"batch_size {batch_size} cannot be split evenly over {world} processes. It is the global batch size: "
                f"pass a multiple of {world}, such as {world * math.ceil(batch_size / world)}."
            )
        if drop_last and len(images) < batch_size:
            raise ValueError(
                f"drop_last leaves no batch: {images.name} has {len(images)} {what}, batch_size is {batch_size}. "
                f"Pass a batch_size of at most {len(images)} (--batch-size), or drop_last=False to Batches."
            )
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected at least 0.")
        _check_augmentation(images, augment, mix, normalization)
        self.images = images if device is None else _moved(images, torch.device(device))
        self.batch_size = batch_size
        self.augment = augment
        self.mix = mix
        self.normalization = normalization
        self.shuffle = shuffle
        self.balanced = balanced
        self.seed = seed
        self.rank = rank
        self.world = world
        self.drop_last = drop_last
        self.device = torch.device(device) if device is not None else self._device_of_images()
        self.num_workers = num_workers

    def _device_of_images(self) -> torch.device:
        if isinstance(self.images, StreamedImages):
            return torch.device("cpu")
        return self.images.images.device if isinstance(self.images, ImageSet) else self.images.frames.device

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
            Images float32 `[b, C, H, W]`, normalised, or frames float32 `[T, b, C, H, W]`, raw counts; and labels int64
            `[b]`, or with `mix` targets float32 `[b, K]` that sum to 1. In memory the channels of frames come last, so
            that folded time `[T * b, C, H, W]` is a view in the order in which convolutions are fastest.

        Raises:
            ValueError: `epoch` or `start` is out of range.
        """
        if epoch < 0 or not 0 <= start <= len(self):
            raise ValueError(f"epoch is {epoch}, start {start}; expected epoch >= 0 and start in 0..{len(self)}.")
        return self._epoch(epoch, start)  # a generator of its own, so that the check above runs at the call

    def _epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        whole = self._order(epoch).split(self.batch_size)[start : len(self)]  # of all processes
        if self.mix is not None:
            for batch, numbers in enumerate(whole, start):
                yield self._mixed(self.mix, numbers, epoch, batch)
            return
        rows = [self._own(len(numbers)) for numbers in whole]
        fetched = self._fetch([numbers[own] for numbers, own in zip(whole, rows, strict=True)])
        for batch, (images, labels) in enumerate(fetched, start):
            numbers, own = whole[batch - start], rows[batch - start]
            yield self._finish(self._augmented(images, own, len(numbers), epoch, batch)), labels

    def _own(self, size: int) -> slice:
        """This process's rows of a global batch."""
        return slice(self.rank * size // self.world, (self.rank + 1) * size // self.world)

    def _augmented(self, images: Tensor, rows: slice | Tensor, size: int, epoch: int, batch: int) -> Tensor:
        """`images`, which are some rows of a global batch, changed as they would be among the whole."""
        if self.augment is None:
            return images
        draws = self.augment.draw(size, _generator(self.seed, epoch, batch))
        return self.augment.apply(images, draws[rows])

    def _mixed(self, mix: EventMix, numbers: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        """This process's rows of a global batch, with parts of other rows in them, and targets."""
        assert isinstance(self.images, FrameSet)
        size, (_, height, width) = len(numbers), self.images.shape
        draws = mix.draw(size, (self.images.steps, height, width), _generator(self.seed, epoch, batch, _MIX))
        draws, needed = draws.part(self._own(size))
        ((frames, labels),) = self._fetch([numbers[needed]])
        frames = self._augmented(frames, needed, size, epoch, batch)
        frames, targets = mix.apply(frames, labels, self.images.num_classes, draws)
        return self._finish(frames), targets

    def _order(self, epoch: int) -> Tensor:
        """Numbers of the images of an epoch, over all processes."""
        if self.balanced:
            return _balanced_order(self.images.labels.cpu(), _generator(self.seed, epoch))
        if self.shuffle:
            return torch.randperm(len(self.images), generator=_generator(self.seed, epoch))
        return torch.arange(len(self.images))

    def _finish(self, images: Tensor) -> Tensor:
        """Numbers as a network takes them."""
        if isinstance(self.images, FrameSet):
            return _time_first(images)
        return self.normalization(images) if self.normalization is not None else images / 255

    def _fetch(self, indices: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Bytes (or counts) and labels on the device, batch by batch."""
        if isinstance(self.images, ImageSet):
            for index in indices:
                index = to_device(index, self.device)
                yield self.images.images[index], self.images.labels[index]
            return
        if isinstance(self.images, FrameSet):
            for index in indices:
                index = to_device(index, self.images.labels.device)
                frames, labels = self.images.read(index), self.images.labels[index]
                yield _to(frames, self.device), _to(labels, self.device)
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


def _balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """As many numbers as labels: a uniform class among those that occur, and one of its images, each time."""
    _, sizes = labels.unique(return_counts=True)
    by_class = labels.argsort(stable=True)
    first = sizes.cumsum(0) - sizes
    which, member = torch.rand(2, len(labels), dtype=torch.float64, generator=generator)
    drawn = (which * len(sizes)).long().clamp_(max=len(sizes) - 1)
    return by_class[first[drawn] + torch.minimum((member * sizes[drawn]).long(), sizes[drawn] - 1)]


def _time_first(frames: Tensor) -> Tensor:
    """`[b, T, C, H, W]` as float32 `[T, b, C, H, W]` with the channels last in memory, in one pass."""
    view = frames.permute(1, 0, 3, 4, 2)  # [T, b, H, W, C]
    return torch.empty(view.shape, device=view.device).copy_(view).permute(0, 1, 4, 2, 3)


def _to(batch: Tensor, device: torch.device) -> Tensor:
    """On `device`, without waiting for it; what is on a GPU cannot be pinned."""
    return batch.to(device, non_blocking=True) if batch.device.type == "cuda" else to_device(batch, device)


def _moved(images: ImageSet | StreamedImages | FrameSet, device: torch.device) -> ImageSet | StreamedImages | FrameSet:
    """The set on `device`, if that is where it is to be."""
    if isinstance(images, ImageSet):
        return images.to(device)
    if isinstance(images, FrameSet) and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return images.to(device) if images.num_bytes <= _SHARE_OF_MEMORY * free else images
    return images


def _check_augmentation(
    images: ImageSet | StreamedImages | FrameSet,
    augment: Augmentation | FrameAugmentation | None,
    mix: EventMix | None,
    normalization: Normalization | None,
) -> None:
    if isinstance(images, FrameSet):
        if isinstance(augment, Augmentation):
            raise TypeError(f"augment is an Augmentation, but {images.name} holds frames. Pass a FrameAugmentation.")
        if normalization is not None:
            raise ValueError(
                f"normalization is {normalization}, but {images.name} holds frames, which are raw counts. Pass None."
            )
        return
    if isinstance(augment, FrameAugmentation):
        raise TypeError(f"augment is a FrameAugmentation, but {images.name} holds images. Pass an Augmentation.")
    if mix is not None:
        raise TypeError(f"mix is an EventMix, but {images.name} holds images. Pass None.")
