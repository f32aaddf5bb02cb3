"""Events counted into frames, and into voxel grids: the forms in which networks take a recording.

Shapes: `T` steps, two polarity channels (`DARKER` 0, `BRIGHTER` 1), `H` height and `W` width [pixels].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import interpolate

from ranvier.checks import check_choice, check_count
from ranvier.data.events.recording import RecordingError, check_events

Bins = Literal["time", "count"]
"""How a recording is cut into steps: into equal times, or into equal numbers of events."""


@dataclass(frozen=True)
class FrameSettings:
    """How a recording becomes frames.

    Args:
        steps: T, the number of frames.
        bins: `time`: frames of equal time. `count`: frames of equally many events.
        size: Frames are resized to `size` x `size` pixels, bilinear with the corners aligned; None keeps the sensor's.

    Raises:
        ValueError: a number is out of range, or `bins` is neither.

    >>> FrameSettings(steps=10, size=48).shape((128, 128))
    (10, 2, 48, 48)
    """

    steps: int = 10
    bins: Bins = "time"
    size: int | None = None

    def __post_init__(self) -> None:
        """Check the range of each."""
        check_count("steps", self.steps)
        check_choice("bins", self.bins, ("time", "count"))
        if self.size is not None:
            check_count("size", self.size)

    def shape(self, sensor_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Shape of the frames of one recording, `(T, 2, H, W)`."""
        height, width = sensor_size if self.size is None else (self.size, self.size)
        return self.steps, 2, height, width


def to_frames(
    events: np.ndarray, settings: FrameSettings, sensor_size: tuple[int, int], where: str = "the recording"
) -> np.ndarray:
    """Count the events of each step, polarity and pixel.

        frames[k, p, y, x] = number of events of polarity p at column x, row y in step k

    Every event is in exactly one step. With t_0 the time of the first event and t_N that of the last [us],

        bins="time"     step k begins at t_0 + k w and ends before t_0 + (k + 1) w,  w = max(floor((t_N - t_0) / T), 1);
                        the last step goes on to t_N, which is less than T us more
        bins="count"    step k holds events floor(k N / T) up to, and without, floor((k + 1) N / T)

    so that steps of equal count differ by at most one event. A recording shorter than T us or than T events leaves
    steps empty.

    Args:
        events: Array of `EVENT`. Not modified.
        settings: Number and kind of the steps, size of the frames.
        sensor_size: Height and width of the sensor [pixels].
        where: The file or what else the events come from, for messages.

    Returns:
        `[T, 2, H, W]`, channel 0 the darker and 1 the brighter events. Raw counts, int16, at the sensor's size; float16
        where they are resized. In memory a pixel's two polarities lie side by side (channels last).

    Raises:
        RecordingError: the events are not valid, or a pixel has more of them in one step than int16 can count.

    Source: time steps as `ToFrame(n_time_bins=T)` of tonic, count steps as its n_event_bins; size as in the released
    code of Zhao et al. 2025 (temporal consistency). Differs from tonic in: no event is lost. There the time steps leave
    out what comes at or after t_0 + T w, at least the last event, and the count steps the last N mod T events.

    >>> from ranvier.data.events.recording import make_events
    >>> columns = np.array([[0, 40, 50, 99, 101], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 1, 1]])
    >>> to_frames(make_events(*columns), FrameSettings(steps=2), (1, 2)).tolist()
    [[[[0, 0]], [[1, 1]]], [[[0, 1]], [[2, 0]]]]
    """
    check_events(events, sensor_size, where)
    _check_polarities(events["p"], where)
    height, width = sensor_size
    steps = settings.steps
    cells = np.repeat(np.arange(steps) * (height * width * 2), np.diff(_borders(events["t"], settings)))
    cells += _pixels(events, width) * 2
    cells += events["p"]
    counts = np.bincount(cells, minlength=steps * height * width * 2).reshape(steps, height, width, 2)
    if counts.max() > np.iinfo(np.int16).max:
        step, row, column, polarity = np.unravel_index(int(counts.argmax()), counts.shape)
        raise RecordingError(
            f"{where}: column {column}, row {row} has {counts.max()} events of polarity {polarity} in step {step}, but "
            f"a frame counts up to {np.iinfo(np.int16).max}. Remove that pixel's events if it is defective, or take "
            f"more than {steps} steps."
        )
    if settings.size is None:
        return counts.astype(np.int16).transpose(0, 3, 1, 2)
    images = torch.from_numpy(counts.astype(np.float32)).permute(0, 3, 1, 2)
    resized = interpolate(images, (settings.size, settings.size), mode="bilinear", align_corners=True)
    return resized.half().numpy()


