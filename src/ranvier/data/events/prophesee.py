"""Recordings in Prophesee's `.dat` format, version 2: contrast detection events of 8 bytes.

Text lines that start with `%` and name width and height of the sensor, one byte for the type of the events, one for
their size; then little-endian words, two an event: its time [us]; x in bits 0..13, y in 14..27, polarity in 28..31.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from ranvier.data.events.layout import check_whole_events, header_lines
from ranvier.data.events.recording import RecordingError, check_events, make_events

_EVENT = np.dtype([("t", "<u4"), ("address", "<u4")])
_CONTRAST_DETECTION = (0x00, 0x0C)  # types of events: Event2d, EventCd
_SETTING = re.compile(rb"%\s*(version|width|height)\s+(\d{1,9}(?:\.0+)?)\s*", re.IGNORECASE)


def read_prophesee(path: str | os.PathLike[str], sensor_size: tuple[int, int] | None = None) -> np.ndarray:
    r"""Read one recording in Prophesee's `.dat` format.

    Args:
        path: A `.dat` file of version 2.
        sensor_size: Height and width of the sensor [pixels]; None takes them from the header of the file.

    Returns:
        Array of `EVENT`: t [us], x, y, p, in the order of time.

    Raises:
        FileNotFoundError: there is no such file.
        RecordingError: another version or type of events, no sensor size in the header where `sensor_size` is None or
            another one than `sensor_size`, no events, a partial last event, an address outside the sensor, a polarity
            above 1, or time going backwards (its 32 bits are used up after 71 minutes).

    Source: https://docs.prophesee.ai/stable/data/file_formats/dat.html

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "a.dat")
    ...     header = b"% Version 2\n% Width 640\n% Height 480\n" + bytes([0x0C, 8])
    ...     _ = path.write_bytes(header + np.array([258, 1 << 28 | 5 << 14 | 3], "<u4").tobytes())
    ...     read_prophesee(path).tolist()
    [(258, 3, 5, 1)]
    """
    return parse(Path(path).read_bytes(), str(path), sensor_size)


def parse(data: bytes, where: str, sensor_size: tuple[int, int] | None = None) -> np.ndarray:
    """Events in the bytes of a file; `where` names it in messages. Raises as `read_prophesee` does."""
    start, settings = _header(data, where)
    size = _sensor_size(settings, sensor_size, where)
    if len(data) < start + 2:
        raise RecordingError(f"{where} ends at byte {len(data)}, before the type of its events. Get it anew.")
    kind, bytes_each = data[start], data[start + 1]
    if kind not in _CONTRAST_DETECTION or bytes_each != _EVENT.itemsize:
        raise RecordingError(
            f"{where}: byte {start}: events have type {kind:#04x} and {bytes_each} bytes, expected 0x00 or 0x0c "
            f"(contrast detection) and {_EVENT.itemsize}. Export the contrast detection events to a .dat file."
        )
    start += 2
    check_whole_events(data, start, _EVENT.itemsize, where)
    columns = np.frombuffer(data, _EVENT, offset=start)
    address = columns["address"]
    polarity = address >> 28
    wrong = polarity > 1
    if wrong.any():
        index = int(wrong.argmax())
        raise RecordingError(
            f"{where}: event {index} (byte {start + index * _EVENT.itemsize}) has polarity {polarity[index]}, expected "
            "0 or 1. The file is damaged or of another format: get it anew."
        )
    return check_events(make_events(columns["t"], address & 0x3FFF, address >> 14 & 0x3FFF, polarity), size, where)


def _header(data: bytes, where: str) -> tuple[int, dict[str, str]]:
    """Offset of the first byte behind the lines that start with `%`, and what they say of version and size."""
    if not data.startswith(b"%"):
        raise RecordingError(
            f"{where}: byte 0: starts with {data[:12]!r}, expected a line of text that starts with %. Is it a .dat "
            "file of Prophesee? Convert .raw files with Prophesee's tools first."
        )
    lines, start = header_lines(data, b"%", where)
    found = [match for match in map(_SETTING.fullmatch, lines) if match]
    settings = {match[1].decode().lower(): match[2].decode() for match in found}
    version = settings.get("version")
    if version is None or float(version) != 2:
        raise RecordingError(
            f"{where}: the header (bytes 0 to {start - 1}) says version {version}, expected 2. Write it anew with "
            "Prophesee's tools."
        )
    return start, settings


def _sensor_size(settings: dict[str, str], wanted: tuple[int, int] | None, where: str) -> tuple[int, int]:
    stated = [int(float(settings[side])) for side in ("height", "width") if side in settings]
    if len(stated) < 2:
        if wanted is None:
            raise RecordingError(
                f"{where}: the header does not say width and height of the sensor. Pass sensor_size=(height, width)."
            )
        return wanted
    height, width = stated
    if wanted is not None and wanted != (height, width):
        raise RecordingError(
            f"{where}: the header says a sensor of {height}x{width} pixels (height x width), expected "
            f"{wanted[0]}x{wanted[1]}. Pass sensor_size=None to take it from the header."
        )
    return height, width
