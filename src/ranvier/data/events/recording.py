"""Recordings of event cameras: one structured array each, and sets of them with class labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

EVENT = np.dtype([("t", np.int64), ("x", np.int16), ("y", np.int16), ("p", np.uint8)], align=True)
"""One event: time t [us], column x and row y [pixels] from the top left, polarity p (1 brighter, 0 darker)."""

BRIGHTER, DARKER = 1, 0
"""Polarities of an event."""


class RecordingError(ValueError):
    """A recording that cannot be read, or that says what cannot be; the message names the file and the place."""


class Recordings(Protocol):
    """Labelled recordings of one sensor, read when they are asked for: from files, or simulated."""

    @property
    def name(self) -> str:
        """What to call the set in messages and reports."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class; its position is the class index."""

    @property
    def labels(self) -> Tensor:
        """Class indices, int64 `[N]`."""

    @property
    def sensor_size(self) -> tuple[int, int]:
        """Height and width of the sensor [pixels]."""

    def __len__(self) -> int:
        """Number of recordings N."""

    def read(self, indices: Sequence[int]) -> list[np.ndarray]:
        """The recordings at `indices`, arrays of `EVENT`; a `RecordingError` where one is unreadable."""

    def identity(self) -> Any:
        """What the recordings depend on, as json: what is derived from them is kept under this key."""


@dataclass(frozen=True)
class RecordingSplits:
    """The training and the test part of one set of recordings."""

    train: Recordings
    test: Recordings


def make_events(t: np.ndarray, x: np.ndarray, y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Put columns of equal length into one array of `EVENT`.

    >>> make_events(np.array([5]), np.array([3]), np.array([2]), np.array([1]))["t"]
    array([5])
    """
    events = np.empty(len(t), EVENT)
    events["t"], events["x"], events["y"], events["p"] = t, x, y, p
    return events


def check_events(events: np.ndarray, sensor_size: tuple[int, int], where: str) -> np.ndarray:
    """Return `events` if they can come from a sensor of that size.

    Args:
        events: Array of `EVENT`.
        sensor_size: Height and width of the sensor [pixels].
        where: The file or what else the events come from, for messages.

    Raises:
        RecordingError: no events, an address outside the sensor, or a time before that of the event before it; the
            message has the number of the first such event, counted from 0.
    """
    if events.dtype != EVENT:
        raise TypeError(f"{where}: events have dtype {events.dtype}, expected {EVENT}. Build them with make_events.")
    if len(events) == 0:
        raise RecordingError(f"{where} holds no events. Remove it, or record it anew.")
    height, width = sensor_size
    x, y, t = events["x"], events["y"], events["t"]
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    if outside.any():
        index = int(outside.argmax())
        raise RecordingError(
            f"{where}: event {index} is at column {x[index]}, row {y[index]}, outside a sensor of {height}x{width} "
            "pixels (height x width). Is it a recording of another sensor?"
        )
    backwards = t[1:] < t[:-1]
    if backwards.any():
        index = int(backwards.argmax()) + 1
        raise RecordingError(
            f"{where}: event {index} is at {t[index]} us, before event {index - 1} at {t[index - 1]} us. Events must "
            "be in the order of time; sort them if the camera wrote them out of order."
        )
    return events