def voxel_grid(events: np.ndarray, steps: int, sensor_size: tuple[int, int]) -> np.ndarray:
    """Spread each event over the two steps next to it, brighter ones as +1 and darker ones as -1.

        V[k, y, x] = sum over the events i at (x, y) of s_i max(0, 1 - |k - u_i|),
        u_i = (T - 1) (t_i - t_0) / (t_N - t_0),    s_i = +1 brighter, -1 darker

    Args:
        events: Array of `EVENT`. Not modified.
        steps: T, the number of steps.
        sensor_size: Height and width of the sensor [pixels].

    Returns:
        float32 `[T, H, W]`; its sum is the number of brighter minus that of darker events. Where all events have one
        time they are in the first step.

    Raises:
        RecordingError: the events are not valid.

    Source: Zhu et al., "Unsupervised Event-based Learning of Optical Flow, Depth, and Egomotion", CVPR 2019, equations
    1 and 2. Differs from it in: nothing. (E2VID and tonic scale time by T instead of T - 1 and lose a part of the last
    step: theirs with T steps is this with T + 1, without the last one.)

    >>> from ranvier.data.events.recording import make_events
    >>> columns = np.array([[0, 25, 100], [0, 0, 0], [0, 0, 0], [1, 1, 0]])
    >>> voxel_grid(make_events(*columns), 3, (1, 1)).flatten().tolist()
    [1.5, 0.5, -1.0]
    """
    check_count("steps", steps)
    check_events(events, sensor_size, "the recording")
    _check_polarities(events["p"], "the recording")
    height, width = sensor_size
    elapsed = (events["t"] - events["t"][0]).astype(np.float64)
    position = elapsed * ((steps - 1) / max(elapsed[-1], 1.0))
    before = np.minimum(position.astype(np.int64), steps - 1)
    share = position - before  # of the step after
    sign = 2.0 * events["p"] - 1.0
    cells = before * (height * width) + _pixels(events, width)
    # One step more than asked for: the last event's second neighbour, whose share is 0.
    cells = np.concatenate([cells, cells + height * width])
    weights = np.concatenate([sign * (1 - share), sign * share])
    grid = np.bincount(cells, weights, minlength=(steps + 1) * height * width)
    return grid.reshape(steps + 1, height, width)[:steps].astype(np.float32)


def _borders(times: np.ndarray, settings: FrameSettings) -> np.ndarray:
    """Number of the first event of each step, and the number of events, `[T + 1]`."""
    steps, count = settings.steps, len(times)
    if settings.bins == "count":
        return np.arange(steps + 1) * count // steps
    duration = max((int(times[-1]) - int(times[0])) // steps, 1)
    inner = np.searchsorted(times, times[0] + duration * np.arange(1, steps))
    return np.concatenate([[0], inner, [count]])


def _pixels(events: np.ndarray, width: int) -> np.ndarray:
    """Number of each event's pixel, row by row, int64."""
    return events["y"] * np.int64(width) + events["x"]


def _check_polarities(polarities: np.ndarray, where: str) -> None:
    if polarities.max() > 1:
        index = int((polarities > 1).argmax())
        raise RecordingError(
            f"{where}: event {index} has polarity {polarities[index]}, expected 1 (brighter) or 0 (darker). "
            "Convert it when the file is read."
        )
