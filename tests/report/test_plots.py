from pathlib import Path

import pytest
import torch
from PIL import Image

from ranvier.report import accuracy_curves, conversion_errors, early_exit_curve, energy_curves, spike_raster


def test_curves_show_every_point(tmp_path: Path) -> None:
    figure = accuracy_curves({"a": [0.5, 0.75], "b": [0.25]}, title="t", path=tmp_path / "a.png")
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["a"].get_ydata()) == [50, 75]
    assert list(lines["b"].get_xdata()) == [1]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 500


def test_curves_at_chosen_steps_with_spread_and_reference(tmp_path: Path) -> None:
    names = [f"{neuron}, {method}" for method in "abcdefgh" for neuron in ("x", "y")]
    figure = accuracy_curves(
        {name: [0.5, 0.75, 0.8] for name in names},
        steps=(1, 2, 4),
        spread={"x, a": [0.1, 0.05, 0.01]},
        groups={name: name[-1] for name in names},
        reference=("ANN", 0.9),
        path=tmp_path / "a.png",
    )
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["x, a"].get_xdata()) == [1, 2, 4]
    assert axes.get_xscale() == "log"
    assert axes.get_xticks().tolist() == [1, 2, 4]
    assert lines["x, a"].get_color() == lines["y, a"].get_color() != lines["x, b"].get_color()
    looks = {(lines[name].get_color(), lines[name].get_linestyle()) for name in names}
    assert len(looks) == len(names)  # eight groups, more than there are colours
    assert set(lines["ANN"].get_ydata()) == {90}
    (band,) = axes.collections
    assert band.get_datalim(axes.transData).y0 == pytest.approx(40)
    assert lines["x, a"].get_marker() != lines["y, a"].get_marker()  # where there is one point and no line
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(names) + 1


def test_more_accuracies_than_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="3 accuracies, but there are 2 steps"):
        accuracy_curves({"a": [0.5, 0.75, 0.8]}, steps=(1, 2))


def test_energies_for_other_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="2 energies and 1 accuracies, but there are 2 steps"):
        energy_curves({"a": ([1e-6, 2e-6], [0.5])}, steps=(1, 2))
    with pytest.raises(ValueError, match="no curves"):
        energy_curves({}, steps=(1, 2))


def test_energy_curves_show_points_and_the_ann(tmp_path: Path) -> None:
    figure = energy_curves(
        {"a": ([1e-6, 2e-6], [0.5, 0.75]), "b": ([2e-6, 5e-6], [0.6, 0.7])},
        steps=(1, 4),
        reference=("ANN", 1e-5, 0.9),
        title="t",
        path=tmp_path / "e.png",
    )
    (axes,) = figure.axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    assert lines == {
        "a": (pytest.approx([1, 2]), [50, 75]),
        "b": (pytest.approx([2, 5]), [60, 70]),
        "ANN": (pytest.approx([10]), [90]),
    }
    assert [text.get_text() for text in axes.texts] == ["T=1", "T=4"]
    assert axes.get_xscale() == "log"
    with Image.open(tmp_path / "e.png") as picture:
        assert picture.size[0] > 500


def test_early_exit_shows_the_choice_beside_fixed_steps(tmp_path: Path) -> None:
    figure = early_exit_curve(
        {"test": ([3.0, 2.0, 1.0], [0.9, 0.85, 0.5]), "held out": ([3.0, 1.0], [0.95, 0.6])},
        chosen=(1.5, 0.875),
        by_step=[0.5, 0.75, 0.9],
        title="t",
        path=tmp_path / "e.png",
    )
    (axes,) = figure.axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    assert lines == {
        "early exit: test": ([3, 2, 1], [90, 85, 50]),
        "early exit: held out": ([3, 1], [95, 60]),
        "t steps for all": ([1, 2], [50, 75]),
        "all 3 steps: 90.00 %": ([3], [90]),
        "chosen: 1.50 steps, 87.50 %": ([1.5], [87.5]),
    }
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == lines.keys()
    assert axes.get_xticks().tolist() == [1, 2, 3]
    assert axes.get_title(loc="left") == "t"
    with Image.open(tmp_path / "e.png") as picture:
        assert picture.size[0] > 500


