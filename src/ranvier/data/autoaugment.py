"""The AutoAugment policy for CIFAR-10, vectorised: each image of a batch draws its own sub-policy.

Pixel for pixel the result is Pillow's, whose operations the policy was searched with: all operations are integer
arithmetic or Pillow's own sequence of float operations. Shapes: `B` images, `C` channels, `H` height, `W` width; `n`
is the number of images of a batch that one operation is applied to.

Source: Cubuk et al., "AutoAugment: Learning Augmentation Policies from Data", CVPR 2019, table 7.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NUM_DRAWS = 5
"""Uniform numbers that `auto_augment` uses for one image."""

_FILL = 128  # what geometric operations show outside the image


class Step(NamedTuple):
    """One step of a sub-policy: apply `operation` at `magnitude` (0..9) with `probability`."""

    operation: str
    probability: float
    magnitude: int = 0


CIFAR10_POLICY: tuple[tuple[Step, Step], ...] = (
    (Step("invert", 0.1), Step("contrast", 0.2, 6)),
    (Step("rotate", 0.7, 2), Step("translate_x", 0.3, 9)),
    (Step("sharpness", 0.8, 1), Step("sharpness", 0.9, 3)),
    (Step("shear_y", 0.5, 8), Step("translate_y", 0.7, 9)),
    (Step("autocontrast", 0.5), Step("equalize", 0.9)),
    (Step("shear_y", 0.2, 7), Step("posterize", 0.3, 7)),
    (Step("color", 0.4, 3), Step("brightness", 0.6, 7)),
    (Step("sharpness", 0.3, 9), Step("brightness", 0.7, 9)),
    (Step("equalize", 0.6), Step("equalize", 0.5)),
    (Step("contrast", 0.6, 7), Step("sharpness", 0.6, 5)),
    (Step("color", 0.7, 7), Step("translate_x", 0.5, 8)),
    (Step("equalize", 0.3), Step("autocontrast", 0.4)),
    (Step("translate_y", 0.4, 3), Step("sharpness", 0.2, 6)),
    (Step("brightness", 0.9, 6), Step("color", 0.2, 8)),
    (Step("solarize", 0.5, 2), Step("invert", 0.0)),
    (Step("equalize", 0.2), Step("autocontrast", 0.6)),
    (Step("equalize", 0.2), Step("equalize", 0.6)),
    (Step("color", 0.9, 9), Step("equalize", 0.6)),
    (Step("autocontrast", 0.8), Step("solarize", 0.2, 8)),
    (Step("brightness", 0.1, 3), Step("color", 0.7, 0)),
    (Step("solarize", 0.4, 5), Step("autocontrast", 0.9)),
    (Step("translate_y", 0.9, 9), Step("translate_y", 0.7, 9)),
    (Step("autocontrast", 0.9), Step("solarize", 0.8, 3)),
    (Step("equalize", 0.8), Step("invert", 0.1)),
    (Step("translate_y", 0.7, 9), Step("autocontrast", 0.9)),
)


def auto_augment(images: Tensor, draws: Tensor) -> Tensor:
    """Apply to each image a sub-policy of its own.

    A sub-policy is two steps in order; each is applied with its probability. Magnitude m of 9 means

        shear        +-0.3 m/9                    rotate      +-30 m/9 degrees
        translate    +-150/331 m/9 of the side    posterize   keep round(8 - 4 m/9) bits
        solarize     invert from 256 (1 - m/9)    color, contrast, brightness, sharpness   1 +- 0.9 m/9

    where the sign is drawn anew for each image. Geometric operations take the nearest pixel and fill with 128.

    Args:
        images: uint8 `[B, C, H, W]` with C = 1 or 3. Not modified.
        draws: Uniform numbers in [0, 1), float64 `[B, 5]` on the CPU: the sub-policy; for each step whether it is
            applied; for each step its sign.

    Returns:
        uint8 `[B, C, H, W]`.

    Raises:
        ValueError: C is neither 1 nor 3.

    Source: Cubuk et al. 2019, tables 6 and 7. Differs from it in: nothing known. (Some re-implementations take bicubic
    pixels for shear, or rotate one way only.)
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images have {images.shape[1]} channels, AutoAugment expects 1 or 3. Use auto_augment=False.")
    images = images.clone()
    side = {"translate_x": images.shape[3], "translate_y": images.shape[2]}
    # The draws are on the CPU: which images go together is known without waiting for the device.
    sub_policies = (draws[:, 0] * len(CIFAR10_POLICY)).long().tolist()
    for position in (0, 1):
        rows: defaultdict[str, list[int]] = defaultdict(list)
        amounts: defaultdict[str, list[float]] = defaultdict(list)
        chances, signs = draws[:, 1 + position].tolist(), draws[:, 3 + position].tolist()
        for row, sub_policy in enumerate(sub_policies):
            step = CIFAR10_POLICY[sub_policy][position]
            if chances[row] < step.probability:
                amount = _AMOUNTS[step.operation](step.magnitude, 1 if signs[row] < 0.5 else -1)
                rows[step.operation].append(row)
                amounts[step.operation].append(amount * side.get(step.operation, 1))
        for operation, members in rows.items():
            index = to_device(torch.tensor(members), images.device)
            images[index] = OPERATIONS[operation](images[index], torch.tensor(amounts[operation], dtype=torch.float64))
    return images


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting for the device to finish what it is doing."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


