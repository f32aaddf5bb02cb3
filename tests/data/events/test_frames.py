from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ranvier.data.events import (
    BRIGHTER,
    DARKER,
    EVENT,
    FrameSettings,
    RecordingError,
    make_events,
    to_frames,
    voxel_grid,
)

SENSOR = (5, 7)
RECORDINGS = st.lists(
    st.tuples(st.integers(-50, 2000), st.integers(0, 6), st.integers(0, 4), st.integers(0, 1)), min_size=1, max_size=60
).map(lambda events: make_events(*np.array(sorted(events)).T))
SETTINGS = st.builds(FrameSettings, st.integers(1, 12), st.sampled_from(["time", "count"]))


def _noise(count: int, duration: int = 100_000, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    times = np.sort(random.integers(0, duration, count))
    height, width = SENSOR
    return make_events(
        times, random.integers(0, width, count), random.integers(0, height, count), random.integers(0, 2, count)
    )


def _tonic() -> Any:
    return pytest.importorskip("tonic.functional", reason="the oracle, tonic (GPL-3), is not installed")


def _for_tonic(events: np.ndarray) -> np.ndarray:
    return events.astype([("t", np.int64), ("x", np.int64), ("y", np.int64), ("p", np.int64)])


# ------------------------------------------------------------------------------------------------------- frames


def test_bins_of_equal_time_computed_by_hand() -> None:
    """10 to 31 us in 3 bins: they begin at 10, 17 and 24, and the last one takes in what is left, t = 31 too."""
    times = np.array([10, 16, 17, 23, 24, 30, 31])
    frames = to_frames(make_events(times, np.arange(7), 0 * times, 1 + 0 * times), FrameSettings(3), SENSOR)
    assert frames.shape == (3, 2, 5, 7)
    assert frames.dtype == np.int16
    assert frames[:, BRIGHTER, 0].tolist() == [[1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]]
    assert frames.sum() == 7


def test_bins_of_equal_count_computed_by_hand() -> None:
    times = np.array([0, 0, 0, 1, 900, 901, 902])
    frames = to_frames(make_events(times, np.arange(7), 0 * times, 0 * times), FrameSettings(3, "count"), SENSOR)
    assert frames[:, DARKER, 0].tolist() == [[1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]]


def test_rows_columns_and_polarities_are_not_confused() -> None:
    frames = to_frames(make_events(*np.array([[0, 1], [6, 2], [4, 1], [1, 0]])), FrameSettings(1), SENSOR)
    assert np.argwhere(frames).tolist() == [[0, DARKER, 1, 2], [0, BRIGHTER, 4, 6]]


@given(events=RECORDINGS, settings=SETTINGS)
def test_every_event_is_counted_once(events: np.ndarray, settings: FrameSettings) -> None:
    before = events.copy()
    frames = to_frames(events, settings, SENSOR)
    assert frames.shape == settings.shape(SENSOR)
    expected = np.zeros((2, *SENSOR), int)
    np.add.at(expected, (events["p"], events["y"], events["x"]), 1)
    assert np.array_equal(frames.sum(0), expected)
    assert np.array_equal(events, before)


@given(events=RECORDINGS, steps=st.integers(1, 12))
def test_bins_of_equal_count_differ_by_at_most_one(events: np.ndarray, steps: int) -> None:
    counts = to_frames(events, FrameSettings(steps, "count"), SENSOR).sum((1, 2, 3))
    assert counts.max() - counts.min() <= 1


@given(events=RECORDINGS, steps=st.integers(1, 12))
def test_bins_of_equal_time_are_a_loop_over_events(events: np.ndarray, steps: int) -> None:
    expected = np.zeros((steps, 2, *SENSOR), int)
    duration = max((int(events["t"][-1]) - int(events["t"][0])) // steps, 1)
    for t, x, y, p in events.tolist():
        expected[min((t - int(events["t"][0])) // duration, steps - 1), p, y, x] += 1
    assert np.array_equal(to_frames(events, FrameSettings(steps), SENSOR), expected)


def test_a_recording_shorter_than_the_bins() -> None:
    events = make_events(np.array([7, 7, 9]), np.zeros(3), np.zeros(3), np.zeros(3))
    assert to_frames(events, FrameSettings(5), SENSOR).sum((1, 2, 3)).tolist() == [2, 0, 1, 0, 0]
    assert to_frames(events, FrameSettings(5, "count"), SENSOR).sum((1, 2, 3)).tolist() == [0, 1, 0, 1, 1]


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_time_bins_are_those_of_tonic_and_hold_what_it_loses(steps: int) -> None:
    events = _noise(500)
    ours = to_frames(events, FrameSettings(steps), SENSOR)
    theirs = _tonic().to_frame_numpy(_for_tonic(events), (*SENSOR[::-1], 2), n_time_bins=steps)
    assert np.array_equal(ours[:-1], theirs[:-1])
    lost = 500 - int(theirs.sum())
    assert lost >= 1  # the last event is always among them
    assert (ours[-1] >= theirs[-1]).all()
    assert int(ours[-1].sum() - theirs[-1].sum()) == lost


def test_count_bins_are_those_of_tonic_where_it_loses_nothing() -> None:
    events = _noise(500)
    ours = to_frames(events, FrameSettings(10, "count"), SENSOR)
    theirs = _tonic().to_frame_numpy(_for_tonic(events), (*SENSOR[::-1], 2), n_event_bins=10)
    assert np.array_equal(ours, theirs)


def test_counts_above_a_byte_do_not_wrap() -> None:
    frames = to_frames(make_events(*np.zeros((4, 300), int)), FrameSettings(1), SENSOR)
    assert frames.max() == 300


@pytest.mark.parametrize("size", [None, 3])
def test_counts_above_int16_are_refused(size: int | None) -> None:
    events = make_events(*np.array([[0], [3], [2], [1]]).repeat(32768, axis=1))
    with pytest.raises(RecordingError, match="f.bin: column 3, row 2 has 32768 events of polarity 1 in step 0"):
        to_frames(events, FrameSettings(1, size=size), SENSOR, "f.bin")
    assert to_frames(events[1:], FrameSettings(1), SENSOR).max() == 32767


def test_resizing_is_bilinear_with_aligned_corners() -> None:
    """From 5 x 7 to 3 x 3: rows 0, 2, 4 and columns 0, 3, 6 of the sensor, exactly."""
    events = _noise(2000)
    frames = to_frames(events, FrameSettings(4), SENSOR)
    resized = to_frames(events, FrameSettings(4, size=3), SENSOR)
    assert resized.dtype == np.float16
    assert np.array_equal(resized, frames[:, :, ::2, ::3])


def test_resizing_between_pixels() -> None:
    """From 5 x 7 to 4 x 4, by the definition: output i lies at input i (n - 1) / 3."""
    events = _noise(2000)
    frames = to_frames(events, FrameSettings(4), SENSOR).astype(float)
    for axis, length in ((2, 5), (3, 7)):
        place = np.arange(4) * (length - 1) / 3
        before = np.minimum(place.astype(int), length - 2)
        share = (place - before).reshape((-1, 1) if axis == 2 else (-1,))
        frames = (1 - share) * frames.take(before, axis) + share * frames.take(before + 1, axis)
    # float16 has 11 bits
    np.testing.assert_allclose(to_frames(events, FrameSettings(4, size=4), SENSOR), frames, rtol=2**-11, atol=1e-6)


@pytest.mark.parametrize("size", [None, 48])
def test_polarities_lie_side_by_side(size: int | None) -> None:
    frames = torch.from_numpy(to_frames(_noise(50), FrameSettings(4, size=size), SENSOR))
    assert frames.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("x", 7, "card: event 1 is at column 7, row 0, outside a sensor of 5x7 pixels"),
        ("t", -1, "card: event 1 is at -1 us, before event 0"),
        ("p", 2, r"card: event 1 has polarity 2, expected 1 \(brighter\) or 0 \(darker\)"),
    ],
)
def test_what_is_not_a_recording_is_refused(column: str, value: int, message: str) -> None:
    events = make_events(*np.zeros((4, 3), int))
    events[column][1] = value
    with pytest.raises(RecordingError, match=message):
        to_frames(events, FrameSettings(), SENSOR, "card")
    with pytest.raises(RecordingError, match=message.removeprefix("card")):
        voxel_grid(events, 3, SENSOR)


def test_an_empty_recording_is_refused() -> None:
    with pytest.raises(RecordingError, match="holds no events"):
        to_frames(np.empty(0, EVENT), FrameSettings(), SENSOR)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps is 0, but must be a whole number of at least 1"),
        ({"bins": "events"}, "bins is 'events', but must be one of 'time', 'count'"),
        ({"size": 0}, "size is 0, but must be a whole number of at least 1"),
    ],
)
def test_what_settings_refuse(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrameSettings(**arguments)


# -------------------------------------------------------------------------------------------------- voxel grids


def test_voxel_grid_computed_by_hand() -> None:
    """4 steps over 0..30 us: t = 5 lies half way between steps 0 and 1, t = 28 at 2.8."""
    events = make_events(*np.array([[0, 5, 28, 30], [0, 1, 2, 2], [0, 0, 1, 1], [1, 0, 1, 1]]))
    grid = voxel_grid(events, 4, (2, 3))
    expected = np.zeros((4, 2, 3))
    expected[0, 0, 0] = 1
    expected[0, 0, 1] = expected[1, 0, 1] = -0.5
    expected[2, 1, 2], expected[3, 1, 2] = 0.2, 0.8 + 1
    assert grid.dtype == np.float32
    np.testing.assert_allclose(grid, expected, rtol=1e-6, atol=1e-7)  # float32


@given(events=RECORDINGS, steps=st.integers(1, 12))
def test_voxel_grid_keeps_every_event(events: np.ndarray, steps: int) -> None:
    grid = voxel_grid(events, steps, SENSOR)
    expected = np.zeros(SENSOR)
    np.add.at(expected, (events["y"], events["x"]), 2.0 * events["p"] - 1)
    assert grid.shape == (steps, *SENSOR)
    np.testing.assert_allclose(grid.sum(0), expected, atol=1e-4)  # up to 60 float32 numbers of up to 60 each


@given(events=RECORDINGS, steps=st.integers(2, 12))
def test_voxel_grid_is_a_loop_over_events(events: np.ndarray, steps: int) -> None:
    expected = np.zeros((steps, *SENSOR))
    first, last = int(events["t"][0]), int(events["t"][-1])
    for t, x, y, p in events.tolist():
        place = (steps - 1) * (t - first) / (last - first) if last > first else 0.0
        for step in range(steps):
            expected[step, y, x] += (2 * p - 1) * max(0.0, 1 - abs(step - place))
    np.testing.assert_allclose(voxel_grid(events, steps, SENSOR), expected, atol=1e-4)


def test_voxel_grid_of_one_more_step_is_that_of_tonic() -> None:
    events = _noise(500)
    theirs = _tonic().to_voxel_grid_numpy(_for_tonic(events), (*SENSOR[::-1], 2), n_time_bins=6)
    np.testing.assert_allclose(voxel_grid(events, 7, SENSOR)[:-1], theirs[:, 0], rtol=1e-5, atol=1e-5)  # float32
