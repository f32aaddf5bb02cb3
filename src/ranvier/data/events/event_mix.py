"""EventMix: recordings with a region of another one in them, and the classes that they then belong to.

Randomness is drawn apart from being applied, as in `ranvier.data.events.frame_augment`, and each result is computed
from two recordings alone, in an arithmetic that rounds nowhere differently in another batch: results depend neither on
the number of processes nor on the device.

Shapes: `B` recordings, `b` of them that a process mixes, `T` steps, `C` polarity channels, `H` height, `W` width
[pixels], `K` classes, `G` Gaussians.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ranvier.checks import check_positive, shape_of
from ranvier.data.autoaugment import to_device
from ranvier.data.events.frame_augment import check_generator

_GAUSSIANS = (2, 4)
"""Least and most Gaussians in the mixture of a recording."""


@dataclass(frozen=True)
class MixDraws:
    """What `EventMix.draw` decides: row i is about result i.

    Args:
        own: Which recording it begins as, int64 `[b]`.
        partner: Which one a region is taken from, int64 `[b]`; itself where nothing is mixed.
        share: Of the cells that the region takes up, float64 `[b]`; 0 where nothing is mixed.
        over_time: The mixture's Gaussians over the steps, times their weights, float32 `[b, G, T]`.
        over_rows: The same Gaussians over the rows of pixels, float32 `[b, G, H]`.
        over_columns: And over the columns, float32 `[b, G, W]`.
    """

    own: Tensor
    partner: Tensor
    share: Tensor
    over_time: Tensor
    over_rows: Tensor
    over_columns: Tensor

    def __len__(self) -> int:
        """Return the number of results."""
        return len(self.own)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Steps, height and width of the frames that this was drawn for."""
        return self.over_time.shape[2], self.over_rows.shape[2], self.over_columns.shape[2]

    def part(self, rows: slice) -> tuple[MixDraws, Tensor]:
        """Some of the results, and which recordings they are made of.

        Args:
            rows: Which results.

        Returns:
            Their draws, whose `own` and `partner` count among the recordings that are needed; and the numbers of
            these, int64, ascending, each once. Of all results it is all recordings.
        """
        count = len(self.own[rows])
        needed, places = torch.cat([self.own[rows], self.partner[rows]]).unique(return_inverse=True)
        gaussians = (self.over_time[rows], self.over_rows[rows], self.over_columns[rows])
        return MixDraws(places[:count], places[count:], self.share[rows], *gaussians), needed


