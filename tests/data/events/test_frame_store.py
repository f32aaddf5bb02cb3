import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ranvier.data.events import (
    FrameSet,
    FrameSettings,
    RecordingError,
    RecordingSplits,
    build_frames,
    build_splits,
    make_events,
    to_frames,
)
from ranvier.data.events.frame_store import _CHUNK, _FrameFile

SETTINGS = FrameSettings(steps=3)
SENSOR = (4, 6)


@dataclass
class Noise:
    """Recordings of noise, some of which cannot be read."""

    count: int = 80
    name: str = "lab/noise"
    unreadable: tuple[int, ...] = ()
    version: int = 0
    events: int = 20
    hot: int | None = None
    """A recording that has 300 more events in one pixel."""
    sensor_size: tuple[int, int] = SENSOR
    classes: tuple[str, ...] = ("a", "b")
    reads: list[int] = field(default_factory=list)
    before: Callable[[], Any] = lambda: None

    @property
    def labels(self) -> Tensor:
        return torch.arange(self.count) % 2

    def __len__(self) -> int:
        return self.count

    def identity(self) -> Any:
        return ["noise", self.count, self.version]

    def read(self, indices: Sequence[int]) -> list[np.ndarray]:
        self.before()
        self.reads.extend(indices)
        for index in indices:
            if index in self.unreadable:
                raise RecordingError(f"{index}.bin is cut short")
        return [self.recording(index) for index in indices]

    def recording(self, index: int) -> np.ndarray:
        random = np.random.default_rng([index, self.version])
        height, width = self.sensor_size
        x, y, p = (random.integers(0, high, self.events) for high in (width, height, 2))
        t = np.sort(random.integers(0, 1000, self.events))
        if index == self.hot:
            t, x, y, p = (np.append(column, [column[-1]] * 300) for column in (t, x, y, p))
        return make_events(t, x, y, p)

    def expected(self, settings: FrameSettings, kept: Sequence[int] | None = None) -> Tensor:
        kept = range(self.count) if kept is None else kept
        frames = [to_frames(self.recording(index), settings, self.sensor_size) for index in kept]
        return torch.from_numpy(np.stack(frames))


def _build(recordings: Noise, folder: Path, settings: FrameSettings = SETTINGS, **arguments: Any) -> FrameSet:
    return build_frames(recordings, settings, cache_dir=folder, **arguments)


def _all(frames: FrameSet) -> Tensor:
    return frames.read(torch.arange(len(frames)))


def _store(folder: Path) -> Path:
    (store,) = (folder / "frames").iterdir()
    return store


# -------------------------------------------------------------------------------------------------- what is built


@pytest.mark.parametrize("num_threads", [1, 3, None])
@pytest.mark.parametrize("settings", [SETTINGS, FrameSettings(2, "count"), FrameSettings(2, size=3)])
def test_frames_are_those_of_each_recording(tmp_path: Path, settings: FrameSettings, num_threads: int | None) -> None:
    noise = Noise()
    frames = _build(noise, tmp_path, settings, num_threads=num_threads)
    assert torch.equal(_all(frames).float(), noise.expected(settings).float())
    assert torch.equal(frames.labels, noise.labels)
    assert (frames.classes, frames.name, len(frames)) == (("a", "b"), "lab/noise", 80)
    assert frames.frames.dtype == (torch.uint8 if settings.size is None else torch.float16)
    assert sorted(noise.reads) == list(range(80))


def test_frames_are_mapped_with_the_channels_last(tmp_path: Path) -> None:
    frames = _build(Noise(), tmp_path).frames
    assert frames.permute(0, 1, 3, 4, 2).is_contiguous()
    stored = np.load(_store(tmp_path) / "frames.npy", mmap_mode="r")
    assert np.array_equal(stored.transpose(0, 1, 4, 2, 3), frames)


def test_a_second_call_reads_no_recording(tmp_path: Path) -> None:
    first = _build(Noise(), tmp_path)
    again = Noise()
    assert torch.equal(_all(_build(again, tmp_path)), _all(first))
    assert again.reads == []


def test_writing_to_the_frames_leaves_the_store_alone(tmp_path: Path) -> None:
    frames = _build(Noise(), tmp_path)
    frames.frames.zero_()
    assert _all(_build(Noise(), tmp_path)).sum() == 80 * 20


