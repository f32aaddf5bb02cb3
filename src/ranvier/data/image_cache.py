"""Decoded image sets on disk: one safetensors file for both splits, whole or absent."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from torch import Tensor

from ranvier.atomic import replacing
from ranvier.data.images import ImageSet, ImageSplits

FORMAT = 1
"""Part of every key. Raise it when what a file holds changes: older files are then rebuilt."""


def read(file: Path) -> ImageSplits | None:
    """Return the splits that `file` holds, or None where it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            train, test = (
                _checked(stored.get_tensor(f"{split}.images"), stored.get_tensor(f"{split}.labels"), **json.loads(card))
                for split, card in sorted(stored.metadata().items(), reverse=True)
            )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # whatever is wrong with it, it can be rebuilt from the source
    return ImageSplits(train, test)


def write(file: Path, splits: ImageSplits) -> None:
    """Write both splits; a reader, or another process that builds the same file, sees a whole one or none.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    cards: dict[str, str] = {}
    for split, part in (("train", splits.train), ("test", splits.test)):
        assert isinstance(part, ImageSet)
        tensors |= {f"{split}.images": part.images, f"{split}.labels": part.labels}
        cards[split] = json.dumps({"classes": part.classes, "name": part.name, "crc32": _checksum(part.images)})
    with replacing(file) as temporary:
        try:
            save_file(tensors, temporary, cards)
        except SafetensorError as error:  # how safetensors reports a failed write
            raise OSError(str(error)) from error


def _checked(images: Tensor, labels: Tensor, *, classes: list[str], name: str, crc32: str) -> ImageSet:
    if _checksum(images) != crc32:
        raise ValueError(f"{name}: the checksum of the pixels differs")
    return ImageSet(images, labels, tuple(classes), name)


def _checksum(images: Tensor) -> str:
    return f"{zlib.crc32(images.numpy().data):08x}"
