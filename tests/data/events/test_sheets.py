"""The data sheets, and loading sets that the tests lay out as their authors do."""

import hashlib
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from ranvier.data.events import SHEETS, RecordingError, load_recordings, sheets
from ranvier.data.events.sheets import EventSheet

from .test_download import Server, server
from .writing import aedat2, aedat3, atis, packet, some_events

__all__ = ["server"]  # a fixture
DOCS = Path(__file__).parents[3] / "docs" / "events.md"


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def nmnist(folder: Path, numbers: tuple[int, ...] = (2, 10, 9)) -> Path:
    for split in ("Train", "Test"):
        for digit in range(10):
            for number in numbers:
                events = some_events(number + digit, 34, 34, seed=number)
                write(folder / split / str(digit) / f"{number:05}.bin", atis(events))
    return folder


def ncaltech101(folder: Path) -> Path:
    """1 to 11 recordings a class."""
    for label, name in enumerate(SHEETS["ncaltech101"].classes):
        for number in range(1, 2 + label % 11):
            write(folder / name / f"image_{number:04}.bin", atis(some_events(3 + number, 180, 240)))
    return folder


def cifar10_dvs(folder: Path, count: int = 20) -> Path:
    for name in SHEETS["cifar10-dvs"].classes:
        for number in range(count):
            write(folder / name / f"cifar10_{name}_{number}.aedat", aedat2(some_events(3 + number, 128, 128)))
    return folder


def dvs_gesture(folder: Path) -> Path:
    """Three recordings of 1,000 events in 200 ms with two trials each; the second person is tested."""
    names = ("user01_led", "user01_lab", "user24_led")
    for name in names:
        write(folder / f"{name}.aedat", aedat3(packet(some_events(1_000, 128, 128))))
        write(folder / f"{name}_labels.csv", b"class,startTime_usec,endTime_usec\n2,5000,50000\n11,60000,90000\n")
    write(folder / "trials_to_train.txt", b"user01_led.aedat\r\nuser01_lab.aedat\r\n\r\n")
    write(folder / "trials_to_test.txt", b"user24_led.aedat\n")
    return folder


SETS = {"nmnist": nmnist, "ncaltech101": ncaltech101, "cifar10-dvs": cifar10_dvs, "dvs-gesture": dvs_gesture}


@pytest.mark.parametrize("name", SHEETS)
def test_sheets_are_complete(name: str) -> None:
    sheet = SHEETS[name]
    assert sheet.name == name
    assert len(set(sheet.classes)) == len(sheet.classes) == {"ncaltech101": 101, "dvs-gesture": 11}.get(name, 10)
    assert sheet.homepage.startswith("https://")
    assert all(re.fullmatch("[0-9a-f]{32}", archive.md5 or "") for archive in sheet.archives)
    assert all(archive.url is None or archive.url.startswith("https://") for archive in sheet.archives)
    assert len({archive.md5 for archive in sheet.archives}) == len(sheet.archives)
    for fact in (sheet.title, sheet.layout, sheet.split, sheet.licence, sheet.citation):
        assert fact in str(sheet)


def test_sizes() -> None:
    """N-Caltech101: 8,709 recordings in all, as published; round(0.9 n) of the n of each class for training."""
    assert {name: sum(sheet.sizes) for name, sheet in SHEETS.items()} == {
        "nmnist": 70_000, "ncaltech101": 8_709, "cifar10-dvs": 10_000, "dvs-gesture": 1_464,
    }  # fmt: skip


@pytest.mark.parametrize("name", SHEETS)
def test_the_documentation_has_the_facts_of_the_sheets(name: str) -> None:
    sheet, text = SHEETS[name], DOCS.read_text()
    height, width = sheet.sensor_size
    row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
    sizes = [f"{size:,}" for size in sheet.sizes]
    for fact in (sheet.title, f"{height}x{width}", str(len(sheet.classes)), *sizes, sheet.homepage, sheet.licence):
        assert fact in row, fact


@pytest.mark.parametrize("name", SHEETS)
def test_every_set_loads(name: str, tmp_path: Path) -> None:
    """From its own folder, and from the one above where the archive has one."""
    sheet = SHEETS[name]
    SETS[name](tmp_path / sheet.top)
    splits = load_recordings(name, tmp_path)
    for split, part, size in (("train", splits.train, sheet.sizes[0]), ("test", splits.test, sheet.sizes[1])):
        assert part.name == f"{name}/{split} ({len(part)} of {size} recordings)"
        assert (part.classes, part.sensor_size) == (sheet.classes, sheet.sensor_size)
        assert all(len(events) for events in part.read(range(len(part))))
    if sheet.top:
        again = load_recordings(name, tmp_path / sheet.top)
        assert again.train.identity() == splits.train.identity()


