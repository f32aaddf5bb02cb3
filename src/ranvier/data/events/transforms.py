"""Random changes to the events of one recording: shift, flip, drop and jitter.

Each function leaves its argument as it is and returns events for which `check_events` holds: in the order of time,
inside the sensor, at least one. Where nothing would be left of a recording, it comes back as it was.
"""

from __future__ import annotations

import numpy as np


def shift_events(
    events: np.ndarray, max_shift: int, sensor_size: tuple[int, int], generator: np.random.Generator
) -> np.ndarray:
    """Move all events by the same number of columns and rows; those that leave the sensor are gone.

    Args:
        events: Array of `EVENT`.
        max_shift: Columns and rows are drawn from -max_shift .. max_shift [pixels], each equally often.
        sensor_size: Height and width of the sensor [pixels].
        generator: Source of randomness.

    Returns:
        The events that are still inside.

    Raises:
        ValueError: `max_shift` is negative.

    >>> from ranvier.data.events.recording import make_events
    >>> events = make_events(np.array([0, 1]), np.array([0, 5]), np.array([0, 5]), np.array([1, 0]))
    >>> shift_events(events, 0, (6, 6), np.random.default_rng(0))["x"].tolist()
    [0, 5]
    """
    if max_shift < 0:
        raise ValueError(f"max_shift is {max_shift}, expected pixels >= 0.")
    down, right = generator.integers(-max_shift, max_shift, 2, endpoint=True)
    height, width = sensor_size
    # In wide integers: a shift may be larger than what an address holds.
    x, y = events["x"] + np.int64(right), events["y"] + np.int64(down)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    if not inside.any():
        return events.copy()
    moved = events[inside]
    moved["x"], moved["y"] = x[inside], y[inside]
    return moved


def flip_events(
    events: np.ndarray, sensor_size: tuple[int, int], generator: np.random.Generator, probability: float = 0.5
) -> np.ndarray:
    """Mirror the recording left-right, with a probability.

    Args:
        events: Array of `EVENT`.
        sensor_size: Height and width of the sensor [pixels].
        generator: Source of randomness.
        probability: Of being mirrored.

    Returns:
        All events, mirrored or as they were.

    Raises:
        ValueError: `probability` is outside 0..1.

    >>> from ranvier.data.events.recording import make_events
    >>> events = make_events(np.array([0, 1]), np.array([0, 5]), np.array([0, 5]), np.array([1, 0]))
    >>> flip_events(events, (6, 8), np.random.default_rng(0), probability=1)["x"].tolist()
    [7, 2]
    """
    _check_share("probability", probability)
    flipped = events.copy()
    if generator.random() < probability:
        flipped["x"] = sensor_size[1] - 1 - events["x"]
    return flipped


def drop_events(events: np.ndarray, probability: float, generator: np.random.Generator) -> np.ndarray:
    """Drop each event with the same probability, whatever happens to the others.

    Args:
        events: Array of `EVENT`.
        probability: Of being dropped.
        generator: Source of randomness.

    Returns:
        The events that are left.

    Raises:
        ValueError: `probability` is outside 0..1.

    Source: Gu et al., "EventDrop: Data Augmentation for Event-based Learning", IJCAI 2021 (random drop). Differs from
    it in: there the number of dropped events is fixed, here it is random.

    >>> from ranvier.data.events.recording import make_events
    >>> events = make_events(*np.zeros((4, 1000), dtype=int))
    >>> 250 < len(drop_events(events, 0.7, np.random.default_rng(0))) < 350
    True
    """
    _check_share("probability", probability)
    return _left(events, generator.random(len(events)) >= probability)


