import json
import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ranvier.data import (
    ImageSet,
    ImageSplits,
    SaccadeSettings,
    SimulatedRecordings,
    load_digits,
    saccades,
    simulate,
    simulated_events,
)
from ranvier.data.events import EVENT, RecordingError, check_events

RIGHT, LEFT = ((-0.5, 0.0), (0.5, 0.0)), ((0.5, 0.0), (-0.5, 0.0))
PLAIN = SaccadeSettings(mismatch=0, noise_rate=0, refractory=0)
NOISY = SaccadeSettings(noise_rate=20, jitter=500, refractory=1500)


def _random(count: int, channels: int = 1, height: int = 8, width: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def _by_pixel(events: np.ndarray) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Time and polarity of the events of each pixel (x, y)."""
    pixels = defaultdict(list)
    for t, x, y, p in events.tolist():
        pixels[x, y].append((t, p))
    return pixels


def _crossings(
    samples: list[float], times: list[float], up: float, down: float, refractory: float
) -> list[tuple[float, bool]]:
    """Events of one pixel with these intensities at these times."""
    views = iter([torch.tensor([value], dtype=torch.float32) for value in samples])
    rise, fall = torch.tensor([math.exp(up)]), torch.tensor([math.exp(-down)])
    index, time, brighter = saccades._crossings(views, times, rise, fall, refractory)
    assert not index.any()
    return list(zip(time.tolist(), brighter.tolist(), strict=True))


def test_straight_intensity_crosses_where_the_formula_says() -> None:
    # I = 1 + t / 100 for 700 us: ln I reaches j * 0.5 at 100 (e^(j / 2) - 1), for j = 1 .. 4, as e^2 < 8 < e^2.5.
    found = _crossings([1.0, 8.0], [0.0, 700.0], 0.5, 0.5, refractory=0)
    assert [t for t, _ in found] == pytest.approx([100 * (math.exp(j / 2) - 1) for j in range(1, 5)], abs=1e-3)
    assert all(brighter for _, brighter in found)
    # Down again at the same speed, to 1.1: from the last reference, e^2, in steps of 0.25; 1.1 is above 1.
    found = _crossings([1.0, 8.0, 1.1], [0.0, 700.0, 1390.0], 0.5, 0.25, refractory=0)[4:]
    expected = [700 + 100 * (8 - math.exp(2 - j / 4)) for j in range(1, 8)]
    assert [t for t, _ in found] == pytest.approx(expected, abs=1e-3)
    assert not any(brighter for _, brighter in found)


@pytest.mark.parametrize("refractory", [0, 30, 130])
def test_straight_log_intensity_makes_events_at_equal_intervals(refractory: int) -> None:
    # ln I = t / 1000 in samples 1 us apart: an event every 100 us of sight. Between samples the straight line is off
    # by (1e-3)^2 / 8 in ln I, which is 1.3e-4 us; float32 intensities add 1e-7 / 1e-3 us for each sum.
    times = [float(t) for t in range(2001)]
    found = _crossings([math.exp(t / 1000) for t in times], times, 0.1, 0.1, refractory)
    period = 100 + refractory
    count = 1 + (2000 - 100 - 1) // period
    assert [t for t, _ in found] == pytest.approx([100 + j * period for j in range(count)], abs=5e-3)


def test_what_happens_while_a_pixel_is_blind_is_lost() -> None:
    # Events at 100 (e^0.5 - 1) = 64.9; blind to 264.9, so that the jump to 8 and back, 100 .. 200, goes unseen; then
    # the reference is the 3 that the pixel sees, and 3 e^0.5 = 4.95 comes at 300 + 100 * 1.95 / 5.
    samples, times = [1.0, 2.0, 8.0, 3.0, 3.0, 8.0], [0.0, 100.0, 150.0, 200.0, 300.0, 400.0]
    found = _crossings(samples, times, 0.5, 0.5, refractory=200)
    assert [t for t, _ in found] == pytest.approx([64.872, 300 + 20 * (3 * math.exp(0.5) - 3)], abs=1e-2)


def test_refractory_time_that_ends_within_a_line_starts_from_what_is_seen_then() -> None:
    # One line, I = 1 + t / 100: first event at 64.87, blind to 164.87, where I = 2.6487; next at I = 2.6487 e^0.5.
    found = _crossings([1.0, 8.0], [0.0, 700.0], 0.5, 0.5, refractory=100)
    first = 100 * (math.exp(0.5) - 1)
    second = 100 * ((1 + (first + 100) / 100) * math.exp(0.5) - 1)
    assert [t for t, _ in found[:2]] == pytest.approx([first, second], abs=1e-3)


def test_a_swept_pixel_counts_the_thresholds_in_its_contrast() -> None:
    # A step from black (0.1) to white (1.1) moves over 4 pixels: ln 11 = 2.398 holds 7 times 0.3. The corners are at
    # whole pixels, so that every pixel on the way sees all of it and no other pixel any.
    step = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    step[..., :4] = 255
    chosen = SaccadeSettings(path=RIGHT, amplitude=4, mismatch=0, noise_rate=0, refractory=0, surround="edge")
    (events,) = simulate(step, chosen, seeds=[0])
    pixels = _by_pixel(events)
    assert {x for x, _ in pixels} == {4, 5, 6, 7}  # the edge is at column 2 + 4, and moves by -2 .. 2
    assert {y for _, y in pixels} == set(range(12))
    assert {len(found) for found in pixels.values()} == {7}
    # The middle of the way: displacement 0 at 50 ms, when pixel 5 has just turned white and pixel 6 is still black.
    assert max(t for t, _ in pixels[5, 0]) <= 50_000 <= min(t for t, _ in pixels[6, 0])


def test_first_crossing_of_a_moving_edge_by_formula() -> None:
    # One saccade of 1 pixel: the share of white in the pixel is the way u - sin(2 pi u) / 2 pi, and 0.1 + share
    # crosses 0.1 e^0.3 where that is 0.1 (e^0.3 - 1).
    step = torch.zeros(1, 1, 6, 6, dtype=torch.uint8)
    step[..., :3] = 255
    chosen = SaccadeSettings(
        path=((0.0, 0.0), (0.5, 0.0)), amplitude=2, mismatch=0, noise_rate=0, interval=100, surround="edge"
    )
    (events,) = simulate(step, chosen, seeds=[0])
    target = 0.1 * (math.exp(0.3) - 1)
    low, high = 0.0, 1.0
    for _ in range(60):
        u = (low + high) / 2
        low, high = (low, u) if u - math.sin(2 * math.pi * u) / (2 * math.pi) > target else (u, high)
    first = {found[0][0] for found in _by_pixel(events).values()}
    assert len(first) == 1
    assert first.pop() == pytest.approx(1e5 * low, abs=5)  # the way is curved within 100 us


@pytest.mark.parametrize(("path", "polarity"), [(RIGHT, 1), (LEFT, 0)])
def test_polarity_is_the_sign_of_the_change(path: tuple, polarity: int) -> None:
    step = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    step[..., :4] = 255  # bright on the left: moving right makes pixels brighter
    chosen = SaccadeSettings(path=path, noise_rate=0, surround="edge")
    for image, expected in ((step, polarity), (255 - step, 1 - polarity)):
        (events,) = simulate(image, chosen, seeds=[0])
        assert len(events) > 0
        assert set(events["p"].tolist()) == {expected}


@settings(deadline=None)
@given(
    dark=st.integers(0, 254),
    contrasts=st.lists(st.integers(1, 255), min_size=2, max_size=2).map(sorted),
    path=st.sampled_from([RIGHT, LEFT]),
    threshold=st.floats(0.05, 1),
)
def test_more_contrast_makes_no_fewer_events(dark: int, contrasts: list[int], path: tuple, threshold: float) -> None:
    steps = torch.full((2, 1, 6, 6), dark, dtype=torch.uint8)
    for step, contrast in zip(steps, contrasts, strict=True):
        step[..., :3] = min(255, dark + contrast)
    chosen = SaccadeSettings(
        path=path, amplitude=2, interval=10_000, mismatch=0, noise_rate=0, refractory=0, surround="edge",
        threshold_brighter=threshold, threshold_darker=threshold,
    )  # fmt: skip
    less, more = simulate(steps, chosen, seeds=[0, 0])
    assert len(less) <= len(more)


def test_without_movement_there_is_only_noise() -> None:
    images = _random(60)
    stills = [SaccadeSettings(amplitude=0, noise_rate=40), SaccadeSettings(path=((0.2, 0.1),) * 4, noise_rate=40)]
    for still in stills:
        recordings = simulate(images, still, seeds=range(60))
        pixels = still.side(8, 8) ** 2
        expected = 60 * 40 * 0.3 * pixels
        # Four standard deviations of a Poisson count; and of pairs within 1 ms at one pixel both are dropped.
        count = sum(map(len, recordings))
        assert expected * (1 - 4 * 40e-3) - 4 * math.sqrt(expected) < count < expected + 4 * math.sqrt(expected)
        share = np.concatenate([events["p"] for events in recordings]).mean()
        assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(count)
        assert all(events["t"][0] >= 0 and events["t"][-1] < 300_000 for events in recordings)
    silent = simulate(images[:5], SaccadeSettings(amplitude=0, noise_rate=0), seeds=[0] * 5)
    assert [len(events) for events in silent] == [0] * 5


def test_a_uniform_image_makes_no_events_inside() -> None:
    grey = torch.full((1, 1, 8, 8), 200, dtype=torch.uint8)
    (events,) = simulate(grey, SaccadeSettings(noise_rate=0, surround="edge"), seeds=[0])
    assert len(events) == 0
    (framed,) = simulate(grey, SaccadeSettings(noise_rate=0, surround="black"), seeds=[0])
    assert len(framed) > 0


@settings(max_examples=40, deadline=None)
@given(
    refractory=st.integers(0, 20_000), noise_rate=st.floats(0, 200), jitter=st.integers(0, 3000),
    interval=st.integers(500, 100_000), seed=st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_refractory_time_holds_at_every_pixel(
    refractory: int, noise_rate: float, jitter: int, interval: int, seed: int
) -> None:
    chosen = SaccadeSettings(
        refractory=refractory, noise_rate=noise_rate, jitter=jitter, interval=interval, threshold_brighter=0.1
    )
    for events in simulate(_random(3, seed=seed % 1000), chosen, seeds=[seed, seed + 1, seed + 2]):
        check_events(events, (14, 14), "simulated")
        assert events["t"][-1] <= chosen.total + jitter
        for found in _by_pixel(events).values():
            assert (np.diff([t for t, _ in found]) >= refractory).all()


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 9),
    channels=st.sampled_from([1, 3]),
    sensor=st.sampled_from([None, 14, 17, 23]),
    data=st.data(),
)
def test_a_recording_does_not_depend_on_its_batch(
    count: int, channels: int, sensor: int | None, data: st.DataObject
) -> None:
    chosen = SaccadeSettings(sensor=sensor, noise_rate=20, jitter=500, interval=7_000)
    images, seeds = _random(count, channels, 8, 11), list(range(5, 5 + count))
    order = data.draw(st.permutations(range(count)))
    whole = simulate(images[order], chosen, seeds=[seeds[index] for index in order])
    for place, index in enumerate(order):
        (alone,) = simulate(images[index : index + 1], chosen, seeds=seeds[index : index + 1])
        assert alone.dtype == EVENT
        assert np.array_equal(alone, whole[place])


def test_a_recording_does_not_depend_on_where_batches_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    images = _random(7)
    whole = simulate(images, NOISY, seeds=range(7))
    monkeypatch.setitem(saccades._CHUNK, "cpu", 3 * 14 * 15)
    assert all(map(np.array_equal, simulate(images, NOISY, seeds=range(7)), whole))


def test_seeds_decide_noise_and_jitter_and_nothing_else_does() -> None:
    images = _random(1).expand(3, 1, 8, 8)
    torch.manual_seed(5)
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first, again, other = simulate(images, NOISY, seeds=[1, 1, 2])
    assert torch.equal(torch.get_rng_state(), state[0]), "the global generator of torch was used"
    assert np.random.get_state()[1].tolist() == state[1], "the global generator of NumPy was used"
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    silent = SaccadeSettings(noise_rate=0)
    assert np.array_equal(*simulate(images[:2], silent, seeds=[1, 2]))


def test_jitter_delays_each_pixel_as_a_whole() -> None:
    on_time, late = (
        _by_pixel(simulate(_random(1), SaccadeSettings(noise_rate=0, jitter=jitter), seeds=[3])[0])
        for jitter in (0, 400)
    )
    delays = set()
    for pixel, found in on_time.items():
        (delay,) = {b[0] - a[0] for a, b in zip(found, late[pixel], strict=True)}
        delays.add(delay)
    assert min(delays) >= 0
    assert max(delays) <= 400
    assert len(delays) > 50


def test_cameras_differ_in_their_mismatch_only() -> None:
    images = _random(1)
    (one,), (other,) = (simulate(images, SaccadeSettings(noise_rate=0, camera=c), seeds=[0]) for c in (0, 1))
    assert not np.array_equal(one, other)
    (one,), (other,) = (
        simulate(images, SaccadeSettings(noise_rate=0, camera=c, mismatch=0), seeds=[0]) for c in (0, 1)
    )
    assert np.array_equal(one, other)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), axis=st.sampled_from([0, 1]), sensor=st.sampled_from([None, 22]))
def test_a_mirrored_image_on_a_mirrored_path_makes_mirrored_events(seed: int, axis: int, sensor: int | None) -> None:
    chosen = {"mismatch": 0, "noise_rate": 0, "sensor": sensor}
    path = tuple((-x, y) if axis == 0 else (x, -y) for x, y in saccades.TRIANGLE)
    image = _random(1, seed=seed)
    (events,) = simulate(image, SaccadeSettings(**chosen), seeds=[0])
    (mirrored,) = simulate(image.flip(3 - axis), SaccadeSettings(path=path, **chosen), seeds=[0])
    last = (sensor or 14) - 1
    there = _by_pixel(mirrored)
    assert len(events) == len(mirrored) > 0
    for (x, y), found in _by_pixel(events).items():
        other = there[(last - x, y) if axis == 0 else (x, last - y)]
        assert [p for _, p in found] == [p for _, p in other]
        assert [t for t, _ in found] == pytest.approx([t for t, _ in other], abs=1)  # rounded down on other sides


def test_colour_is_reduced_to_luminance() -> None:
    grey = _random(1)
    (expected,) = simulate(grey, PLAIN, seeds=[0])
    (events,) = simulate(grey.expand(1, 3, 8, 8), PLAIN, seeds=[0])
    assert len(events) == len(expected)  # 0.299 + 0.587 + 0.114 = 1
    assert np.abs(events["t"] - expected["t"]).max() <= 2  # in another order of sums, with float32
    red, green = torch.zeros(2, 1, 3, 8, 8, dtype=torch.uint8)
    red[:, 0, 2:6, 2:6] = green[:, 1, 2:6, 2:6] = 255
    (dim,), (bright,) = simulate(red, PLAIN, seeds=[0]), simulate(green, PLAIN, seeds=[0])
    assert len(dim) < len(bright)


@pytest.mark.parametrize(("length", "size"), [(8, 28), (32, 40), (28, 28), (40, 24), (30, 7), (5, 1)])
def test_images_are_resized_as_torch_does(length: int, size: int) -> None:
    light = torch.rand(length, 6, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(
        light.permute(2, 0, 1)[:, None], size=(size, 6), mode="bilinear", antialias=True
    )
    result = saccades._resize(light, 0, size).permute(2, 0, 1)[:, None]
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)  # float32 sums of up to 9 terms


def test_images_are_centred_with_their_aspect_ratio() -> None:
    white = torch.full((1, 1, 4, 8), 255, dtype=torch.uint8)
    canvas = saccades._canvas(white, 22, SaccadeSettings(sensor=22))[:, :, 0]
    pad = 4
    assert canvas.shape == (22 + 2 * pad, 22 + 2 * pad)
    seen = (canvas > 0.5).nonzero()
    assert seen.min(0).values.tolist() == [pad + 7, pad + 3]  # 8 x 16 pixels of 22 x 22
    assert seen.max(0).values.tolist() == [pad + 14, pad + 18]
    assert canvas.max().item() == pytest.approx(1.1)
    assert canvas.min().item() == pytest.approx(0.1)


def test_a_digit_makes_about_as_many_events_as_a_recorded_one() -> None:
    # 20 x 20 pixels of 28 x 28, with strokes sharpened, as MNIST has them. N-MNIST has 4,200 events a recording.
    digits = torch.nn.functional.interpolate(load_digits().train.images[:20].float(), size=20, mode="bilinear")
    digits = torch.nn.functional.pad(((digits - 127) * 2 + 127).clamp(0, 255), (4,) * 4).byte()
    recordings = simulate(digits, SaccadeSettings(), seeds=range(20))
    assert 3_000 < np.mean([len(events) for events in recordings]) < 5_500
    assert 0.45 < np.mean([events["p"].mean() for events in recordings]) < 0.55


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_a_cpu_gives() -> None:
    images = _random(9, 3)
    results = [simulate(images.to(device), NOISY, seeds=range(9)) for device in ("cpu", "cuda")]
    assert all(map(np.array_equal, *results))


def test_tensors_are_divided_by_tensors() -> None:
    """By a plain number a GPU would divide as it multiplies with the inverse, which can differ in the last bit."""
    divisors = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
                divisors.append(args[1])
            return function(*args, **(kwargs or {}))

    with Watched():
        simulate(_random(3, 3), NOISY, seeds=range(3))
    assert len(divisors) > 10
    assert all(isinstance(divisor, Tensor) for divisor in divisors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"duration": 0}, "duration is 0, but must be a whole number of at least 1"),
        ({"interval": 0.5}, "interval is 0.5, but must be a whole number"),
        ({"sensor": 0}, "sensor is 0, but must be a whole number"),
        ({"sensor": 6}, "sensor is 6 but the movement takes 6 pixels"),
        ({"amplitude": -1.0}, "amplitude is -1.0, expected a finite number >= 0"),
        ({"noise_rate": math.inf}, "noise_rate is inf, expected a finite number"),
        ({"mismatch": math.nan}, "mismatch is nan, expected a finite number"),
        ({"refractory": 0.5}, "refractory is 0.5, expected a whole number"),
        ({"jitter": -1}, "jitter is -1, expected a finite number >= 0"),
        ({"camera": -1}, "camera is -1"),
        ({"threshold_brighter": 0.0}, "threshold_brighter is 0.0, expected at least 0.01"),
        ({"threshold_darker": math.nan}, "threshold_darker is nan, expected at least 0.01"),
        ({"offset": 0.0}, "offset is 0.0, expected a number > 0"),
        ({"surround": "grey"}, "surround is 'grey', but must be one of 'black', 'edge'"),
        ({"path": ((0.0, 0.0),)}, "path has 1 corners, expected at least 2"),
        ({"path": ((0.0, 0.0), (0.0, 0.6))}, "expected corners"),
        ({"path": ((0.0, 0.0), (0.0, math.nan))}, "expected corners"),
    ],
)
def test_settings_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SaccadeSettings(**change)


def test_images_that_cannot_be_simulated() -> None:
    with pytest.raises(TypeError, match=r"torch\.float32, expected torch\.uint8 \(0\.\.255\)"):
        simulate(_random(1).float(), PLAIN, seeds=[0])
    for wrong in (_random(1)[0], _random(1, 2), _random(1)[..., :0]):
        with pytest.raises(ValueError, match=r"expected \[N, C, H, W\] with 1 or 3 channels"):
            simulate(wrong, PLAIN, seeds=[0])
    with pytest.raises(ValueError, match="there are 1 seeds for 2 images"):
        simulate(_random(2), PLAIN, seeds=[0])
    with pytest.raises(ValueError, match="a seed is -3"):
        simulate(_random(2), PLAIN, seeds=[0, -3])
    assert simulate(_random(1)[:0], PLAIN, seeds=[]) == []


def _set(seed: int = 0, name: str = "noise") -> ImageSet:
    return ImageSet(_random(4, seed=seed), torch.tensor([0, 1, 0, 1]), ("a", "b"), name)


def test_recordings_of_an_image_set() -> None:
    recordings = SimulatedRecordings(_set(), NOISY, seed=3)
    assert recordings.name == "simulated noise"
    assert (recordings.classes, len(recordings), recordings.sensor_size) == (("a", "b"), 4, (14, 14))
    assert recordings.labels.tolist() == [0, 1, 0, 1]
    whole = recordings.read(range(4))
    assert all(map(np.array_equal, recordings.read([2, 0]), [whole[2], whole[0]]))
    assert recordings.read([]) == []
    for index in (4, -1):
        with pytest.raises(IndexError, match=f"there is no recording {index} in simulated noise, which has 4"):
            recordings.read([index])


def test_each_recording_of_each_split_has_its_own_noise() -> None:
    same = ImageSet(_random(1).expand(2, 1, 8, 8), torch.tensor([0, 0]), ("a",), "same")
    splits = simulated_events(ImageSplits(same, same), NOISY, seed=1)
    other = simulated_events(ImageSplits(same, same), NOISY, seed=2)
    found = [*splits.train.read([0, 1]), *splits.test.read([0, 1]), *other.train.read([0, 1])]
    assert len({events.tobytes() for events in found}) == 6


def test_identity_is_all_that_recordings_depend_on() -> None:
    recordings = SimulatedRecordings(_set(), NOISY, seed=3)
    identity = recordings.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert SimulatedRecordings(_set(name="another name"), NOISY, seed=3).identity() == identity
    pixels, relabelled = _random(4), _set()
    pixels[3, 0, 7, 7] ^= 1
    relabelled.labels[0] = 1
    others = [
        SimulatedRecordings(_set(), NOISY, seed=4),
        SimulatedRecordings(_set(), NOISY, seed=3, split=1),
        SimulatedRecordings(_set(), SaccadeSettings(), seed=3),
        SimulatedRecordings(ImageSet(pixels, _set().labels, ("a", "b"), "noise"), NOISY, seed=3),
        SimulatedRecordings(relabelled, NOISY, seed=3),
    ]
    assert len({json.dumps(other.identity()) for other in [recordings, *others]}) == 6


def test_an_image_in_which_nothing_happens_is_named() -> None:
    blank = ImageSet(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 0]), ("a",), "blank")
    with pytest.raises(RecordingError, match="simulated blank: recording 1 holds no events"):
        SimulatedRecordings(blank, PLAIN, seed=0).read([1])


def test_splits_are_simulated_apart_and_by_default_as_digits_are() -> None:
    digits = load_digits()
    splits = simulated_events(digits)
    assert (len(splits.train), len(splits.test)) == (1197, 600)
    assert splits.test.sensor_size == (14, 14)
    assert splits.train.identity()["settings"] == splits.test.identity()["settings"]
    (events,) = splits.test.read([7])
    check_events(events, (14, 14), "simulated")


def test_what_cannot_be_made_recordings() -> None:
    class Streamed:
        name = "large"

    with pytest.raises(TypeError, match="large is read one by one from disk, expected an ImageSet"):
        simulated_events(ImageSplits(_set(), Streamed()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed is -1"):
        SimulatedRecordings(_set(), NOISY, seed=-1)