# --------------------------------------------------------------------------------------------- operations
# Each takes images uint8 [n, C, H, W] and one amount for each, float64 [n] on the CPU, and returns new images.


def invert(images: Tensor, amount: Tensor) -> Tensor:
    """255 - pixel; `amount` is not used (`PIL.ImageOps.invert`)."""
    return 255 - images


def solarize(images: Tensor, amount: Tensor) -> Tensor:
    """Invert pixels at or above the threshold `amount` (`PIL.ImageOps.solarize`)."""
    threshold = to_device(amount.ceil().int(), images.device)[:, None, None, None]  # pixels are integers
    return torch.where(images < threshold, images, 255 - images)


def posterize(images: Tensor, amount: Tensor) -> Tensor:
    """Keep the `amount` highest bits, 1..8 (`PIL.ImageOps.posterize`)."""
    mask = (256 - 2 ** (8 - amount.long())).to(torch.uint8)
    return images & to_device(mask, images.device)[:, None, None, None]


def autocontrast(images: Tensor, amount: Tensor) -> Tensor:
    """Stretch each channel to 0..255; `amount` is not used (`PIL.ImageOps.autocontrast`)."""
    low, high = (edge.double()[:, :, None, None] for edge in (images.amin((2, 3)), images.amax((2, 3))))
    # Not 255 / x, which torch computes as 255 * (1 / x). Infinite for a flat channel, which stays as it is.
    scale = torch.full_like(low, 255) / (high - low)
    stretched = (images * scale - low * scale).clamp(0, 255).nan_to_num().to(torch.uint8)
    return torch.where(high > low, stretched, images)


def equalize(images: Tensor, amount: Tensor) -> Tensor:
    """Flatten each channel's histogram; `amount` is not used (`PIL.ImageOps.equalize`)."""
    pixels = images.flatten(2).long()  # [n, C, H*W]
    histogram = pixels.new_zeros(*pixels.shape[:2], 256).scatter_add_(2, pixels, torch.ones_like(pixels))
    last = histogram.gather(2, pixels.amax(2, keepdim=True))  # count of the brightest level present, [n, C, 1]
    step = (pixels.shape[2] - last) // 255
    below = histogram.cumsum(2) - histogram
    curve = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, curve.gather(2, pixels), pixels).to(torch.uint8).view_as(images)


def brightness(images: Tensor, amount: Tensor) -> Tensor:
    """Blend with black; factor `amount` (`PIL.ImageEnhance.Brightness`)."""
    return _blend(torch.zeros_like(images), images, amount)


def contrast(images: Tensor, amount: Tensor) -> Tensor:
    """Blend with the image's mean luminance; factor `amount` (`PIL.ImageEnhance.Contrast`)."""
    luminance = _luminance(images)
    count = luminance[0].numel()
    mean = (2 * luminance.sum((1, 2, 3), keepdim=True) + count) // (2 * count)  # rounded, halves up
    return _blend(mean, images, amount)


def color(images: Tensor, amount: Tensor) -> Tensor:
    """Blend with the luminance; factor `amount` (`PIL.ImageEnhance.Color`). Leaves grayscale as it is."""
    return _blend(_luminance(images), images, amount)


