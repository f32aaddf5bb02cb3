"""Labelled recordings in files, read when they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ranvier.data.events.recording import RecordingError, check_events
from ranvier.data.labels import check_labels


@dataclass(frozen=True)
class Trial:
    """A file, or the part of it from `start` to before `stop`.

    Args:
        path: The file, relative to the folder of the set.
        start: First time [us]; None from the first event.
        stop: Time [us] to stop before; None to the last event.
    """

    path: Path
    start: int | None = None
    stop: int | None = None


@dataclass(frozen=True)
class FileRecordings:
    """Labelled recordings in files of one folder: implements `Recordings`.

    Args:
        name: What to call the set in messages and reports.
        folder: The folder that the paths of `trials` start from.
        trials: One file, or part of a file, for each recording.
        labels: Class indices, int64 `[N]`, one for each trial, each in `0 .. len(classes) - 1`.
        classes: Name of each class; its position is the class index.
        sensor_size: Height and width of the sensor [pixels].
        reader: A reader of this package, or a function like one: it is called with a path, or with a path, start and
            stop for a part of a file, and returns an array of `EVENT`. Its results are checked again here.
        skipped: Why recordings were left out, one message each: see `without_unreadable`.

    Raises:
        TypeError: `labels` is not int64.
        ValueError: lengths differ, there are no trials, a label is outside the classes, or a path is not relative.

    >>> import tempfile
    >>> import torch
    >>> from ranvier.data.events import read_nmnist
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.bin").write_bytes(bytes([3, 5, 0x80, 0x01, 0x02]))
    ...     trials = (Trial(Path("a.bin")),)
    ...     digits = FileRecordings("one", Path(folder), trials, torch.tensor([7]), tuple("0123456789"), (34, 34),
    ...                             read_nmnist)
    ...     digits.read([0])[0].tolist()
    [(258, 3, 5, 1)]
    """

    name: str
    folder: Path
    trials: tuple[Trial, ...]
    labels: Tensor
    classes: tuple[str, ...]
    sensor_size: tuple[int, int]
    reader: Callable[..., np.ndarray]
    skipped: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Check lengths, types, the range of the labels and the paths."""
        check_labels(self.labels, len(self.trials), self.classes, self.name, of="recording")
        absolute = next((trial.path for trial in self.trials if trial.path.is_absolute()), None)
        if absolute is not None:
            raise ValueError(f"{self.name}: path {absolute} is absolute, expected one relative to {self.folder}.")

    def __len__(self) -> int:
        """Return the number of recordings."""
        return len(self.trials)

    def read(self, indices: Sequence[int]) -> list[np.ndarray]:
        """The recordings at `indices`, arrays of `EVENT` with times [us] as in the files.

        Raises:
            RecordingError: one cannot be read, or is not what this sensor records.
        """
        return [self._read(self.trials[index]) for index in indices]

    def identity(self) -> dict[str, Any]:
        """What the recordings depend on, as json: a digest of names, sizes and times of change, parts and labels.

        The folder is not part of it: a copy that keeps the times of change is the same set.

        Raises:
            FileNotFoundError: a file is gone.
        """
        stamps: dict[Path, tuple[int, int]] = {}
        for path in {trial.path for trial in self.trials}:
            status = (self.folder / path).stat()
            stamps[path] = status.st_size, status.st_mtime_ns
        digest = hashlib.sha256()
        for trial, label in zip(self.trials, self.labels.tolist(), strict=True):
            row = [trial.path.as_posix(), *stamps[trial.path], trial.start, trial.stop, label]
            digest.update(json.dumps(row).encode() + b"\n")
        return {
            "name": self.name,
            "classes": list(self.classes),
            "sensor_size": list(self.sensor_size),
            "reader": f"{self.reader.__module__}.{self.reader.__qualname__}",
            "recordings": len(self),
            "sha256": digest.hexdigest(),
        }

    def take(self, indices: Sequence[int]) -> FileRecordings:
        """The set of the recordings at `indices`, in that order."""
        chosen = [int(index) for index in indices]
        return replace(self, trials=tuple(self.trials[index] for index in chosen), labels=self.labels[chosen])

    def without_unreadable(self, progress: bool = True) -> FileRecordings:
        """The set of those recordings that can be read; each is read once to find out.

        Args:
            progress: Show a progress bar.

        Returns:
            The set without the others. Its `skipped` has a message for each of them: `len(skipped)` is their number.

        Raises:
            RecordingError: none can be read; the message is that of the first.
        """
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        hidden = not (progress and console.is_terminal)
        kept, skipped = [], []
        for index in track(range(len(self)), f"checking {self.name}", console=console, transient=True, disable=hidden):
            try:
                self._read(self.trials[index])
            except RecordingError as error:
                skipped.append(str(error))
            else:
                kept.append(index)
        if not kept:
            raise RecordingError(
                f"{self.name}: none of the {len(self)} recordings can be read; the first: {skipped[0]}"
            )
        return replace(self.take(kept), skipped=(*self.skipped, *skipped))

    def _read(self, trial: Trial) -> np.ndarray:
        path = self.folder / trial.path
        whole = trial.start is None and trial.stop is None
        try:
            events = self.reader(path) if whole else self.reader(path, trial.start, trial.stop)
        except OSError as error:
            raise RecordingError(
                f"{path} cannot be read ({error.strerror or error}). Get it anew, or leave it out of the set."
            ) from error
        part = "" if whole else f" from {trial.start} to before {trial.stop} us"
        return check_events(events, self.sensor_size, f"{path}{part}")
