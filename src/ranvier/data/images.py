"""Still images with class labels: all in memory, or decoded one by one.

Shapes: `N` images, `C` channels (1 or 3), `H` height, `W` width [pixels]. Pixels are uint8, 0..255.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ranvier.data.labels import check_labels, stratified_split

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one size, all in memory.

    Args:
        images: Pixels, uint8 `[N, C, H, W]`.
        labels: Class indices, int64 `[N]`, each in `0 .. len(classes) - 1`.
        classes: Name of each class; its position is the class index.
        name: What to call the set in messages and reports.

    Raises:
        TypeError: `images` is not uint8, or `labels` is not int64.
        ValueError: wrong rank, unequal lengths, no images, no classes, or a label outside the classes.

    >>> two = ImageSet(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), ("cat", "dog"), "pets")
    >>> len(two), two.num_classes, two.shape
    (2, 2, (1, 8, 8))
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        """Check ranks, types, lengths and the range of the labels."""
        if self.images.dtype != torch.uint8:
            raise TypeError(
                f"{self.name}: images have dtype {self.images.dtype}, expected torch.uint8 (0..255). "
                "Convert floats in [0, 1] with (images * 255).round().to(torch.uint8)."
            )
        if self.images.ndim != 4:
            raise ValueError(
                f"{self.name}: images have shape {tuple(self.images.shape)}, expected [N, C, H, W]. "
                "Add a channel axis to grayscale images with images.unsqueeze(1)."
            )
        check_labels(self.labels, len(self.images), self.classes, self.name, of="image")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image, `(C, H, W)`."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def to(self, device: torch.device | str) -> ImageSet:
        """Return the set with images and labels on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def hold_out(self, count: int, seed: int) -> tuple[ImageSet, ImageSet]:
        """Split off `count` images, with every class represented in proportion.

        Args:
            count: Images to hold out, `1 .. len(self) - 1`.
            seed: The same seed gives the same split, on every machine.

        Returns:
            The rest, and the held-out images; both keep the original order.

        Raises:
            ValueError: `count` leaves one of the two parts empty.
        """
        rest, held_out = stratified_split(self.labels, count, seed, self.name, of="image")
        return self._take(rest), self._take(held_out)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all pixels, in [0, 1] units."""
        return _channel_statistics(self.images)

    def first(self, count: int) -> ImageSet:
        """The first `count` images, at least 1; all if there are fewer."""
        return self._take(torch.arange(min(max(count, 1), len(self))))

    def _take(self, indices: Tensor) -> ImageSet:
        indices = indices.to(self.images.device)
        return replace(self, images=self.images[indices], labels=self.labels[indices])


@dataclass(frozen=True)
class StreamedImages:
    """Labelled images too many to hold in memory: each is decoded and resized when it is asked for.

    It has the attributes and methods of `ImageSet` except `images` and `to`. `Batches` reads it through a torch
    `DataLoader`, whose workers decode in parallel.

    Args:
        source: A Hugging Face data set.
        image_column: The column of `source` that holds the images.
        labels: Class indices, int64 `[N]`, one for each row of `source`.
        classes: Name of each class; its position is the class index.
        name: What to call the set in messages and reports.
        shape: `(C, H, W)` that every image is converted to when `resize` is set, and must have otherwise.
        resize: Whether images of another size are resized (bilinear, antialiased) instead of refused.
        drop_color: Whether colour images are reduced to one channel, where `C` is 1, instead of refused.
    """

    source: datasets.Dataset
    image_column: str
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    shape: tuple[int, int, int]
    resize: bool = False
    drop_color: bool = False

    def __post_init__(self) -> None:
        """Check lengths and the range of the labels."""
        check_labels(self.labels, len(self.source), self.classes, self.name, of="image")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Decode one image: pixels uint8 `[C, H, W]` and its label, int64 `[]`."""
        index = range(len(self))[index]
        try:
            image = self.source[index][self.image_column]
        except OSError as error:
            raise self.undecodable(index, error) from error
        return torch.from_numpy(self.pixels(image, index)), self.labels[index]

    def pixels(self, image: Image, index: int) -> np.ndarray:
        """Convert a decoded image to bytes `[C, H, W]`; `index` names it in errors.

        Raises:
            ValueError: it is not 8-bit, or it has another size or colour than `shape` and may not be converted.
        """
        return _pixels(image, self.shape, self.resize, self.drop_color, f"{self.name}: image {index}")

    def undecodable(self, index: int, error: OSError) -> ValueError:
        """Say which file holds the image at `index`, which Pillow refused with `error`."""
        from datasets import Image

        encoded = self.source.cast_column(self.image_column, Image(decode=False))[index][self.image_column]
        return ValueError(
            f"{self.name}: image {index} ({encoded['path'] or 'no path'}) cannot be decoded: {error}. "
            "Remove or replace it."
        )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def hold_out(self, count: int, seed: int) -> tuple[StreamedImages, StreamedImages]:
        """Split off `count` images in proportion to the classes, as `ImageSet.hold_out` does."""
        rest, held_out = stratified_split(self.labels, count, seed, self.name, of="image")
        return self._take(rest), self._take(held_out)

    def statistics(self, sample: int = 1000) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, in [0, 1] units, from `sample` evenly spaced images."""
        indices = np.unique(np.linspace(0, len(self) - 1, min(sample, len(self))).round().astype(int))
        return _channel_statistics(torch.stack([self[int(index)][0] for index in indices]))

    def first(self, count: int) -> StreamedImages:
        """The first `count` images, at least 1; all if there are fewer."""
        return self._take(torch.arange(min(max(count, 1), len(self))))

    def _take(self, indices: Tensor) -> StreamedImages:
        return replace(self, source=self.source.select(indices.tolist()), labels=self.labels[indices])


@dataclass(frozen=True)
class ImageSplits:
    """The training and the test part of one data set."""

    train: ImageSet | StreamedImages
    test: ImageSet | StreamedImages


def _channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact integer sums, so that the result does not depend on the order of summation."""
    count = images[:, 0].numel()
    means, deviations = [], []
    for channel in images.unbind(1):
        levels = torch.bincount(channel.flatten().int(), minlength=256).double().cpu()
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = float((levels * values).sum() / count)
        means.append(mean)
        deviations.append(float(((levels * (values - mean) ** 2).sum() / count).sqrt()))
    return tuple(means), tuple(deviations)


def is_grayscale(image: Image) -> bool:
    """Whether a Pillow image has one channel, transparency aside."""
    return image.mode in ("1", "L", "LA")


def _pixels(image: Image, shape: tuple[int, int, int], resize: bool, drop_color: bool, what: str) -> np.ndarray:
    """Bytes `[C, H, W]` of a decoded image, or a ValueError where converting would lose what nobody agreed to lose."""
    from PIL.Image import Resampling

    channels, height, width = shape
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{what} has mode {image.mode}, expected 8 bits a channel. Convert the files to 8 bits.")
    if channels == 1 and not (is_grayscale(image) or drop_color):
        raise ValueError(f"{what} is in colour ({image.mode}) but the first one is not. Pass grayscale=True or False.")
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        if not resize:
            raise ValueError(
                f"{what} is {image.height}x{image.width} but the first one is {height}x{width} [pixels]. "
                "Resize all to one size: --image-size, or size=(height, width) in load_images."
            )
        image = image.resize((width, height), Resampling.BILINEAR)  # Pillow widens the filter when it shrinks
    pixels = np.array(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
