"""Prophesee's .dat files, with expelliarmus, which tonic reads them with, as the oracle."""

from pathlib import Path

import numpy as np
import pytest
from expelliarmus import Wizard
from hypothesis import given, settings
from hypothesis import strategies as st

from ranvier.data.events import EVENT, RecordingError, make_events, read_prophesee
from ranvier.data.events.prophesee import parse

from .writing import DAT_HEADER, check_cuts, check_mutations, dat, some_events

SIZE = (240, 304)


def parse_file(data: bytes, sensor_size: tuple[int, int] | None = None) -> np.ndarray:
    return parse(data, "a-file", sensor_size)


def assert_same(events: np.ndarray, expected: np.ndarray) -> None:
    assert len(events) == len(expected)
    for name in ("t", "x", "y", "p"):
        assert (events[name] == expected[name]).all(), name


def test_bits_of_an_event(tmp_path: Path) -> None:
    """x in bits 0..13, y in bits 14..27, polarity from bit 28."""
    path = tmp_path / "a.dat"
    words = np.array([77, 1 << 28 | 239 << 14 | 303, 0xFFFFFFFF, 0], "<u4").tobytes()
    path.write_bytes(DAT_HEADER + b"% Width 304\n% Height 240\n\x0c\x08" + words)
    events = read_prophesee(path)
    assert events.dtype == EVENT
    assert events.tolist() == [(77, 303, 239, 1), (2**32 - 1, 0, 0, 0)]


@settings(deadline=None)
@given(count=st.integers(1, 200), seed=st.integers(0, 99))
def test_what_is_written_is_read(count: int, seed: int) -> None:
    events = some_events(count, 720, 1280, seed=seed)
    assert (parse_file(dat(events, (720, 1280), kind=0)) == events).all()


def test_expelliarmus_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.dat"
    path.write_bytes(dat(some_events(5_000, *SIZE)))
    assert_same(read_prophesee(path), Wizard(encoding="dat").read(str(path)))


def test_what_expelliarmus_writes_is_read(tmp_path: Path) -> None:
    """Its header has neither width nor height."""
    path = tmp_path / "b.dat"
    source = tmp_path / "a.dat"
    source.write_bytes(dat(some_events(500, *SIZE)))
    wizard = Wizard(encoding="dat")
    wizard.save(fpath=str(path), arr=wizard.read(str(source)))
    assert_same(read_prophesee(path, SIZE), read_prophesee(source))
    with pytest.raises(RecordingError, match=r"b.dat: the header does not say .* sensor_size=\(height, width\)"):
        read_prophesee(path)


def test_the_sensor_size_must_agree() -> None:
    data = dat(some_events(5, *SIZE))
    assert len(parse_file(data, SIZE)) == 5
    with pytest.raises(RecordingError, match=r"a-file: the header says a sensor of 240x304 .* expected 304x240"):
        parse_file(data, (304, 240))
    with pytest.raises(RecordingError, match="outside a sensor of 10x10"):
        parse_file(dat(some_events(5, *SIZE), None), (10, 10))


ONE = make_events(np.array([5]), np.array([3]), np.array([2]), np.array([1]))
SIZES = b"% Height 240\n% Width 304\n"
START = len(DAT_HEADER + SIZES)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a-file: byte 0: starts with b'', expected a line of text that starts with %"),
        (b"\x0c\x08" + bytes(8), "byte 0: starts with"),
        (b"% Version 2", "byte 0: the header line b'% Version 2' is not a line of text"),
        (b"% Version 2\n%\0\n", r"byte 12: the header line b'%\\x00' is not a line"),
        (b"% Version 3\n", r"the header \(bytes 0 to 11\) says version 3, expected 2"),
        (SIZES, "says version None, expected 2"),
        (DAT_HEADER + SIZES, f"a-file ends at byte {START}, before the type of its events"),
        (dat(ONE, kind=0x0E), f"byte {START}: events have type 0x0e and 8 bytes"),
        (dat(ONE, bytes_each=12), "events have type 0x0c and 12 bytes"),
        (dat(ONE[:0]), "a-file holds no events"),
        (dat(ONE) + bytes(3), f"3 bytes are left over at byte {START + 10}, after event 0; an event has 8"),
        (dat(ONE)[:-1] + b"\x20", rf"event 0 \(byte {START + 2}\) has polarity 2, expected 0 or 1"),
        (dat(ONE, (240, 3)), "event 0 is at column 3, row 2, outside a sensor of 240x3"),
        (dat(ONE) + dat(ONE)[-8:].replace(b"\5", b"\4"), "event 1 is at 4 us, before event 0 at 5 us"),
    ],
)
def test_bad_files_are_named_with_the_place(data: bytes, message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        parse_file(data)


@pytest.mark.parametrize("line", [b"% Version 2.0\n", b"%Version 2\r\n", b"% version 2 \n"])
def test_a_header_line_may_be_written_in_several_ways(line: bytes) -> None:
    assert len(parse_file(dat(ONE, header=line))) == 1


def test_a_file_cut_off_anywhere_but_between_events_raises() -> None:
    data = dat(some_events(20, *SIZE))
    check_cuts(parse_file, data, whole=set(range(START + 10, len(data), 8)))


def test_ten_thousand_damaged_files() -> None:
    check_mutations(parse_file, dat(some_events(12, *SIZE), header=b"% Version 2\n"), SIZE)


def test_ten_thousand_damaged_files_of_a_known_sensor() -> None:
    check_mutations(lambda data: parse_file(data, SIZE), dat(some_events(12, *SIZE), None), SIZE)
