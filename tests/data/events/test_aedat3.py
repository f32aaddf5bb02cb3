"""DVS128-Gesture: recordings, with the header and event reader of tonic as the oracle, and label files."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tonic.io import get_aer_events_from_file, read_aedat_header_from_file

from ranvier.data.events import EVENT, GestureTrial, RecordingError, make_events, read_dvs_gesture, read_gesture_labels
from ranvier.data.events.aedat3 import GESTURES, parse, parse_gesture_labels

from .writing import AEDAT3_HEADER, aedat3, check_cuts, check_mutations, packet, some_events

SIZE = (128, 128)
NONE = make_events(*(np.empty(0, int) for _ in range(4)))
LABELS = b"class,startTime_usec,endTime_usec\n1,80048239,85092709\n2,89431170,95231007\n11,180675853,187389051\n"


def parse_file(data: bytes) -> np.ndarray:
    return parse(data, "a-file")


def parse_labels(data: bytes) -> tuple[GestureTrial, ...]:
    return parse_gesture_labels(data, "a-file")


def events_at(*times: int) -> np.ndarray:
    return make_events(np.array(times), *(np.zeros((3, len(times)), int)))


def test_bits_of_an_event(tmp_path: Path) -> None:
    """x 127 in bits 17.., y 1 in bits 2.., polarity in bit 1; then one whose filter bit 0 is not set."""
    path = tmp_path / "user01_led.aedat"
    words = np.array([127 << 17 | 1 << 2 | 1 << 1 | 1, 77, 3 << 17 | 126 << 2, 78], "<u4").tobytes()
    path.write_bytes(aedat3(packet(NONE, number=2, capacity=2) + words))
    events = read_dvs_gesture(path)
    assert events.dtype == EVENT
    assert events.tolist() == [(77, 127, 1, 1), (78, 3, 126, 0)]


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_packets_join(counts: list[int], seed: int) -> None:
    events = some_events(sum(counts) + 1, *SIZE, seed=seed)
    borders = np.cumsum([0, *counts, 1])
    data = aedat3(*(packet(events[start:stop]) for start, stop in pairwise(borders)))
    assert (parse_file(data) == events).all()


def test_addresses_and_times_are_those_that_tonic_reads(tmp_path: Path) -> None:
    events = some_events(5_000, *SIZE)
    path = tmp_path / "user01_lab.aedat"
    path.write_bytes(aedat3(*(packet(part) for part in np.array_split(events, 7))))
    read = read_dvs_gesture(path)
    version, start, _ = read_aedat_header_from_file(str(path))
    assert (version, start) == (3.1, len(AEDAT3_HEADER))
    raw = get_aer_events_from_file(str(path), version, start)
    address = raw["address"].astype(np.int64)
    assert (read["t"] == raw["timeStamp"]).all()
    assert (read["x"] == address >> 17).all()
    assert (read["y"] == (address >> 2 & 0x1FFF)).all()
    assert (read["p"] == (address >> 1 & 1)).all()


def test_time_runs_over_after_31_bits() -> None:
    later = events_at(3 << 31 | 5)
    data = aedat3(packet(events_at(9)), packet(later, overflow=3))
    assert parse_file(data)["t"].tolist() == [9, (3 << 31) + 5]


def test_other_packets_are_skipped() -> None:
    """Special events of 8 bytes, frames of 100; a packet with more places than events."""
    special = packet(events_at(1), kind=0)
    frames = packet(NONE, kind=2, size=100, number=1, capacity=2) + bytes(200)
    roomy = packet(events_at(3, 4), number=1, valid=1)
    assert parse_file(aedat3(special, frames, roomy, packet(events_at(5))))["t"].tolist() == [3, 5]
    with pytest.raises(RecordingError, match="a-file holds no events"):
        parse_file(aedat3(special))


def test_events_marked_invalid_are_left_out() -> None:
    marks = np.array([1, 0, 1])
    assert parse_file(aedat3(packet(events_at(1, 2, 3), marks=marks, valid=2)))["t"].tolist() == [1, 3]
    assert parse_file(aedat3(packet(events_at(1, 2, 3), marks=marks)))["t"].tolist() == [1, 2, 3]
    with pytest.raises(RecordingError, match="announces 1 valid events but marks 2"):
        parse_file(aedat3(packet(events_at(1, 2, 3), marks=marks, valid=1)))


def test_a_trial_is_cut_out(tmp_path: Path) -> None:
    """From its start to before its stop, as SpikingJelly cuts; also where it spans packets."""
    path = tmp_path / "user02_led.aedat"
    path.write_bytes(aedat3(packet(events_at(10, 20, 30)), packet(events_at(30, 40, 50))))
    assert read_dvs_gesture(path, 20, 50)["t"].tolist() == [20, 30, 30, 40]
    assert read_dvs_gesture(path, start=30)["t"].tolist() == [30, 30, 40, 50]
    assert read_dvs_gesture(path, stop=30)["t"].tolist() == [10, 20]
    with pytest.raises(RecordingError, match=r"user02_led.aedat from 31 us to before 40 us holds no events"):
        read_dvs_gesture(path, 31, 40)


def test_only_what_is_returned_must_be_in_order() -> None:
    """A camera whose clock was reset before the first trial; a trial that has both clocks raises."""
    data = aedat3(packet(events_at(900, 10, 20, 30)))
    assert parse(data, "a-file", 10, 100)["t"].tolist() == [10, 20, 30]
    with pytest.raises(RecordingError, match="a-file: event 1 is at 10 us, before event 0 at 900 us"):
        parse(data, "a-file")


def packet_of(**fields: int) -> bytes:
    return aedat3(packet(events_at(1, 2), **fields))


FIRST = len(AEDAT3_HEADER)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a-file: byte 0: starts with b'', expected b'#!AER-DAT3.1'"),
        (b"#!AER-DAT2.0\r\n", "byte 0: starts with b'#!AER-DAT2.0'.* read_cifar10_dvs"),
        (b"#!AER-DAT3.1\r\n#Source", "byte 14: the header goes on with b'#Source'"),
        (b"#!AER-DAT3.1\r\nSource\n", "byte 14: the header goes on with b'Source"),
        (AEDAT3_HEADER, "a-file holds no events"),
        (AEDAT3_HEADER + bytes(5), f"packet at byte {FIRST} has 5 bytes of its header of 28"),
        (packet_of(capacity=3), f"packet at byte {FIRST} announces 24 bytes of events but 16 follow"),
        (packet_of(kind=-1), "has event type -1"),
        (packet_of(kind=14), "expected a type in 0..13"),
        (packet_of(size=0), "0 bytes an event"),
        (packet_of(size=4, capacity=4), "has polarity events of 4 bytes"),
        (packet_of(offset=0), "with their time at byte 0, expected 8 and 4"),
        (packet_of(overflow=-1), "time overflow -1"),
        (packet_of(number=3, valid=2), "2 valid of 3 events in 2 places"),
        (packet_of(valid=3), "3 valid of 2 events"),
        (packet_of(capacity=-1, number=-2, valid=-3), "-3 valid of -2 events in -1 places"),
        (aedat3(packet(events_at(1)), packet(events_at(2), camera=2)), r"has events of cameras \[1, 2\]"),
        (
            aedat3(packet(make_events(np.array([1]), np.array([128]), np.array([0]), np.array([0])))),
            "event 0 is at column 128, row 0, outside a sensor of 128x128",
        ),
        (aedat3(packet(events_at(3, 2))), "event 1 is at 2 us, before event 0 at 3 us"),
        (packet_of(valid=2)[:-1] + b"\x80", "event 1 of the packet has the time word 0x80000002"),
    ],
)
def test_bad_files_are_named_with_the_place(data: bytes, message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        parse_file(data)


def test_a_file_cut_off_anywhere_but_between_packets_raises() -> None:
    parts = [packet(part) for part in np.array_split(some_events(12, *SIZE), 3)]
    check_cuts(parse_file, aedat3(*parts), whole={FIRST + len(parts[0]), FIRST + len(parts[0]) + len(parts[1])})


def test_ten_thousand_damaged_files() -> None:
    parts = [packet(part) for part in np.array_split(some_events(9, *SIZE), 3)]
    check_mutations(parse_file, aedat3(*parts, header=b"#!AER-DAT3.1\r\n#!END-HEADER\r\n"), SIZE)


def test_labels_are_counted_from_zero(tmp_path: Path) -> None:
    path = tmp_path / "user01_fluorescent_labels.csv"
    path.write_bytes(LABELS.replace(b"\n", b"\r\n"))
    trials = read_gesture_labels(path)
    assert trials[0] == GestureTrial(label=0, start=80048239, stop=85092709)
    assert [GESTURES[trial.label] for trial in trials] == ["hand clapping", "right hand wave", "other gestures"]
    assert len(GESTURES) == 11


def test_trials_may_overlap_as_in_user22_led() -> None:
    overlapping = b"class,startTime_usec,endTime_usec\n9,100,300\n10,200,400\n"
    assert [trial.start for trial in parse_labels(overlapping)] == [100, 200]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a-file: line 1 is ''"),
        (b"1,2,3\n", "line 1 is '1,2,3', expected 'class,startTime_usec,endTime_usec'"),
        (LABELS[:34], "a-file holds no trials"),
        (LABELS + b"12,1,2\n", r"line 5 is '12,1,2', expected a class in 1..11"),
        (LABELS + b"0,1,2\n", "line 5"),
        (LABELS + b"3,5,5\n", "line 5 is '3,5,5'"),
        (LABELS + b"3,-5,5\n", "line 5"),
        (LABELS + b"3,1\n", "line 5"),
        (LABELS + b"3,1,2.5\n", "line 5"),
        (LABELS + b"3,1," + b"9" * 30 + b"\n", "line 5"),
        (LABELS + b"\xff\n", f"byte {len(LABELS)} is 0xff, not text"),
    ],
)
def test_bad_label_files_are_named_with_the_line(data: bytes, message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        parse_labels(data)


def test_ten_thousand_damaged_label_files() -> None:
    """Each raises or gives trials that can be cut out."""

    def as_events(data: bytes) -> np.ndarray:
        trials = parse_labels(data)
        assert all(0 <= trial.label < 11 and 0 <= trial.start < trial.stop for trial in trials)
        return events_at(*range(len(trials)))

    check_mutations(as_events, LABELS, SIZE)
