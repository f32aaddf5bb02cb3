"""Frames of a whole set of recordings, counted once and kept on disk: no epoch reads events again.

A store is a folder that is there whole or not at all: `frames.npy`, `[N, T, H, W, 2]`, mapped into memory when it is
read, and `card.json`, which says what it holds.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from ranvier.atomic import SUFFIX, write_json
from ranvier.data.events.frame_set import FrameSet, FrameSplits
from ranvier.data.events.frames import FrameSettings, to_frames
from ranvier.data.events.recording import RecordingError, Recordings, RecordingSplits
from ranvier.provenance import cache_folder

FORMAT = 1
"""Part of every key. Raise it when what a store holds changes: older ones are then built anew."""

_DTYPES = (np.uint8, np.int16, np.float16)
_CHUNK = 32  # recordings that one thread reads at a time: enough to share a call, few enough for long recordings
_MOST_THREADS = 8  # reading overlaps with counting; more only compete for the interpreter
_ABANDONED = 3600.0  # a temporary folder that nothing was written to for so long [s] is of a build that was killed


def build_frames(
    recordings: Recordings,
    settings: FrameSettings,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    skip_unreadable: bool = False,
    num_threads: int | None = None,
) -> FrameSet:
    """Turn recordings into frames, or map the frames that an earlier call has made.

    The store is kept under `recordings.identity()`, the labels and `settings`: change one of them and another is built.
    Several processes may build one at the same time; one of them keeps its own, the others use it. A store whose card
    or sizes do not fit is built anew; a byte that changed inside the frames is not noticed.

    Args:
        recordings: What to make frames of; `read` is called from several threads at once.
        settings: How, see `to_frames`.
        cache_dir: Folder for the store; None means `ranvier.provenance.cache_folder()`.
        progress: Show a progress bar while it is built.
        skip_unreadable: Leave out recordings that cannot be read, with one warning that counts and names them, instead
            of stopping at the first.
        num_threads: Threads that read and count; None takes one for each core, up to 8.

    Returns:
        The frames of all recordings that could be read, in their order: counts uint8, or int16 where one exceeds 255,
        at the size of the sensor; float16 where they are resized. They are mapped from the file; what is written to
        them stays in memory.

    Raises:
        RecordingError: a recording cannot be read (or, if they may be skipped, none can).
        OSError: the folder cannot be written to, or the disk is full.
    """
    stores = (Path(cache_dir) if cache_dir is not None else cache_folder()) / "frames"
    stem = f"{recordings.name.replace('/', '--')}-{_key(recordings, settings)}"
    store = stores / stem
    found = _open(store, recordings, settings)
    if found is not None and found[1] and not skip_unreadable:
        found = None  # built when they were to be skipped; now the error is wanted, or the recording is readable again
    if found is None:
        _remove_abandoned(stores, stem)
        with _folder(store) as folder:
            _build(
                folder,
                recordings,
                settings,
                progress,
                skip_unreadable,
                num_threads or min(os.cpu_count() or 1, _MOST_THREADS),
            )
            _put_in_place(folder, store, recordings, settings, skip_unreadable)
        for _ in range(10):
            found = _open(store, recordings, settings)
            if found is not None:
                break
            time.sleep(0.05)  # another process is about to put its own in place
        if found is None:
            raise OSError(f"{store} was built but cannot be read back. Is another program changing files there?")
    frames, skipped = found
    if skipped:
        _warn(recordings, skipped)
    return frames


def build_splits(
    splits: RecordingSplits,
    settings: FrameSettings,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    skip_unreadable: bool = False,
    num_threads: int | None = None,
) -> FrameSplits:
    """Frames of both parts of a data set, as `build_frames` makes them."""
    train, test = (
        build_frames(
            part,
            settings,
            cache_dir=cache_dir,
            progress=progress,
            skip_unreadable=skip_unreadable,
            num_threads=num_threads,
        )
        for part in (splits.train, splits.test)
    )
    return FrameSplits(train, test)


def _key(recordings: Recordings, settings: FrameSettings) -> str:
    """A hash of all that the store depends on."""
    labels = hashlib.sha256(recordings.labels.cpu().numpy().tobytes()).hexdigest()
    parts = [FORMAT, recordings.identity(), labels, recordings.classes, recordings.sensor_size, asdict(settings)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------- reading a store


def _open(store: Path, recordings: Recordings, settings: FrameSettings) -> tuple[FrameSet, dict[int, str]] | None:
    """The frames in `store`, and why which recordings are not among them; None where it is absent or damaged."""
    try:
        card = json.loads((store / "card.json").read_text())
        skipped = {int(index): str(reason) for index, reason in card["skipped"].items()}
        file = store / "frames.npy"
        # Copy on write: torch wants writable memory, and nobody is to write to the file.
        frames = np.lib.format.open_memmap(file, mode="c")
        fits = frames.shape == _stored_shape(recordings, settings) and frames.dtype in _DTYPES
        if not fits or file.stat().st_size != card["bytes"]:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # whatever is wrong with it, it can be built again
    kept = torch.tensor([index for index in range(len(recordings)) if index not in skipped], dtype=torch.int64)
    part = FrameSet(
        torch.from_numpy(frames).permute(0, 1, 4, 2, 3),
        recordings.labels[kept],
        tuple(recordings.classes),
        recordings.name,
        rows=kept if skipped else None,
    )
    return part, skipped


def _stored_shape(recordings: Recordings, settings: FrameSettings) -> tuple[int, ...]:
    """`(N, T, H, W, 2)`: polarities last, so that a batch is read as convolutions want it."""
    steps, channels, height, width = settings.shape(recordings.sensor_size)
    return len(recordings), steps, height, width, channels


def _warn(recordings: Recordings, skipped: dict[int, str]) -> None:
    shown = "; ".join(f"recording {index}: {reason}" for index, reason in islice(skipped.items(), 5))
    more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    warnings.warn(
        f"{recordings.name}: {len(skipped)} of {len(recordings)} recordings cannot be read and are left out. "
        f"{shown}{more}",
        stacklevel=3,
    )


# ------------------------------------------------------------------------------------------------- writing a store


@contextmanager
def _folder(store: Path) -> Iterator[Path]:
    """A temporary folder beside `store`, gone at the end unless it was renamed."""
    folder = store.parent / f".{store.name}.{secrets.token_hex(4)}{SUFFIX}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot keep frames in {store.parent} ({error}). Pass cache_dir= a writable folder."
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(stores: Path, stem: str) -> None:
    """Delete what builds of this store left behind that were killed; one that still runs writes now and then."""
    for folder in stores.glob(f".{stem}.*{SUFFIX}"):
        try:
            last = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except OSError:  # its owner has finished meanwhile
            continue
        if time.time() - last > _ABANDONED:
            shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(
    folder: Path, store: Path, recordings: Recordings, settings: FrameSettings, skip_unreadable: bool
) -> None:
    """Rename `folder` to `store`, unless another process was faster and left a good one there."""
    for _ in range(10):
        try:
            folder.rename(store)  # refused where there is a folder that is not empty
            return
        except OSError as error:
            # Another process may have renamed away what was in the way, and so it need not be there any more.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) and not store.exists():
                raise
        others = _open(store, recordings, settings)
        if others is not None and (skip_unreadable or not others[1]):
            return
        with _folder(store) as old:  # renamed away first: nobody finds half of what is being deleted
            try:
                store.rename(old / "damaged")
            except FileNotFoundError:
                continue


def _build(
    folder: Path,
    recordings: Recordings,
    settings: FrameSettings,
    progress: bool,
    skip_unreadable: bool,
    num_threads: int,
) -> None:
    """Write the frames of all recordings and their card to `folder`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not (progress and console.is_terminal))
    numbers = range(len(recordings))
    chunks = [numbers[first : first + _CHUNK] for first in numbers[::_CHUNK]]
    skipped: dict[int, str] = {}
    file = folder / "frames.npy"
    stored_shape = _stored_shape(recordings, settings)
    with _FrameFile(file, stored_shape, np.uint8 if settings.size is None else np.float16) as stored, bar:
        task = bar.add_task(f"counting {recordings.name}", total=len(recordings))
        for results in _in_order(chunks, recordings, settings, skip_unreadable, num_threads):
            for index, result in results:
                if isinstance(result, RecordingError):
                    skipped[index] = str(result)
                    result = np.zeros(stored_shape[1:], stored.dtype)  # its row stays, and nobody reads it
                stored.write(result)
            bar.advance(task, len(results))
    if len(skipped) == len(recordings):
        raise RecordingError(
            f"{recordings.name}: none of the {len(recordings)} recordings can be read. The first one: {skipped[0]}"
        )
    card: dict[str, Any] = {
        "name": recordings.name,
        "classes": list(recordings.classes),
        "labels": recordings.labels.tolist(),
        "sensor_size": list(recordings.sensor_size),
        "settings": asdict(settings),
        "shape": list(stored_shape),
        "bytes": file.stat().st_size,
        "skipped": skipped,
    }
    write_json(folder / "card.json", card)