def test_nmnist_is_ordered_by_class_then_number(tmp_path: Path) -> None:
    train = load_recordings("nmnist", nmnist(tmp_path)).train
    assert train.labels.tolist() == [digit for digit in range(10) for _ in range(3)]
    assert [len(events) for events in train.read([0, 1, 2, 3])] == [2, 9, 10, 3]


def test_a_whole_set_has_a_plain_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = replace(SHEETS["nmnist"], sizes=(30, 30))
    monkeypatch.setattr(sheets, "SHEETS", MappingProxyType({"nmnist": whole}))
    assert load_recordings("nmnist", nmnist(tmp_path)).test.name == "nmnist/test"


def test_cifar10_dvs_is_split_by_number(tmp_path: Path) -> None:
    """18 and 19 are tested although 2 to 9 come behind 19 as text."""
    splits = load_recordings("cifar10-dvs", cifar10_dvs(tmp_path))
    assert [len(events) - 3 for events in splits.train.read(range(18))] == list(range(18))
    assert [len(events) - 3 for events in splits.test.read([0, 1])] == [18, 19]
    assert splits.test.labels.tolist() == [label for label in range(10) for _ in range(2)]


def test_ncaltech101_is_split_class_by_class(tmp_path: Path) -> None:
    """round(0.9 n) for n = 1 .. 11; ties, of which there are none at 0.9 n for n < 5, go to the even number."""
    splits = load_recordings("ncaltech101", ncaltech101(tmp_path))
    counts = splits.train.labels.bincount(minlength=101)[:11].tolist()
    assert counts == [1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10]
    assert splits.test.labels.bincount(minlength=101)[:11].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]


def test_dvs_gesture_is_split_by_its_lists(tmp_path: Path) -> None:
    splits = load_recordings("dvs-gesture", dvs_gesture(tmp_path))
    assert splits.train.labels.tolist() == [1, 10, 1, 10]
    assert splits.test.labels.tolist() == [1, 10]
    first, second = splits.test.read([0, 1])
    assert first["t"][0] >= 5_000
    assert first["t"][-1] < 50_000
    assert second["t"][0] >= 60_000
    assert second["t"][-1] < 90_000


def test_unreadable_recordings_are_reported_and_on_request_skipped(tmp_path: Path) -> None:
    nmnist(tmp_path)
    bad = tmp_path / "Train" / "3" / "00009.bin"
    bad.write_bytes(b"123")
    splits = load_recordings("nmnist", tmp_path)
    with pytest.raises(RecordingError, match=r"Train/3/00009.bin: 3 bytes are left over at byte 0"):
        splits.train.read(range(30))
    with pytest.warns(UserWarning, match=r"nmnist: left out 1 of 60 recordings that cannot be read; .*00009.bin: 3 by"):
        splits = load_recordings("nmnist", tmp_path, skip_unreadable=True, progress=False)
    assert (len(splits.train), len(splits.train.skipped), len(splits.test.skipped)) == (29, 1, 0)
    bad.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_recordings("nmnist", tmp_path, skip_unreadable=True, progress=False)


@pytest.mark.parametrize("name", SHEETS)
def test_a_missing_set_says_which_file_goes_where(name: str, tmp_path: Path) -> None:
    sheet = SHEETS[name]
    with pytest.raises(FileNotFoundError) as raised:
        load_recordings(name, tmp_path / "nowhere")
    message = str(raised.value)
    assert f"{sheet.title} is not in {tmp_path / 'nowhere'}" in message
    assert sheet.layout in message
    for archive in sheet.archives:
        assert (
            f"{archive.url or sheet.homepage} as {tmp_path / 'nowhere' / archive.name} (md5 {archive.md5})" in message
        )
    assert not (tmp_path / "nowhere").exists()


def lose(path: str) -> object:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()

    return change


