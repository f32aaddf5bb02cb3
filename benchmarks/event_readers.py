"""Events a second of the readers of event-camera files, beside those of tonic, on one core.

    python benchmarks/event_readers.py
    python benchmarks/event_readers.py --nmnist FOLDER_WITH_TRAIN_AND_TEST

Writes one large file of each format, reads it from the page cache in alternating rounds, and prints medians. Our times
include every check (order of time, addresses, truncation); tonic checks nothing. Its .dat files are read by
expelliarmus. tonic 1.7.0's own `read_dvs_128` and `read_dvs_ibm` raise for every file; what they set out to do is done
here with the functions that they call.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tonic.io
from expelliarmus import Wizard

from ranvier import provenance
from ranvier.data.events import make_events, read_cifar10_dvs, read_dvs_gesture, read_nmnist, read_prophesee

TONIC = np.dtype([("x", int), ("y", int), ("t", int), ("p", int)])
PACKET = 4096  # events


def some_events(count: int, height: int, width: int, stop: int) -> np.ndarray:
    """Random events in the order of time, before `stop` us."""
    random = np.random.default_rng(0)
    t = np.sort(random.integers(0, stop, count))
    return make_events(t, *(random.integers(0, end, count) for end in (width, height, 2)))


def write_nmnist(path: Path, count: int) -> None:
    events = some_events(count, 34, 34, 1 << 23)
    rows = np.empty((count, 5), np.uint8)
    rows[:, 0], rows[:, 1], rows[:, 2] = events["x"], events["y"], events["p"] << 7 | events["t"] >> 16
    rows[:, 3], rows[:, 4] = events["t"] >> 8 & 255, events["t"] & 255
    path.write_bytes(rows.tobytes())


def write_cifar10_dvs(path: Path, count: int) -> None:
    events = some_events(count, 128, 128, 1 << 30)
    address = events["y"].astype(np.int64) << 8 | events["x"].astype(np.int64) << 1 | events["p"]
    words = np.stack([address, events["t"]], axis=1).astype(">u4")
    path.write_bytes(b"#!AER-DAT2.0\r\n# Timestamps tick is 1 us\r\n" + words.tobytes())


def write_dvs_gesture(path: Path, count: int) -> None:
    events = some_events(count, 128, 128, 1 << 30)
    address = events["x"].astype(np.int64) << 17 | events["y"].astype(np.int64) << 2 | events["p"] << 1 | 1
    words = np.stack([address, events["t"]], axis=1).astype("<u4")
    with path.open("wb") as file:
        file.write(b"#!AER-DAT3.1\r\n#!END-HEADER\r\n")
        for start in range(0, count, PACKET):
            part = words[start : start + PACKET]
            file.write(np.array([1, 1], "<i2").tobytes())
            file.write(np.array([8, 4, 0, len(part), len(part), len(part)], "<i4").tobytes() + part.tobytes())


def write_prophesee(path: Path, count: int) -> None:
    events = some_events(count, 720, 1280, 1 << 30)
    address = events["p"].astype(np.int64) << 28 | events["y"].astype(np.int64) << 14 | events["x"]
    words = np.stack([events["t"], address], axis=1).astype("<u4")
    path.write_bytes(b"% Version 2\n% Width 1280\n% Height 720\n\x0c\x08" + words.tobytes())


def tonic_nmnist(path: Path) -> np.ndarray:
    return tonic.io.read_mnist_file(str(path), TONIC)


def tonic_aedat(path: Path, x_shift: int, y_shift: int, p_shift: int, mask: int) -> np.ndarray:
    version, start, _ = tonic.io.read_aedat_header_from_file(str(path))
    raw = tonic.io.get_aer_events_from_file(str(path), version, start)
    address = raw["address"]
    x, y, p = (address >> x_shift) & mask, (address >> y_shift) & mask, (address >> p_shift) & 1
    return tonic.io.make_structured_array(x, y, raw["timeStamp"], p)


def expelliarmus_dat(path: Path) -> np.ndarray:
    return Wizard(encoding="dat").read(str(path))


FORMATS: dict[str, tuple[Callable, Callable, Callable, str]] = {
    "5 bytes (N-MNIST)": (write_nmnist, read_nmnist, tonic_nmnist, "tonic"),
    "AEDAT 2.0 (CIFAR10-DVS)": (
        write_cifar10_dvs, read_cifar10_dvs, lambda path: tonic_aedat(path, 8, 1, 0, 0x7F), "tonic",
    ),
    "AEDAT 3.1 (DVS128-Gesture)": (
        write_dvs_gesture, read_dvs_gesture, lambda path: tonic_aedat(path, 17, 2, 1, 0x1FFF), "tonic",
    ),
    "Prophesee .dat": (write_prophesee, read_prophesee, expelliarmus_dat, "expelliarmus"),
}  # fmt: skip


def seconds(reader: Callable, paths: list[Path]) -> float:
    start = time.perf_counter()
    for path in paths:
        reader(path)
    return time.perf_counter() - start


def row(name: str, ours: Callable, theirs: Callable, peer: str, paths: list[Path], rounds: int) -> str:
    """One line of the table: medians over rounds in which both read the same files, in turn."""
    count = sum(len(ours(path)) for path in paths)
    assert count == sum(len(theirs(path)) for path in paths), f"{peer} reads another number of events"
    times = [(seconds(ours, paths), seconds(theirs, paths)) for _ in range(rounds)]
    speeds = [sorted(count / 1e6 / value for value in column) for column in zip(*times, strict=True)]
    cells = [f"{statistics.median(speed):.0f} ({speed[0]:.0f} to {speed[-1]:.0f})" for speed in speeds]
    ratio = statistics.median(theirs / ours for ours, theirs in times)
    return f"| {name} | {len(paths)} | {count:,} | {cells[0]} | {peer} {cells[1]} | {ratio:.1f} |"


def main() -> None:
    """Write the files, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=5_000_000, help="events in each file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--nmnist", type=Path, help="folder of real N-MNIST recordings, read as well")
    arguments = parser.parse_args()
    print(f"{provenance.device_name()}; {provenance.versions()}; tonic {tonic.__version__}\n")
    print("| format | files | events | ours [million events/s] | peer [million events/s] | ours / peer |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (write, ours, theirs, peer) in FORMATS.items():
            path = Path(folder, "large.dat")  # expelliarmus insists on the suffix
            write(path, arguments.events)
            print(row(name, ours, theirs, peer, [path], arguments.rounds), flush=True)
    if arguments.nmnist:
        paths = sorted(arguments.nmnist.glob("T*/*/*.bin"))
        print(row("N-MNIST, real", read_nmnist, tonic_nmnist, "tonic", paths, arguments.rounds))


if __name__ == "__main__":
    main()
