"""Recordings in 5 bytes an event, as N-MNIST and N-Caltech101 are published.

    byte 0    column x
    byte 1    row y
    byte 2    polarity (bit 7), time (its bits 22..16)
    byte 3    time (bits 15..8)
    byte 4    time (bits 7..0) [us]

A row of 240 is no event but a mark: time is 8192 us later from there on than its 23 bits say.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ranvier.data.events.layout import check_whole_events
from ranvier.data.events.recording import EVENT, check_events

NMNIST_SIZE = (34, 34)
"""Height and width of the N-MNIST recordings [pixels]."""

NCALTECH101_SIZE = (180, 240)
"""Height and width that hold every N-Caltech101 recording [pixels]; the recordings themselves differ in size."""

_LAYOUT = np.dtype([("x", "u1"), ("yqt", ">u4")])  # 5 bytes: not aligned
_OVERFLOW_ROW = 240
_OVERFLOW = 8192  # us
_CHUNK = 1 << 16  # events whose columns stay in the cache of a core


def read_nmnist(path: str | os.PathLike[str]) -> np.ndarray:
    """Read one N-MNIST recording (`Train/<digit>/NNNNN.bin`, `Test/<digit>/NNNNN.bin`).

    Args:
        path: A `.bin` file.

    Returns:
        Array of `EVENT`: t [us], x, y, p, in the order of time.

    Raises:
        FileNotFoundError: there is no such file.
        RecordingError: no events, a partial last event, an address outside 34x34 pixels, or time going backwards.

    Source: Orchard et al. (2015), and the reader published with the data (event-Python, `read_dataset`), whose
    handling of row 240 is kept.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "00001.bin")
    ...     _ = path.write_bytes(bytes([3, 5, 0x80, 0x01, 0x02]))  # column 3, row 5, brighter, at 258 us
    ...     read_nmnist(path).tolist()
    [(258, 3, 5, 1)]
    """
    return parse(Path(path).read_bytes(), NMNIST_SIZE, str(path))


def read_ncaltech101(path: str | os.PathLike[str]) -> np.ndarray:
    """Read one N-Caltech101 recording (`<class>/image_NNNN.bin`): see `read_nmnist`, with 180x240 pixels.

    Addresses are those in the file. The recordings have the sizes of the images and start at row 0, column 0 only
    approximately; some published pipelines shift each to the least row and column that occurs in it.
    """
    return parse(Path(path).read_bytes(), NCALTECH101_SIZE, str(path))


def parse(data: bytes, sensor_size: tuple[int, int], where: str) -> np.ndarray:
    """Events in the bytes of a file.

    Args:
        data: The whole file.
        sensor_size: Height and width of the sensor [pixels], both at most 240.
        where: The file, for messages.

    Raises:
        RecordingError: as for `read_nmnist`.

    >>> parse(bytes([3, 5, 0x80, 0x01, 0x02, 7]), (34, 34), "a.bin")
    Traceback (most recent call last):
    ...
    ranvier.data.events.recording.RecordingError: a.bin: 1 byte is left over at byte 5, after event 0; an event has \
5 bytes. The file is cut off or of another format: get it anew.
    """
    count = check_whole_events(data, 0, _LAYOUT.itemsize, where)
    columns = np.frombuffer(data, _LAYOUT)
    events = np.empty(count, EVENT)
    overflows = False
    for start in range(0, count, _CHUNK):
        part, chunk = columns[start : start + _CHUNK], events[start : start + _CHUNK]
        yqt = part["yqt"].astype(np.uint32)  # to the byte order of the machine: row, polarity, time
        row = yqt >> 24
        chunk["t"], chunk["x"], chunk["y"], chunk["p"] = yqt & 0x7FFFFF, part["x"], row, (yqt >> 23) & 1
        overflows = overflows or bool((row == _OVERFLOW_ROW).any())
    if overflows:
        marks = events["y"] == _OVERFLOW_ROW
        events["t"] += _OVERFLOW * np.cumsum(marks)
        events = events[~marks]
    return check_events(events, sensor_size, where)
