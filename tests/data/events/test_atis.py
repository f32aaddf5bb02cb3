"""N-MNIST and N-Caltech101, with tonic as the oracle: on files written here and on real recordings."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tonic.io import read_mnist_file

from ranvier.data.events import EVENT, RecordingError, load_recordings, make_events, read_ncaltech101, read_nmnist
from ranvier.data.events.atis import NMNIST_SIZE, parse
from ranvier.data.events.download import unpack

from .writing import atis, check_cuts, check_mutations, some_events

REAL_DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "nmnist"
TONIC = np.dtype([("x", int), ("y", int), ("t", int), ("p", int)])


def parse_nmnist(data: bytes) -> np.ndarray:
    return parse(data, NMNIST_SIZE, "a-file")


def assert_as_tonic(events: np.ndarray, data: bytes) -> None:
    expected = read_mnist_file(io.BytesIO(data), TONIC, is_stream=True)
    assert len(events) == len(expected)
    for name in ("t", "x", "y", "p"):
        assert (events[name] == expected[name]).all(), name


def test_bits_of_an_event(tmp_path: Path) -> None:
    """Column 33, row 2, polarity bit set, time 0x7ABCDE; then the same time, darker."""
    path = tmp_path / "00001.bin"
    path.write_bytes(bytes([33, 2, 0x80 | 0x7A, 0xBC, 0xDE, 0, 33, 0x7A, 0xBC, 0xDE]))
    events = read_nmnist(path)
    assert events.dtype == EVENT
    assert events.tolist() == [(0x7ABCDE, 33, 2, 1), (0x7ABCDE, 0, 33, 0)]


def test_a_row_of_240_moves_time_on() -> None:
    """Two marks, of which the second counts twice for what follows: 2 x 8192 us. The marks are no events."""
    data = bytes([1, 1, 0, 0, 5, 0, 240, 0, 0, 0, 2, 2, 0, 0, 6, 0, 240, 0, 0, 0, 3, 3, 0x80, 0, 0])
    assert parse_nmnist(data).tolist() == [(5, 1, 1, 0), (6 + 8192, 2, 2, 0), (2 * 8192, 3, 3, 1)]
    assert_as_tonic(parse_nmnist(data), data)


def test_marks_alone_are_an_empty_recording() -> None:
    with pytest.raises(RecordingError, match="a-file holds no events"):
        parse_nmnist(bytes([0, 240, 0, 0, 0]))


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 33), st.integers(0, 33) | st.just(240), st.integers(0, 1), st.integers(0, 8191)),
        max_size=60,
    )
)
def test_what_is_read_is_what_tonic_reads(rows: list[tuple[int, int, int, int]]) -> None:
    """Times that rise between the marks, as a camera writes them whose clock runs over at 8192 us."""
    data, now = b"", 0
    for x, y, p, step in rows:
        now = 0 if y == 240 else now + step
        if now >= 1 << 23:
            break
        data += bytes([x, y, p << 7 | now >> 16, now >> 8 & 255, now & 255])
    expected = read_mnist_file(io.BytesIO(data), TONIC, is_stream=True)
    if len(expected) == 0 or (np.diff(expected["t"]) < 0).any():
        with pytest.raises(RecordingError):
            parse_nmnist(data)
    else:
        assert_as_tonic(parse_nmnist(data), data)


@pytest.mark.parametrize("count", [1, 65_535, 65_536, 65_537, 200_000])
def test_chunks_join(count: int) -> None:
    events = some_events(count, 34, 34, step=40)
    assert (parse_nmnist(atis(events)) == events).all()


def test_marks_count_across_chunks() -> None:
    """A mark in the first chunk, another one at the end of the second."""
    events = some_events(150_000, 34, 34, step=2)
    data = atis(events)
    data = data[:50] + bytes([0, 240, 0, 0, 0]) + data[50:655_355] + bytes([0, 240, 0, 0, 0]) + data[655_355:]
    assert_as_tonic(parse_nmnist(data), data)
    assert len(parse_nmnist(data)) == 150_000


def test_ncaltech101_has_a_larger_sensor(tmp_path: Path) -> None:
    path = tmp_path / "image_0001.bin"
    events = make_events(np.array([1, 2]), np.array([239, 0]), np.array([0, 179]), np.array([0, 1]))
    path.write_bytes(atis(events))
    assert (read_ncaltech101(path) == events).all()
    with pytest.raises(RecordingError, match=r"image_0001.bin: event 0 is at column 239, row 0, outside .* 34x34"):
        read_nmnist(path)
    path.write_bytes(bytes([0, 180, 0, 0, 1]))
    with pytest.raises(RecordingError, match=r"event 0 is at column 0, row 180, outside a sensor of 180x240"):
        read_ncaltech101(path)


def test_bad_files_are_named_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "00007.bin"
    good = atis(some_events(3, 34, 34))
    path.write_bytes(good + b"\1\2")
    with pytest.raises(RecordingError, match=r"00007.bin: 2 bytes are left over at byte 15, after event 2; .* anew"):
        read_nmnist(path)
    path.write_bytes(bytes([0, 0, 0, 0, 9, 0, 0, 0, 0, 8]))
    with pytest.raises(RecordingError, match=r"00007.bin: event 1 is at 8 us, before event 0 at 9 us"):
        read_nmnist(path)
    path.write_bytes(b"")
    with pytest.raises(RecordingError, match=r"00007.bin holds no events"):
        read_nmnist(path)
    with pytest.raises(FileNotFoundError, match="00008"):
        read_nmnist(tmp_path / "00008.bin")


def test_a_file_cut_off_anywhere_but_between_events_raises() -> None:
    data = atis(some_events(20, 34, 34))
    check_cuts(parse_nmnist, data, whole=set(range(5, len(data), 5)))


def test_ten_thousand_damaged_files() -> None:
    check_mutations(parse_nmnist, atis(some_events(12, 34, 34)), NMNIST_SIZE)


def test_damaged_files_that_are_read_are_read_as_tonic_reads_them() -> None:
    data = bytearray(atis(some_events(12, 34, 34)))
    random = np.random.default_rng(1)
    agreed = 0
    for _ in range(500):
        damaged = bytearray(data)
        damaged[random.integers(0, len(data))] = random.choice([240, 0, 33, 128])
        try:
            events = parse_nmnist(bytes(damaged))
        except RecordingError:
            continue
        assert_as_tonic(events, bytes(damaged))
        agreed += 1
    assert agreed > 100


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"needs real N-MNIST recordings in {REAL_DATA}")
def test_real_recordings_are_read_as_tonic_reads_them(tmp_path: Path) -> None:
    """All 1,100; their labels, numbers of events and last times are also those listed beside them."""
    unpack(REAL_DATA / "nmnist_subset_1100.tar.xz", tmp_path)
    with (REAL_DATA / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1_100
    for row in rows:
        path = tmp_path / row["path"]
        events = read_nmnist(path)
        assert_as_tonic(events, path.read_bytes())
        assert (len(events), events["t"][-1]) == (int(row["n_events"]), int(row["last_timestamp_us"]))
    splits = load_recordings("nmnist", tmp_path)
    labels = {row["path"]: int(row["label"]) for row in rows}
    assert (len(splits.train), len(splits.test)) == (1_000, 100)
    for part in (splits.train, splits.test):
        assert part.labels.tolist() == [labels[trial.path.as_posix()] for trial in part.trials]
