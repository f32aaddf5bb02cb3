"""Recordings in AEDAT 2.0, the format of jAER, from a DVS128 camera: CIFAR10-DVS.

After text lines that start with `#`, an event has 8 bytes, most significant first: a 32-bit address and a 32-bit
time [us]. The address of a DVS128 has its polarity in bit 0, one coordinate in bits 1..7, the other in bits 8..14;
bit 15 marks what is no event of a pixel (a synchronisation pulse).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ranvier.data.events.layout import check_whole_events, header_lines
from ranvier.data.events.recording import RecordingError, check_events, make_events

DVS128_SIZE = (128, 128)
"""Height and width of a DVS128 sensor [pixels]."""

_LAYOUT = np.dtype([("address", ">u4"), ("t", ">u4")])
_MAGIC = b"#!AER-DAT2.0"
_NOT_A_PIXEL = 0x8000
_LARGEST_ADDRESS = 0xFFFF


def read_cifar10_dvs(path: str | os.PathLike[str]) -> np.ndarray:
    r"""Read one CIFAR10-DVS recording (`<class>/cifar10_<class>_N.aedat`).

        x = 127 - bits 8..14       y = 127 - bits 1..7       p = 1 - bit 0

    The camera lay on its side, so that its rows are the columns of the picture; this is the orientation in which the
    pictures are upright. jAER shows them turned.

    Args:
        path: An `.aedat` file.

    Returns:
        Array of `EVENT`: t [us], x, y, p, in the order of time. Synchronisation pulses are left out.

    Raises:
        FileNotFoundError: there is no such file.
        RecordingError: not AEDAT 2.0, no events, a partial last event, an address that a DVS128 does not have, or
            time going backwards.

    Source: Li et al. (2017); the address bits of jAER's DVS128. Orientation and polarity are those of SpikingJelly.
    tonic's reader of this format has x and y counted from the other end and bit 0 as polarity.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "cifar10_cat_0.aedat")
    ...     _ = path.write_bytes(b"#!AER-DAT2.0\r\n" + bytes([0, 0, 5, 6, 0, 0, 1, 2]))
    ...     read_cifar10_dvs(path).tolist()
    [(258, 122, 124, 1)]
    """
    return parse(Path(path).read_bytes(), str(path))


def parse(data: bytes, where: str) -> np.ndarray:
    """Events in the bytes of a file; `where` names it in messages. Raises as `read_cifar10_dvs` does."""
    if not data.startswith(_MAGIC):
        raise RecordingError(
            f"{where}: byte 0: starts with {data[: len(_MAGIC)]!r}, expected {_MAGIC!r}. AEDAT 3.1 files are read by "
            "read_dvs_gesture; those of newer versions (CIFAR10-DVS exists in AEDAT 4, too) are not supported."
        )
    _, start = header_lines(data, b"#", where)
    check_whole_events(data, start, _LAYOUT.itemsize, where)
    columns = np.frombuffer(data, _LAYOUT, offset=start)
    address = columns["address"].astype(np.uint32)
    wrong = address > _LARGEST_ADDRESS
    if wrong.any():
        index = int(wrong.argmax())
        raise RecordingError(
            f"{where}: event {index} (byte {start + _LAYOUT.itemsize * index}) has address "
            f"{int(address[index]):#010x}, expected at most {_LARGEST_ADDRESS:#06x} from a sensor of 128x128 pixels. "
            "Is it a recording of another camera?"
        )
    t = columns["t"]
    pulses = address & _NOT_A_PIXEL != 0
    if pulses.any():
        address, t = address[~pulses], t[~pulses]
    x, y, p = (
        127 - (address >> 8 & 0x7F).astype(np.int16),
        127 - (address >> 1 & 0x7F).astype(np.int16),
        1 - (address & 1),
    )
    return check_events(make_events(t, x, y, p), DVS128_SIZE, where)
