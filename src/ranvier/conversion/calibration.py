"""The images that a conversion is calibrated on, checked, and split into those to fit on and those to choose on."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ranvier.checks import check_labels, shape_of
from ranvier.data import evaluation_batch_size

Calibration = Tensor | Iterable[Tensor | tuple[Tensor, Tensor]]
"""Images `[N, ...]`, or batches of images, or batches of images and labels, as a data loader gives them."""


@dataclass(frozen=True)
class CalibrationImages:
    """Images for a conversion.

    Attributes:
        fitting: Batches to compute thresholds and biases from.
        choosing: Batches to choose settings on; disjoint from the former unless nothing was held out.
        labels: Of `choosing`, batch by batch, or None where the calibration came without.
        held_out: Images held out for choosing.
    """

    fitting: tuple[Tensor, ...]
    choosing: tuple[Tensor, ...]
    labels: tuple[Tensor, ...] | None
    held_out: int

    @property
    def fitted(self) -> int:
        """Images to fit on."""
        return sum(len(batch) for batch in self.fitting)


def gather(
    calibration: Calibration,
    *,
    batch_size: int,
    held_out: float,
    fit_at_most: int,
    seed: int,
    device: torch.device,
    steps: int = 1,
    first_look: int = 0,
) -> CalibrationImages:
    """Read, check, shuffle and split the calibration images.

    Args:
        calibration: Images, with or without labels. An iterator is read once, and all of it is kept in memory.
        batch_size: Images per batch; batches are as even as possible.
        held_out: Share of the images to choose settings on, at least one and all but one at most; 0 chooses on the
            images that were fitted on.
        fit_at_most: Images to fit on; what `held_out` leaves beyond is for choosing, too.
        seed: Decides which images are held out.
        device: Where the networks are.
        steps: T, on which it depends how many images a batch to choose on has; no more than `batch_size`.
        first_look: Images to choose on whose last ends a batch, if there are more.

    Raises:
        TypeError: Something in the calibration is not an image tensor.
        ValueError: No images, images of different shapes, labels that do not fit, or values that are not finite.
    """
    images, labels = _read(calibration)
    if not bool(torch.isfinite(images).all()):
        broken = int((~torch.isfinite(images.flatten(1)).all(1)).nonzero()[0, 0])
        raise ValueError(f"calibration image {broken} holds NaN or infinity. Mend the data.")
    if len(images) > 1 and torch.equal(images, images[:1].expand_as(images)):
        warnings.warn(
            f"all {len(images)} calibration images are the same: thresholds and corrections will suit this one alone, "
            "and the report says nothing of others. Pass a few hundred different ones.",
            UserWarning,
            stacklevel=4,
        )
    count = 0
    if held_out > 0:
        count = max(round(held_out * len(images)), len(images) - fit_at_most)
        count = min(max(count, 1), len(images) - 1)
        if len(images) < 2:
            raise ValueError(
                "the calibration holds 1 image, which cannot both be fitted and chosen on. Pass a few hundred images, "
                "or Settings(held_out=0) to choose on what was fitted."
            )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images = images[order].to(device)
    labels = labels[order].to(device) if labels is not None else None
    fit, choose = (images[count:], images[:count]) if count else (images, images)
    chosen = labels[:count] if labels is not None and count else labels

    fastest = evaluation_batch_size(steps, device, image_size=images.shape[2:])

    def choosing(rows: Tensor) -> tuple[Tensor, ...]:
        parts = (rows[:first_look], rows[first_look:])
        return tuple(batch for part in parts if len(part) for batch in _even(part, min(batch_size, fastest)))

    return CalibrationImages(
        fitting=_even(fit, batch_size),
        choosing=choosing(choose),
        labels=None if chosen is None else choosing(chosen),
        held_out=count,
    )


def _even(rows: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    return tuple(rows.tensor_split(-(-len(rows) // batch_size)))


def _read(calibration: Calibration) -> tuple[Tensor, Tensor | None]:
    if isinstance(calibration, Tensor):
        calibration = [calibration]
    if not isinstance(calibration, Iterable):
        raise TypeError(
            f"the calibration is a {type(calibration).__name__}, but must be images, a floating tensor [B, ...], or "
            "batches of images, with or without labels, such as a data loader gives."
        )
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for number, batch in enumerate(calibration):
        parts = batch if isinstance(batch, tuple | list) and len(batch) in (1, 2) else (batch,)
        x, y = parts if len(parts) == 2 else (parts[0], None)
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point or x.ndim < 2:
            came = (
                f"a tensor of {x.dtype} and shape {shape_of(x)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            )
            raise TypeError(
                f"calibration batch {number} is {came}, but must be images, a floating tensor [B, ...] prepared as for "
                "training, or a pair (images, labels), or images alone in a list. Labels alone tell nothing about "
                "activations; a single pair goes into a list, [(images, labels)]."
            )
        if images and x.shape[1:] != images[0].shape[1:]:
            raise ValueError(
                f"calibration batch {number} has images of shape {list(x.shape[1:])}, but the first had "
                f"{list(images[0].shape[1:])}. Resize them to one size."
            )
        if y is not None and (not isinstance(y, Tensor) or y.shape != x.shape[:1] or y.dtype != torch.int64):
            raise ValueError(
                f"the labels of calibration batch {number} are {_kind(y)}, but {len(x)} images need torch.int64 of "
                f"shape [{len(x)}]. Pass class indices, or leave the labels out."
            )
        images.append(x.detach())
        if y is not None:
            labels.append(y)
    if not images or not sum(map(len, images)):
        raise ValueError(
            "the calibration is empty. Pass images, such as a few hundred of the training set; an iterator that was "
            "used up before gives nothing."
        )
    if labels and len(labels) != len(images):
        raise ValueError(f"only {len(labels)} of {len(images)} calibration batches have labels. Pass all or none.")
    return torch.cat(images), torch.cat(labels) if labels else None


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {shape_of(value)}"
    return f"a {type(value).__name__}"


def check_classes(images: CalibrationImages, num_classes: int) -> None:
    """Raise unless all labels are classes of the network."""
    for labels in images.labels or ():
        check_labels(labels, num_classes)
