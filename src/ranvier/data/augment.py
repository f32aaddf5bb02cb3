"""Random changes to training images, and normalisation: on the device, for a whole batch at once.

Randomness is drawn apart from being applied. A draw is a table of uniform numbers, one row for each image of the
*global* batch; a process that holds rows 32..63 of the batch applies rows 32..63 of the table. So results do not depend
on the number of processes, and, as the table is drawn on the CPU, not on the device either.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ranvier.data.autoaugment import NUM_DRAWS as _NUM_POLICY_DRAWS
from ranvier.data.autoaugment import auto_augment, to_device

# Columns of the table. Each is drawn whether it is used or not, so that switching one augmentation on or off leaves
# what the others do unchanged.
_CROP_Y, _CROP_X, _FLIP, _CUTOUT_Y, _CUTOUT_X, _POLICY = range(6)
_NUM_DRAWS = _POLICY + _NUM_POLICY_DRAWS


@dataclass(frozen=True)
class Augmentation:
    """Random crop, horizontal flip, AutoAugment and cutout, in this order.

    Args:
        crop_padding: Zeros [pixels] put around the image before a window of its own size is cut out; 0 is no crop.
        flip: Mirror left-right with probability 1/2.
        auto_augment: Apply the CIFAR-10 policy, see `ranvier.data.autoaugment`.
        cutout: Side of one square hole [pixels] set to 0; its centre is anywhere in the image, so that it may hang over
            the edge; 0 is no hole.

    Raises:
        ValueError: `crop_padding` or `cutout` is negative.

    Source: crop and flip, He et al. 2016; cutout, DeVries and Taylor, arXiv 1708.04552.

    >>> augmentation = Augmentation(crop_padding=4, flip=True, cutout=8)
    >>> augmentation(torch.full((2, 1, 28, 28), 255, dtype=torch.uint8), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 1, 28, 28])
    """

    crop_padding: int = 0
    flip: bool = False
    auto_augment: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        """Check the sizes."""
        for field in ("crop_padding", "cutout"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}, expected pixels >= 0. Pass 0 to switch it off.")

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the randomness for `count` images.

        Args:
            count: Images in the global batch.
            generator: On the CPU, whatever device the images are on.

        Returns:
            Uniform numbers in [0, 1), float64 `[count, 10]`; row i decides all that happens to image i.

        Raises:
            ValueError: `generator` is not on the CPU.
        """
        if generator.device.type != "cpu":
            raise ValueError(
                f"generator is on {generator.device}, expected the CPU: results must not depend on the device. "
                "Pass torch.Generator().manual_seed(seed)."
            )
        return torch.rand(count, _NUM_DRAWS, dtype=torch.float64, generator=generator)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Change `images` as `draws` says.

        Args:
            images: uint8 `[B, C, H, W]` on any device. Not modified.
            draws: The rows of `draw` that belong to them, `[B, 10]`.

        Returns:
            uint8 `[B, C, H, W]`, on the device of `images`.

        Raises:
            TypeError: `images` is not uint8.
            ValueError: the shapes do not fit.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images have dtype {images.dtype}, expected torch.uint8. Augment before normalising.")
        if images.ndim != 4 or draws.shape != (len(images), _NUM_DRAWS):
            raise ValueError(
                f"images have shape {tuple(images.shape)} and draws {tuple(draws.shape)}, expected [B, C, H, W] and "
                f"[B, {_NUM_DRAWS}]. Pass the rows of draw() that belong to these images."
            )
        if self.crop_padding:
            images = _crop(images, draws[:, [_CROP_Y, _CROP_X]], self.crop_padding)
        if self.flip:
            images = _flip(images, draws[:, _FLIP])
        if self.auto_augment:
            images = auto_augment(images, draws[:, _POLICY:])
        if self.cutout:
            images = _cut_out(images, draws[:, [_CUTOUT_Y, _CUTOUT_X]], self.cutout)
        return images

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draw for, and apply to, a batch that is not split over processes."""
        return self.apply(images, self.draw(len(images), generator))


@dataclass(frozen=True)
class Normalization:
    """Bytes to floats: `(pixel / 255 - mean) / std` for each channel.

    Args:
        mean: Mean of each channel in [0, 1] units, `[C]`.
        std: Standard deviation of each channel in [0, 1] units, `[C]`, positive.

    Raises:
        ValueError: unequal lengths, or a standard deviation that is not positive.

    >>> Normalization((0.5,), (0.25,))(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).flatten().tolist()
    [-2.0, 2.0]
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check lengths and signs."""
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std {len(self.std)}. Pass one value per channel.")
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std is {self.std}, expected positive values. A constant channel can take std 1.")

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise uint8 `[B, C, H, W]`.

        Returns:
            float32 `[B, C, H, W]`.

        Raises:
            TypeError: `images` is not uint8.
            ValueError: the number of channels differs.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images have dtype {images.dtype}, expected torch.uint8. Normalise bytes, and only once.")
        if images.ndim != 4 or images.shape[1] != len(self.mean):
            raise ValueError(
                f"images have shape {tuple(images.shape)}, expected [B, C={len(self.mean)}, H, W]. "
                "Pass mean and std of the set these images come from (ImageSet.statistics)."
            )
        scale, shift = _scale_and_shift(self.mean, self.std, images.device)
        return images * scale + shift


@lru_cache(maxsize=16)
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """`[C, 1, 1]` each; kept, because a copy to the device waits for it."""
    means, stds = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
    return (1 / (255 * stds)).float().to(device), (-means / stds).float().to(device)


def _integers(draws: Tensor, count: int, device: torch.device) -> Tensor:
    """Uniform integers 0..count-1 from uniform numbers in [0, 1)."""
    return to_device((draws * count).long().clamp_(max=count - 1), device)


def _crop(images: Tensor, draws: Tensor, padding: int) -> Tensor:
    height, width = images.shape[2:]
    offset = _integers(draws, 2 * padding + 1, images.device)
    windows = torch.nn.functional.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    row = torch.arange(len(images), device=images.device)
    return windows[row, :, offset[:, 0], offset[:, 1]]


def _flip(images: Tensor, draws: Tensor) -> Tensor:
    mirrored = to_device(draws < 0.5, images.device)[:, None, None, None]
    return torch.where(mirrored, images.flip(3), images)


def _cut_out(images: Tensor, draws: Tensor, size: int) -> Tensor:
    height, width = images.shape[2:]
    top = _integers(draws[:, 0], height, images.device)[:, None] - size // 2
    left = _integers(draws[:, 1], width, images.device)[:, None] - size // 2
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    in_rows, in_columns = (y >= top) & (y < top + size), (x >= left) & (x < left + size)  # [B, H], [B, W]
    return images.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)