Result = tuple[int, "np.ndarray | RecordingError"]
"""Number of a recording, and its frames `[T, H, W, 2]` or why there are none."""


def _in_order(
    chunks: list[range], recordings: Recordings, settings: FrameSettings, skip_unreadable: bool, num_threads: int
) -> Iterator[list[Result]]:
    """Results of all chunks, a few of which are worked on at a time, so that memory does not grow."""
    if num_threads == 1:
        for chunk in chunks:
            yield _count(chunk, recordings, settings, skip_unreadable)
        return
    coming = iter(chunks)
    with ThreadPoolExecutor(num_threads) as pool:
        pending: deque[Future[list[Result]]] = deque()
        try:
            while True:
                for chunk in islice(coming, 2 * num_threads - len(pending)):
                    pending.append(pool.submit(_count, chunk, recordings, settings, skip_unreadable))
                if not pending:
                    return
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _count(
    indices: Sequence[int], recordings: Recordings, settings: FrameSettings, skip_unreadable: bool
) -> list[Result]:
    """Frames of some recordings; what cannot be read is in the list as the error, or raises it."""
    found: list[np.ndarray | RecordingError]
    try:
        found = [*recordings.read(indices)]
    except RecordingError:
        if not skip_unreadable:
            raise
        found = [_read_one(recordings, index) for index in indices]  # one of them cannot be read: find out which
    results: list[Result] = []
    for index, events in zip(indices, found, strict=True):
        result: np.ndarray | RecordingError
        try:
            result = events if isinstance(events, RecordingError) else _frames(events, index, recordings, settings)
        except RecordingError as error:
            if not skip_unreadable:
                raise
            result = error
        results.append((index, result))
    return results


