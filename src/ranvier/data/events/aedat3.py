"""Recordings in AEDAT 3.1, the format of cAER, and the label files of DVS128-Gesture.

Text lines that start with `#`, the last of them `#!END-HEADER`; then packets: a header of 28 bytes, and events of one
type. All numbers are little-endian. A polarity event has 8 bytes: x in bits 17..31 of the first word, y in 2..16,
polarity in 1, validity in 0; the second word is the time [us], of which the packet header has the bits above 30.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ranvier.data.events.aedat2 import DVS128_SIZE
from ranvier.data.events.recording import RecordingError, check_events, make_events

GESTURES = (
    "hand clapping",
    "right hand wave",
    "left hand wave",
    "right arm clockwise",
    "right arm counter clockwise",
    "left arm clockwise",
    "left arm counter clockwise",
    "arm roll",
    "air drums",
    "air guitar",
    "other gestures",
)
"""Names of the classes; the label files count them from 1."""

_MAGIC = b"#!AER-DAT3.1"
_END_OF_HEADER = b"#!END-HEADER\r\n"
_PACKET = struct.Struct(
    "<hhiiiiii"
)  # type, source, size of an event, offset of its time, overflow, capacity, number, valid
_EVENT = np.dtype([("address", "<u4"), ("t", "<u4")])
_POLARITY = 1
_LAST_TYPE = 13  # libcaer/events/common.h
_LABEL_HEADER = ["class", "startTime_usec", "endTime_usec"]


@dataclass(frozen=True)
class GestureTrial:
    """One performance of a gesture within a recording.

    Args:
        label: Class index, `0 .. 10`: the number in the label file less 1.
        start: Its first microsecond.
        stop: The microsecond after its last one.
    """

    label: int
    start: int
    stop: int


def read_dvs_gesture(path: str | os.PathLike[str], start: int | None = None, stop: int | None = None) -> np.ndarray:
    r"""Read one DVS128-Gesture recording (`userNN_<light>.aedat`), or one trial of it.

    Args:
        path: An `.aedat` file.
        start: First time [us] to return; None from the first event.
        stop: Time [us] to stop before; None to the last event.

    Returns:
        Array of `EVENT`: t [us] as in the file, x, y, p, in the order of time. Packets of other events are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        RecordingError: not AEDAT 3.1, a packet that is cut off or says what cannot be, or, among the events returned,
            none at all, an address outside 128x128 pixels, or time going backwards.

    Source: Amir et al. (2017) and the README of the data. Trials are `start <= t < stop`, as in SpikingJelly.

    >>> import tempfile
    >>> header = _PACKET.pack(1, 0, 8, 4, 0, 2, 2, 2)
    >>> events = np.array([3 << 17 | 5 << 2 | 2 | 1, 258, 3 << 17 | 5 << 2 | 1, 300], "<u4")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "user01_led.aedat")
    ...     _ = path.write_bytes(b"#!AER-DAT3.1\r\n#!END-HEADER\r\n" + header + events.tobytes())
    ...     read_dvs_gesture(path).tolist(), read_dvs_gesture(path, 0, 300).tolist()
    ([(258, 3, 5, 1), (300, 3, 5, 0)], [(258, 3, 5, 1)])
    """
    return parse(Path(path).read_bytes(), str(path), start, stop)


def parse(data: bytes, where: str, start: int | None = None, stop: int | None = None) -> np.ndarray:
    """Events in the bytes of a file; `where` names it in messages. Raises as `read_dvs_gesture` does."""
    address, t = _polarity_events(data, where)
    if start is not None or stop is not None:
        where = f"{where} from {'the start' if start is None else f'{start} us'} to " + (
            "the end" if stop is None else f"before {stop} us"
        )
        inside = np.ones(len(t), dtype=bool)
        if start is not None:
            inside &= t >= start
        if stop is not None:
            inside &= t < stop
        address, t = address[inside], t[inside]
    return check_events(make_events(t, address >> 17, address >> 2 & 0x7FFF, address >> 1 & 1), DVS128_SIZE, where)


def read_gesture_labels(path: str | os.PathLike[str]) -> tuple[GestureTrial, ...]:
    r"""Read the label file of one recording (`userNN_<light>_labels.csv`): when which gesture was performed.

    Trials may overlap and follow each other in any order: `user22_led_labels.csv` is published with a trial of class 9
    that ends after the next one has begun. It is returned as it is.

    Args:
        path: A csv file of `class,startTime_usec,endTime_usec`.

    Returns:
        The trials, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        RecordingError: another header, no trials, or a line that is not a class in 1 .. 11 and two rising times.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "user01_led_labels.csv")
    ...     _ = path.write_text("class,startTime_usec,endTime_usec\n1,80048239,85092709\n")
    ...     read_gesture_labels(path)
    (GestureTrial(label=0, start=80048239, stop=85092709),)
    """
    return parse_gesture_labels(Path(path).read_bytes(), str(path))


def parse_gesture_labels(data: bytes, where: str) -> tuple[GestureTrial, ...]:
    """Trials in the bytes of a label file; `where` names it in messages. Raises as `read_gesture_labels` does."""
    try:
        lines = data.decode("ascii").splitlines()
    except UnicodeDecodeError as error:
        raise RecordingError(
            f"{where}: byte {error.start} is {data[error.start]:#04x}, not text. Get the file anew."
        ) from error
    if not lines or [cell.strip() for cell in lines[0].split(",")] != _LABEL_HEADER:
        raise RecordingError(
            f"{where}: line 1 is {lines[0][:60] if lines else ''!r}, expected {','.join(_LABEL_HEADER)!r}. "
            "Is it the label file of a DVS128-Gesture recording?"
        )
    trials = []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split(",")]
        digits = len(cells) == 3 and all(cell.isdecimal() and len(cell) < 19 for cell in cells)  # within int64
        label, start, stop = map(int, cells) if digits else (0, 0, 0)
        if not (1 <= label <= len(GESTURES) and start < stop):
            raise RecordingError(
                f"{where}: line {number} is {line[:60]!r}, expected a class in 1..{len(GESTURES)}, a start and a later "
                "end [us]. Correct the line or get the file anew."
            )
        trials.append(GestureTrial(label - 1, start, stop))
    if not trials:
        raise RecordingError(f"{where} holds no trials. Get the file anew.")
    return tuple(trials)


def _polarity_events(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Address words and times [us] of all polarity events, in the order of the file."""
    position = _end_of_header(data, where)
    packets: list[np.ndarray] = []
    overflows: list[int] = []
    cameras: set[int] = set()
    while position < len(data):
        here = f"{where}: packet at byte {position}"
        if position + _PACKET.size > len(data):
            raise RecordingError(
                f"{here} has {len(data) - position} bytes of its header of {_PACKET.size}. The file is cut off: get it "
                "anew."
            )
        kind, camera, size, offset, overflow, capacity, number, valid = _PACKET.unpack_from(data, position)
        if not (0 <= kind <= _LAST_TYPE and size > 0 and overflow >= 0 and 0 <= valid <= number <= capacity):
            raise RecordingError(
                f"{here} has event type {kind}, {size} bytes an event, time overflow {overflow}, and {valid} valid of "
                f"{number} events in {capacity} places; expected a type in 0..{_LAST_TYPE}, a positive size, an "
                "overflow of at least 0 and valid <= events <= places. The file is damaged: get it anew."
            )
        first = position + _PACKET.size
        position = first + size * capacity
        if position > len(data):
            raise RecordingError(
                f"{here} announces {size * capacity} bytes of events but {len(data) - first} follow. The file is cut "
                "off: get it anew."
            )
        if kind != _POLARITY or number == 0:
            continue
        if (size, offset) != (_EVENT.itemsize, 4):
            raise RecordingError(
                f"{here} has polarity events of {size} bytes with their time at byte {offset}, expected 8 and 4. The "
                "file is damaged: get it anew."
            )
        packets.append(_valid_events(np.frombuffer(data, _EVENT, number, first), valid, here))
        overflows.append(overflow)
        cameras.add(camera)
    if len(cameras) > 1:
        raise RecordingError(f"{where} has events of cameras {sorted(cameras)}, expected one. Split it by camera.")
    if not packets:
        return np.empty(0, np.int32), np.empty(0, np.int64)
    events = np.concatenate(packets)
    t = events["t"].astype(np.int64)
    if any(overflows):
        t += np.repeat(np.array(overflows, np.int64) << 31, [len(packet) for packet in packets])
    return events["address"], t


