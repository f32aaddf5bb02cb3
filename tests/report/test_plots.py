from pathlib import Path

import pytest
import torch
from PIL import Image

from ranvier.report import accuracy_curves, spike_raster


def test_curves_show_every_point(tmp_path: Path) -> None:
    figure = accuracy_curves({"a": [0.5, 0.75], "b": [0.25]}, title="t", path=tmp_path / "a.png")
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["a"].get_ydata()) == [50, 75]
    assert list(lines["b"].get_xdata()) == [1]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 500


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


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="no curves"):
        accuracy_curves({})
    with pytest.raises(ValueError, match="no layers"):
        spike_raster({})
