from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranvier.data.events import (
    check_events,
    drop_area,
    drop_events,
    drop_interval,
    event_drop,
    flip_events,
    jitter_times,
    make_events,
    shift_events,
)

SENSOR = (5, 7)
RECORDINGS = st.lists(
    st.tuples(st.integers(-50, 500), st.integers(0, 6), st.integers(0, 4), st.integers(0, 1)), min_size=1, max_size=40
).map(lambda events: make_events(*np.array(sorted(events)).T))
SEEDS = st.integers(0, 1000)
SHARES = st.floats(0, 1)

Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]
TRANSFORMS = st.one_of(
    st.integers(0, 12).map(lambda size: lambda events, random: shift_events(events, size, SENSOR, random)),
    SHARES.map(lambda share: lambda events, random: flip_events(events, SENSOR, random, share)),
    SHARES.map(lambda share: lambda events, random: drop_events(events, share, random)),
    SHARES.map(lambda share: lambda events, random: drop_interval(events, share, random)),
    SHARES.map(lambda share: lambda events, random: drop_area(events, share, SENSOR, random)),
    st.just(lambda events, random: event_drop(events, SENSOR, random)),
    st.floats(0, 1e6).map(lambda std: lambda events, random: jitter_times(events, std, random)),
)


def _random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def _line(count: int) -> np.ndarray:
    """One event each us, all in one pixel."""
    return make_events(np.arange(count), np.full(count, 3), np.full(count, 2), np.arange(count) % 2)


@given(events=RECORDINGS, transform=TRANSFORMS, seed=SEEDS)
def test_a_recording_stays_a_recording(events: np.ndarray, transform: Transform, seed: int) -> None:
    before = events.copy()
    changed = transform(events, _random(seed))
    check_events(changed, SENSOR, "changed")
    assert np.array_equal(changed, transform(events, _random(seed)))
    assert not np.shares_memory(changed, events)
    assert np.array_equal(events, before)


# ----------------------------------------------------------------------------------------------------------- shift


@given(events=RECORDINGS, max_shift=st.integers(0, 40_000), seed=SEEDS)
def test_a_shift_moves_all_alike(events: np.ndarray, max_shift: int, seed: int) -> None:
    down, right = _random(seed).integers(-max_shift, max_shift, 2, endpoint=True).tolist()
    moved = [(t, x + right, y + down, p) for t, x, y, p in events.tolist()]
    inside = [event for event in moved if 0 <= event[1] < 7 and 0 <= event[2] < 5]
    assert shift_events(events, max_shift, SENSOR, _random(seed)).tolist() == (inside or events.tolist())


def test_shifts_reach_both_limits_equally_often() -> None:
    center = make_events(*np.array([[0], [3], [2], [1]]))
    columns = [int(shift_events(center, 2, SENSOR, _random(seed))["x"][0]) for seed in range(1000)]
    counts = np.bincount(columns, minlength=7)
    assert counts[[0, 6]].tolist() == [0, 0]
    assert (np.abs(counts[1:6] - 200) < 65).all()  # five standard deviations


# ------------------------------------------------------------------------------------------------------------ flip


@given(events=RECORDINGS, seed=SEEDS)
def test_a_flip_mirrors_columns(events: np.ndarray, seed: int) -> None:
    flipped = flip_events(events, SENSOR, _random(seed), 1.0)
    assert np.array_equal(flipped["x"], 6 - events["x"])
    for column in ("t", "y", "p"):
        assert np.array_equal(flipped[column], events[column])
    assert np.array_equal(flip_events(flipped, SENSOR, _random(seed), 1.0), events)
    assert np.array_equal(flip_events(events, SENSOR, _random(seed), 0.0), events)


def test_half_of_all_are_flipped() -> None:
    left = make_events(*np.zeros((4, 1), int))
    flipped = sum(int(flip_events(left, SENSOR, _random(seed))["x"][0]) == 6 for seed in range(1000))
    assert 420 < flipped < 580  # five standard deviations


# ------------------------------------------------------------------------------------------------------------ drop


@given(events=RECORDINGS, probability=SHARES, seed=SEEDS)
def test_what_is_not_dropped_is_as_it_was(events: np.ndarray, probability: float, seed: int) -> None:
    kept = _random(seed).random(len(events)) >= probability
    left = drop_events(events, probability, _random(seed))
    assert np.array_equal(left, events[kept] if kept.any() else events)


def test_events_are_dropped_with_the_probability() -> None:
    assert abs(len(drop_events(_line(10_000), 0.3, _random())) - 7000) < 230  # five standard deviations
    assert len(drop_events(_line(10), 0.0, _random())) == 10