@pytest.mark.parametrize(
    ("recordings", "settings"),
    [
        (Noise(version=1), SETTINGS),
        (Noise(classes=("a", "c")), SETTINGS),
        (Noise(sensor_size=(6, 6)), SETTINGS),
        (Noise(), FrameSettings(steps=4)),
        (Noise(), FrameSettings(steps=3, bins="count")),
        (Noise(), FrameSettings(steps=3, size=4)),
    ],
)
def test_what_differs_has_a_store_of_its_own(tmp_path: Path, recordings: Noise, settings: FrameSettings) -> None:
    _build(Noise(), tmp_path)
    frames = _build(recordings, tmp_path, settings)
    assert recordings.reads
    assert torch.equal(_all(frames).float(), recordings.expected(settings).float())
    assert frames.classes == recordings.classes
    assert len(list((tmp_path / "frames").iterdir())) == 2


def test_other_labels_have_a_store_of_their_own(tmp_path: Path) -> None:
    class Relabelled(Noise):
        @property
        def labels(self) -> Tensor:
            return super().labels.flip(0)

    _build(Noise(), tmp_path)
    assert torch.equal(_build(Relabelled(), tmp_path).labels, Noise().labels.flip(0))
    assert len(list((tmp_path / "frames").iterdir())) == 2


@pytest.mark.parametrize("hot", [0, 41, 79])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_count_above_255_widens_all(tmp_path: Path, hot: int, num_threads: int) -> None:
    noise = Noise(hot=hot)
    frames = _build(noise, tmp_path, num_threads=num_threads)
    assert frames.frames.dtype == torch.int16
    assert frames.frames.max() > 255
    assert torch.equal(_all(frames), noise.expected(SETTINGS))
    assert torch.equal(_all(_build(Noise(), tmp_path)), _all(frames))
    assert sorted(path.name for path in _store(tmp_path).iterdir()) == ["card.json", "frames.npy"]


def test_the_card_says_what_there_is(tmp_path: Path) -> None:
    _build(Noise(count=3, events=2), tmp_path, FrameSettings(steps=2, size=5))
    card = json.loads((_store(tmp_path) / "card.json").read_text())
    assert card == {
        "name": "lab/noise",
        "classes": ["a", "b"],
        "labels": [0, 1, 0],
        "sensor_size": [4, 6],
        "settings": {"steps": 2, "bins": "time", "size": 5},
        "shape": [3, 2, 5, 5, 2],
        "bytes": (_store(tmp_path) / "frames.npy").stat().st_size,
        "skipped": {},
    }


def test_both_parts(tmp_path: Path) -> None:
    splits = RecordingSplits(Noise(name="noise/train"), Noise(40, name="noise/test"))
    frames = build_splits(splits, SETTINGS, cache_dir=tmp_path, progress=False)
    assert (len(frames.train), frames.train.name) == (80, "noise/train")
    assert (len(frames.test), frames.test.name) == (40, "noise/test")


def test_the_folder_is_that_of_all_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANVIER_CACHE", str(tmp_path))
    build_frames(Noise(), SETTINGS)
    assert (_store(tmp_path) / "frames.npy").is_file()


# --------------------------------------------------------------------------------------------------- unreadable


@pytest.mark.parametrize("num_threads", [1, 2])
def test_an_unreadable_recording_stops_the_build(tmp_path: Path, num_threads: int) -> None:
    with pytest.raises(RecordingError, match="^41.bin is cut short$"):
        _build(Noise(unreadable=(41,)), tmp_path, num_threads=num_threads)
    assert list((tmp_path / "frames").iterdir()) == []


@pytest.mark.parametrize("settings", [SETTINGS, FrameSettings(2, size=3)])
@pytest.mark.parametrize("unreadable", [(41,), (0, 1, 79), tuple(range(_CHUNK))])
def test_unreadable_recordings_are_left_out_and_counted(
    tmp_path: Path, unreadable: tuple[int, ...], settings: FrameSettings
) -> None:
    noise = Noise(unreadable=unreadable)
    first = unreadable[0]
    message = rf"lab/noise: {len(unreadable)} of 80 recordings cannot be read .*recording {first}: {first}.bin"
    with pytest.warns(UserWarning, match=message):
        frames = _build(noise, tmp_path, settings, skip_unreadable=True)
    kept = [index for index in range(80) if index not in unreadable]
    assert len(frames) == len(kept)
    assert torch.equal(_all(frames).float(), noise.expected(settings, kept).float())
    assert torch.equal(frames.labels, noise.labels[kept])
    card = json.loads((_store(tmp_path) / "card.json").read_text())
    assert card["skipped"] == {str(index): f"{index}.bin is cut short" for index in unreadable}