@dataclass(frozen=True)
class EventMix:
    """EventMix: replace a random region of space and time of a recording by that of another one of the batch.

        m = the cells [t, y, x] with the highest values of a random Gaussian mixture, a share r ~ Beta(beta, beta)
        mixed = (1 - m) a + m b
        target = w onehot(label of a) + (1 - w) onehot(label of b),    w = k_a / (k_a + p_b)

    where k_a is the share of the events of a that is kept, and p_b the share of the events of b that is put in. The
    mixture has 2 to 4 Gaussians with uniform weights and centres, and standard deviations of 0.05 to 0.5 of each side.

    Args:
        probability: Of being mixed, for each recording.
        beta: Of the distribution of r; the larger, the closer to 1/2.

    Raises:
        ValueError: a number is out of range.

    Source: Shen et al. 2022, "EventMix", arXiv 2205.12054, with the weights by the numbers of events, which is what its
    released code does. Differs from the code in: partners are a permutation of the batch; no salt-and-pepper noise.

    >>> frames, labels = torch.ones(2, 4, 2, 8, 8), torch.tensor([0, 1])
    >>> mixed, targets = EventMix(probability=1.0)(frames, labels, 3, torch.Generator().manual_seed(0))
    >>> bool((mixed == 1).all()), targets.sum(1).tolist()
    (True, [1.0, 1.0])
    """

    probability: float = 0.5
    beta: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_positive("beta", self.beta)
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability is {self.probability}, expected 0 to 1.")

    def draw(self, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> MixDraws:
        """Draw the randomness for `count` recordings.

        Args:
            count: Recordings in the global batch.
            shape: T, H and W of their frames.
            generator: On the CPU, whatever device the frames are on.

        Returns:
            Who is mixed with whom, and by which regions, on the CPU. A process takes its `part`.

        Raises:
            ValueError: `generator` is not on the CPU.
        """
        check_generator(generator)
        own, (least, most) = torch.arange(count), _GAUSSIANS
        partner = torch.randperm(count, generator=generator)
        share = _beta(self.beta, count, generator)
        mixed = torch.rand(count, generator=generator) < self.probability
        weights = torch.rand(count, most, generator=generator)
        number = torch.randint(least, most + 1, (count, 1), generator=generator)
        profiles = []
        for length in shape:
            center = torch.randint(length, (count, most, 1), generator=generator)
            deviation = torch.rand(count, most, 1, generator=generator).clamp_(min=0.1) * (length / 2)
            profiles.append(torch.exp(-(((torch.arange(length) - center) / deviation) ** 2) / 2))
        profiles[0] *= (weights * (torch.arange(most) < number))[:, :, None]
        return MixDraws(own, torch.where(mixed, partner, own), share * mixed, *profiles)

    def apply(self, frames: Tensor, labels: Tensor, num_classes: int, draws: MixDraws) -> tuple[Tensor, Tensor]:
        """Mix `frames` as `draws` says.

        Args:
            frames: `[B, T, C, H, W]` of any dtype, on any device: the recordings that `draws` counts. Not modified.
            labels: Their class indices, int64 `[B]`, on the same device.
            num_classes: K.
            draws: For `b` results, on the CPU.

        Returns:
            Mixed frames `[b, T, C, H, W]` of the same dtype, and targets float32 `[b, K]` that sum to 1, both on the
            device of `frames`.

        Raises:
            ValueError: the shapes do not fit.
        """
        if frames.ndim != 5 or labels.shape != frames.shape[:1]:
            raise ValueError(
                f"frames have shape {shape_of(frames)} and labels {shape_of(labels)}, expected [B, T, C, H, W] and "
                "[B]. Frames [T, B, C, H, W], as Batches gives them, become so with frames.transpose(0, 1)."
            )
        fewest = int(torch.cat([draws.own, draws.partner]).max()) + 1 if len(draws) else 0
        if (frames.shape[1], *frames.shape[3:]) != draws.shape or len(frames) < fewest:
            raise ValueError(
                f"frames have shape {shape_of(frames)}, but the draws are for {fewest} recordings or more with T, H, W "
                f"= {draws.shape}. Pass the recordings that draw() or part() counted."
            )
        # Which rows are mixed is known without waiting for the device. Only they are computed.
        rows = draws.share.nonzero().flatten()
        region = _region(draws, rows, frames.device).unsqueeze(2)  # [m, T, 1, H, W]
        own, partner = to_device(draws.own, frames.device), to_device(draws.partner[rows], frames.device)
        rows = to_device(rows, frames.device)
        mixed, targets = frames[own], one_hot(labels[own], num_classes).float()
        a, b = mixed[rows], frames[partner]
        mixture = torch.where(region, b, a)
        put = _events(b * region)
        kept_share = (_events(mixture) - put).clamp_(min=0) / _events(a).clamp(min=1e-6)  # rounded, it could be below 0
        put_share = put / _events(b).clamp(min=1e-6)
        whole = kept_share + put_share
        weight = torch.where(whole > 0, kept_share / whole, 1.0)[:, None]  # 1: no event is left
        both = weight * targets[rows] + (1 - weight) * one_hot(labels[partner], num_classes)
        return mixed.index_copy_(0, rows, mixture), targets.index_copy_(0, rows, both)

    def __call__(
        self, frames: Tensor, labels: Tensor, num_classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw for, and apply to, a batch that is not split over processes."""
        steps, _, height, width = frames.shape[1:]
        draws = self.draw(len(frames), (steps, height, width), generator)
        return self.apply(frames, labels, num_classes, draws)


def mix_frames(
    frames: Tensor,
    labels: Tensor,
    num_classes: int,
    generator: torch.Generator,
    *,
    beta: float = 1.0,
    probability: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mix a batch as it comes time-first, in a loop of your own: see `EventMix`, which `Batches` takes.

    Args:
        frames: A batch as `Batches` gives it, time-first: `[T, B, C, H, W]`. Not modified.
        labels: Class indices, int64 `[B]`.
        num_classes: K.
        generator: On the CPU, whatever device the frames are on.
        beta: Of the distribution of the share that is replaced; the larger, the closer to 1/2.
        probability: Of being mixed, for each recording.

    Returns:
        Mixed frames `[T, B, C, H, W]`, laid out in memory as they were, and targets float32 `[B, K]` that sum to 1,
        both on the device of `frames`.

    Raises:
        ValueError: the shapes do not fit, a number is out of range, or `generator` is not on the CPU.

    >>> frames, labels = torch.ones(4, 2, 2, 8, 8), torch.tensor([0, 1])
    >>> mixed, targets = mix_frames(frames, labels, 3, torch.Generator().manual_seed(0))
    >>> bool((mixed == 1).all()), targets.sum(1).tolist()
    (True, [1.0, 1.0])
    """
    if frames.ndim != 5 or labels.shape != frames.shape[1:2]:
        raise ValueError(
            f"frames have shape {shape_of(frames)} and labels {shape_of(labels)}, expected [T, B, C, H, W] and [B]. "
            "Batches gives both; frames [B, T, C, H, W] become so with frames.transpose(0, 1)."
        )
    mixed, targets = EventMix(probability, beta)(frames.transpose(0, 1), labels, num_classes, generator)
    return torch.empty_like(frames).copy_(mixed.transpose(0, 1)), targets


def _beta(beta: float, count: int, generator: torch.Generator) -> Tensor:
    """Numbers from Beta(beta, beta), float64 `[count]`; torch draws them from no generator but its own."""
    seed = int(torch.randint(2**32, (), generator=generator))
    return torch.from_numpy(np.random.RandomState(seed).beta(beta, beta, count))


def _region(draws: MixDraws, rows: Tensor, device: torch.device) -> Tensor:
    """The cells where the Gaussian mixture of each of the rows is highest, their share of all: bool `[m, T, H, W]`."""
    over_time, over_rows, over_columns = (
        to_device(profile[rows], device) for profile in (draws.over_time, draws.over_rows, draws.over_columns)
    )
    planes = (over_rows[:, :, :, None] * over_columns[:, :, None, :]).flatten(2)  # [m, G, H * W]
    density = torch.zeros(len(rows), over_time.shape[2], planes.shape[2], device=device)
    # Not as a product of matrices, which may round otherwise in another batch or on another device.
    for number in range(over_time.shape[1]):
        density += over_time[:, number, :, None] * planes[:, number, None, :]
    # Positive floats are in the order of their bits, and these rise as their logarithms do, which spreads the cells
    # out: most are far down the slopes. Densities that differ by less than one in 8192 may count as equal, and those
    # below 1e-37 do.
    level = density.clamp_(min=1e-37).flatten(1).view(torch.int32) >> 10  # [m, T * H * W]
    cells = to_device((draws.share[rows] * level.shape[1]).round(), device)
    # The level that this share of the cells exceeds, by bisection: sorting takes several times as long. Up to 4, the
    # sum of the weights, there are less than 2^20 levels.
    low, high = level.amin(1) - 1, level.amax(1)
    for _ in range(21):
        middle = low + (high - low) // 2
        many = (level > middle[:, None]).sum(1, dtype=torch.int32) > cells  # int64 takes longer
        low, high = torch.where(many, middle, low), torch.where(many, high, middle)
    return (level > high[:, None]).unflatten(1, draws.shape)


def _events(frames: Tensor) -> Tensor:
    """Events of each recording, float32 `[B]`. In float64 sums of counts, and of float16, are exact in any order."""
    return frames.sum((1, 2, 3, 4), dtype=torch.float64).float()