def test_nothing_left_means_nothing_dropped() -> None:
    assert np.array_equal(drop_events(_line(10), 1.0, _random()), _line(10))
    assert np.array_equal(drop_area(_line(10), 1.0, SENSOR, _random()), _line(10))
    alone = make_events(*np.array([[5], [0], [0], [1]]))
    assert np.array_equal(shift_events(alone, 10**6, SENSOR, _random()), alone)


@given(seed=SEEDS, share=SHARES)
def test_an_interval_has_its_length_and_no_event(seed: int, share: float) -> None:
    events = _line(1001)
    left = drop_interval(events, share, _random(seed))["t"]
    begin = _random(seed).random() * 1000
    expected = [t for t in range(1001) if t < begin or t >= begin + share * 1000]
    assert left.tolist() == (expected or list(range(1001)))


@given(seed=SEEDS, share=SHARES)
def test_an_area_is_one_box_inside_the_sensor(seed: int, share: float) -> None:
    height, width = SENSOR
    y, x = np.divmod(np.arange(35), width)
    left = drop_area(make_events(np.zeros(35), x, y, np.zeros(35)), share, SENSOR, _random(seed))
    dropped = np.ones(SENSOR, bool)
    dropped[left["y"], left["x"]] = False
    rows, columns = np.flatnonzero(dropped.any(1)), np.flatnonzero(dropped.any(0))
    sides = [max(round(share * height), 1), max(round(share * width), 1)]
    if sides == [height, width]:
        assert len(left) == 35
        return
    assert [len(rows), len(columns)] == sides
    assert np.ptp(rows) + 1 == len(rows)
    assert np.ptp(columns) + 1 == len(columns)
    assert dropped[np.ix_(rows, columns)].all()


def test_event_drop_does_each_of_four_things() -> None:
    y, x = np.divmod(np.arange(2000) % 35, 7)
    events = make_events(np.arange(2000), x, y, np.zeros(2000))
    lengths = [len(event_drop(events, SENSOR, _random(seed))) for seed in range(400)]
    assert 60 < lengths.count(2000) < 150  # a quarter, and few intervals at the very end: five standard deviations
    kinds = set()
    for seed in range(40):
        left = event_drop(events, SENSOR, _random(seed))
        pixels = len(np.unique(left[["x", "y"]]))
        gap = np.diff(left["t"], prepend=-1, append=2000).max()
        kinds.add("none" if len(left) == 2000 else "area" if pixels < 35 else "interval" if gap > 190 else "events")
    assert kinds == {"none", "area", "interval", "events"}


# ---------------------------------------------------------------------------------------------------------- jitter


@given(events=RECORDINGS, std=st.floats(0, 1e30), seed=SEEDS)
def test_jitter_keeps_events_and_span(events: np.ndarray, std: float, seed: int) -> None:
    jittered = jitter_times(events, std, _random(seed))
    assert sorted(jittered[["x", "y", "p"]].tolist()) == sorted(events[["x", "y", "p"]].tolist())
    assert jittered["t"][0] >= events["t"][0]
    assert jittered["t"][-1] <= events["t"][-1]


def test_jitter_of_zero_changes_nothing() -> None:
    together = make_events(np.zeros(5), np.arange(5), np.zeros(5), np.zeros(5))
    assert np.array_equal(jitter_times(together, 0.0, _random()), together)
    assert np.array_equal(jitter_times(together, 100.0, _random()), together)  # a stable sort, and no span to move in


def test_jitter_has_its_deviation() -> None:
    events = make_events(np.arange(20_000) * 1000, *np.zeros((3, 20_000), int))  # too far apart to change places
    amounts = jitter_times(events, 50.0, _random())["t"] - events["t"]
    assert abs(amounts.mean()) < 1.8  # five standard deviations
    assert abs(amounts.std() - 50) < 1.3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shift_events(_line(3), -1, SENSOR, _random()), "max_shift is -1, expected pixels >= 0"),
        (lambda: flip_events(_line(3), SENSOR, _random(), 2.0), "probability is 2.0, expected 0 to 1"),
        (lambda: drop_events(_line(3), -0.5, _random()), "probability is -0.5, expected 0 to 1"),
        (lambda: drop_interval(_line(3), 1.5, _random()), "share is 1.5, expected 0 to 1"),
        (lambda: drop_area(_line(3), float("nan"), SENSOR, _random()), "share is nan, expected 0 to 1"),
        (lambda: jitter_times(_line(3), -1.0, _random()), "std is -1.0, expected us >= 0"),
    ],
)
def test_what_is_refused(call: Callable[[], np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
