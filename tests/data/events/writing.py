"""Files of event cameras as tests write them, and ways to damage them."""

import struct
from collections.abc import Callable

import numpy as np
import pytest

from ranvier.data.events import RecordingError, check_events, make_events

Parser = Callable[[bytes], np.ndarray]

AEDAT2_HEADER = (
    b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n"
    b"# Data format is int32 address, int32 timestamp (8 bytes total), repeated for each event\r\n"
    b"# Timestamps tick is 1 us\r\n# created Thu Oct 01 12:00:00 CST 2015\r\n"
)
AEDAT3_HEADER = (
    b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#Start-Time: 2016-10-04 15:38:22 (TZ+0200)\r\n"
    b"#!END-HEADER\r\n"
)
DAT_HEADER = b"% Data file containing CD events.\n% Version 2\n% Date 2020-09-14 14:18:29\n"


def some_events(count: int, height: int, width: int, *, seed: int = 0, step: int = 400) -> np.ndarray:
    """Random events in the order of time, on average `step` / 2 us apart."""
    random = np.random.default_rng(seed)
    return make_events(
        np.cumsum(random.integers(0, step, count)),
        random.integers(0, width, count),
        random.integers(0, height, count),
        random.integers(0, 2, count),
    )


def columns(events: np.ndarray) -> tuple[np.ndarray, ...]:
    """Times, columns, rows and polarities as int64."""
    return tuple(events[name].astype(np.int64) for name in ("t", "x", "y", "p"))


def atis(events: np.ndarray) -> bytes:
    """5 bytes an event; times of 2^23 us and more do not fit."""
    t, x, y, p = columns(events)
    assert t.max(initial=0) < 1 << 23
    rows = np.stack([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255], axis=1)
    return rows.astype(np.uint8).tobytes()


def aedat2(events: np.ndarray, header: bytes = AEDAT2_HEADER) -> bytes:
    """As CIFAR10-DVS: rows and columns from the other end and exchanged, bit 0 is 1 for darker."""
    t, x, y, p = columns(events)
    address = (127 - x) << 8 | (127 - y) << 1 | (1 - p)
    return header + np.stack([address, t], axis=1).astype(">u4").tobytes()


def packet(
    events: np.ndarray,
    *,
    kind: int = 1,
    camera: int = 1,
    size: int = 8,
    offset: int = 4,
    overflow: int = 0,
    number: int | None = None,
    capacity: int | None = None,
    valid: int | None = None,
    marks: np.ndarray | None = None,
) -> bytes:
    """One packet of AEDAT 3.1; what is not given is what a right packet has."""
    t, x, y, p = columns(events)
    number = len(events) if number is None else number
    capacity = len(events) if capacity is None else capacity
    valid = number if valid is None else valid
    address = x << 17 | y << 2 | p << 1 | (np.ones(len(events), np.int64) if marks is None else marks)
    header = struct.pack("<hhiiiiii", kind, camera, size, offset, overflow, capacity, number, valid)
    return header + np.stack([address, t & 0x7FFFFFFF], axis=1).astype("<u4").tobytes()


def aedat3(*packets: bytes, header: bytes = AEDAT3_HEADER) -> bytes:
    return header + b"".join(packets)


def dat(
    events: np.ndarray,
    size: tuple[int, int] | None = (240, 304),
    *,
    header: bytes = DAT_HEADER,
    kind: int = 0x0C,
    bytes_each: int = 8,
) -> bytes:
    """Prophesee's format; `size` (height, width) goes into the header."""
    t, x, y, p = columns(events)
    if size is not None:
        header += f"% Height {size[0]}\n% Width {size[1]}\n".encode()
    words = np.stack([t, p << 28 | y << 14 | x], axis=1).astype("<u4")
    return header + bytes([kind, bytes_each]) + words.tobytes()


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """`data` damaged in one of the ways in which files get damaged, or replaced by noise."""
    length = len(data)
    kind = int(random.integers(0, 9))
    first, second = sorted(int(place) for place in random.integers(0, length + 1, 2))
    damaged = np.frombuffer(data, np.uint8).copy()
    if kind == 0:
        return data[:first]
    if kind == 1:
        return data[:first] + data[second:]
    if kind == 2:
        return data[:second] + data[first:]
    if kind == 3:
        return data[:first] + random.bytes(int(random.integers(1, 20))) + data[first:]
    if kind == 4:
        return random.bytes(int(random.integers(0, length + 1)))
    if kind == 5:
        return data[:first] + random.bytes(length - first)
    places = random.integers(0, length, int(random.integers(1, 4)))
    if kind == 6:
        damaged[places] ^= 1 << random.integers(0, 8, len(places)).astype(np.uint8)
    elif kind == 7:
        damaged[places] = random.choice([0, 255, 127, 128])
    else:
        damaged[places] = random.integers(0, 256, len(places))
    return damaged.tobytes()


def check_mutations(parse: Parser, data: bytes, size: tuple[int, int], *, count: int = 10_000, seed: int = 0) -> None:
    """Every damaged file raises `RecordingError` or gives events that the sensor can have recorded."""
    random = np.random.default_rng(seed)
    read = 0
    for _ in range(count):
        damaged = mutated(data, random)
        try:
            events = parse(damaged)
        except RecordingError:
            continue
        check_events(events, size, "damaged")
        read += 1
    assert count // 100 < read < count - count // 100, "the damage is too hard or too soft to test anything"


def check_cuts(parse: Parser, data: bytes, whole: set[int]) -> None:
    """A file cut off anywhere raises, except after the lengths `whole`."""
    for length in range(len(data)):
        if length in whole:
            assert len(parse(data[:length])) > 0
        else:
            with pytest.raises(RecordingError, match="a-file"):
                parse(data[:length])