def test_the_warning_comes_with_every_use(tmp_path: Path) -> None:
    for reads in (True, False):
        noise = Noise(unreadable=(3,))
        with pytest.warns(UserWarning, match="1 of 80 recordings"):
            _build(noise, tmp_path, skip_unreadable=True)
        assert bool(noise.reads) == reads


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="7 of 80 .*recording 4: 4.bin is cut short; and 2 more$"):
        _build(Noise(unreadable=tuple(range(7))), tmp_path, skip_unreadable=True)


def test_a_store_with_gaps_does_not_serve_who_wants_all(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="1 of 80"):
        _build(Noise(unreadable=(3,)), tmp_path, skip_unreadable=True)
    with pytest.raises(RecordingError, match="3.bin is cut short"):
        _build(Noise(unreadable=(3,)), tmp_path)
    repaired = _build(Noise(), tmp_path)
    assert len(repaired) == 80
    assert torch.equal(_all(repaired), Noise().expected(SETTINGS))


def test_a_whole_store_serves_who_would_skip(tmp_path: Path) -> None:
    _build(Noise(), tmp_path)
    again = Noise()
    assert len(_build(again, tmp_path, skip_unreadable=True)) == 80
    assert again.reads == []


class _Outside(Noise):
    """Its recording 5 has an event outside the sensor, which `read` does not notice."""

    def recording(self, index: int) -> np.ndarray:
        events = super().recording(index)
        if index == 5:
            events["x"][2] = 6
        return events


def test_events_that_cannot_be_count_as_unreadable(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="lab/noise: recording 5: event 2 is at column 6"):
        _build(_Outside(), tmp_path)
    with pytest.warns(UserWarning, match="1 of 80 .*recording 5: event 2 is at column 6"):
        assert len(_build(_Outside(), tmp_path, skip_unreadable=True)) == 79


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="none of the 4 recordings can be read. The first one: 0.bin is cut"):
        _build(Noise(4, unreadable=(0, 1, 2, 3)), tmp_path, skip_unreadable=True)


# ------------------------------------------------------------------------------------------------- damaged stores


def _shorten(store: Path) -> None:
    content = (store / "frames.npy").read_bytes()
    (store / "frames.npy").write_bytes(content[:-1])


def _lengthen(store: Path) -> None:
    with (store / "frames.npy").open("ab") as file:
        file.write(b"x")


def _other_shape(store: Path) -> None:
    np.save(store / "frames.npy", np.zeros((80, 3, 6, 4, 2), np.uint8))


def _other_dtype(store: Path) -> None:
    frames = np.load(store / "frames.npy")
    np.save(store / "frames.npy", frames.view(np.int8))  # as many bytes


def _card(store: Path, content: str) -> None:
    (store / "card.json").write_text(content)


@pytest.mark.parametrize(
    "damage",
    [
        _shorten,
        _lengthen,
        _other_shape,
        _other_dtype,
        lambda store: (store / "frames.npy").unlink(),
        lambda store: (store / "frames.npy").write_bytes(b""),
        lambda store: (store / "card.json").unlink(),
        lambda store: _card(store, ""),
        lambda store: _card(store, "{}"),
        lambda store: _card(store, "[]"),
        lambda store: _card(store, '{"bytes": 1, "skipped": []}'),
        lambda store: _card(store, (store / "card.json").read_text()[:-20]),
    ],
)
def test_a_damaged_store_is_built_anew(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    _build(Noise(), tmp_path)
    damage(_store(tmp_path))
    again = Noise()
    assert torch.equal(_all(_build(again, tmp_path)), again.expected(SETTINGS))
    assert sorted(again.reads) == list(range(80))
    third = Noise()
    _build(third, tmp_path)
    assert third.reads == []
    assert len(list((tmp_path / "frames").iterdir())) == 1


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: Any) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    monkeypatch.setattr(_FrameFile, "_begin", lambda self, path: Full())
    with pytest.raises(OSError, match=r"No space left on device.* Pass cache_dir= a folder with 0.0 GB free"):
        _build(Noise(), tmp_path)
    assert list((tmp_path / "frames").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "frames").write_text("a file")
    with pytest.raises(OSError, match="cannot keep frames in .*Pass cache_dir= a writable folder"):
        _build(Noise(), tmp_path)


