from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from ranvier.data.events import make_events
from ranvier.report.events import COLORS, draw_frames, draw_recording


def _events(count: int) -> np.ndarray:
    number = np.arange(count)
    return make_events(1000 * number, number % 6, number % 4, number % 2)


def test_events_are_drawn_in_space_and_time_and_on_the_sensor(tmp_path: Path) -> None:
    figure = draw_recording(_events(8), (4, 6), title="five", path=tmp_path / "r.png")
    flat, space, bar = figure.axes
    (points,) = space.collections
    times, columns, rows = points._offsets3d
    assert list(times) == list(range(8))  # [ms]
    assert list(columns) == [0, 1, 2, 3, 4, 5, 0, 1]
    assert list(rows) == [0, 1, 2, 3, 0, 1, 2, 3]
    (dots,) = flat.collections
    assert dots.get_offsets().tolist() == [[n % 6, n % 4] for n in range(8)]
    for drawn in (points, dots):
        assert list(drawn.get_array()) == list(range(8))  # coloured by time
    assert flat.get_ylim() == (3.5, -0.5)  # rows run down
    assert space.get_zlim() == (3, 0)
    assert bar.get_ylabel() == "time [ms]"
    assert figure.get_suptitle() == "five   8 events, 50 % brighter"
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.format == "PNG"
        assert picture.size[0] > 500


def test_of_very_many_events_some_are_drawn() -> None:
    figure = draw_recording(_events(50_001), (4, 6))
    (dots,) = figure.axes[0].collections
    times = dots.get_array()
    assert len(times) == 20_000
    assert (times[0], times[-1]) == (0, 50_000)
    assert figure.get_suptitle() == "50,001 events, 50 % brighter"


def test_frames_are_coloured_by_polarity(tmp_path: Path) -> None:
    frames = torch.zeros(10, 2, 3, 5, dtype=torch.uint8)
    frames[0, 1, 0, 0] = 4  # brighter
    frames[0, 0, 1, 1] = 4  # darker
    frames[9, :, 2, 4] = 4  # both
    frames[9, 1, 0, 3] = 1  # the root of a quarter is a half
    figure = draw_frames(frames, title="t", path=tmp_path / "f.png")
    assert [axes.get_title() for axes in figure.axes] == ["step 1", *map(str, range(2, 11))]
    pictures = [axes.get_images()[0].get_array() for axes in figure.axes]
    red, blue = (np.array(to_rgb(COLORS[polarity])) for polarity in (1, 0))
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    np.testing.assert_allclose(pictures[0][0, 0], red)
    np.testing.assert_allclose(pictures[0][1, 1], blue)
    np.testing.assert_allclose(pictures[9][2, 4], red * blue)
    np.testing.assert_allclose(pictures[9][0, 3], (1 + red) / 2)
    assert all((picture == 1).all() for picture in pictures[1:9])
    assert figure.get_suptitle() == "t   red: brighter   blue: darker   full colour: 4"
    with Image.open(tmp_path / "f.png") as picture:
        assert picture.size[0] > 500


@pytest.mark.parametrize(("steps", "rows", "columns"), [(1, 1, 1), (8, 1, 8), (10, 2, 5), (20, 3, 7)])
def test_frames_stand_in_even_rows_of_at_most_eight(steps: int, rows: int, columns: int) -> None:
    figure = draw_frames(torch.rand(steps, 2, 4, 4))
    assert len(figure.axes) == steps
    assert figure.axes[0].get_gridspec().get_geometry() == (rows, columns)


def test_empty_frames_are_white() -> None:
    figure = draw_frames(torch.zeros(1, 2, 4, 4))
    assert (figure.axes[0].get_images()[0].get_array() == 1).all()


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="no events to draw"):
        draw_recording(_events(0), (4, 6))
    for shape in ((2, 4, 4), (3, 1, 4, 4), (0, 2, 4, 4), (5, 1, 2, 4, 4)):
        with pytest.raises(ValueError, match=r"expected \[T, 2, H, W\]"):
            draw_frames(torch.zeros(shape))
