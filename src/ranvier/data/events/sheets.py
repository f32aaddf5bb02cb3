"""Data sheets of published event-camera data sets, and loading them from the files that their authors distribute."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from ranvier.data.events.aedat2 import DVS128_SIZE, read_cifar10_dvs
from ranvier.data.events.aedat3 import GESTURES, read_dvs_gesture, read_gesture_labels
from ranvier.data.events.atis import NCALTECH101_SIZE, NMNIST_SIZE, read_ncaltech101, read_nmnist
from ranvier.data.events.download import fetch, unpack
from ranvier.data.events.files import FileRecordings, Trial
from ranvier.data.events.recording import RecordingError, RecordingSplits

_Part = list[tuple[Trial, int]]
"""Trials of one split and their labels."""


@dataclass(frozen=True)
class Archive:
    """One file to download.

    Args:
        name: What to call it beside the data.
        url: Where it is, None where only a person with a browser can fetch it.
        md5: Checksum, None where none is known.
        holds: What unpacking it gives, relative to the folder of the data set.
    """

    name: str
    url: str | None
    md5: str | None
    holds: tuple[str, ...]


@dataclass(frozen=True)
class EventSheet:
    """What a published set of recordings is: its data sheet.

    Args:
        name: What `load_recordings` calls it.
        title: What its authors call it.
        sensor_size: Height and width [pixels].
        classes: Name of each class; its position is the class index.
        sizes: Number of training and of test recordings in the whole set.
        layout: Files below its folder.
        split: Which recordings are for training and which for testing, whose choice that is, and their order.
        homepage: Where its authors present it.
        archives: What to download.
        licence: Its terms.
        citation: What to cite.
        reader: Function that reads one of its files.
        find: Lists the training and the test recordings below a folder.
        top: Folder that the archive unpacks to, "" where its files lie directly in the folder of the set.
    """

    name: str
    title: str
    sensor_size: tuple[int, int]
    classes: tuple[str, ...]
    sizes: tuple[int, int]
    layout: str
    split: str
    homepage: str
    archives: tuple[Archive, ...]
    licence: str
    citation: str
    reader: Callable[..., np.ndarray]
    find: Callable[[Path, EventSheet], tuple[_Part, _Part]]
    top: str = ""

    def __str__(self) -> str:
        """Return the sheet as lines of text."""
        height, width = self.sensor_size
        names = ", ".join(self.classes) if len(self.classes) <= 12 else f"{self.classes[0]} .. {self.classes[-1]}"
        rows = {
            self.name: self.title,
            "sensor": f"{height}x{width} pixels (height x width)",
            "classes": f"{len(self.classes)}: {names}",
            "size": f"{self.sizes[0]} recordings for training, {self.sizes[1]} for testing",
            "layout": self.layout,
            "split": self.split,
            "homepage": self.homepage,
            **{archive.name: f"{archive.url or self.homepage} (md5 {archive.md5})" for archive in self.archives},
            "licence": self.licence,
            "cite": self.citation,
        }
        return "\n".join(f"{key:16}{value}" for key, value in rows.items())


def load_recordings(
    name: str,
    folder: str | os.PathLike[str],
    *,
    download: bool = False,
    skip_unreadable: bool = False,
    progress: bool = True,
) -> RecordingSplits:
    """List the recordings of a published data set; each is read when it is asked for.

    Args:
        name: One of `SHEETS`: "nmnist", "ncaltech101", "cifar10-dvs", "dvs-gesture".
        folder: Where its files lie, as the sheet's `layout` says. A part of the set is enough as long as every class
            has its folder; the names of the splits then say how many recordings there are.
        download: Fetch the archives that are missing, check and unpack them. An archive that is in `folder` already
            is not fetched again. DVS128-Gesture can only be fetched by hand.
        skip_unreadable: Read every file once and leave out those that cannot be read, with a warning that counts them;
            the `skipped` of each split has the reasons. Otherwise `read` raises for such a file.
        progress: Show progress bars while downloading and checking.

    Returns:
        The training and the test recordings, both `FileRecordings`, split and ordered as the sheet says.

    Raises:
        FileNotFoundError: the set is not in `folder`; the message says which file to put where.
        RecordingError: the folder is laid out otherwise than expected.
        ConnectionError: an archive could not be downloaded.
        ValueError: an unknown name, or an archive with a wrong checksum.

    >>> load_recordings("mnist", ".")
    Traceback (most recent call last):
    ...
    ValueError: name is 'mnist', expected one of nmnist, ncaltech101, cifar10-dvs, dvs-gesture.
    """
    if name not in SHEETS:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(SHEETS)}.")
    sheet, folder = SHEETS[name], Path(folder).expanduser()
    if download:
        _download(sheet, folder, progress)
    top = _top(sheet, folder)
    if top is None:
        raise FileNotFoundError(_how_to_get(sheet, folder))
    splits = [
        FileRecordings(
            f"{name}/{split}" if len(part) == size else f"{name}/{split} ({len(part)} of {size} recordings)",
            top,
            tuple(trial for trial, _ in part),
            torch.tensor([label for _, label in part], dtype=torch.int64),
            sheet.classes,
            sheet.sensor_size,
            sheet.reader,
        )
        for split, part, size in zip(("train", "test"), sheet.find(top, sheet), sheet.sizes, strict=True)
    ]
    if skip_unreadable:
        whole = sum(map(len, splits))
        splits = [split.without_unreadable(progress) for split in splits]
        reasons = [reason for split in splits for reason in split.skipped]
        if reasons:
            warnings.warn(
                f"{name}: left out {len(reasons)} of {whole} recordings that cannot be read; the first: {reasons[0]}",
                stacklevel=2,
            )
    return RecordingSplits(splits[0], splits[1])


def _download(sheet: EventSheet, folder: Path, progress: bool) -> None:
    top = _top(sheet, folder)
    for archive in sheet.archives:
        if all(((top or folder / sheet.top) / held).exists() for held in archive.holds):
            continue
        path = folder / archive.name
        if not path.exists() and archive.url is None:
            raise FileNotFoundError(_how_to_get(sheet, folder))
        fetch(archive.url or sheet.homepage, path, md5=archive.md5, progress=progress)
        unpack(path, folder)


def _top(sheet: EventSheet, folder: Path) -> Path | None:
    """The folder in which something of the set lies: `folder`, or the one in it that the archive unpacks to."""
    held = [name for archive in sheet.archives for name in archive.holds]
    for top in (folder, folder / sheet.top):
        if any((top / name).exists() for name in held):
            return top
    return None


def _how_to_get(sheet: EventSheet, folder: Path) -> str:
    by_hand = [archive for archive in sheet.archives if archive.url is None]
    wanted = [
        f"{archive.url or sheet.homepage} as {folder / archive.name} (md5 {archive.md5})" for archive in sheet.archives
    ]
    return (
        f"{sheet.title} is not in {folder}, where {sheet.layout} was expected (working directory: {Path.cwd()}). "
        + ("" if by_hand else "Pass download=True; or save by hand, ")
        + ("Its authors distribute it through a web page only: save " if by_hand else "")
        + ", ".join(wanted)
        + ", then pass download=True: files that are there are only checked and unpacked."
    )


def _find_nmnist(top: Path, sheet: EventSheet) -> tuple[_Part, _Part]:
    train, test = (
        _flat(_class_files(top, split, sheet.classes, r"(\d+)\.bin", "NNNNN.bin")) for split in ("Train", "Test")
    )
    return train, test


def _find_ncaltech101(top: Path, sheet: EventSheet) -> tuple[_Part, _Part]:
    return _first_nine_tenths(_class_files(top, "", sheet.classes, r"image_(\d+)\.bin", "image_NNNN.bin"))


def _find_cifar10_dvs(top: Path, sheet: EventSheet) -> tuple[_Part, _Part]:
    return _first_nine_tenths(
        _class_files(top, "", sheet.classes, r"cifar10_{class}_(\d+)\.aedat", "cifar10_<class>_N.aedat")
    )


def _find_dvs_gesture(top: Path, sheet: EventSheet) -> tuple[_Part, _Part]:
    listed = {split: _listed_files(top / f"trials_to_{split}.txt") for split in ("train", "test")}
    twice = sorted(set(listed["train"]) & set(listed["test"]))
    if twice:
        raise RecordingError(
            f"{top}: {twice[0]} is both in trials_to_train.txt and in trials_to_test.txt. Get them anew."
        )
    train, test = (
        [
            (Trial(Path(name), trial.start, trial.stop), trial.label)
            for name in names
            for trial in read_gesture_labels(top / f"{name.removesuffix('.aedat')}_labels.csv")
        ]
        for names in listed.values()
    )
    return train, test


def _listed_files(path: Path) -> list[str]:
    """Names in one of the two split files of DVS128-Gesture; what they name and its labels must be there."""
    if not path.is_file():
        raise RecordingError(f"there is no {path}, which lists the recordings of a split. Unpack the archive anew.")
    names = [line.strip() for line in path.read_text(encoding="ascii", errors="replace").splitlines() if line.strip()]
    if not names:
        raise RecordingError(f"{path} lists no recordings. Unpack the archive anew.")
    for number, name in enumerate(names, start=1):
        if not re.fullmatch(r"\w+\.aedat", name, re.ASCII) or name in names[: number - 1]:
            raise RecordingError(
                f"{path}: entry {number} is {name!r}, expected the name of an .aedat file beside it, once. Unpack the "
                "archive anew."
            )
        for needed in (path.with_name(name), path.with_name(f"{name.removesuffix('.aedat')}_labels.csv")):
            if not needed.is_file():
                raise RecordingError(
                    f"there is no {needed}, which {path.name} asks for. Unpack the archive anew, or take the line out "
                    "of the list."
                )
    return names


def _class_files(
    top: Path, split: str, classes: Sequence[str], pattern: str, shown: str
) -> list[list[tuple[Trial, int]]]:
    """For each class its files, sorted by the number in their names."""
    folder = top / split
    missing = [name for name in classes if not (folder / name).is_dir()]
    if missing:
        raise RecordingError(
            f"{folder}: no folder for {len(missing)} of {len(classes)} classes, the first: {missing[0]}. Expected "
            f"{folder / missing[0] / shown}; unpack the archive anew."
        )
    suffix = shown[shown.rindex(".") :]
    for entry in sorted(folder.iterdir()):
        if entry.name not in classes and _counts(entry) and any(entry.glob(f"*{suffix}")):
            raise RecordingError(
                f"{entry} holds {suffix} files but is the folder of no class, expected {classes[0]} .. {classes[-1]}. "
                "Move it elsewhere."
            )
    found = []
    for label, name in enumerate(classes):
        expected = re.compile(pattern.replace("{class}", re.escape(name)), re.ASCII)
        numbered = []
        for entry in (folder / name).iterdir():
            if not _counts(entry):
                continue
            match = expected.fullmatch(entry.name)
            if match is None:
                raise RecordingError(
                    f"{entry} is not named like a recording of this class, expected {shown.replace('<class>', name)}. "
                    "Move it, or rename it."
                )
            numbered.append((int(match[1]), entry.name))
        if not numbered:
            raise RecordingError(f"{folder / name} holds no {shown}. Unpack the archive anew.")
        found.append([(Trial(Path(split, name, file)), label) for _, file in sorted(numbered)])
    return found


def _counts(entry: Path) -> bool:
    """Whether a file may be part of a data set: not what a file manager leaves behind."""
    return not entry.name.startswith((".", "__MACOSX")) and entry.name != "Thumbs.db"


def _flat(classes: list[_Part]) -> _Part:
    return [recording for part in classes for recording in part]


def _first_nine_tenths(classes: list[_Part]) -> tuple[_Part, _Part]:
    """Of each class the first round(0.9 n) of its n recordings for training, the others for testing."""
    borders = [round(0.9 * len(part)) for part in classes]
    train = [part[:border] for part, border in zip(classes, borders, strict=True)]
    test = [part[border:] for part, border in zip(classes, borders, strict=True)]
    return _flat(train), _flat(test)


_MENDELEY = "https://data.mendeley.com/public-files/datasets"
_ORCHARD = (
    "G. Orchard, A. Jayawant, G. K. Cohen, N. Thakor (2015). Converting static image datasets to spiking neuromorphic "
    "datasets using saccades. Frontiers in Neuroscience 9:437. https://doi.org/10.3389/fnins.2015.00437"
)

_NMNIST = EventSheet(
    name="nmnist",
    title="N-MNIST",
    sensor_size=NMNIST_SIZE,
    classes=tuple("0123456789"),
    sizes=(60_000, 10_000),
    layout="Train/<digit>/NNNNN.bin and Test/<digit>/NNNNN.bin",
    split="official, that of MNIST; class by class, in a class by number (the number counts MNIST images from 1)",
    homepage="https://www.garrickorchard.com/datasets/n-mnist",
    archives=(
        Archive(
            "Train.zip",
            f"{_MENDELEY}/468j46mzdv/files/39c25547-014b-4137-a934-9d29fa53c7a0/file_downloaded",
            "20959b8e626244a1b502305a9e6e2031",
            ("Train",),
        ),
        Archive(
            "Test.zip",
            f"{_MENDELEY}/468j46mzdv/files/05a4d654-7e03-4c15-bdfa-9bb2bcbea494/file_downloaded",
            "69ca8762b2fe404d9b9bad1103e97832",
            ("Test",),
        ),
    ),
    licence="CC BY-SA 4.0",
    citation=_ORCHARD,
    reader=read_nmnist,
    find=_find_nmnist,
)

# The order of the class folders, by byte value. "Faces" of Caltech101 is not in N-Caltech101.
_CALTECH101_NAMES = """
    BACKGROUND_Google Faces_easy Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver binocular bonsai
    brain brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair chandelier cougar_body
    cougar_face crab crayfish crocodile crocodile_head cup dalmatian dollar_bill dolphin dragonfly electric_guitar
    elephant emu euphonium ewer ferry flamingo flamingo_head garfield gerenuk gramophone grand_piano hawksbill headphone
    hedgehog helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop llama lobster lotus mandolin mayfly
    menorah metronome minaret nautilus octopus okapi pagoda panda pigeon pizza platypus pyramid revolver rhino rooster
    saxophone schooner scissors scorpion sea_horse snoopy soccer_ball stapler starfish stegosaurus stop_sign strawberry
    sunflower tick trilobite umbrella watch water_lilly wheelchair wild_cat windsor_chair wrench yin_yang
    """
_CALTECH101_CLASSES = tuple(_CALTECH101_NAMES.split())

_NCALTECH101 = EventSheet(
    name="ncaltech101",
    title="N-Caltech101",
    sensor_size=NCALTECH101_SIZE,
    classes=_CALTECH101_CLASSES,
    sizes=(7_839, 870),
    layout="Caltech101/<class>/image_NNNN.bin",
    split=(
        "customary, there is no official one: of each class the first round(0.9 n) of its n recordings for training; "
        "class by class in the order of `classes`, in a class by number"
    ),
    homepage="https://www.garrickorchard.com/datasets/n-caltech101",
    archives=(
        Archive(
            "Caltech101.zip",
            f"{_MENDELEY}/cy6cvx3ryv/files/36b5c52a-b49d-4853-addb-a836a8883e49/file_downloaded",
            "66201824eabb0239c7ab992480b50ba3",
            _CALTECH101_CLASSES,
        ),
    ),
    licence="CC BY 4.0",
    citation=_ORCHARD,
    reader=read_ncaltech101,
    find=_find_ncaltech101,
    top="Caltech101",
)

_FIGSHARE_FILES = {
    "airplane": ("7712788", "0afd5c4bf9ae06af762a77b180354fdd"),
    "automobile": ("7712791", "8438dfeba3bc970c94962d995b1b9bdd"),
    "bird": ("7712794", "a9c207c91c55b9dc2002dc21c684d785"),
    "cat": ("7712812", "52c63c677c2b15fa5146a8daf4d56687"),
    "deer": ("7712815", "b6bf21f6c04d21ba4e23fc3e36c8a4a3"),
    "dog": ("7712818", "f379ebdf6703d16e0a690782e62639c3"),
    "frog": ("7712842", "cad6ed91214b1c7388a5f6ee56d08803"),
    "horse": ("7712851", "e7cbbf77bec584ffbf913f00e682782a"),
    "ship": ("7712836", "41c7bd7d6b251be82557c6cce9a7d5c9"),
    "truck": ("7712839", "89f3922fd147d9aeff89e76a2b0b70a7"),
}

_CIFAR10_DVS = EventSheet(
    name="cifar10-dvs",
    title="CIFAR10-DVS",
    sensor_size=DVS128_SIZE,
    classes=tuple(_FIGSHARE_FILES),
    sizes=(9_000, 1_000),
    layout="<class>/cifar10_<class>_N.aedat",
    split=(
        "customary, there is no official one: of each class the first 90 % by number (N = 0..899) for training, the "
        "others for testing; class by class, in a class by number. Other papers test on N = 0..99 and train on the "
        "rest, or split at random: accuracies are not comparable across splits"
    ),
    homepage="https://figshare.com/articles/dataset/CIFAR10-DVS_New/4724671",
    archives=tuple(
        Archive(f"{name}.zip", f"https://ndownloader.figshare.com/files/{number}", md5, (name,))
        for name, (number, md5) in _FIGSHARE_FILES.items()
    ),
    licence="stated on its page at figshare; the files state none",
    citation=(
        "H. Li, H. Liu, X. Ji, G. Li, L. Shi (2017). CIFAR10-DVS: an event-stream dataset for object classification. "
        "Frontiers in Neuroscience 11:309. https://doi.org/10.3389/fnins.2017.00309"
    ),
    reader=read_cifar10_dvs,
    find=_find_cifar10_dvs,
)

_DVS_GESTURE = EventSheet(
    name="dvs-gesture",
    title="DVS128-Gesture",
    sensor_size=DVS128_SIZE,
    classes=GESTURES,
    sizes=(1_176, 288),
    layout="DvsGesture/userNN_<light>.aedat, userNN_<light>_labels.csv, trials_to_train.txt and trials_to_test.txt",
    split=(
        "official, by person: users 1 to 23 for training, 24 to 29 for testing, as listed in trials_to_train.txt and "
        "trials_to_test.txt; in the order of these lists, in a file in the order of its label file. The paper counts "
        "1,342 trials, the label files 1,464"
    ),
    homepage="https://research.ibm.com/interactive/dvsgesture/",
    archives=(
        Archive(
            "DvsGesture.tar.gz",
            None,
            "8a5c71fb11e24e5ca5b11866ca6c00a1",
            ("trials_to_train.txt", "trials_to_test.txt"),
        ),
    ),
    licence="CC BY 4.0",
    citation=(
        "A. Amir et al. (2017). A low power, fully event-based gesture recognition system. IEEE Conference on Computer "
        "Vision and Pattern Recognition, 7388-7397. https://doi.org/10.1109/CVPR.2017.781"
    ),
    reader=read_dvs_gesture,
    find=_find_dvs_gesture,
    top="DvsGesture",
)

SHEETS: Mapping[str, EventSheet] = MappingProxyType(
    {sheet.name: sheet for sheet in (_NMNIST, _NCALTECH101, _CIFAR10_DVS, _DVS_GESTURE)}
)
"""The data sheets by name; `print(SHEETS["nmnist"])` shows one."""
