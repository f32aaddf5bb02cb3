"""Loading labelled images from the Hugging Face hub, from parquet files or from class folders."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ranvier.data import image_cache
from ranvier.data.images import ImageSet, ImageSplits, StreamedImages, is_grayscale
from ranvier.provenance import cache_folder

if TYPE_CHECKING:
    import datasets

_IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
_LABEL_NAMES = ("label", "labels", "fine_label")


def load_images(
    source: str | os.PathLike[str],
    *,
    size: int | tuple[int, int] | None = None,
    grayscale: bool | None = None,
    train_split: str = "train",
    test_split: str = "test",
    cache_dir: str | os.PathLike[str] | None = None,
    max_bytes: int = 8 * 2**30,
    progress: bool = True,
) -> ImageSplits:
    """Load a labelled image data set from the Hugging Face hub or from a folder.

    A folder holds either parquet files as on the hub, or one folder per class:

        root/train/<class>/*.png    root/test/<class>/*.png

    Images are decoded once; the bytes are cached, so the next call takes as long as reading a file does.

    Args:
        source: A folder, or else a hub id such as `"uoft-cs/cifar10"`.
        size: Height and width [pixels] to resize to (bilinear, antialiased, the aspect ratio is not kept); one number
            means a square. None keeps the size the images have, which must then be the same for all.
        grayscale: True gives one channel, False three; None takes what the first image has.
        train_split: Name of the training split.
        test_split: Name of the test split. Where there is no split `"test"`, `"validation"` stands in for it.
        cache_dir: Folder for the decoded images; None means `ranvier.provenance.cache_folder()`.
        max_bytes: Splits that would together need more memory are returned as `StreamedImages` and not cached.
        progress: Show progress bars while downloading and decoding.

    Returns:
        The two splits, both `ImageSet` or both `StreamedImages`.

    Raises:
        FileNotFoundError: `source` is a path and there is no such folder.
        ConnectionError: `source` is a hub id and could not be loaded.
        ValueError: no images, labels or splits could be found, or the images differ in size and `size` is None.
        ImportError: `datasets` or Pillow is not installed.
    """
    height_width = _height_width(size)
    cache_root = Path(cache_dir) if cache_dir is not None else cache_folder()
    arrow_cache = cache_root / "arrow" if cache_dir is not None else None  # None: the cache that `datasets` shares
    folder = _find_folder(source)
    if folder is not None:
        files = _data_files(folder)
        name, identity = folder.name, [[str(path.relative_to(folder)), *_stamp(path)] for path in files]
    else:
        opened = _open_hub(str(source), arrow_cache, progress)
        name, identity = str(source), [[key, part.num_rows, part._fingerprint] for key, part in opened.items()]
    settings = [image_cache.FORMAT, str(folder or source), identity, height_width, grayscale, train_split, test_split]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    cache_file = cache_root / "images" / f"{name.replace('/', '--')}-{key}.safetensors"
    if cache_file.is_file() and cache_file.stat().st_size <= max_bytes:
        cached = image_cache.read(cache_file)
        if cached is not None:
            return cached

    if folder is not None:
        opened = _open_folder(folder, files, arrow_cache, progress)
    train, test = _find_splits(opened, name, height_width, grayscale, train_split, test_split)
    if sum(len(part) * math.prod(part.shape) for part in (train, test)) > max_bytes:
        return ImageSplits(train, test)
    splits = ImageSplits(_decode(train, progress), _decode(test, progress))
    try:
        image_cache.write(cache_file, splits)
    except OSError as error:
        warnings.warn(f"could not cache the decoded images ({error}). Pass cache_dir= a writable folder.", stacklevel=2)
    return splits


def _height_width(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size is {size}, expected positive pixels. Pass size=32 or size=(height, width).")
    return height, width


def _find_folder(source: str | os.PathLike[str]) -> Path | None:
    """The folder that `source` names, or None for a hub id."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve()
    text = os.fspath(source)
    is_hub_id = isinstance(source, str) and text.count("/") <= 1 and not text.startswith((".", "/", "~"))
    if not is_hub_id or folder.exists():
        raise FileNotFoundError(
            f"there is no folder {text!r} (working directory: {Path.cwd()}). Pass a folder of parquet files, "
            "a folder with train/<class>/ and test/<class>/ inside, or a Hugging Face hub id."
        )
    return None


def _data_files(folder: Path) -> list[Path]:
    """All parquet files below `folder` or, if there are none, all image files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parquet = [path for path in files if path.suffix == ".parquet"]
    images = [path for path in files if path.suffix.lower() in _IMAGE_SUFFIXES]
    if not (parquet or images):
        suffixes = sorted({path.suffix or path.name for path in files})
        raise ValueError(
            f"{folder} holds no parquet files and no images; found {', '.join(suffixes[:8]) or 'nothing'}. "
            "Pass a folder with *.parquet files, or with train/<class>/*.png and test/<class>/*.png inside."
        )
    return parquet or images


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@contextmanager
def _datasets(progress: bool) -> Iterator[Any]:
    """The `datasets` module, with its own progress bars switched to `progress` meanwhile."""
    try:
        import datasets
        import PIL.Image  # noqa: F401  (`datasets` decodes with it, and fails late and obscurely without)
    except ImportError as error:
        raise ImportError(f"loading images needs {error.name}. Install it with: pip install datasets pillow") from error
    were_disabled = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if progress else datasets.disable_progress_bars)()
    try:
        yield datasets
    finally:
        (datasets.disable_progress_bars if were_disabled else datasets.enable_progress_bars)()


def _open_folder(folder: Path, files: list[Path], cache_dir: Path | None, progress: bool) -> datasets.DatasetDict:
    builder = "parquet" if files[0].suffix == ".parquet" else "imagefolder"
    with _datasets(progress) as datasets:
        try:
            return datasets.load_dataset(builder, data_dir=str(folder), cache_dir=cache_dir and str(cache_dir))
        except datasets.exceptions.DatasetsError as error:
            cause = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"{folder} cannot be read as one data set ({cause[0]}); {len(files)} files lie in it, of which "
                f"{files[0].relative_to(folder)} is the first. Pass the folder of a single data set; if it is one, a "
                "file is damaged: get it anew."
            ) from error


def _open_hub(source: str, cache_dir: Path | None, progress: bool) -> datasets.DatasetDict:
    with _datasets(progress) as datasets:
        try:
            return datasets.load_dataset(source, cache_dir=cache_dir and str(cache_dir))
        except Exception as error:  # datasets, huggingface_hub and their HTTP client share no exception class
            raise ConnectionError(
                f"could not load {source!r} from the Hugging Face hub ({type(error).__name__}: {error}). "
                "No folder of that name exists here either. Check the id; without network access, download the data "
                "set's parquet files elsewhere and pass their folder."
            ) from error


def _find_splits(
    opened: datasets.DatasetDict,
    name: str,
    height_width: tuple[int, int] | None,
    grayscale: bool | None,
    train_split: str,
    test_split: str,
) -> tuple[StreamedImages, StreamedImages]:
    """Both splits, with columns and classes found and nothing decoded but the first image of each."""
    if test_split == "test" and "test" not in opened and "validation" in opened:
        test_split = "validation"
    for split in (train_split, test_split):
        if split not in opened:
            raise ValueError(
                f"{name} has no split {split!r}; it has {', '.join(sorted(opened))}. Pass train_split= and "
                "test_split=, or put the images into train/<class>/ and test/<class>/ below one folder."
            )
    train, test = opened[train_split], opened[test_split]
    if train.num_rows == 0 or test.num_rows == 0:
        raise ValueError(f"{name} has {train.num_rows} training and {test.num_rows} test rows. Both must have some.")
    image_column, label_column = _find_columns(train.features, name)
    labels = [_labels(part, label_column, name) for part in (train, test)]
    classes = getattr(train.features[label_column], "names", None)
    if classes is None:
        classes = [str(index) for index in range(int(torch.cat(labels).max()) + 1)]

    first = train[0][image_column]
    channels = 1 if (is_grayscale(first) if grayscale is None else grayscale) else 3
    height, width = height_width or (first.height, first.width)
    parts = [
        StreamedImages(
            part, image_column, part_labels, tuple(classes), f"{name}/{split}", (channels, height, width),
            resize=height_width is not None, drop_color=grayscale is True,
        )
        for part, part_labels, split in zip((train, test), labels, (train_split, test_split), strict=True)
    ]  # fmt: skip
    return parts[0], parts[1]


def _find_columns(features: Any, name: str) -> tuple[str, str]:
    """Names of the image column and of the label column, found by their types."""
    with _datasets(progress=False) as datasets:
        images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
        labels = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    columns = ", ".join(f"{column} ({type(kind).__name__})" for column, kind in features.items())
    if len(images) != 1:
        raise ValueError(
            f"{name} has {len(images)} image columns, expected one; its columns are: {columns}. "
            "Make one image column with datasets (cast_column to Image, remove_columns) and save it with to_parquet."
        )
    integers = [column for column, kind in features.items() if "int" in str(getattr(kind, "dtype", ""))]
    candidates = labels if len(labels) == 1 else [column for column in _LABEL_NAMES if column in labels + integers]
    if not candidates:
        raise ValueError(
            f"{name} has no label column; its columns are: {columns}. Expected a ClassLabel column, or integers named "
            f"{', '.join(_LABEL_NAMES)}. In a folder of images each class has a folder: train/<class>/, test/<class>/."
        )
    return images[0], candidates[0]


def _labels(part: datasets.Dataset, column: str, name: str) -> Tensor:
    values = part[column][:]
    if None in values:
        raise ValueError(
            f"{name}: row {values.index(None)} has no {column}. Choose splits in which every row has one; "
            "below a folder, every image belongs into a class folder: train/<class>/, test/<class>/."
        )
    return torch.tensor(values, dtype=torch.int64)


def _decode(part: StreamedImages, progress: bool) -> ImageSet:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    rows = part.source.select_columns([part.image_column])
    bar = track(rows, f"decoding {part.name}", len(part), console=console, transient=True, disable=hidden)
    images = np.empty((len(part), *part.shape), dtype=np.uint8)
    index = 0
    try:
        for row in bar:
            images[index] = part.pixels(row[part.image_column], index)
            index += 1
    except OSError as error:  # Pillow's, raised while the row is read
        raise part.undecodable(index, error) from error
    return ImageSet(torch.from_numpy(images), part.labels, part.classes, part.name)