def test_early_exit_over_many_steps_has_few_ticks() -> None:
    figure = early_exit_curve({"test": ([32.0, 1.0], [0.9, 0.1])}, chosen=(9.0, 0.85), by_step=[0.5] * 32)
    assert figure.axes[0].get_xticks().tolist() == [1, 2, 4, 8, 16, 32]


def test_early_exit_of_one_step() -> None:
    figure = early_exit_curve({"test": ([1.0], [0.9])}, chosen=(1.0, 0.9), by_step=[0.9])
    assert figure.axes[0].get_xticks().tolist() == [1]


def test_raster_separates_spikes_from_bursts(tmp_path: Path) -> None:
    spikes = torch.zeros(3, 2, 4)
    spikes[0, 1, 2] = 1.0
    spikes[2, 1, 3] = 1.7
    spikes[1, 0, 0] = 1.0  # of the other sample
    figure = spike_raster({"layer": spikes, "other": spikes}, sample=1, path=tmp_path / "r.png")
    assert len(figure.axes) == 2
    plain, burst = (points.get_offsets().tolist() for points in figure.axes[0].collections)
    assert plain == [[1, 2]]
    assert burst == [[3, 3]]


BEFORE, AFTER = [[0.9, 0.4], [2.5, 0.2], [0.3, 0.1]], [[0.1, 0.0], [0.2, 0.05], [0.3, 0.15]]


def test_errors_are_drawn_layer_by_layer_from_the_top(tmp_path: Path) -> None:
    figure = conversion_errors(["first", "second", "last"], BEFORE, AFTER, title="t", path=tmp_path / "e.png")
    left, right, bar = figure.axes
    for axes, errors in ((left, BEFORE), (right, AFTER)):
        (picture,) = axes.get_images()
        assert picture.get_array().tolist() == errors
        assert picture.get_extent() == [0.5, 2.5, 3, 0]  # steps from 1; the first layer on top
        assert [round(float(text.get_text()), 2) for text in axes.texts] == [e for row in errors for e in row]
        assert picture.get_clim() == (0.0, 1.0)  # the same colours on both sides, though one error is 2.5
    assert [label.get_text() for label in left.get_yticklabels()] == ["first", "second", "last"]
    assert "mean 0.73" in left.get_title()  # 4.4 / 6
    assert "mean 0.13" in right.get_title()  # 0.8 / 6
    assert bar.get_ylabel() == "relative mean error"
    assert figure.get_suptitle() == "t"
    with Image.open(tmp_path / "e.png") as picture:
        assert picture.format == "PNG"
        assert picture.size[0] > 500


def test_small_errors_use_all_colours() -> None:
    figure = conversion_errors(["a"], [[0.25, 0.125]], [[0.0, 0.0]])
    assert figure.axes[1].get_images()[0].get_clim() == (0.0, 0.25)
    conversion_errors(["a"], [[0.0]], [[0.0]])  # none at all


def test_many_steps_have_neither_numbers_nor_crowded_ticks() -> None:
    figure = conversion_errors(["a"], [[0.5] * 32], [[0.1] * 32])
    assert not figure.axes[0].texts
    assert figure.axes[0].get_xticks().tolist() == [1, 4, 8, 16, 32]


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="no curves"):
        accuracy_curves({})
    with pytest.raises(ValueError, match="no curves"):
        accuracy_curves({"a": []})
    for curves, by_step in (({}, [0.5]), ({"test": ([1.0], [0.5])}, [])):
        with pytest.raises(ValueError, match="no curves"):
            early_exit_curve(curves, chosen=(1.0, 0.5), by_step=by_step)
    with pytest.raises(ValueError, match="no layers"):
        spike_raster({})
    with pytest.raises(ValueError, match="no layers"):
        conversion_errors([], [], [])