def _valid_events(events: np.ndarray, valid: int, here: str) -> np.ndarray:
    """Those events of a packet that no filter has marked invalid.

    The marks count only where the header says that there are some: the readers published with the data ignore them.
    """
    beyond = events["t"] >> 31 != 0
    if beyond.any():
        index = int(beyond.argmax())
        raise RecordingError(
            f"{here}: event {index} of the packet has the time word {int(events['t'][index]):#010x}, whose highest bit "
            "must be 0. The file is damaged: get it anew."
        )
    if valid == len(events):
        return events
    kept = events[events["address"] & 1 == 1]
    if len(kept) != valid:
        raise RecordingError(
            f"{here} announces {valid} valid events but marks {len(kept)}. The file is damaged: get it anew."
        )
    return kept


def _end_of_header(data: bytes, where: str) -> int:
    """Offset of the first packet."""
    if not data.startswith(_MAGIC):
        raise RecordingError(
            f"{where}: byte 0: starts with {data[: len(_MAGIC)]!r}, expected {_MAGIC!r}. AEDAT 2.0 files are read by "
            "read_cifar10_dvs; other versions are not supported."
        )
    start = 0
    while data.startswith(b"#", start):
        end = data.find(b"\n", start) + 1
        if data[start:end] == _END_OF_HEADER:
            return end
        if end == 0:
            break
        start = end
    raise RecordingError(
        f"{where}: byte {start}: the header goes on with {data[start : start + 20]!r}, expected lines that start with "
        f"# up to {_END_OF_HEADER!r}. The file is damaged or cut off: get it anew."
    )