def _read_one(recordings: Recordings, index: int) -> np.ndarray | RecordingError:
    try:
        return recordings.read([index])[0]
    except RecordingError as error:
        return error


def _frames(events: np.ndarray, index: int, recordings: Recordings, settings: FrameSettings) -> np.ndarray:
    frames = to_frames(events, settings, recordings.sensor_size, where=f"{recordings.name}: recording {index}")
    return frames.transpose(0, 2, 3, 1)


class _FrameFile:
    """An array of frames, written one after the other: plain writes fail with an error where the disk is full."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        self.path = path
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.written = 0
        self.file = self._begin(path)

    def __enter__(self) -> _FrameFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:  # on the disk before the folder gets the name under which it counts as whole
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()

    def write(self, frames: np.ndarray) -> None:
        """Append one recording `[T, H, W, 2]`; the first count above 255 makes the whole file int16."""
        if self.dtype == np.uint8 and frames.max() > 255:
            self._widen()
        self._append(np.ascontiguousarray(frames, dtype=self.dtype))
        self.written += 1

    def _append(self, frames: np.ndarray) -> None:
        try:
            self.file.write(frames.data)
        except OSError as error:
            gigabytes = math.prod(self.shape) * self.dtype.itemsize / 1e9
            reason = f"could not write {self.path} ({error}). Pass cache_dir= a folder with {gigabytes:.1f} GB free."
            raise OSError(error.errno, reason) from error

    def _begin(self, path: Path) -> Any:
        file = path.open("wb")
        description = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(file, description)
        return file

    def _widen(self) -> None:
        header = self.file.tell() - self.written * math.prod(self.shape[1:])
        self.file.close()
        narrow = self.path.rename(self.path.with_suffix(".narrow"))
        self.dtype = np.dtype(np.int16)
        self.file = self._begin(self.path)
        with narrow.open("rb") as before:
            before.seek(header)
            for _ in range(self.written):
                counts = np.frombuffer(before.read(math.prod(self.shape[1:])), np.uint8)
                self._append(counts.astype(np.int16))
        narrow.unlink()
