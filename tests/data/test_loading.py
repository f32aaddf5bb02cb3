import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ranvier.data import ImageSet, ImageSplits, StreamedImages, image_cache, load_images, loading

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CLASSES = ("ant", "bee", "cow")


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., ImageSplits]:
    """`load_images` with a cache of its own."""
    return lambda source, **settings: load_images(source, cache_dir=tmp_path / "cache", progress=False, **settings)


def picture(value: int, mode: str = "RGB", size: tuple[int, int] = (6, 5)) -> Image.Image:
    """A noise image, `size` (width, height)."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(value).integers(0, 256, shape).astype(np.uint8))


def parquet_folder(folder: Path, features: dict[str, Any] | None = None, **splits: dict[str, list]) -> Path:
    """Write one parquet file for each split, as on the hub."""
    folder.mkdir(parents=True)
    features = features or {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    for split, columns in splits.items():
        rows = datasets.Dataset.from_dict(columns, datasets.Features(features))
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def rows(count: int, start: int = 0, **settings: Any) -> dict[str, list]:
    return {
        "image": [picture(start + index, **settings) for index in range(count)],
        "label": [index % 3 for index in range(count)],
    }


def class_folders(root: Path, *splits: str, count: int = 2) -> Path:
    for number, split in enumerate(splits):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                picture(100 * number + 10 * label + index).save(folder / f"{index}.png")
    return root


def expected_pixels(image: Image.Image) -> torch.Tensor:
    pixels = np.array(image)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


# --------------------------------------------------------------------------------------------- what loads


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_parquet_folder(tmp_path: Path, load: Callable[..., ImageSplits], mode: str, channels: int) -> None:
    train, test = rows(7, mode=mode), rows(3, start=50, mode=mode)
    splits = load(parquet_folder(tmp_path / "farm", train=train, test=test))
    for part, columns, name in ((splits.train, train, "farm/train"), (splits.test, test, "farm/test")):
        assert isinstance(part, ImageSet)
        assert (part.classes, part.name, part.shape) == (CLASSES, name, (channels, 5, 6))
        assert part.labels.tolist() == columns["label"]
        assert torch.equal(part.images, torch.stack([expected_pixels(image) for image in columns["image"]]))


@pytest.mark.parametrize("test_name", ["test", "validation", "val"])
def test_class_folders(tmp_path: Path, load: Callable[..., ImageSplits], test_name: str) -> None:
    splits = load(str(class_folders(tmp_path / "farm", "train", test_name)))
    assert (len(splits.train), len(splits.test)) == (6, 6)
    assert splits.train.classes == CLASSES
    assert sorted(splits.test.labels.tolist()) == [0, 0, 1, 1, 2, 2]
    assert isinstance(splits.test, ImageSet)
    first_cow = splits.test.images[splits.test.labels == 2][0]
    assert torch.equal(first_cow, expected_pixels(picture(120)))


def test_named_splits(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    folder = parquet_folder(tmp_path / "farm", train=rows(5), validation=rows(4), test=rows(3))
    assert len(load(folder).test) == 3
    assert len(load(folder, test_split="validation").test) == 4
    assert len(load(folder, train_split="validation").train) == 4


@pytest.mark.parametrize("column", ["label", "labels", "fine_label"])
def test_integer_labels_are_named_by_their_number(
    tmp_path: Path, load: Callable[..., ImageSplits], column: str
) -> None:
    features = {"picture": datasets.Image(), column: datasets.Value("int32"), "id": datasets.Value("int64")}
    columns = {"picture": rows(4)["image"], column: [0, 1, 2, 1], "id": [5, 6, 7, 8]}
    splits = load(parquet_folder(tmp_path / "farm", features, train=columns, test=columns))
    assert splits.train.classes == ("0", "1", "2")
    assert splits.train.labels.tolist() == [0, 1, 2, 1]


def test_fine_labels_are_preferred(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    features = {
        "coarse_label": datasets.ClassLabel(names=["animal"]),
        "fine_label": datasets.ClassLabel(names=CLASSES),
        "img": datasets.Image(),
    }
    columns = {"coarse_label": [0] * 3, "fine_label": [0, 1, 2], "img": rows(3)["image"]}
    assert load(parquet_folder(tmp_path / "farm", features, train=columns, test=columns)).train.classes == CLASSES


def test_size_resizes_all(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    columns = rows(3)
    columns["image"][1] = picture(9, size=(12, 11))
    folder = parquet_folder(tmp_path / "farm", train=columns, test=rows(2))
    train = load(folder, size=(4, 3)).train
    assert isinstance(train, ImageSet)
    expected = [expected_pixels(image.resize((3, 4), Image.Resampling.BILINEAR)) for image in columns["image"]]
    assert torch.equal(train.images, torch.stack(expected))
    assert load(folder, size=8).train.shape == (3, 8, 8)


def test_grayscale_decides_the_channels(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    folder = parquet_folder(tmp_path / "farm", train=rows(2), test=rows(2, mode="L"))
    gray, color = load(folder, grayscale=True), load(folder, grayscale=False)
    assert gray.train.shape == gray.test.shape == (1, 5, 6)
    assert color.train.shape == color.test.shape == (3, 5, 6)
    assert isinstance(gray.train, ImageSet)
    assert torch.equal(gray.train.images[0], expected_pixels(picture(0).convert("L")))


def test_too_large_a_set_is_streamed_and_equal(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    folder = parquet_folder(tmp_path / "farm", train=rows(5), test=rows(3))
    bytes_needed = (5 + 3) * 3 * 5 * 6
    streamed = load(folder, max_bytes=bytes_needed - 1)
    whole = load(folder, max_bytes=bytes_needed)
    assert isinstance(load(folder, max_bytes=bytes_needed - 1).train, StreamedImages), "the cached set was returned"
    for stream, part in ((streamed.train, whole.train), (streamed.test, whole.test)):
        assert isinstance(stream, StreamedImages)
        assert isinstance(part, ImageSet)
        assert (len(stream), stream.classes, stream.name, stream.shape) == (
            len(part), part.classes, part.name, part.shape
        )  # fmt: skip
        assert torch.equal(torch.stack([stream[index][0] for index in range(len(stream))]), part.images)
        assert torch.equal(stream.labels, part.labels)


# --------------------------------------------------------------------------------------------- the hub


def test_hub_id(load: Callable[..., ImageSplits], monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    columns = {"img": rows(3)["image"], "label": [0, 1, 2]}
    asked = []

    def load_dataset(path: str, cache_dir: str) -> Any:
        asked.append(path)
        part = datasets.Dataset.from_dict(columns, features)
        return datasets.DatasetDict(train=part, test=part)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = load("someone/farm")
    assert asked == ["someone/farm"]
    assert splits.test.name == "someone/farm/test"
    assert splits.train.labels.tolist() == [0, 1, 2]


def test_unreachable_hub(load: Callable[..., ImageSplits], monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, cache_dir: str) -> Any:
        raise RuntimeError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match=r"'someone/farm' .*RuntimeError: no route to host.* pass their folder"):
        load("someone/farm")


# --------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("source", ["./missing", "a/b/c", "~/missing-ranvier-folder", Path("missing")])
def test_missing_folder(load: Callable[..., ImageSplits], source: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .* Pass a folder of parquet files"):
        load(source)


def test_file_instead_of_a_folder(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load(tmp_path / "file")


@pytest.mark.parametrize(("file", "found"), [("notes.txt", r"\.txt"), (None, "nothing")])
def test_folder_without_images(tmp_path: Path, load: Callable[..., ImageSplits], file: str | None, found: str) -> None:
    (tmp_path / "farm").mkdir()
    if file is not None:
        (tmp_path / "farm" / file).write_text("no image")
    with pytest.raises(ValueError, match=rf"holds no parquet files and no images; found {found}\."):
        load(tmp_path / "farm")


def test_no_test_split(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    with pytest.raises(ValueError, match=r"farm has no split 'test'; it has train\. Pass .* test/<class>/"):
        load(class_folders(tmp_path / "farm", "."))


def test_unknown_split(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    with pytest.raises(ValueError, match=r"farm has no split 'extra'; it has test, train\."):
        load(class_folders(tmp_path / "farm", "train", "test"), train_split="extra")


def test_images_without_class_folders(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    for split in ("train", "test"):
        (tmp_path / "farm" / split).mkdir(parents=True)
        picture(1).save(tmp_path / "farm" / split / "1.png")
    with pytest.raises(ValueError, match=r"row 0 has no label.* every image belongs into a class folder"):
        load(tmp_path / "farm")


def test_no_label_column(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    features = {"image": datasets.Image(), "weight": datasets.Value("int32")}
    columns = {"image": rows(2)["image"], "weight": [0, 1]}
    folder = parquet_folder(tmp_path / "farm", features, train=columns, test=columns)
    with pytest.raises(ValueError, match=r"farm has no label column; its columns are: image \(Image\), weight"):
        load(folder)


@pytest.mark.parametrize("names", [[], ["image", "mask"]])
def test_other_than_one_image_column(tmp_path: Path, load: Callable[..., ImageSplits], names: list[str]) -> None:
    features = dict.fromkeys(names, datasets.Image()) | {"label": datasets.ClassLabel(names=CLASSES)}
    columns = dict.fromkeys(names, rows(2)["image"]) | {"label": [0, 1]}
    folder = parquet_folder(tmp_path / "farm", features, train=columns, test=columns)
    with pytest.raises(ValueError, match=rf"farm has {len(names)} image columns, .*label \(ClassLabel\)"):
        load(folder)


def test_label_missing_in_a_row(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    columns = rows(3) | {"label": [0, None, 1]}
    with pytest.raises(ValueError, match="farm: row 1 has no label"):
        load(parquet_folder(tmp_path / "farm", train=rows(3), test=columns))


def test_split_published_without_labels(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    with pytest.raises(ValueError, match="farm/test: label -1 at index 0"):
        load(parquet_folder(tmp_path / "farm", train=rows(3), test=rows(3) | {"label": [-1] * 3}))


def test_empty_split(load: Callable[..., ImageSplits], monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    full, empty = (datasets.Dataset.from_dict(rows(count), features) for count in (3, 0))
    opened = datasets.DatasetDict(train=full, test=empty)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, cache_dir: opened)
    with pytest.raises(ValueError, match="farm has 3 training and 0 test rows"):
        load("someone/farm")


def test_different_sizes(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    columns = rows(3)
    columns["image"][2] = picture(2, size=(6, 6))
    with pytest.raises(
        ValueError, match=r"farm/train: image 2 is 6x6 but the first one is 5x6 .*--image-size, or size="
    ):
        load(parquet_folder(tmp_path / "farm", train=columns, test=rows(2)))


def test_colour_after_grayscale(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    columns = rows(2, mode="L")
    columns["image"][1] = picture(1)
    with pytest.raises(ValueError, match=r"image 1 is in colour .* Pass grayscale="):
        load(parquet_folder(tmp_path / "farm", train=columns, test=columns))


def test_a_folder_of_several_data_sets_is_refused(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    for name, columns in (("one", {"image": [1]}), ("two", {"label": [1], "fine": ["a"]})):
        (tmp_path / name).mkdir()
        datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / name / "train.parquet"))
    with pytest.raises(ValueError, match=r"cannot be read as one data set .*; 2 files lie in it, .*single data set"):
        load(tmp_path)


def test_damaged_image_is_named(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    columns = rows(3)
    columns["image"][1] = {"bytes": b"no image", "path": "bee/1.png"}
    folder = parquet_folder(tmp_path / "farm", train=columns, test=rows(2))
    message = r"farm/train: image 1 \(bee/1\.png\) cannot be decoded"
    with pytest.raises(ValueError, match=message):
        load(folder)
    with pytest.raises(ValueError, match=message):
        load(folder, max_bytes=0).train[1]


@pytest.mark.parametrize("size", [0, (4, -1)])
def test_impossible_size(tmp_path: Path, load: Callable[..., ImageSplits], size: int | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected positive pixels"):
        load(tmp_path, size=size)


@pytest.mark.parametrize("package", ["datasets", "PIL.Image"])
def test_missing_package(
    tmp_path: Path, load: Callable[..., ImageSplits], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    folder = class_folders(tmp_path / "farm", "train", "test")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install datasets pillow"):
        load(folder)


# --------------------------------------------------------------------------------------------- the cache


def _forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(loading, "_decode", fail)


def test_second_call_decodes_nothing(
    tmp_path: Path, load: Callable[..., ImageSplits], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = parquet_folder(tmp_path / "farm", train=rows(4), test=rows(2))
    first = load(folder)
    _forbid_decoding(monkeypatch)
    again = load(folder)
    for ours, theirs in ((first.train, again.train), (first.test, again.test)):
        assert isinstance(ours, ImageSet)
        assert isinstance(theirs, ImageSet)
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert (ours.classes, ours.name) == (theirs.classes, theirs.name)
    with pytest.raises(AssertionError, match="decoded again"):
        load(folder, size=4)


def test_changed_files_are_decoded_again(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    folder = class_folders(tmp_path / "farm", "train", "test")
    assert len(load(folder).train) == 6
    picture(77).save(folder / "train" / "ant" / "new.png")
    assert len(load(folder).train) == 7


def test_damaged_cache_is_rebuilt(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    folder = parquet_folder(tmp_path / "farm", train=rows(4), test=rows(2))
    first = load(folder).train
    (cached,) = (tmp_path / "cache" / "images").iterdir()
    cached.write_bytes(cached.read_bytes()[:-10])
    again = load(folder).train
    assert isinstance(first, ImageSet)
    assert isinstance(again, ImageSet)
    assert torch.equal(first.images, again.images)
    assert image_cache.read(cached) is not None


def test_two_at_once(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    folder = class_folders(tmp_path / "farm", "train", "test")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(load, [folder, folder])
    assert isinstance(first.train, ImageSet)
    assert isinstance(second.train, ImageSet)
    assert torch.equal(first.train.images, second.train.images)
    assert len(list((tmp_path / "cache" / "images").iterdir())) == 1


def test_cache_that_cannot_be_written(tmp_path: Path, load: Callable[..., ImageSplits]) -> None:
    folder = parquet_folder(tmp_path / "farm", train=rows(4), test=rows(2))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "images").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="could not cache the decoded images .* Pass cache_dir="):
        assert len(load(folder).train) == 4


def test_default_cache_is_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = class_folders(tmp_path / "farm", "train", "test")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    load_images(folder, progress=False)
    assert len(list((tmp_path / ".cache" / "ranvier" / "images").iterdir())) == 1


def test_progress_bars_are_left_as_they_were(
    tmp_path: Path, load: Callable[..., ImageSplits], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = parquet_folder(tmp_path / "farm", train=rows(4), test=rows(2))
    before = datasets.are_progress_bars_disabled()
    capsys.readouterr()
    load(folder)
    assert datasets.are_progress_bars_disabled() == before
    assert capsys.readouterr() == ("", "")


def test_progress_is_shown_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take the captured stream for a terminal
    load_images(class_folders(tmp_path / "farm", "train", "test"), cache_dir=tmp_path / "cache")
    out, err = capsys.readouterr()
    assert "decoding farm/train" in err
    assert out == ""


# --------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize(
    ("name", "shape", "sizes", "first_labels"),
    [
        ("fashion_mnist", (1, 28, 28), (60000, 10000), [9, 0, 0, 3]),
        ("cifar10", (3, 32, 32), (50000, 10000), [6, 9, 9, 4]),
    ],
)
@pytest.mark.slow
def test_real_data(
    load: Callable[..., ImageSplits], name: str, shape: tuple[int, int, int], sizes: tuple[int, int], first_labels: list
) -> None:
    if not (REAL_DATA / name).is_dir():
        pytest.skip(f"{name} is not there: put its parquet files into {REAL_DATA / name}")
    splits = load(REAL_DATA / name)
    assert (len(splits.train), len(splits.test)) == sizes
    assert splits.train.shape == splits.test.shape == shape
    assert splits.train.labels[:4].tolist() == first_labels
    assert torch.bincount(splits.test.labels).tolist() == [1000] * 10