def drop_interval(events: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Drop all events of an interval of time.

    Args:
        events: Array of `EVENT`.
        share: Length of the interval as a share of the recording's.
        generator: Source of randomness: the interval begins anywhere in the recording and may reach beyond its end.

    Returns:
        The events before and after the interval.

    Raises:
        ValueError: `share` is outside 0..1.

    Source: Gu et al., IJCAI 2021 (drop by time). Differs from it in: time runs from the first event, not from 0.

    >>> from ranvier.data.events.recording import make_events
    >>> events = make_events(np.arange(1000), *np.zeros((3, 1000), dtype=int))
    >>> int(np.diff(drop_interval(events, 0.2, np.random.default_rng(0))["t"]).max())
    201
    """
    _check_share("share", share)
    first, last = int(events["t"][0]), int(events["t"][-1])
    begin = first + generator.random() * (last - first)
    end = begin + share * (last - first)
    return _left(events, (events["t"] < begin) | (events["t"] >= end))


def drop_area(
    events: np.ndarray, share: float, sensor_size: tuple[int, int], generator: np.random.Generator
) -> np.ndarray:
    """Drop all events of a box of pixels.

    Args:
        events: Array of `EVENT`.
        share: Sides of the box as a share of those of the sensor; rounded, but at least one pixel.
        sensor_size: Height and width of the sensor [pixels].
        generator: Source of randomness: the box is anywhere inside the sensor.

    Returns:
        The events outside the box.

    Raises:
        ValueError: `share` is outside 0..1.

    Source: Gu et al., IJCAI 2021 (drop by area). Differs from the released code in: that drops the whole rows and the
    whole columns of the box.

    >>> from ranvier.data.events.recording import make_events
    >>> x, y = np.divmod(np.arange(100), 10)
    >>> len(drop_area(make_events(np.zeros(100), x, y, np.zeros(100)), 0.3, (10, 10), np.random.default_rng(0)))
    91
    """
    _check_share("share", share)
    inside = np.ones(len(events), dtype=bool)
    for axis, length in zip(("y", "x"), sensor_size, strict=True):
        size = max(round(share * length), 1)
        begin = generator.integers(length - size, endpoint=True)
        inside &= (events[axis] >= begin) & (events[axis] < begin + size)
    return _left(events, ~inside)


def event_drop(events: np.ndarray, sensor_size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """EventDrop: with equal chances nothing, `drop_interval`, `drop_area` or `drop_events`, each of random size.

    An interval is 0.1, 0.2 ... 0.9 of the time, a box 0.05, 0.10 ... 0.25 of the sides, and single events are dropped
    with probability 0.1, 0.2 ... 0.9.

    Args:
        events: Array of `EVENT`.
        sensor_size: Height and width of the sensor [pixels].
        generator: Source of randomness.

    Returns:
        The events that are left.

    Source: Gu et al., IJCAI 2021, with the sizes of the released code. Differs from it in: see the three functions.

    >>> from ranvier.data.events.recording import make_events
    >>> events = make_events(np.arange(100), *np.zeros((3, 100), dtype=int))
    >>> 0 < len(event_drop(events, (1, 1), np.random.default_rng(0))) <= 100
    True
    """
    choice = generator.integers(4)
    if choice == 1:
        return drop_interval(events, generator.integers(1, 10) / 10, generator)
    if choice == 2:
        return drop_area(events, generator.integers(1, 6) / 20, sensor_size, generator)
    if choice == 3:
        return drop_events(events, generator.integers(1, 10) / 10, generator)
    return events.copy()


def jitter_times(events: np.ndarray, std: float, generator: np.random.Generator) -> np.ndarray:
    """Move each event in time by a normally distributed amount, and put the events in order again.

    Events that come to have the same time stay in the order that they had. The recording keeps its span: no event
    becomes earlier than the first one was or later than the last one.

    Args:
        events: Array of `EVENT`.
        std: Standard deviation of the amount [us], which is rounded to whole us.
        generator: Source of randomness.

    Returns:
        As many events.

    Raises:
        ValueError: `std` is negative.

    >>> from ranvier.data.events.recording import make_events
    >>> events = make_events(np.arange(0, 500, 100), np.arange(5), np.zeros(5), np.zeros(5))
    >>> jitter_times(events, 5.0, np.random.default_rng(0))["x"].tolist()
    [0, 1, 2, 3, 4]
    """
    if not std >= 0:
        raise ValueError(f"std is {std}, expected us >= 0.")
    moved = events.copy()
    first, last = events["t"][0], events["t"][-1]
    amount = np.rint(generator.normal(0.0, std, len(events)).clip(first - last, last - first))
    moved["t"] = (events["t"] + amount.astype(np.int64)).clip(first, last)
    return moved[np.argsort(moved["t"], kind="stable")]


def _left(events: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return events[kept] if kept.any() else events.copy()


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}, expected 0 to 1.")
