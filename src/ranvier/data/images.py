"""Still images with class labels: decoded once to bytes, kept in memory or streamed.

Shapes: `N` images, `C` channels (1 or 3), `H` height, `W` width [pixels]. Pixels are uint8, 0..255.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

_INSTALL = "Install it with: pip install datasets pillow"
_IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
_LABEL_NAMES = ("label", "labels", "fine_label")
_CACHE_FORMAT = 1  # raise when what a cache file holds changes: older files are then rebuilt


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
        _check_labels(self.labels, len(self.images), self.classes, self.name)

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
        rest, held_out = _stratified_split(self.labels, count, seed, self.name)
        return self._take(rest), self._take(held_out)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all pixels, in [0, 1] units."""
        return _channel_statistics(self.images)

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
        _check_labels(self.labels, len(self.source), self.classes, self.name)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Decode one image: pixels uint8 `[C, H, W]` and its label, int64 `[]`."""
        index = range(len(self))[index]
        pixels = self.pixels(self.source[index][self.image_column], index)
        return torch.from_numpy(pixels), self.labels[index]

    def pixels(self, image: Image, index: int) -> np.ndarray:
        """Convert a decoded image to bytes `[C, H, W]`; `index` names it in errors.

        Raises:
            ValueError: it is not 8-bit, or it has another size or colour than `shape` and may not be converted.
        """
        return _pixels(image, self.shape, self.resize, self.drop_color, f"{self.name}: image {index}")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def hold_out(self, count: int, seed: int) -> tuple[StreamedImages, StreamedImages]:
        """Split off `count` images in proportion to the classes, as `ImageSet.hold_out` does."""
        rest, held_out = _stratified_split(self.labels, count, seed, self.name)
        return self._take(rest), self._take(held_out)

    def statistics(self, sample: int = 1000) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, in [0, 1] units, from `sample` evenly spaced images."""
        indices = np.unique(np.linspace(0, len(self) - 1, min(sample, len(self))).round().astype(int))
        return _channel_statistics(torch.stack([self[int(index)][0] for index in indices]))

    def _take(self, indices: Tensor) -> StreamedImages:
        return replace(self, source=self.source.select(indices.tolist()), labels=self.labels[indices])


@dataclass(frozen=True)
class ImageSplits:
    """The training and the test part of one data set."""

    train: ImageSet | StreamedImages
    test: ImageSet | StreamedImages


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
        source: A hub id such as `"uoft-cs/cifar10"`, or a folder.
        size: Height and width [pixels] to resize to (bilinear, antialiased, the aspect ratio is not kept); one number
            means a square. None keeps the size the images have, which must then be the same for all.
        grayscale: True gives one channel, False three; None takes what the first image has.
        train_split: Name of the training split.
        test_split: Name of the test split. Where there is no split `"test"`, `"validation"` stands in for it.
        cache_dir: Folder for the decoded images; None means `~/.cache/ranvier`.
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
    cache_root = Path(cache_dir) if cache_dir is not None else Path.home() / ".cache" / "ranvier"
    arrow_cache = cache_root / "arrow" if cache_dir is not None else None  # None: the cache that `datasets` shares
    folder = _find_folder(source)
    if folder is not None:
        files = _data_files(folder)
        name, identity = folder.name, [[str(path.relative_to(folder)), *_stamp(path)] for path in files]
        opened = None
    else:
        opened = _open_hub(str(source), arrow_cache, progress)
        name = str(source)
        identity = [[key, split.num_rows, split._fingerprint] for key, split in sorted(opened.items())]

    settings = [_CACHE_FORMAT, str(folder or source), identity, height_width, grayscale, train_split, test_split]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    cache_file = cache_root / "images" / f"{name.replace('/', '--')}-{key}.safetensors"
    cached = _read_cache(cache_file)
    if cached is not None:
        return cached

    if opened is None:
        assert folder is not None
        opened = _open_folder(folder, files, arrow_cache, progress)
    streamed = _stream_splits(opened, name, height_width, grayscale, train_split, test_split)
    if sum(len(part) * int(np.prod(part.shape)) for part in streamed) > max_bytes:
        return ImageSplits(*streamed)
    train, test = (_decode(part, progress) for part in streamed)
    _write_cache(cache_file, train, test)
    return ImageSplits(train, test)