def sharpness(images: Tensor, amount: Tensor) -> Tensor:
    """Blend with a 3x3 smoothed image, edge pixels kept; factor `amount` (`PIL.ImageEnhance.Sharpness`)."""
    smooth = images.clone()
    if min(images.shape[2:]) > 2:
        wide = images.int()
        rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
        total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[:, :, 1:-1, 1:-1]  # weights 1, centre 5
        smooth[:, :, 1:-1, 1:-1] = ((2 * total + 13) // 26).to(torch.uint8)  # total / 13, rounded
    return _blend(smooth, images, amount)


def translate_x(images: Tensor, amount: Tensor) -> Tensor:
    """Show pixel x + `amount` at x."""
    one, zero = torch.ones_like(amount), torch.zeros_like(amount)
    return _transform(images, torch.stack([one, zero, amount, zero, one, zero], 1))


def translate_y(images: Tensor, amount: Tensor) -> Tensor:
    """Show pixel y + `amount` at y."""
    one, zero = torch.ones_like(amount), torch.zeros_like(amount)
    return _transform(images, torch.stack([one, zero, zero, zero, one, amount], 1))


def shear_y(images: Tensor, amount: Tensor) -> Tensor:
    """Show pixel y + `amount` x at (x, y)."""
    one, zero = torch.ones_like(amount), torch.zeros_like(amount)
    return _transform(images, torch.stack([one, zero, zero, amount, one, zero], 1))


def rotate(images: Tensor, amount: Tensor) -> Tensor:
    """Rotate by `amount` degrees counter-clockwise about the centre (`PIL.Image.Image.rotate`)."""
    center_x, center_y = images.shape[3] / 2, images.shape[2] / 2
    cosine, sine = (amount * (-math.pi / 180)).cos(), (amount * (-math.pi / 180)).sin()
    shift_x = center_x - cosine * center_x - sine * center_y
    shift_y = center_y + sine * center_x - cosine * center_y
    return _transform(images, torch.stack([cosine, sine, shift_x, -sine, cosine, shift_y], 1))


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    operation.__name__: operation
    for operation in (
        autocontrast, brightness, color, contrast, equalize, invert, posterize,
        rotate, sharpness, shear_y, solarize, translate_x, translate_y,
    )
}  # fmt: skip


def _enhancement(magnitude: int, sign: int) -> float:
    return 1 + sign * 0.9 * magnitude / 9


_AMOUNTS: dict[str, Callable[[int, int], float]] = {
    "autocontrast": lambda magnitude, sign: 0.0,
    "brightness": _enhancement,
    "color": _enhancement,
    "contrast": _enhancement,
    "equalize": lambda magnitude, sign: 0.0,
    "invert": lambda magnitude, sign: 0.0,
    "posterize": lambda magnitude, sign: round(8 - 4 * magnitude / 9),
    "rotate": lambda magnitude, sign: sign * 30 * magnitude / 9,
    "sharpness": _enhancement,
    "shear_y": lambda magnitude, sign: sign * 0.3 * magnitude / 9,
    "solarize": lambda magnitude, sign: 256 - 256 * magnitude / 9,
    "translate_x": lambda magnitude, sign: sign * 150 / 331 * magnitude / 9,  # times the width
    "translate_y": lambda magnitude, sign: sign * 150 / 331 * magnitude / 9,  # times the height
}


def _luminance(images: Tensor) -> Tensor:
    """Pillow's conversion to one channel, int32 `[n, 1, H, W]`."""
    if images.shape[1] == 1:
        return images.int()
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _blend(start: Tensor, end: Tensor, factor: Tensor) -> Tensor:
    """`start + factor (end - start)`, clipped and truncated as `PIL.Image.blend` does."""
    factor = to_device(factor.float(), end.device)[:, None, None, None]
    return (start + factor * (end.int() - start.int())).clamp(0, 255).to(torch.uint8)


def _transform(images: Tensor, matrix: Tensor) -> Tensor:
    """Nearest-pixel affine map in Pillow's 16.16 fixed point, filled with 128.

    `matrix` `[n, 6]` float64 on the CPU: output (x, y) shows input (a x + b y + c, d x + e y + f).
    """
    height, width = images.shape[2:]
    a, b, c, d, e, f = matrix.unbind(1)
    fixed = torch.stack([a, b, c + 0.5 * (a + b), d, e, f + 0.5 * (d + e)], 1)
    fixed = to_device((fixed * 65536 + 0.5).floor().long(), images.device)
    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)[:, None]
    a, b, c, d, e, f = fixed[:, :, None, None].unbind(1)  # [n, 1, 1]
    source_x, source_y = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16  # [n, H, W]
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    index = (source_y * width + source_x).masked_fill(~inside, 0).flatten(1)[:, None].expand(-1, images.shape[1], -1)
    moved = images.flatten(2).gather(2, index).view_as(images)
    return moved.masked_fill(~inside[:, None], _FILL)
