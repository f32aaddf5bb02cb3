"""CIFAR10-DVS, with the header and event reader of tonic as the oracle."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tonic.io import get_aer_events_from_file, read_aedat_header_from_file

from ranvier.data.events import EVENT, RecordingError, make_events, read_cifar10_dvs
from ranvier.data.events.aedat2 import parse

from .writing import AEDAT2_HEADER, aedat2, check_cuts, check_mutations, some_events

SIZE = (128, 128)


def parse_file(data: bytes) -> np.ndarray:
    return parse(data, "a-file")


def test_bits_of_an_event(tmp_path: Path) -> None:
    """Address 0x7F00: bits 8..14 are 127, bits 1..7 are 0, bit 0 is 0: column 0, row 127, brighter."""
    path = tmp_path / "cifar10_cat_0.aedat"
    words = np.array([0x7F00, 0x01020304, 0x00FF, 0x01020305], ">u4")
    path.write_bytes(b"#!AER-DAT2.0\r\n" + words.tobytes())
    events = read_cifar10_dvs(path)
    assert events.dtype == EVENT
    assert events.tolist() == [(0x01020304, 0, 127, 1), (0x01020305, 127, 0, 0)]


@settings(deadline=None)
@given(count=st.integers(1, 200), seed=st.integers(0, 99))
def test_what_is_written_is_read(count: int, seed: int) -> None:
    events = some_events(count, *SIZE, seed=seed)
    assert (parse_file(aedat2(events)) == events).all()


def test_addresses_and_times_are_those_that_tonic_reads(tmp_path: Path) -> None:
    """tonic counts columns and rows from the other end and calls a set bit 0 polarity 1."""
    path = tmp_path / "cifar10_dog_7.aedat"
    path.write_bytes(aedat2(some_events(5_000, *SIZE)))
    events = read_cifar10_dvs(path)
    version, start, _ = read_aedat_header_from_file(str(path))
    assert (version, start) == (2.0, len(AEDAT2_HEADER))
    raw = get_aer_events_from_file(str(path), version, start)
    address = raw["address"].astype(np.int64)
    assert (events["t"] == raw["timeStamp"]).all()
    assert (events["x"] == 127 - (address >> 8 & 0x7F)).all()
    assert (events["y"] == 127 - (address >> 1 & 0x7F)).all()
    assert (events["p"] == 1 - (address & 1)).all()


def test_pulses_are_no_events() -> None:
    """Bit 15: what is left is in order although the pulse is not."""
    data = AEDAT2_HEADER + np.array([0x0000, 5, 0x8000, 3, 0x0001, 6], ">u4").tobytes()
    assert parse_file(data)["t"].tolist() == [5, 6]
    with pytest.raises(RecordingError, match="a-file holds no events"):
        parse_file(AEDAT2_HEADER + np.array([0x8000, 3], ">u4").tobytes())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"a-file: byte 0: starts with b'', expected b'#!AER-DAT2.0'"),
        (b"#!AER-DAT3.1\r\n", r"byte 0: starts with b'#!AER-DAT3.1'.* read_dvs_gesture"),
        (b"#!AER-DAT2.0", r"byte 0: the header line .* is not a line of text"),
        (b"#!AER-DAT2.0\r\n# a\0b\r\n", r"byte 14: the header line b'# a\\x00b\\r' is not a line of text"),
        (b"#!AER-DAT2.0\r\n", "a-file holds no events"),
        (b"#!AER-DAT2.0\r\n" + bytes(9), r"1 byte is left over at byte 22, after event 0; an event has 8 bytes"),
        (b"#!AER-DAT2.0\r\n" + bytes(8) + b"\0\1" + bytes(6), r"event 1 \(byte 22\) has address 0x00010000, expected"),
        (b"#!AER-DAT2.0\r\n" + bytes(7) + b"\2" + bytes(8), "event 1 is at 0 us, before event 0 at 2 us"),
    ],
)
def test_bad_files_are_named_with_the_place(data: bytes, message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        parse_file(data)


def test_a_header_may_hold_text_that_is_not_ascii() -> None:
    events = make_events(np.array([4]), np.array([1]), np.array([2]), np.array([1]))
    header = b"#!AER-DAT2.0\r\n# created " + "星期四".encode() + b"\r\n"
    assert (parse_file(aedat2(events, header)) == events).all()


def test_a_file_cut_off_anywhere_but_between_events_raises() -> None:
    data = aedat2(some_events(20, *SIZE))
    check_cuts(parse_file, data, whole=set(range(len(AEDAT2_HEADER) + 8, len(data), 8)))


def test_ten_thousand_damaged_files() -> None:
    check_mutations(parse_file, aedat2(some_events(12, *SIZE), b"#!AER-DAT2.0\r\n# created now\r\n"), SIZE)
