from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ranvier.data import ImageSet, ImageSplits, image_cache


def _splits() -> ImageSplits:
    pixels = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    train = ImageSet(pixels[:4], torch.tensor([0, 1, 0, 1]), ("cät", "dog"), "pets/train")
    return ImageSplits(train, ImageSet(pixels[4:], torch.tensor([1, 0]), ("cät", "dog"), "pets/test"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "cache" / "pets.safetensors"
    image_cache.write(path, _splits())
    return path


def test_round_trip(file: Path) -> None:
    stored = image_cache.read(file)
    assert stored is not None
    for ours, theirs in ((stored.train, _splits().train), (stored.test, _splits().test)):
        assert isinstance(ours, ImageSet)
        assert isinstance(theirs, ImageSet)
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert (ours.classes, ours.name) == (theirs.classes, theirs.name)


def test_every_shortened_file_is_noticed(file: Path) -> None:
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        assert image_cache.read(file) is None


def test_a_changed_pixel_is_noticed(file: Path) -> None:
    content = bytearray(file.read_bytes())
    train = _splits().train
    assert isinstance(train, ImageSet)
    content[content.find(train.images.numpy().tobytes())] ^= 1
    file.write_bytes(content)
    assert image_cache.read(file) is None


@pytest.mark.parametrize("metadata", [None, {}, {"train": "{}"}, {"train": "no json", "test": "{}"}])
def test_a_foreign_file_is_noticed(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"train.images": torch.zeros(1)}, tmp_path / "other", metadata)
    assert image_cache.read(tmp_path / "other") is None


def test_missing_file(tmp_path: Path) -> None:
    assert image_cache.read(tmp_path / "missing") is None


def test_write_leaves_one_file_and_replaces_what_was_there(file: Path) -> None:
    file.write_bytes(b"damaged")
    image_cache.write(file, _splits())
    assert image_cache.read(file) is not None
    assert list(file.parent.iterdir()) == [file]


def test_a_write_that_fails_leaves_the_old_file_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        image_cache.write(file, _splits())
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_an_error_of_safetensors_becomes_an_os_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def fail(*arguments: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        image_cache.write(file, _splits())
    assert list(file.parent.iterdir()) == [file]
