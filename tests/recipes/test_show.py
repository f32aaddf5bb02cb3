"""Pictures of recordings and of networks on disk."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ranvier.data.events import RecordingError
from ranvier.recipes import digits, digits_ann, run, show

QUICK = {"model": "mlp", "epochs": 1, "hidden": (16,), "device": "cpu"}


def five_bytes(path: Path, column: int) -> Path:
    times = np.arange(100) * 3000
    fields = [np.full(100, column), np.arange(100) % 34, (times % 2) << 7 | times >> 16, times >> 8 & 255, times & 255]
    path.write_bytes(np.stack(fields, 1).astype(np.uint8).tobytes())
    return path


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        image.verify()
        return image.size


@pytest.mark.parametrize(("column", "sensor"), [(33, "34x34"), (200, "180x240")])
def test_a_recording(tmp_path: Path, column: int, sensor: str) -> None:
    """N-MNIST and N-Caltech101 share a format: the addresses tell them apart."""
    shown = show(five_bytes(tmp_path / "a.bin", column), tmp_path / "out", steps=3)
    assert "100 events in 0.297 s" in str(shown)
    assert sensor in str(shown)
    assert [picture.name for picture in shown.pictures] == ["events.png", "frames.png"]
    assert all(min(size_of(picture)) > 100 for picture in shown.pictures)


def test_a_broken_recording(tmp_path: Path) -> None:
    path = five_bytes(tmp_path / "a.bin", 3)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RecordingError, match=r"a\.bin"):
        show(path, tmp_path / "out")


def test_a_network(tmp_path: Path) -> None:
    run(digits(**QUICK), tmp_path / "a", quiet=True)
    shown = show(tmp_path / "a", tmp_path / "out", index=599)
    assert "test image 599 of digits" in str(shown)
    assert [picture.name for picture in shown.pictures] == ["spikes.png"]
    with pytest.raises(ValueError, match=r"there are 600 test images: 0 \.\. 599"):
        show(tmp_path / "a", tmp_path / "out", index=600)
    run(digits_ann(**QUICK), tmp_path / "ann", quiet=True)
    with pytest.raises(ValueError, match="holds an ANN"):
        show(tmp_path / "ann", tmp_path / "out")