# ---------------------------------------------------------------------------------------------- checks and statistics


def _check_labels(labels: Tensor, count: int, classes: tuple[str, ...], name: str) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: labels have dtype {labels.dtype}, expected torch.int64. Convert with labels.long().")
    if labels.ndim != 1 or len(labels) != count:
        raise ValueError(
            f"{name}: labels have shape {tuple(labels.shape)} but there are {count} images; expected [{count}]. "
            "Pass one class index for each image."
        )
    if count == 0:
        raise ValueError(f"{name}: the set is empty. Pass at least one image.")
    wrong = (labels < 0) | (labels >= len(classes))
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: label {int(labels[index])} at index {index} is outside 0..{len(classes) - 1} "
            f"({len(classes)} classes). Name every class, and choose a split that has labels "
            "(-1 usually marks a split published without them)."
        )


def _stratified_split(labels: Tensor, count: int, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Indices of the rest and of `count` held-out rows, both ascending."""
    if not 1 <= count < len(labels):
        raise ValueError(f"{name}: cannot hold out {count} of {len(labels)} images. Pass 1..{len(labels) - 1}.")
    random = np.random.RandomState(seed)  # its stream is frozen by NumPy, unlike that of default_rng
    numbers = labels.cpu().numpy()
    _, inverse, sizes = np.unique(numbers, return_inverse=True, return_counts=True)
    shares = sizes * count / len(numbers)
    quotas = np.floor(shares).astype(int)
    # Largest remainders get the images that rounding down left over; a stable sort settles ties by class index.
    quotas[np.argsort(quotas - shares, kind="stable")[: count - quotas.sum()]] += 1
    held_out = np.zeros(len(numbers), dtype=bool)
    for position, quota in enumerate(quotas):
        held_out[random.permutation(np.flatnonzero(inverse == position))[:quota]] = True
    return torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(np.flatnonzero(held_out))


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


# --------------------------------------------------------------------------------------------- finding the data


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
        raise ImportError(f"loading images needs `{error.name}`. {_INSTALL}") from error
    were_disabled = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if progress else datasets.disable_progress_bars)()
    try:
        yield datasets
    finally:
        (datasets.disable_progress_bars if were_disabled else datasets.enable_progress_bars)()


def _open_folder(folder: Path, files: list[Path], cache_dir: Path | None, progress: bool) -> datasets.DatasetDict:
    builder = "parquet" if files[0].suffix == ".parquet" else "imagefolder"
    with _datasets(progress) as datasets:
        return datasets.load_dataset(builder, data_dir=str(folder), cache_dir=cache_dir and str(cache_dir))


def _open_hub(source: str, cache_dir: Path | None, progress: bool) -> datasets.DatasetDict:
    with _datasets(progress) as datasets:
        try:
            return datasets.load_dataset(source, cache_dir=cache_dir and str(cache_dir))
        except Exception as error:  # datasets, huggingface_hub and their HTTP client share no exception class
            raise ConnectionError(
                f"could not load {source!r} from the Hugging Face hub ({type(error).__name__}: {error}). "
                "Check the id; without network access, download the data set's parquet files elsewhere and pass "
                "their folder."
            ) from error


def _stream_splits(
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
    labels = [torch.tensor(part[label_column][:], dtype=torch.int64) for part in (train, test)]
    classes = getattr(train.features[label_column], "names", None)
    if classes is None:
        classes = [str(index) for index in range(int(torch.cat(labels).max()) + 1)]

    first = train[0][image_column]
    channels = 1 if (_is_grayscale(first) if grayscale is None else grayscale) else 3
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
        raise ValueError(f"{name} has {len(images)} image columns, expected one; its columns are: {columns}. "
                         "Keep one with Dataset.select_columns and save it with Dataset.to_parquet.")  # fmt: skip
    integers = [column for column, kind in features.items() if "int" in str(getattr(kind, "dtype", ""))]
    candidates = labels if len(labels) == 1 else [column for column in _LABEL_NAMES if column in labels + integers]
    if not candidates:
        raise ValueError(
            f"{name} has no label column; its columns are: {columns}. Expected a ClassLabel column, or integers named "
            f"{', '.join(_LABEL_NAMES)}. Class folders need at least two classes: train/<class>/, test/<class>/."
        )
    return images[0], candidates[0]


# --------------------------------------------------------------------------------------------- decoding


def _is_grayscale(image: Image) -> bool:
    return image.mode in ("1", "L", "LA")


def _pixels(image: Image, shape: tuple[int, int, int], resize: bool, drop_color: bool, what: str) -> np.ndarray:
    """Bytes `[C, H, W]` of a decoded image, or a ValueError where converting would lose what nobody agreed to lose."""
    from PIL.Image import Resampling

    channels, height, width = shape
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{what} has mode {image.mode}, expected 8 bits a channel. Convert the files to 8 bits.")
    if channels == 1 and not (_is_grayscale(image) or drop_color):
        raise ValueError(f"{what} is in colour ({image.mode}) but the first one is not. Pass grayscale=True or False.")
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        if not resize:
            raise ValueError(
                f"{what} is {image.height}x{image.width} but the first one is {height}x{width} [pixels]. "
                "Pass size=(height, width) to resize all."
            )
        image = image.resize((width, height), Resampling.BILINEAR)  # Pillow widens the filter when it shrinks
    pixels = np.array(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _decode(part: StreamedImages, progress: bool) -> ImageSet:
    from rich.progress import track

    rows = part.source.select_columns([part.image_column])
    images = np.empty((len(part), *part.shape), dtype=np.uint8)
    bar = track(rows, f"decoding {part.name}", total=len(part), disable=not progress, transient=True)
    for index, row in enumerate(bar):
        images[index] = part.pixels(row[part.image_column], index)
    return ImageSet(torch.from_numpy(images), part.labels, part.classes, part.name)


# --------------------------------------------------------------------------------------------- cache on disk


def _checksum(images: Tensor) -> str:
    return f"{zlib.crc32(images.numpy().data):08x}"


def _read_cache(file: Path) -> ImageSplits | None:
    """The splits that `file` holds, or None where it does not exist or is damaged."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            cards = {split: json.loads(card) for split, card in stored.metadata().items()}
            sets = {
                split: ImageSet(
                    stored.get_tensor(f"{split}.images"),
                    stored.get_tensor(f"{split}.labels"),
                    tuple(card["classes"]),
                    card["name"],
                )
                for split, card in cards.items()
                if split in ("train", "test")
            }
        if all(_checksum(sets[split].images) == cards[split]["crc32"] for split in ("train", "test")):
            return ImageSplits(sets["train"], sets["test"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # whatever is wrong with it, it is rebuilt from the source
    return None


def _write_cache(file: Path, train: ImageSet, test: ImageSet) -> None:
    """Write both splits under a temporary name, then rename: a reader sees a whole file or none."""
    from safetensors.torch import save_file

    tensors, metadata = {}, {}
    for split, part in (("train", train), ("test", test)):
        tensors |= {f"{split}.images": part.images, f"{split}.labels": part.labels}
        metadata[split] = json.dumps({"classes": part.classes, "name": part.name, "crc32": _checksum(part.images)})
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.stem}-", delete=False) as handle:
            temporary = Path(handle.name)
        save_file(tensors, temporary, metadata)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except OSError as error:
        warnings.warn(f"could not cache the decoded images ({error}). Pass cache_dir= a writable folder.", stacklevel=3)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
