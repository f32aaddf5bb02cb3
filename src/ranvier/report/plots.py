"""Figures: accuracy by time step and for energy, early exit, spike rasters, errors of a conversion."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ranvier.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#2b2b2b"
FAINT = "#8a8a8a"
PALETTE = ("#0b6e99", "#d1495b", "#66a182", "#edae49", "#7d5ba6", "#5c6770", "#8a5a2b")
"""Told apart in print and with the common colour-vision deficiencies; blue and red come first."""
_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "D", "^")


def accuracy_curves(
    curves: Mapping[str, Sequence[float]],
    *,
    steps: Sequence[int] | None = None,
    spread: Mapping[str, Sequence[float]] | None = None,
    groups: Mapping[str, str] | None = None,
    reference: tuple[str, float] | None = None,
    title: str = "",
    path: str | Path | None = None,
) -> "Figure":
    """Accuracy against the number of time steps, one line per network.

    Args:
        curves: For each name, accuracies in [0, 1], those after `steps`.
        steps: Numbers of time steps, increasing; None for 1 .. T.
        spread: For some names, what to draw above and below each accuracy.
        groups: For each name, a group; lines of a group have one colour. None: each stands for itself.
        reference: Name and accuracy of a network without steps: a horizontal line.
        title: Above the axes.
        path: Where to write a PNG; None writes nothing.

    Raises:
        ValueError: There are no curves, or longer ones than there are steps.
    """
    if not any(curves.values()):
        raise ValueError("there are no curves to draw. Pass at least one name with its accuracies.")
    longest = max(map(len, curves.values()))
    steps = range(1, longest + 1) if steps is None else steps
    if longest > len(steps):
        raise ValueError(f"a curve has {longest} accuracies, but there are {len(steps)} steps. Pass one for each.")
    figure, axes = _accuracy_axes(len(curves) + (reference is not None), title)
    lines = _lines(list(curves), groups)
    for name, accuracy in curves.items():
        values = [100 * value for value in accuracy]
        x = steps[: len(values)]
        axes.plot(x, values, label=name, **lines[name])
        if spread and name in spread:
            low, high = ([y + sign * 100 * d for y, d in zip(values, spread[name], strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=lines[name]["color"], alpha=0.15, linewidth=0)
    if reference is not None:
        axes.axhline(100 * reference[1], color=FAINT, linewidth=1.2, linestyle=":", label=reference[0])
    axes.set_xlabel("time steps T")
    if len(steps) < steps[-1]:  # at equal distances where each doubles the one before it
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xticks(steps)
    _legend(figure, axes)
    return _finish(figure, path)


def energy_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    steps: Sequence[int],
    groups: Mapping[str, str] | None = None,
    reference: tuple[str, float, float] | None = None,
    title: str = "",
    path: str | Path | None = None,
) -> "Figure":
    """Accuracy against energy, one line per network with a point for each number of time steps.

    Args:
        curves: For each name, energies of an image [J] and accuracies in [0, 1], those after `steps`.
        steps: Numbers of time steps: written beside the points of the last curve.
        groups: As in `accuracy_curves`.
        reference: Name, energy and accuracy of a network without steps: a star.
        title: Above the axes.
        path: Where to write a PNG; None writes nothing.

    Raises:
        ValueError: There are no curves.
    """
    if not curves:
        raise ValueError("there are no curves to draw. Pass at least one name with its energies and accuracies.")
    for name, pair in curves.items():
        if {*map(len, pair)} != {len(steps)}:
            raise ValueError(
                f"{name!r} has {len(pair[0])} energies and {len(pair[1])} accuracies, but there are {len(steps)} "
                "steps. Pass one of both for each."
            )
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = _accuracy_axes(len(curves) + (reference is not None), title)
    lines = _lines(list(curves), groups)
    for name, (energies, accuracy) in curves.items():
        x, y = [1e6 * energy for energy in energies], [100 * value for value in accuracy]
        axes.plot(x, y, label=name, **lines[name])
    for step, *point in zip(steps, x, y, strict=True):
        axes.annotate(f"T={step}", point, (0, 7), textcoords="offset points", fontsize=7, color=INK, ha="center")
    if reference is not None:
        name, energy, value = reference
        axes.plot([1e6 * energy], [100 * value], "*", markersize=12, color=INK, label=name, linestyle="none")
    axes.margins(y=0.09)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("energy for an image [µJ]")
    _legend(figure, axes)
    return _finish(figure, path)


def early_exit_curve(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    chosen: tuple[float, float],
    by_step: Sequence[float],
    title: str = "",
    path: str | Path | None = None,
) -> "Figure":
    """Accuracy against the mean number of steps where samples stop early, next to that of fixed numbers of steps.

    Args:
        curves: For each set of images, mean steps and accuracies in [0, 1] of all thresholds; the first set is the one
            that the points belong to.
        chosen: Mean steps and accuracy of the threshold that was chosen.
        by_step: Accuracies without early exit, after 1 .. T steps for every sample.
        title: Above the axes.
        path: Where to write a PNG; None writes nothing.

    Raises:
        ValueError: There are no curves, or no accuracies.
    """
    if not curves or not by_step:
        raise ValueError("there are no curves to draw. Pass mean steps and accuracies, and those of fixed steps.")
    figure, (axes,) = _figure(6.4, 4.4)
    steps = len(by_step)
    for index, (name, (mean_steps, accuracy)) in enumerate(curves.items()):
        axes.plot(
            mean_steps,
            [100 * value for value in accuracy],
            linewidth=1.8,
            linestyle="-" if index == 0 else "--",
            color=PALETTE[0] if index == 0 else FAINT,
            label=f"early exit: {name}",
        )
    fixed = [100 * value for value in by_step]
    last = f"all {steps} steps: {fixed[-1]:.2f} %"
    rule = f"chosen: {chosen[0]:.2f} steps, {100 * chosen[1]:.2f} %"
    axes.plot(
        range(1, steps), fixed[:-1], "o", markersize=5, markerfacecolor="white", color=INK, label="t steps for all"
    )
    axes.plot([steps], fixed[-1:], "o", markersize=7, color=INK, label=last, clip_on=False)
    axes.plot([chosen[0]], [100 * chosen[1]], "D", markersize=8, color=PALETTE[1], label=rule, clip_on=False)
    axes.set_xlabel("mean time steps")
    axes.set_ylabel("accuracy %")
    axes.set_xticks(range(1, steps + 1) if steps <= 16 else [t for t in range(1, steps + 1) if t & (t - 1) == 0])
    axes.set_title(title, loc="left", color=INK)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    # Below the axes: inside, some curve would run through it.
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return _finish(figure, path)


def spike_raster(
    spikes: Mapping[str, Tensor], *, sample: int = 0, neurons: int = 80, title: str = "", path: str | Path | None = None
) -> "Figure":
    """Spikes of a few neurons of every layer, for one sample; bursts stand out.

    Args:
        spikes: For each layer, `[T, B, ...]` as `ranvier.evaluation.record_spikes` returns them.
        sample: Index in the batch.
        neurons: How many neurons of a layer to show, evenly spread over it.
        title: Above the figure.
        path: Where to write a PNG; None writes nothing.

    Raises:
        ValueError: There are no layers.
    """
    if not spikes:
        raise ValueError("there are no layers to draw. Pass what ranvier.evaluation.record_spikes returns.")
    figure, grid = _figure(1.2 + 1.7 * len(spikes), 4.4, columns=len(spikes))
    has_bursts = False
    for axes, (name, emitted) in zip(grid, spikes.items(), strict=True):
        shown = emitted[:, sample].flatten(1)
        total = shown.shape[1]
        shown = shown[:, torch.linspace(0, total - 1, min(neurons, total)).long()]
        burst = (shown != 0) & (shown != 1)
        for mask, color, size in ((shown == 1, PALETTE[0], 9), (burst, PALETTE[1], 20)):
            step, neuron = mask.nonzero(as_tuple=True)
            axes.scatter(step + 1, neuron, s=size, marker="s" if size > 9 else "o", color=color, linewidths=0)
        has_bursts |= bool(burst.any())
        rate = float((emitted[:, sample] != 0).float().mean())
        axes.set_title(f"{name}\n{total} neurons, rate {rate:.2f}", fontsize=8, color=INK)
        axes.set_xticks(range(1, len(shown) + 1))
        axes.set_xlim(0.5, len(shown) + 0.5)
        axes.set_ylim(-1, shown.shape[1])
        axes.set_yticks([])
        axes.set_xlabel("time step")
    grid[0].set_ylabel(f"up to {neurons} neurons of each layer")
    legend = "blue: spike" + ("   red: burst" if has_bursts else "")
    figure.suptitle(f"{title}   {legend}".strip(), fontsize=9, color=INK, x=0.01, ha="left")
    return _finish(figure, path)


def conversion_errors(
    names: Sequence[str],
    before: Sequence[Sequence[float]],
    after: Sequence[Sequence[float]],
    *,
    title: str = "",
    path: str | Path | None = None,
) -> "Figure":
    """Relative mean error of every layer at every time step, before and after a correction, side by side.

    Colours end at 1, where a layer is as wrong as if it were silent; up to 8 steps the numbers are written in.

    Args:
        names: Layers, in the order in which they run.
        before: For each layer, the error at steps 1 .. T.
        after: The same after correction.
        title: Above the figure.
        path: Where to write a PNG; None writes nothing.

    Raises:
        ValueError: There are no layers.
    """
    if not names:
        raise ValueError("there are no layers to draw. Pass the layers of an account.")
    height = 1.9 + 0.22 * len(names)
    figure, grid = _figure(7.2, height, columns=2)
    largest = max(map(max, (*before, *after)))
    top = min(max(largest, 1e-9), 1.0)
    steps = len(before[0])
    for axes, errors, what in zip(grid, (before, after), ("before correction", "after correction"), strict=True):
        picture = axes.imshow(
            errors, aspect="auto", cmap="magma_r", vmin=0, vmax=top, extent=(0.5, steps + 0.5, len(names), 0)
        )
        mean = sum(map(sum, errors)) / (len(names) * steps)
        axes.set_title(f"{what}, mean {mean:.2f}", fontsize=9, color=INK)
        # Beyond 8 steps the powers of two have room, but for the first of many.
        axes.set_xticks(
            [t for t in range(1, steps + 1) if steps <= 8 or t == 1 or (t >= steps / 8 and t & (t - 1) == 0)]
        )
        axes.set_xlabel("time step", fontsize=8)
        axes.set_yticks([])
        axes.tick_params(labelsize=8, length=2)
        axes.spines[:].set_visible(False)
        for (row, column), error in _cells(errors) if steps <= 8 else ():
            color = "white" if error > 0.4 * top else INK
            axes.text(column + 1, row + 0.5, f"{error:.2f}", fontsize=6, color=color, ha="center", va="center")
    grid[0].set_yticks([index + 0.5 for index in range(len(names))], names, fontsize=7)
    beyond = "max" if largest > top else "neither"
    bar = figure.colorbar(picture, ax=list(grid), aspect=8 * height, extend=beyond, extendfrac=0.15 / height)
    bar.set_label("relative mean error", fontsize=8)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)
    figure.suptitle(title, fontsize=9, color=INK, x=0.01, ha="left")
    return _finish(figure, path)


def _lines(names: Sequence[str], groups: Mapping[str, str] | None) -> dict[str, dict[str, Any]]:
    """How each line is drawn: a colour for each group, a style and a marker for each member of it."""
    group_of = {name: groups[name] if groups else name for name in names}
    order = list(dict.fromkeys(group_of.values()))
    lines = {}
    for index, (name, group) in enumerate(group_of.items()):
        place = order.index(group)
        member = (list(group_of.values())[:index].count(group) + 2 * (place // len(PALETTE))) % len(_STYLES)
        lines[name] = {
            "color": PALETTE[place % len(PALETTE)],
            "linewidth": 1.8,
            "linestyle": _STYLES[member],
            "marker": _MARKERS[member],
            "markersize": 5,
        }
    return lines


def _accuracy_axes(lines: int, title: str) -> tuple["Figure", Any]:
    """Figure and axes for that many lines; wider where `_legend` will stand beside the axes."""
    figure, (axes,) = _figure(8.6 if lines > len(PALETTE) else 6.4, 4.0)
    axes.set_ylabel("accuracy %")
    axes.set_title(title, loc="left", color=INK)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    return figure, axes


def _legend(figure: "Figure", axes: Any) -> None:
    """Inside, or beside the axes where there are many lines."""
    if len(axes.get_legend_handles_labels()[0]) > len(PALETTE):
        figure.legend(loc="outside right upper", frameon=False, fontsize=8, handlelength=3.2)
    else:
        axes.legend(frameon=False)


def _cells(rows: Sequence[Sequence[float]]) -> list[tuple[tuple[int, int], float]]:
    return [((i, j), value) for i, row in enumerate(rows) for j, value in enumerate(row)]


def _figure(width: float, height: float, columns: int = 1) -> tuple["Figure", Any]:
    # Not pyplot: it would pick a window system and keep figures alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, columns, squeeze=False)[0]
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=FAINT, labelcolor=INK)
    return figure, grid


def _finish(figure: "Figure", path: str | Path | None) -> "Figure":
    if path is not None:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")
    return figure
