"""Random changes to the frames of recordings, the same for all frames of one: for a whole batch, on its device.

Randomness is drawn apart from being applied, as in `ranvier.data.augment`: results depend neither on the number of
processes nor on the device.

Shapes: `B` recordings, `T` steps, `C` polarity channels, `H` height, `W` width [pixels].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ranvier.checks import shape_of
from ranvier.data.autoaugment import to_device

# Columns of the table. Each is drawn whether it is used or not, so that switching one augmentation on or off leaves
# what the others do unchanged.
_CROP_Y, _CROP_X, _FLIP, _SHIFT_Y, _SHIFT_X, _DROP, _DROP_KIND, _DROP_SHARE, _DROP_FIRST, _DROP_SECOND = range(10)
_NUM_DRAWS = _DROP_SECOND + 1


@dataclass(frozen=True)
class FrameAugmentation:
    """Random roll, crop, horizontal flip and event drop, in this order; all frames of a recording get the same.

    Args:
        crop_padding: Zeros [pixels] put around the frames before a window of their own size is cut out; 0 is no crop.
        flip: Mirror left-right with probability 1/2.
        shift: Roll the frames by up to so many pixels up or down and left or right; what leaves on one side enters on
            the other; 0 is no roll.
        drop: Probability with which events of a recording are dropped: with equal chances either all of an interval,
            0.1, 0.2 ... 0.9 of the time, that may reach beyond the end, or all of a box with 0.05, 0.10 ... 0.25 of
            each side. A recording that would be left without a frame stays as it is.

    Raises:
        ValueError: a number is out of range.

    Source: crop and flip, He et al. 2016, as Zhao et al. 2025 (temporal consistency) use them for event frames; roll,
    the released code of Deng et al. 2022 (TET), and Li et al. 2022 (NDA); event drop, Gu et al. 2021. Differs from the
    last in: an interval drops the frames whose middle it covers, and single events, which frames no longer have, are
    not dropped (`drop_events` does it on recordings).

    >>> augmentation = FrameAugmentation(crop_padding=4, flip=True)
    >>> augmentation(torch.zeros(3, 10, 2, 48, 48), torch.Generator().manual_seed(0)).shape
    torch.Size([3, 10, 2, 48, 48])
    """

    crop_padding: int = 0
    flip: bool = False
    shift: int = 0
    drop: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for field in ("crop_padding", "shift"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}, expected pixels >= 0. Pass 0 to switch it off.")
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop is {self.drop}, expected a probability, 0 to 1.")

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the randomness for `count` recordings.

        Args:
            count: Recordings in the global batch.
            generator: On the CPU, whatever device the frames are on.

        Returns:
            Uniform numbers in [0, 1), float64 `[count, 10]`; row i decides all that happens to recording i.

        Raises:
            ValueError: `generator` is not on the CPU.
        """
        check_generator(generator)
        return torch.rand(count, _NUM_DRAWS, dtype=torch.float64, generator=generator)

    def apply(self, frames: Tensor, draws: Tensor) -> Tensor:
        """Change `frames` as `draws` says.

        Args:
            frames: `[B, T, C, H, W]` of any dtype, on any device. Not modified. Fastest where channels come last in
                memory, as they do in a frame store.
            draws: The rows of `draw` that belong to them, `[B, 10]`, on the CPU.

        Returns:
            `[B, T, C, H, W]` of the same dtype, on the device of `frames`.

        Raises:
            ValueError: the shapes do not fit, or `shift` is not less than the side of the frames.
        """
        if frames.ndim != 5 or draws.shape != (len(frames), _NUM_DRAWS):
            raise ValueError(
                f"frames have shape {shape_of(frames)} and draws {shape_of(draws)}, expected [B, T, C, H, W] and "
                f"[B, {_NUM_DRAWS}]. Pass the rows of draw() that belong to these recordings."
            )
        if self.shift >= min(frames.shape[3:]):
            raise ValueError(
                f"shift is {self.shift}, but the frames have {frames.shape[3]}x{frames.shape[4]} pixels. "
                f"Pass at most {min(frames.shape[3:]) - 1}."
            )
        images = frames.permute(0, 1, 3, 4, 2)  # [B, T, H, W, C]
        if self.shift:
            images = _windows(_wrapped(images, self.shift), draws[:, [_SHIFT_Y, _SHIFT_X]], self.shift)
        if self.crop_padding:
            padded = pad(images, (0, 0, *(self.crop_padding,) * 4))
            images = _windows(padded, draws[:, [_CROP_Y, _CROP_X]], self.crop_padding)
        if self.flip:
            images = _flip(images, draws[:, _FLIP])
        if self.drop:
            images = _drop(images, draws[:, _DROP:], self.drop)
        return images.permute(0, 1, 4, 2, 3)

    def __call__(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """Draw for, and apply to, a batch that is not split over processes."""
        return self.apply(frames, self.draw(len(frames), generator))


def check_generator(generator: torch.Generator) -> None:
    """Raise unless `generator` is on the CPU."""
    if generator.device.type != "cpu":
        raise ValueError(
            f"generator is on {generator.device}, expected the CPU: results must not depend on the device. "
            "Pass torch.Generator().manual_seed(seed)."
        )


# ------------------------------------------------------------------------------------ parts of FrameAugmentation
# Each takes images [B, T, H, W, C] and returns new ones.


def _windows(images: Tensor, draws: Tensor, margin: int) -> Tensor:
    """Cut a window out of each recording, smaller than `images` by `margin` on each side, at a drawn place `[B, 2]`."""
    height, width = images.shape[2] - 2 * margin, images.shape[3] - 2 * margin
    offset = to_device((draws * (2 * margin + 1)).long().clamp_(max=2 * margin), images.device)
    row = torch.arange(len(images), device=images.device)
    windows = images.unfold(2, height, 1).unfold(3, width, 1).permute(0, 1, 2, 3, 5, 6, 4)  # [B, T, y, x, H, W, C]
    return windows[row, :, offset[:, 0], offset[:, 1]]


def _wrapped(images: Tensor, margin: int) -> Tensor:
    """Repeat the opposite edge around the frames."""
    for axis in (2, 3):
        last = images.narrow(axis, images.shape[axis] - margin, margin)
        images = torch.cat([last, images, images.narrow(axis, 0, margin)], axis)
    return images


def _flip(images: Tensor, draws: Tensor) -> Tensor:
    rows = to_device((draws < 0.5).nonzero().flatten(), images.device)  # known without waiting for the device
    return images.index_copy(0, rows, images[rows].flip(3))


def _drop(images: Tensor, draws: Tensor, probability: float) -> Tensor:
    _, steps, height, width, _ = images.shape
    chance, kind, size, first, second = draws.unbind(1)
    interval = kind < 0.5
    middle = (torch.arange(steps) + 0.5) / steps
    end = first + (1 + (size * 9).floor()) / 10
    in_time = (middle >= first[:, None]) & (middle < end[:, None])  # [B, T]
    in_time &= ((chance < probability) & interval & ~in_time.all(1))[:, None]
    share = (1 + (size * 5).floor()) / 20
    in_rows, in_columns = _span(height, share, first), _span(width, share, second)  # [B, H], [B, W]
    in_rows &= ((chance < probability) & ~interval)[:, None]
    in_time, in_rows, in_columns = (to_device(part, images.device) for part in (in_time, in_rows, in_columns))
    hole = in_time[:, :, None, None] | (in_rows[:, :, None] & in_columns[:, None, :])[:, None]  # [B, T, H, W]
    return images.masked_fill(hole[..., None], 0)


def _span(length: int, share: Tensor, draws: Tensor) -> Tensor:
    """Which pixels are in a part of `share`, at least one pixel, that begins at a drawn place: `[B, length]`."""
    size = (share * length).round().clamp_(min=1)
    first = (draws * (length - size + 1)).floor()
    pixel = torch.arange(length)
    return (pixel >= first[:, None]) & (pixel < (first + size)[:, None])
