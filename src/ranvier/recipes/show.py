"""Pictures of a recording of an event camera, or of what a network on disk does with one test image."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ranvier.checks import check_count
from ranvier.data.events import (
    SHEETS,
    FrameSettings,
    RecordingError,
    read_cifar10_dvs,
    read_dvs_gesture,
    read_ncaltech101,
    read_nmnist,
    read_prophesee,
    to_frames,
)
from ranvier.evaluation import record_spikes
from ranvier.recipes.evaluate import spiking_network
from ranvier.recipes.recipe import EventRecipe
from ranvier.report import draw_frames, draw_recording, spike_raster

ENDINGS = (".bin", ".aedat", ".dat")
"""Of files that hold recordings."""


@dataclass(frozen=True)
class Shown:
    """What was drawn, in words, and the pictures."""

    what: str
    pictures: tuple[Path, ...]

    def __str__(self) -> str:
        return "\n".join([self.what, *map(str, self.pictures)])


def show(
    path: str | Path,
    out: str | Path | None = None,
    *,
    source: str | None = None,
    steps: int | None = None,
    index: int = 0,
) -> Shown:
    """Draw a recording (events and frames), or one test image as a network sees it (frames) and answers (spikes).

    Args:
        path: A recording, `*.bin`, `*.aedat` or `*.dat`; or the folder of a run, or a file of it.
        out: Folder for the pictures; None for `runs/show/NAME`.
        source: Data set to use instead of the one that the network was trained on.
        steps: Frames of a recording (10 if None), or time steps of a network (those of training if None).
        index: Which test image, from 0.

    Raises:
        FileNotFoundError: There is no such file or run.
        RecordingError: The recording cannot be read.
        ValueError: The network is an ANN or has biases for fewer steps, or there is no test image of that number.
    """
    path = Path(path)
    out = Path(out) if out is not None else Path("runs", "show", path.resolve().stem)
    if path.suffix in ENDINGS:
        return _show_recording(path, out, 10 if steps is None else steps)
    return _show_network(path, out, source, steps, index)


def read_any(path: Path) -> tuple[np.ndarray, tuple[int, int]]:
    """Events of a file of any known format, and height and width of the sensor [pixels].

    N-MNIST and N-Caltech101 share a format; what does not fit the small sensor of the one is taken for the other.

    Raises:
        RecordingError: No reader knows it.
    """
    if path.suffix == ".dat":
        events = read_prophesee(path)
        return events, (int(events["y"].max()) + 1, int(events["x"].max()) + 1)
    if path.suffix == ".aedat":
        head = path.open("rb").read(16)
        if head.startswith(b"#!AER-DAT3"):
            return read_dvs_gesture(path), SHEETS["dvs-gesture"].sensor_size
        return read_cifar10_dvs(path), SHEETS["cifar10-dvs"].sensor_size
    try:
        return read_nmnist(path), SHEETS["nmnist"].sensor_size
    except RecordingError:
        return read_ncaltech101(path), SHEETS["ncaltech101"].sensor_size


def _show_recording(path: Path, out: Path, steps: int) -> Shown:
    events, sensor_size = read_any(path)
    frames = torch.from_numpy(to_frames(events, FrameSettings(steps), sensor_size, str(path)))
    pictures = (out / "events.png", out / "frames.png")
    draw_recording(events, sensor_size, title=path.name, path=pictures[0])
    draw_frames(frames, title=path.name, path=pictures[1])
    height, width = sensor_size
    seconds = (int(events["t"][-1]) - int(events["t"][0])) / 1e6
    what = f"{path}: {len(events):,} events in {seconds:.3f} s on {height}x{width} pixels (height x width)"
    return Shown(what, pictures)


def _show_network(path: Path, out: Path, source: str | None, steps: int | None, index: int) -> Shown:
    trained = spiking_network(path)
    steps = trained.steps if steps is None else steps
    check_count("steps", steps)
    trained.check_steps(steps)
    batches = trained.batches(source, steps=steps)
    if not 0 <= index < len(batches.images):
        raise ValueError(
            f"index is {index}, but there are {len(batches.images)} test images: 0 .. {len(batches.images) - 1}."
        )
    batch, place = divmod(index, batches.batch_size)
    images, labels = next(batches.epoch(0, start=batch))
    is_events = isinstance(trained.recipe, EventRecipe)
    one = images[:, place : place + 1] if is_events else images[place : place + 1]
    spikes = record_spikes(trained.model, one, steps)
    with torch.no_grad():
        answers = trained.model(one, steps).mean(0)[0]
    shown, right = (trained.form.classes[int(number)] for number in (answers.argmax(), labels[place]))
    what = f"test image {index} of {trained.recipe.name}, a {right}: the network answers {shown} after {steps} steps"
    pictures = [out / "spikes.png"]
    layers = {name.removesuffix(".neuron"): sent for name, sent in spikes.items()}
    spike_raster(layers, title=what, path=pictures[0])
    if is_events:
        pictures.append(out / "frames.png")
        draw_frames(one[:, 0], title=f"what it sees: a {right}", path=pictures[1])
    return Shown(what, tuple(pictures))
