"""A simulated event camera: still images, moved in front of a sensor that reports changes of log intensity.

What comes out is called *simulated* wherever it is named. The model, with sources, is `docs/simulated_events.md`.

Shapes: `N` images, `S` side of the sensor [pixels], `E` events.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ranvier.checks import check_choice, check_count
from ranvier.data.events.recording import RecordingSplits, check_events, make_events
from ranvier.data.images import ImageSet, ImageSplits

FORMAT = 1
"""Part of every identity. Raise it when the same settings give other events."""

TRIANGLE = ((-0.5, -0.5), (0.0, 0.5), (0.5, -0.5), (-0.5, -0.5))
"""Corners (x, y) of the path of an N-MNIST digit over the sensor, as fractions of the amplitude: three saccades."""

_SMALLEST_THRESHOLD = 0.01
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in ITU-R BT.601, as Pillow weighs them
_SURROUNDS = ("black", "edge")
_CHUNK = {"cpu": 2**15, "cuda": 2**22}
"""Pixels of all recordings that are simulated together. On a CPU that is as much as torch computes in one thread: with
more, its threads wait for each other after each of thousands of small steps, and where other programs run, for long."""


@dataclass(frozen=True)
class SaccadeSettings:
    """How the image moves, and what the camera is like.

    The side of the sensor is `side(height, width)`: that of the image plus a margin that holds the movement.

    Args:
        sensor: Height and width of the sensor [pixels]; the longer side of the image is then resized (bilinear,
            antialiased, the aspect ratio kept) to `sensor - margin`. None keeps the size of the image.
        path: Corners (x, y) of the path of the image, in -0.5 .. 0.5, x to the right and y down; one saccade leads
            from each to the next.
        amplitude: What 1 is in `path` [pixels].
        duration: Of one saccade [us].
        interval: Between two positions on the path at which intensities are computed, at most [us]; between them each
            intensity is a straight line.
        surround: What lies around the image: `"black"`, as on a dark screen, or `"edge"`, its outermost pixels drawn
            out, which suits photographs: their frame then makes no events.
        threshold_brighter: Increase of log intensity that makes an event of polarity 1 [natural log units].
        threshold_darker: Decrease of log intensity that makes an event of polarity 0 [natural log units].
        mismatch: Standard deviation of both thresholds over the pixels [natural log units]; no threshold is less
            than 0.01.
        camera: Seed of the mismatch: all recordings of one setting come from the same camera.
        refractory: Time after an event in which its pixel is blind [us]. The pixel then compares with what it sees.
        noise_rate: Events that nothing in the image causes, of either polarity [Hz, per pixel].
        jitter: Delay of each pixel, a whole number drawn for each recording from 0 .. jitter [us].
        offset: Added to intensities in 0 .. 1: light where the image is black. It bounds the contrast.

    Raises:
        ValueError: a number is out of its range, or the path has fewer than two corners or one outside -0.5 .. 0.5.

    Source: path, Orchard et al. 2015, Frontiers in Neuroscience 9, 437; pixel, Lichtsteiner et al. 2008, IEEE JSSC
    43(2), 566; interpolation, Rebecq et al. 2018 (ESIM), CoRL; mismatch and noise, Hu et al. 2021 (v2e), CVPRW.

    >>> SaccadeSettings().side(28, 28), SaccadeSettings(sensor=48, amplitude=8).margin
    (34, 8)
    """

    sensor: int | None = None
    path: tuple[tuple[float, float], ...] = TRIANGLE
    amplitude: float = 6.0
    duration: int = 100_000
    interval: int = 2_000
    surround: str = "black"
    threshold_brighter: float = 0.3
    threshold_darker: float = 0.3
    mismatch: float = 0.03
    camera: int = 0
    refractory: int = 1_000
    noise_rate: float = 0.3
    jitter: int = 0
    offset: float = 0.1

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("duration", "interval", *(("sensor",) if self.sensor is not None else ())):
            check_count(name, getattr(self, name))
        for name in ("amplitude", "mismatch", "camera", "refractory", "noise_rate", "jitter"):
            value = getattr(self, name)
            if not (0 <= value < math.inf):
                raise ValueError(f"{name} is {value}, expected a finite number >= 0. Pass 0 to switch it off.")
        for name in ("camera", "refractory", "jitter"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a whole number.")
        for name in ("threshold_brighter", "threshold_darker"):
            value = getattr(self, name)
            if not (_SMALLEST_THRESHOLD <= value < math.inf):
                raise ValueError(
                    f"{name} is {value}, expected at least {_SMALLEST_THRESHOLD} [log units]. 0.3 is usual."
                )
        if not (0 < self.offset < math.inf):
            raise ValueError(f"offset is {self.offset}, expected a number > 0: the log of black must be finite.")
        check_choice("surround", self.surround, _SURROUNDS)
        if len(self.path) < 2:
            raise ValueError(f"path has {len(self.path)} corners, expected at least 2. To stand still, repeat one.")
        if not all(len(corner) == 2 and all(abs(value) <= 0.5 for value in corner) for corner in self.path):
            raise ValueError(
                f"path is {self.path}, expected corners (x, y) in -0.5 .. 0.5. Set its size in pixels with amplitude."
            )
        if self.sensor is not None and self.sensor <= self.margin:
            raise ValueError(
                f"sensor is {self.sensor} but the movement takes {self.margin} pixels of it, which leaves none for the "
                "image. Raise sensor or lower amplitude."
            )

    @property
    def margin(self) -> int:
        """Pixels by which the sensor is larger than the image: the smallest even number that holds the amplitude."""
        return 2 * math.ceil(self.amplitude / 2)

    @property
    def total(self) -> int:
        """Duration of a recording [us]."""
        return self.duration * (len(self.path) - 1)

    def side(self, height: int, width: int) -> int:
        """Height and width of the sensor [pixels] for images of that size."""
        return self.sensor or max(height, width) + self.margin


def simulate(images: Tensor, settings: SaccadeSettings, *, seeds: Sequence[int]) -> list[np.ndarray]:
    """Record moving images with a simulated event camera.

        I(t) = offset + luminance / 255         what a pixel sees of the moved image, in area-weighted means
        event when ln I(t) - ln I(t0) > threshold_brighter or < -threshold_darker
        t0 = time of the event + refractory     the pixel is blind meanwhile

    Each pixel starts with t0 = 0. Times are those at which the straight line between two samples of I crosses; they
    are rounded down to whole microseconds.

    Args:
        images: uint8 `[N, C, H, W]`, C = 1 or 3, on any device. Colour is reduced to luminance.
        settings: The movement and the camera.
        seeds: One for each image, >= 0: of the noise and the jitter of its recording.

    Returns:
        For each image its events, an array of `EVENT` `[E]` in the order of time, rows, columns and polarity. It
        follows from pixels, settings and seed alone. It is empty where nothing moves and noise makes no event.

    Raises:
        TypeError: `images` is not uint8.
        ValueError: wrong shape, another number of seeds than of images, or a seed < 0.

    Source: see `SaccadeSettings`. Differs from it in: noise is laid over the events and moves no reference.

    >>> square = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    >>> square[..., 10:18, 10:18] = 255
    >>> (events,) = simulate(square, SaccadeSettings(noise_rate=0), seeds=[0])
    >>> int(events["x"].min()), int(events["x"].max())  # 10..17, plus the margin of 3, plus and minus 3
    (10, 23)
    """
    if images.dtype != torch.uint8:
        raise TypeError(
            f"images have dtype {images.dtype}, expected torch.uint8 (0..255). Simulate before normalising."
        )
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise ValueError(f"images have shape {tuple(images.shape)}, expected [N, C, H, W] with 1 or 3 channels.")
    if len(seeds) != len(images):
        raise ValueError(f"there are {len(seeds)} seeds for {len(images)} images. Pass one for each image.")
    if any(seed < 0 for seed in seeds):
        raise ValueError(f"a seed is {min(seeds)}, expected whole numbers >= 0.")
    side = settings.side(*images.shape[2:])
    count = max(1, _CHUNK.get(images.device.type, _CHUNK["cuda"]) // (side * (side + 1)))
    return [
        events
        for start in range(0, len(images), count)
        for events in _record(images[start : start + count], side, settings, seeds[start : start + count])
    ]


@dataclass(frozen=True)
class SimulatedRecordings:
    """An image set as event recordings, simulated whenever they are read: a `Recordings`.

    Args:
        images: What the camera sees.
        settings: The movement and the camera.
        seed: With `split` and the index, the seed of each recording.
        split: Number of the split, so that training and test recordings have other noise.

    >>> pets = ImageSet(torch.eye(8).byte().mul(255).expand(2, 1, 8, 8), torch.tensor([0, 1]), ("cat", "dog"), "pets")
    >>> recordings = SimulatedRecordings(pets, SaccadeSettings(), seed=0)
    >>> recordings.name, len(recordings), recordings.sensor_size, recordings.read([1])[0].dtype.names
    ('simulated pets', 2, (14, 14), ('t', 'x', 'y', 'p'))
    """

    images: ImageSet
    settings: SaccadeSettings
    seed: int
    split: int = 0

    def __post_init__(self) -> None:
        """Check the seed."""
        if self.seed < 0 or self.split < 0:
            raise ValueError(f"seed is {self.seed} and split {self.split}, expected whole numbers >= 0.")

    @property
    def name(self) -> str:
        """The name of the image set after the word "simulated"."""
        return f"simulated {self.images.name}"

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class."""
        return self.images.classes

    @property
    def labels(self) -> Tensor:
        """Class indices, int64 `[N]`."""
        return self.images.labels

    @property
    def sensor_size(self) -> tuple[int, int]:
        """Height and width of the sensor [pixels]."""
        _, height, width = self.images.shape
        side = self.settings.side(height, width)
        return side, side

    def __len__(self) -> int:
        """Number of recordings."""
        return len(self.images)

    def read(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Simulate the recordings at `indices`, arrays of `EVENT`.

        Raises:
            IndexError: an index is not in `0 .. len(self) - 1`.
            RecordingError: a recording has no events: the image is uniform, and there is no noise.
        """
        indices = [int(index) for index in indices]
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"there is no recording {index} in {self.name}, which has {len(self)}.")
        seeds = [_recording_seed(self.seed, self.split, index) for index in indices]
        chosen = self.images.images[torch.tensor(indices, dtype=torch.int64, device=self.images.images.device)]
        recordings = simulate(chosen, self.settings, seeds=seeds)
        for index, events in zip(indices, recordings, strict=True):
            check_events(events, self.sensor_size, f"{self.name}: recording {index}")
        return recordings

    def identity(self) -> Any:
        """What the recordings and their labels depend on, as json."""
        return {
            "simulated": FORMAT,
            "images": self._checksum,
            "settings": asdict(self.settings) | {"path": [list(corner) for corner in self.settings.path]},
            "seed": self.seed,
            "split": self.split,
        }

    @cached_property
    def _checksum(self) -> str:
        digest = hashlib.sha256(repr((tuple(self.images.images.shape), self.classes)).encode())
        for tensor in (self.images.images, self.images.labels):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:32]


def simulated_events(splits: ImageSplits, settings: SaccadeSettings | None = None, seed: int = 0) -> RecordingSplits:
    """Both parts of an image set as simulated event recordings.

    Args:
        splits: Images that fit in memory.
        settings: The movement and the camera; None means `SaccadeSettings()`.
        seed: Of noise and jitter. Training recordings differ from test recordings in theirs.

    Raises:
        TypeError: a part is `StreamedImages`.

    >>> from ranvier.data import load_digits
    >>> simulated_events(load_digits()).test.name
    'simulated digits'
    """
    parts = []
    for number, part in enumerate((splits.train, splits.test)):
        if not isinstance(part, ImageSet):
            raise TypeError(
                f"{part.name} is read one by one from disk, expected an ImageSet. Raise max_bytes= when loading it."
            )
        parts.append(SimulatedRecordings(part, settings or SaccadeSettings(), seed, number))
    return RecordingSplits(*parts)


def _recording_seed(seed: int, split: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, split, index)).generate_state(1, np.uint64)[0])


def _random(seed: int) -> np.random.RandomState:
    """Draws that NumPy has frozen, unlike those of default_rng; its usual generator takes ten times as long to seed."""
    return np.random.RandomState(np.random.PCG64(seed))


# Everything below keeps to sums, products and quotients of two numbers at a time. Those are rounded in one way only,
# whereas logarithms, and products fused with sums, can differ in the last bit between the middle and the end of a row:
# what a recording holds would then depend on its place in the batch. Quotients are of two tensors: torch divides by a
# plain number on a GPU as it multiplies with its inverse, which rounds twice.


def _record(images: Tensor, side: int, settings: SaccadeSettings, seeds: Sequence[int]) -> Iterator[np.ndarray]:
    """Simulate images that are few enough to be handled together."""
    times, positions = _journey(settings)
    canvas = _canvas(images, side, settings)
    rise, fall = (factor.to(images.device).expand(side, side, len(images)) for factor in _factors(side, settings))
    index, time, brighter = _crossings(_views(canvas, positions, side), times, rise, fall, settings.refractory)
    pixel, recording = np.divmod(index.cpu().numpy(), len(images))
    t, p = np.floor(time.cpu().numpy()).astype(np.int64), brighter.cpu().numpy().astype(np.int64)
    noises, delays = zip(*(_draw(seed, side, settings) for seed in seeds), strict=True)
    noise = [np.concatenate(column) for column in zip(*noises, strict=True)]
    of = np.repeat(np.arange(len(images)), [len(columns[0]) for columns in noises])
    keep = _apart(noise[0], of * side**2 + noise[1], t, recording * side**2 + pixel, settings.refractory)
    recording = np.concatenate([recording, of[keep]])
    t, pixel, p = (np.concatenate([a, b[keep]]) for a, b in zip((t, pixel, p), noise, strict=True))
    t = t + np.stack(delays)[recording, pixel]
    # One integer for each event sorts by recording, time, row, column and polarity at once.
    pixel_bits, time_bits = (side**2).bit_length(), (settings.total + settings.jitter).bit_length()
    key = np.sort(((recording << time_bits | t) << pixel_bits | pixel) << 1 | p)
    p, pixel = key & 1, (key >> 1) & ((1 << pixel_bits) - 1)
    t = (key >> (1 + pixel_bits)) & ((1 << time_bits) - 1)
    y, x = np.divmod(pixel, side)
    ends = np.searchsorted(key >> (1 + pixel_bits + time_bits), np.arange(len(images) + 1))
    for start, end in pairwise(ends):
        yield make_events(t[start:end], x[start:end], y[start:end], p[start:end])


def _journey(settings: SaccadeSettings) -> tuple[list[float], list[tuple[float, float]]]:
    """Times [us] and displacements (x, y) [pixels] of the image at all samples."""
    count = math.ceil(settings.duration / settings.interval)
    times, positions = [0.0], [settings.path[0]]
    for number, (start, end) in enumerate(pairwise(settings.path)):
        for sample in range(1, count + 1):
            u = sample / count
            way = u - math.sin(2 * math.pi * u) / (2 * math.pi)  # the speed is a raised cosine, 0 at both ends
            times.append((number + u) * settings.duration)
            positions.append((start[0] * (1 - way) + end[0] * way, start[1] * (1 - way) + end[1] * way))
    return times, [(x * settings.amplitude, y * settings.amplitude) for x, y in positions]


def _canvas(images: Tensor, side: int, settings: SaccadeSettings) -> Tensor:
    """Intensities of the sensor's surface and all that moves over it, float32 `[S + 2 pad, S + 2 pad, N]`.

    The images come last: what is shifted in the first two dimensions then still lies in long rows.
    """
    light = images.permute(2, 3, 0, 1).float()
    if images.shape[1] == 1:
        light = light[..., 0]
    else:
        red, green, blue = (light[..., channel] * weight for channel, weight in enumerate(_LUMA))
        light = red + green + blue
    if settings.sensor is not None:
        scale = (side - settings.margin) / max(light.shape[:2])
        for axis in (0, 1):
            light = _resize(light, axis, max(1, round(scale * light.shape[axis])))
    pad = settings.margin // 2 + 1
    for axis in (0, 1):
        length = light.shape[axis]
        places = torch.arange(-pad, side + pad, device=light.device) - (side - length) // 2
        light = light.index_select(axis, places.clamp(0, length - 1))
        if settings.surround == "black":
            outside = (places < 0) | (places >= length)
            light[(slice(None),) * axis + (outside,)] = 0
    return (light / light.new_full((), 255) + settings.offset).contiguous()


def _resize(light: Tensor, axis: int, size: int) -> Tensor:
    """Resample one axis with a triangle, widened where it shrinks: bilinear, antialiased."""
    length = light.shape[axis]
    if size == length:
        return light
    step = length / size
    width = max(step, 1.0)
    centre = (np.arange(size) + 0.5) * step - 0.5
    taps = np.floor(centre - width)[:, None] + np.arange(1, math.ceil(2 * width) + 1)  # [size, taps]
    weight = np.clip(1 - np.abs(taps - centre[:, None]) / width, 0, None) * ((taps >= 0) & (taps < length))
    weight /= weight.sum(1, keepdims=True)
    places = torch.from_numpy(taps.clip(0, length - 1)).long().to(light.device)
    weights = torch.from_numpy(weight).float().to(light.device)
    shape = [1] * light.ndim
    shape[axis] = size
    result = light.index_select(axis, places[:, 0]) * weights[:, 0].view(shape)
    for tap in range(1, taps.shape[1]):
        result += light.index_select(axis, places[:, tap]) * weights[:, tap].view(shape)
    return result


def _views(canvas: Tensor, positions: Sequence[tuple[float, float]], side: int) -> Iterator[Tensor]:
    """What the sensor sees at each position, float32 `[S, S, N]`; a view is overwritten two positions later."""
    pad, count = (len(canvas) - side) // 2, canvas.shape[2]
    across, product = canvas.new_empty(2, side + 1, side, count)
    views = canvas.new_empty(2, side, side, count)
    for number, (x, y) in enumerate(positions):
        left, top = math.floor(pad - x), math.floor(pad - y)
        right_share, lower_share = pad - x - left, pad - y - top
        rows, view = canvas[top : top + side + 1], views[number % 2]
        torch.mul(rows[:, left : left + side], 1 - right_share, out=across)
        torch.mul(rows[:, left + 1 : left + 1 + side], right_share, out=product)
        across.add_(product)
        torch.mul(across[:-1], 1 - lower_share, out=view)
        torch.mul(across[1:], lower_share, out=product[1:])
        yield view.add_(product[1:])


def _factors(side: int, settings: SaccadeSettings) -> tuple[Tensor, Tensor]:
    """By what the intensity at each pixel must rise and fall to make an event, float32 `[S, S, 1]`."""
    random = _random(settings.camera)
    thresholds = random.standard_normal((2, side, side, 1)) * settings.mismatch
    thresholds += np.reshape([settings.threshold_brighter, settings.threshold_darker], (2, 1, 1, 1))
    rise, fall = np.exp(np.maximum(thresholds, _SMALLEST_THRESHOLD) * np.reshape([1, -1], (2, 1, 1, 1)))
    return torch.from_numpy(rise).float(), torch.from_numpy(fall).float()


def _crossings(
    views: Iterator[Tensor], times: Sequence[float], rise: Tensor, fall: Tensor, refractory: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Events of pixels whose intensities are straight lines between `views`.

    Only pixels in which something happens are computed one by one; the rest is compared with the two intensities at
    which the next event would be.

    Args:
        views: Intensities > 0 at all times, float32, of one shape.
        times: When, ascending [us].
        rise: The factor > 1 by which an intensity must exceed the last one compared with, of the same shape.
        fall: The factor < 1 for the other polarity.
        refractory: Time [us].

    Returns:
        Index into the flattened shape, int64 `[E]`; time [us], float64 `[E]`; whether it became brighter, bool `[E]`.
    """
    before = next(views)
    upper, lower = (before * rise).flatten(), (before * fall).flatten()
    before, rise, fall = before.flatten(), rise.flatten(), fall.flatten()
    blind, release = upper.new_empty(0, dtype=torch.int64), upper.new_empty(0, dtype=torch.float64)
    found = [(blind, release, blind.bool())]
    for (start, end), view in zip(pairwise(times), views, strict=True):
        after, span = view.flatten(), release.new_full((), end - start)
        # The pixels in which something happens: those that cross a level, and those that see again.
        pixel = ((after > upper) | (after < lower)).nonzero().flatten()
        first, last = before[pixel].double(), after[pixel].double()
        up, down = upper[pixel].double(), lower[pixel].double()
        clock = torch.full_like(first, start)
        if len(blind):
            seeing, since = _where(release <= end, blind, release)
            blind, release = _where(release > end, blind, release)
            a, b = before[seeing].double(), after[seeing].double()
            seen = a + (b - a) * ((since - start) / span)
            pixel, clock = torch.cat([pixel, seeing]), torch.cat([clock, since])
            first, last = torch.cat([first, a]), torch.cat([last, b])
            up = torch.cat([up, seen * rise[seeing]])
            down = torch.cat([down, seen * fall[seeing]])
        while len(pixel):  # one event of each at a time, until none crosses before the line ends
            upper[pixel], lower[pixel] = up.float(), down.float()
            brighter = last > up
            level = torch.where(brighter, up, down)
            columns = (pixel, clock, first, last, level, brighter)
            pixel, clock, first, last, level, brighter = _where(brighter | (last < down), *columns)
            if not len(pixel):
                break
            time = (start + (level - first) / (last - first) * (end - start)).maximum(clock).clamp_(max=end)
            found.append((pixel, time, brighter))
            clock = time + refractory
            late, late_clock = _where(clock > end, pixel, clock)
            upper[late], lower[late] = math.inf, -math.inf  # nothing is seen before the release
            blind, release = torch.cat([blind, late]), torch.cat([release, late_clock])
            pixel, clock, first, last = _where(clock <= end, pixel, clock, first, last)
            seen = first + (last - first) * ((clock - start) / span)
            up, down = seen * rise[pixel], seen * fall[pixel]
        before = after
    index, time, brighter = (torch.cat(column) for column in zip(*found, strict=True))
    return index, time, brighter


def _where(mask: Tensor, *columns: Tensor) -> list[Tensor]:
    """The entries of each column at which `mask` is set; it is searched once."""
    rows = mask.nonzero().flatten()
    return [column[rows] for column in columns]


def _draw(seed: int, side: int, settings: SaccadeSettings) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Noise of one recording (times [us], pixels, polarities), and the delay of each pixel [us], int64 `[S * S]`."""
    random = _random(seed)
    count = random.poisson(settings.noise_rate * side**2 * settings.total * 1e-6)
    noise = tuple(random.randint(below, size=count) for below in (settings.total, side**2, 2))
    return noise, random.randint(settings.jitter + 1, size=side**2)


def _apart(noise_t: np.ndarray, noise_at: np.ndarray, t: np.ndarray, at: np.ndarray, refractory: int) -> np.ndarray:
    """Which noise events have no other event of their pixel within the refractory time, bool."""
    noisy = np.zeros(max(noise_at.max(initial=0), at.max(initial=0)) + 1, dtype=bool)
    noisy[noise_at] = True
    near = noisy[at]
    at, t = np.concatenate([noise_at, at[near]]), np.concatenate([noise_t, t[near]])
    order = np.lexsort((t, at))
    close = (np.diff(at[order]) == 0) & (np.diff(t[order]) < refractory)
    crowded = np.zeros(len(order), dtype=bool)
    crowded[order[1:][close]] = crowded[order[:-1][close]] = True
    return ~crowded[: len(noise_t)]