def add(path: str, content: bytes = b"") -> object:
    return lambda folder: write(folder / path, content)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("nmnist", lose("Test"), r"Test: no folder for 10 of 10 classes, the first: 0. Expected .*Test/0/NNNNN.bin"),
        ("nmnist", lose("Train/7"), "Train: no folder for 1 of 10 classes, the first: 7"),
        ("nmnist", add("Train/10/00001.bin"), r"Train/10 holds .bin files but is the folder of no class"),
        ("nmnist", add("Train/1/00001 (copy).bin"), r"00001 \(copy\).bin is not named like .* expected NNNNN.bin"),
        ("ncaltech101", lose("ant"), "no folder for 1 of 101 classes, the first: ant"),
        ("ncaltech101", add("Faces/image_0001.bin"), "Faces holds .bin files but is the folder of no class"),
        ("cifar10-dvs", lose("truck"), r"the first: truck. Expected .*truck/cifar10_<class>_N.aedat"),
        ("cifar10-dvs", add("cat/cifar10_dog_1.aedat"), "expected cifar10_cat_N.aedat"),
        ("dvs-gesture", lose("trials_to_test.txt"), "there is no .*trials_to_test.txt"),
        ("dvs-gesture", lose("user01_lab.aedat"), "there is no .*user01_lab.aedat, which trials_to_train.txt asks for"),
        ("dvs-gesture", lose("user24_led_labels.csv"), "there is no .*user24_led_labels.csv"),
        ("dvs-gesture", add("trials_to_test.txt", b"user01_led.aedat"), "user01_led.aedat is both in trials_to_train"),
        ("dvs-gesture", add("trials_to_test.txt", b"../a.aedat"), r"entry 1 is '../a.aedat'"),
        ("dvs-gesture", add("trials_to_test.txt", b"user24_led.aedat\n" * 2), "entry 2 is 'user24_led.aedat'"),
        ("dvs-gesture", add("trials_to_test.txt", b"\n"), "trials_to_test.txt lists no recordings"),
        ("dvs-gesture", add("user01_lab_labels.csv", b"1,2,3"), "user01_lab_labels.csv: line 1 is '1,2,3'"),
    ],
)
def test_an_unexpected_layout_is_named(name: str, change: object, message: str, tmp_path: Path) -> None:
    change(SETS[name](tmp_path))
    with pytest.raises(RecordingError, match=message):
        load_recordings(name, tmp_path)


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    shutil.rmtree(cifar10_dvs(tmp_path) / "bird")
    (tmp_path / "bird").mkdir()
    with pytest.raises(RecordingError, match=r"bird holds no cifar10_<class>_N.aedat"):
        load_recordings("cifar10-dvs", tmp_path)


def test_what_file_managers_leave_behind_does_not_count(tmp_path: Path) -> None:
    for junk in ("Train/.DS_Store", "Train/__MACOSX/0/a.bin", "Train/3/._00002.bin", "Train/3/Thumbs.db"):
        write(nmnist(tmp_path) / junk, b"junk")
    assert len(load_recordings("nmnist", tmp_path).train) == 30


@pytest.fixture
def archives(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EventSheet]:
    """N-MNIST as the server has it: Train.zip of the test, and a Test.zip that is to be fetched by hand."""
    source = nmnist(tmp_path / "source")
    packed = []
    for split, archive in zip(("Train", "Test"), SHEETS["nmnist"].archives, strict=True):
        path = source / archive.name
        with zipfile.ZipFile(path, "w") as zipped:
            for file in sorted((source / split).rglob("*.bin")):
                zipped.write(file, file.relative_to(source))
        url = server.url if split == "Train" else None
        packed.append(replace(archive, url=url, md5=hashlib.md5(path.read_bytes()).hexdigest()))
    server.content = (source / "Train.zip").read_bytes()
    sheet = replace(SHEETS["nmnist"], archives=tuple(packed))
    monkeypatch.setattr(sheets, "SHEETS", MappingProxyType({"nmnist": sheet}))
    return sheet


def test_download(archives: EventSheet, server: Server, tmp_path: Path) -> None:
    """Train.zip is fetched over a connection that is cut, Test.zip lies there; a second call fetches nothing."""
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(tmp_path / "source" / "Test.zip", folder)
    server.cuts = [1_000]
    splits = load_recordings("nmnist", folder, download=True, progress=False)
    assert (len(splits.train), len(splits.test)) == (30, 30)
    assert server.asked == [None, "bytes=1000-"]
    load_recordings("nmnist", folder, download=True, progress=False)
    assert len(server.asked) == 2


def test_download_says_what_only_a_person_can_fetch(archives: EventSheet, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"through a web page only: save .*Test.zip \(md5"):
        load_recordings("nmnist", tmp_path / "data", download=True, progress=False)


def test_gesture_cannot_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"DVS128-Gesture is not in .* save https://research.ibm.com"):
        load_recordings("dvs-gesture", tmp_path, download=True)


def test_a_wrong_archive_is_not_unpacked(archives: EventSheet, server: Server, tmp_path: Path) -> None:
    server.content = b"an error page"
    with pytest.raises(ValueError, match=r"13 bytes\) has md5"):
        load_recordings("nmnist", tmp_path / "data", download=True, progress=False)
    assert list((tmp_path / "data").iterdir()) == []
