"""Sets of recordings in files: reading, parts of files, what changes their identity, and unreadable ones."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ranvier.data.events import (
    FileRecordings,
    RecordingError,
    Recordings,
    Trial,
    make_events,
    read_dvs_gesture,
    read_nmnist,
    read_prophesee,
)

from .writing import aedat3, atis, dat, packet, some_events

CLASSES = ("zero", "one", "two")


def file_set(folder: Path, count: int = 6) -> FileRecordings:
    """`count` recordings of 10, 11, .. events."""
    for index in range(count):
        (folder / str(index % 3)).mkdir(exist_ok=True)
        (folder / str(index % 3) / f"{index}.bin").write_bytes(atis(some_events(10 + index, 34, 34, seed=index)))
    trials = tuple(Trial(Path(str(index % 3), f"{index}.bin")) for index in range(count))
    labels = torch.arange(count) % 3
    return FileRecordings("six", folder, trials, labels, CLASSES, (34, 34), read_nmnist)


def test_recordings_are_read_in_the_order_asked_for(tmp_path: Path) -> None:
    recordings: Recordings = file_set(tmp_path)
    assert len(recordings) == 6
    assert recordings.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert [len(events) for events in recordings.read([5, 0, 0])] == [15, 10, 10]
    assert (recordings.read([2])[0] == some_events(12, 34, 34, seed=2)).all()
    assert recordings.read([]) == []


def test_parts_of_files(tmp_path: Path) -> None:
    events = some_events(1_000, 128, 128)
    (tmp_path / "a.aedat").write_bytes(aedat3(packet(events)))
    middle = int(events["t"][500])
    trials = (Trial(Path("a.aedat"), 0, middle), Trial(Path("a.aedat"), middle, middle * 9), Trial(Path("a.aedat")))
    recordings = FileRecordings("a", tmp_path, trials, torch.tensor([0, 1, 2]), CLASSES, (128, 128), read_dvs_gesture)
    first, second, whole = recordings.read([0, 1, 2])
    assert (np.concatenate([first, second]) == whole).all()
    assert first["t"].max() < middle <= second["t"].min()


def test_what_a_reader_returns_is_checked_again(tmp_path: Path) -> None:
    """A reader that takes the sensor from the file must not smuggle in another one."""
    event = make_events(np.array([1]), np.array([50]), np.array([0]), np.array([0]))
    (tmp_path / "a.dat").write_bytes(dat(event, (64, 64)))
    trial = (Trial(Path("a.dat")),)
    recordings = FileRecordings("a", tmp_path, trial, torch.tensor([0]), CLASSES, (34, 34), read_prophesee)
    with pytest.raises(RecordingError, match=r"a.dat: event 0 is at column 50, row 0, outside a sensor of 34x34"):
        recordings.read([0])


def test_a_missing_file_is_an_unreadable_one(tmp_path: Path) -> None:
    recordings = file_set(tmp_path)
    (tmp_path / "1" / "4.bin").unlink()
    with pytest.raises(RecordingError, match=r"4.bin cannot be read \(No such file or directory\)"):
        recordings.read([3, 4])
    with pytest.raises(FileNotFoundError):
        recordings.identity()


def test_unreadable_recordings_are_left_out_and_counted(tmp_path: Path) -> None:
    recordings = file_set(tmp_path)
    (tmp_path / "1" / "4.bin").write_bytes(b"123")
    (tmp_path / "2" / "2.bin").write_bytes(b"")
    kept = recordings.without_unreadable(progress=False)
    assert kept.labels.tolist() == [0, 1, 0, 2]
    assert [len(events) for events in kept.read(range(4))] == [10, 11, 13, 15]
    assert len(kept.skipped) == 2
    assert "2.bin holds no events" in kept.skipped[0]
    assert "4.bin: 3 bytes are left over" in kept.skipped[1]
    (tmp_path / "0" / "0.bin").unlink()
    assert len(kept.without_unreadable(progress=False).skipped) == 3
    assert recordings.skipped == ()


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    recordings = file_set(tmp_path, count=2)
    for trial in recordings.trials:
        (tmp_path / trial.path).write_bytes(b"1")
    with pytest.raises(RecordingError, match=r"six: none of the 2 recordings can be read; the first: .*0.bin"):
        recordings.without_unreadable(progress=False)


def test_take(tmp_path: Path) -> None:
    taken = file_set(tmp_path).take([4, 1])
    assert taken.labels.tolist() == [1, 1]
    assert [len(events) for events in taken.read([0, 1])] == [14, 11]


def test_identity_depends_on_what_is_read_and_not_on_where_it_lies(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    recordings = file_set(here)
    identity = recordings.identity()
    assert json.loads(json.dumps(identity)) == identity
    moved = here.rename(tmp_path / "there")
    assert replace(recordings, folder=moved).identity() == identity

    recordings = replace(recordings, folder=moved)
    one = moved / recordings.trials[0].path
    changed = [
        replace(recordings, labels=recordings.labels.flip(0)),
        replace(recordings, classes=("a", "b", "c")),
        replace(recordings, sensor_size=(128, 128)),
        replace(recordings, reader=read_prophesee),
        replace(recordings, trials=(Trial(recordings.trials[0].path, 0, 5), *recordings.trials[1:])),
        recordings.take([1, 0, 2, 3, 4, 5]),
        recordings.take([0, 1]),
    ]
    digests = {json.dumps(other.identity()) for other in changed}
    assert len(digests) == len(changed)
    assert json.dumps(identity) not in digests
    os.utime(one, ns=(0, 12345))
    touched = recordings.identity()
    assert touched != identity
    one.write_bytes(one.read_bytes() + bytes(5))
    os.utime(one, ns=(0, 12345))
    assert recordings.identity() != touched


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(6)}, TypeError, "six: labels have dtype torch.float32, expected torch.int64"),
        ({"labels": torch.zeros(5).long()}, ValueError, r"labels have shape \[5\] but there are 6 recordings"),
        ({"labels": torch.full((6,), 3)}, ValueError, r"label 3 at index 0 is outside 0..2 \(3 classes\)"),
        ({"labels": torch.full((6,), -1)}, ValueError, "label -1 at index 0"),
        ({"trials": (), "labels": torch.zeros(0).long()}, ValueError, "six: the set is empty"),
    ],
)
def test_wrong_sets_are_refused(tmp_path: Path, change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(file_set(tmp_path), **change)


def test_absolute_paths_are_refused(tmp_path: Path) -> None:
    """They would make the identity depend on the folder."""
    recordings = file_set(tmp_path, count=1)
    with pytest.raises(ValueError, match=r"path .*0.bin is absolute, expected one relative to"):
        replace(recordings, trials=(Trial(tmp_path / "0" / "0.bin"),))
