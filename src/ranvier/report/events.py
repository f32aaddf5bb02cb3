"""Figures of event recordings: the events in space and time, and the frames that a network sees."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ranvier.data.events import BRIGHTER, DARKER
from ranvier.report.plots import FAINT, INK, PALETTE, _figure, _finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {BRIGHTER: PALETTE[1], DARKER: PALETTE[0]}
"""Red where it becomes brighter, blue where it becomes darker."""

_MOST_POINTS = 20_000  # more cover each other, and take seconds to draw
_COLUMNS = 8


def draw_recording(
    events: np.ndarray, sensor_size: tuple[int, int], *, title: str = "", path: str | Path | None = None
) -> Figure:
    """Events of one recording, coloured by time: in space and time, and on the sensor.

    At most 20,000 events are drawn, evenly spread over the recording.

    Args:
        events: Array of `EVENT`, in the order of time.
        sensor_size: Height and width of the sensor [pixels].
        title: Above the figure.
        path: Where to write a PNG; None writes nothing.

    Raises:
        ValueError: There are no events.
    """
    if len(events) == 0:
        raise ValueError("there are no events to draw. Pass a recording that has some.")
    count = len(events)
    share = float(np.mean(events["p"] == BRIGHTER))
    if count > _MOST_POINTS:
        events = events[np.linspace(0, count - 1, _MOST_POINTS).astype(int)]
    height, width = sensor_size
    x, y, milliseconds = events["x"], events["y"], events["t"] / 1000
    figure, (placeholder, flat) = _figure(9.0, 4.0, columns=2)
    space = figure.add_subplot(placeholder.get_subplotspec(), projection="3d")
    placeholder.remove()
    # Time runs to the right, and rows run down as on the sensor.
    points = space.scatter(milliseconds, x, y, c=milliseconds, s=3, linewidths=0, cmap="viridis", depthshade=False)
    space.set_ylim(0, width - 1)
    space.set_zlim(height - 1, 0)
    space.set_box_aspect((2, width / max(sensor_size), height / max(sensor_size)), zoom=1.12)
    space.view_init(elev=18, azim=-60)
    space.set_xlabel("time [ms]", fontsize=8)
    space.set_ylabel("column", fontsize=8)
    space.set_zlabel("row", fontsize=8, labelpad=-2)
    space.tick_params(labelsize=7, colors=FAINT, labelcolor=INK)
    for axis in (space.yaxis, space.zaxis):  # short in perspective: more labels would overlap
        axis.get_major_locator().set_params(nbins=4, integer=True)
    flat.scatter(x, y, c=milliseconds, s=max(2, 9000 / height / width), alpha=0.5, linewidths=0, cmap="viridis")
    flat.set_xlim(-0.5, width - 0.5)
    flat.set_ylim(height - 0.5, -0.5)
    flat.set_aspect("equal")
    flat.set_xlabel("column", fontsize=8)
    flat.set_ylabel("row", fontsize=8)
    flat.tick_params(labelsize=7)
    bar = figure.colorbar(points, ax=flat)
    bar.set_label("time [ms]", fontsize=8)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)
    what = f"{count:,} events, {100 * share:.0f} % brighter"
    figure.suptitle(f"{title}   {what}".strip(), fontsize=9, color=INK, x=0.01, ha="left")
    return _finish(figure, path)


def draw_frames(frames: Tensor, *, title: str = "", path: str | Path | None = None) -> Figure:
    """Frames of one recording side by side: red where it became brighter, blue where darker, purple where both.

    The fullest pixel of all frames has the full colour; the others have the root of their share of it, so that single
    events are seen.

    Args:
        frames: Counts of events or what became of them, >= 0, `[T, 2, H, W]`; channel 1 is brighter, 0 darker.
        title: Above the figure.
        path: Where to write a PNG; None writes nothing.

    Raises:
        ValueError: `frames` has another shape, or no step.
    """
    if frames.ndim != 4 or frames.shape[1] != 2 or 0 in frames.shape:
        raise ValueError(
            f"frames have shape {list(frames.shape)}, expected [T, 2, H, W]. Of a batch [T, B, 2, H, W] pass one "
            "recording: frames[:, 0]."
        )
    largest = float(frames.max())
    colored = _colored(frames.double() / max(largest, 1e-9))
    steps = len(frames)
    rows = math.ceil(steps / _COLUMNS)
    columns = math.ceil(steps / rows)
    figure, grid = _figure(max(3.2, 1.3 * columns), 0.5 + 1.45 * rows * frames.shape[2] / frames.shape[3], columns=1)
    grid[0].remove()
    for step, picture in enumerate(colored):
        axes = figure.add_subplot(rows, columns, step + 1)
        axes.imshow(picture, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#dddddd")
        axes.set_title(f"step {step + 1}" if step == 0 else f"{step + 1}", fontsize=8, color=INK, pad=3)
    legend = f"red: brighter   blue: darker   full colour: {largest:g}"
    figure.suptitle(f"{title}   {legend}".strip(), fontsize=9, color=INK, x=0.01, ha="left")
    return _finish(figure, path)


def _colored(shares: Tensor) -> np.ndarray:
    """Colours `[T, H, W, 3]` in [0, 1] of shares `[T, 2, H, W]` in [0, 1]; white where there is nothing."""
    from matplotlib.colors import to_rgb

    result = np.ones((len(shares), *shares.shape[2:], 3))
    for polarity, color in COLORS.items():
        ink = np.sqrt(shares[:, polarity].cpu().numpy())[..., None]
        result *= 1 - ink * (1 - np.array(to_rgb(color)))
    return result