# ----------------------------------------------------------------------------------------------- several builders


@pytest.mark.parametrize("damaged", [False, True])
def test_builders_at_the_same_time_leave_one_good_store(tmp_path: Path, damaged: bool) -> None:
    """All are in the middle of the build before one of them ends."""
    if damaged:
        _build(Noise(), tmp_path)
        _shorten(_store(tmp_path))
    barrier = threading.Barrier(4)
    results: list[FrameSet] = []

    def work() -> None:
        waited = iter([barrier.wait])
        noise = Noise(before=lambda: next(waited, lambda: None)())
        results.append(_build(noise, tmp_path, num_threads=1))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for frames in results:
        assert torch.equal(_all(frames), Noise().expected(SETTINGS))
    assert _store(tmp_path).name.startswith("lab--noise-")


@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EEXIST])
def test_what_was_in_the_way_may_be_gone_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Of two builders that find a damaged store, one renames it away while the other looks."""
    rename, refused = Path.rename, []

    def busy(self: Path, target: Path) -> Path:
        if not refused:
            refused.append(target)
            raise OSError(number, "as if another store were there")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    assert torch.equal(_all(_build(Noise(), tmp_path)), Noise().expected(SETTINGS))
    assert refused


BUILDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_frame_store import Noise, SETTINGS, build_frames

folder, name, wait_for = Path(sys.argv[2]), sys.argv[3], sys.argv[4]
batches = 0

def before():
    global batches
    batches += 1
    if batches == 2:  # what was read before is written
        (folder / name).touch()
        while not (folder / wait_for).exists():
            time.sleep(0.01)

print(build_frames(Noise(before=before), SETTINGS, cache_dir=folder, num_threads=1).frames.sum().item())
"""


def _builder(folder: Path, name: str, wait_for: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", BUILDER, str(Path(__file__).parent), str(folder), name, wait_for]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_processes(tmp_path: Path) -> None:
    """Each goes on only once the other is in the middle, too."""
    builders = [_builder(tmp_path, "one", "two"), _builder(tmp_path, "two", "one")]
    outputs = [builder.communicate(timeout=60) for builder in builders]
    assert [output for output, _ in outputs] == ["1600\n"] * 2, outputs
    assert torch.equal(_all(_build(Noise(), tmp_path)), Noise().expected(SETTINGS))
    assert _store(tmp_path).is_dir()


def test_a_killed_build_does_not_disturb_and_is_removed_when_it_is_old(tmp_path: Path) -> None:
    builder = _builder(tmp_path, "begun", "never")
    _wait_for(tmp_path / "begun", builder)
    builder.kill()
    builder.communicate()
    leftover = _store(tmp_path)
    assert leftover.name.endswith(".tmp")
    assert torch.equal(_all(_build(Noise(), tmp_path)), Noise().expected(SETTINGS))
    assert leftover.is_dir()  # for all that is known, its owner still writes

    for path in (*leftover.iterdir(), leftover):
        os.utime(path, (time.time() - 4000,) * 2)
    _build(Noise(), tmp_path)
    assert leftover.is_dir()  # nothing to build, nothing to clean
    (next(path for path in (tmp_path / "frames").iterdir() if path != leftover) / "card.json").unlink()
    _build(Noise(), tmp_path)
    assert _store(tmp_path) != leftover


# --------------------------------------------------------------------------------------------------- progress bar


def test_nothing_is_shown_where_nobody_looks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _build(Noise(), tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_is_on_stderr(
    tmp_path: Path, progress: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    _build(replace(Noise(), name="noise"), tmp_path, progress=progress)
    output, errors = capfd.readouterr()
    assert output == ""
    assert ("counting noise" in errors) == progress
