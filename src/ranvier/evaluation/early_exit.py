"""Early exit: a sample stops at the first step at which the network is sure enough of its answer.

Legend: `T` steps, `N` samples of a set, `B` of a batch, `K` classes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from rich.table import Table
from torch import Tensor, nn

from ranvier.atomic import write_json
from ranvier.checks import check_choice, check_count, check_logits
from ranvier.evaluation.accuracy import AccuracyByStep
from ranvier.evaluation.mode import device_of, evaluating
from ranvier.evaluation.streaming import (
    Frames,
    Measure,
    check_finite,
    check_streamed_logits,
    check_temperature,
    confidence,
    frames_of,
    mean_of,
    run_until_confident,
)

MAX_LOSS = 0.005
"""Share of the samples that may be answered worse than with all steps, if the caller does not say."""

POINTS = 200
"""Points that are kept of a curve, which has up to N (T - 1) + 1."""

COLDEST, HOTTEST = 0.01, 100.0
"""Between these a temperature is fitted."""


@dataclass(frozen=True)
class ExitCurve:
    """What each threshold would give: from never (infinity) down to all samples stopping after the first step.

    A threshold changes something only where it passes a confidence that was measured; of these points, up to about
    `POINTS` are kept, evenly spread over the mean steps.
    """

    threshold: tuple[float, ...]
    mean_steps: tuple[float, ...]
    accuracy: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.threshold)


@dataclass(frozen=True)
class Exits:
    """Samples by the step after which they stopped, and the correct ones among them.

    Attributes:
        stopped: Samples that stopped after step 1 .. T.
        hits: Those of each group whose true class scores above every other.
        ties: Those of each group that tie for the first place with the true class; a tie is a miss.
        all_steps: The same samples without early exit.
        curve: Other thresholds.

    >>> exits = Exits((6, 4), (6, 3), (0, 1), AccuracyByStep((7, 9), (1, 0), 10), ExitCurve((), (), ()))
    >>> exits.mean_steps, exits.accuracy, exits.accuracy_by_exit
    (1.4, 0.9, (1.0, 0.75))
    """

    stopped: tuple[int, ...]
    hits: tuple[int, ...]
    ties: tuple[int, ...]
    all_steps: AccuracyByStep
    curve: ExitCurve

    @property
    def total(self) -> int:
        """Samples."""
        return sum(self.stopped)

    @property
    def mean_steps(self) -> float:
        """Steps that a sample takes on average."""
        return sum(t * count for t, count in enumerate(self.stopped, 1)) / self.total

    @property
    def accuracy(self) -> float:
        """Share of hits among all samples, in [0, 1]."""
        return sum(self.hits) / self.total

    @property
    def share(self) -> tuple[float, ...]:
        """Share of the samples that stop after step 1 .. T."""
        return tuple(count / self.total for count in self.stopped)

    @property
    def accuracy_by_exit(self) -> tuple[float | None, ...]:
        """Share of hits in each group; None where no sample stopped."""
        return tuple(hits / count if count else None for hits, count in zip(self.hits, self.stopped, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        curve = {**asdict(self.curve), "threshold": [_finite(value) for value in self.curve.threshold]}
        return {
            **asdict(self),
            "total": self.total,
            "mean_steps": self.mean_steps,
            "accuracy": self.accuracy,
            "accuracy_by_exit": self.accuracy_by_exit,
            "all_steps": {**asdict(self.all_steps), "accuracy": self.all_steps.accuracy},
            "curve": curve,
        }


@dataclass(frozen=True)
class EarlyExit:
    """A rule for stopping, chosen on some images and measured on others.

    Attributes:
        threshold: A sample stops when its confidence is at least this; infinity if none stops before the last step.
        measure: What confidence is.
        temperature: By which logits are divided before the softmax.
        max_loss: Accuracy that was allowed to be lost on `choosing`, as a share.
        choosing: The rule on the images that it was chosen on.
        testing: The rule on the others, run by streaming.
        differing: Samples of `testing` that stopped elsewhere or answered another class than the rule gives on the
            logits of one call of T steps. Rounding explains a few; many mean that the network does not carry its state.
        chosen_on: What the images of `choosing` are, in words.
        energy_by_step: Of one sample at each step [J], if known.
    """

    threshold: float
    measure: Measure
    temperature: float
    max_loss: float
    choosing: Exits
    testing: Exits
    differing: int
    chosen_on: str = ""
    energy_by_step: tuple[float, ...] | None = None

    @property
    def energy(self) -> float | None:
        """Mean energy of a sample with early exit [J]: what the steps that it runs take on average."""
        if self.energy_by_step is None:
            return None
        spent = accumulate(self.energy_by_step)
        return sum(share * energy for share, energy in zip(self.testing.share, spent, strict=True))

    @property
    def energy_of_all_steps(self) -> float | None:
        """Energy of a sample without early exit [J]."""
        return None if self.energy_by_step is None else sum(self.energy_by_step)

    def __str__(self) -> str:
        exits, everyone = self.testing, self.testing.all_steps
        ties = f"ties {100 * sum(exits.ties) / exits.total:.2f} % and {100 * everyone.ties[-1] / exits.total:.2f} %"
        return (
            f"{self._rule()}: {100 * exits.accuracy:.2f} % after {exits.mean_steps:.2f} of {len(exits.stopped)} steps, "
            f"{100 * everyone.final:.2f} % after all  (n = {exits.total}, {ties})"
        )

    def __rich__(self) -> Table:
        """Table for the terminal."""
        exits, everyone = self.testing, self.testing.all_steps
        table = Table(title=f"Early exit: {self._rule()} (n = {exits.total})", caption=self._caption(), min_width=72)
        for title in ("steps", "samples %", "accuracy %", "ties %", "all: accuracy %", "all: ties %"):
            table.add_column(title, justify="right")
        for t, (share, accuracy) in enumerate(zip(exits.share, exits.accuracy_by_exit, strict=True), 1):
            ties = exits.ties[t - 1]
            table.add_row(
                str(t),
                f"{100 * share:.2f}",
                "-" if accuracy is None else f"{100 * accuracy:.2f}",
                "-" if accuracy is None else f"{100 * ties / exits.stopped[t - 1]:.2f}",
                f"{100 * everyone[t - 1]:.2f}",
                f"{100 * everyone.ties[t - 1] / exits.total:.2f}",
                end_section=t == len(exits.stopped),
            )
        table.add_row(
            f"mean {exits.mean_steps:.2f}",
            "100.00",
            f"{100 * exits.accuracy:.2f}",
            f"{100 * sum(exits.ties) / exits.total:.2f}",
            f"{100 * everyone.final:.2f}",
            f"{100 * everyone.ties[-1] / exits.total:.2f}",
        )
        return table

    def _rule(self) -> str:
        if self.threshold == math.inf:
            return "never stops before the last step"
        warm = "" if self.temperature == 1 else f" at temperature {self.temperature:.3g}"
        return f"stops at {self.measure} >= {self.threshold:.4f}{warm}"

    def _caption(self) -> str:
        seen = self.choosing
        lines = [
            f"chosen on {self.chosen_on or f'{seen.total} images'}; "
            f"there {100 * seen.accuracy:.2f} % after {seen.mean_steps:.2f} steps, "
            f"{100 * seen.all_steps.final:.2f} % after all; allowed to lose {100 * self.max_loss:g} points"
        ]
        if self.energy is not None and self.energy_of_all_steps is not None:
            saved = 1 - self.energy / self.energy_of_all_steps if self.energy_of_all_steps else 0.0
            lines.append(
                f"{self.energy:.3g} J a sample instead of {self.energy_of_all_steps:.3g} J ({100 * saved:.0f} % less)"
            )
        if self.differing:
            lines.append(
                f"{self.differing} samples stopped elsewhere or answered otherwise than in one call: "
                "rounding, or a state that is not carried"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists; a threshold of infinity, which json does not have, is None."""
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "threshold": _finite(self.threshold),
            "choosing": self.choosing.to_json(),
            "testing": self.testing.to_json(),
            "energy": self.energy,
            "energy_of_all_steps": self.energy_of_all_steps,
        }

    def save(self, path: str | Path) -> None:
        """Write everything as json."""
        write_json(path, self.to_json())


def early_exit(
    model: nn.Module,
    choosing: Iterable[tuple[Tensor, Tensor]],
    testing: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int,
    max_loss: float = MAX_LOSS,
    measure: Measure = "probability",
    temperature: float | Literal["fit"] = 1.0,
    energy_by_step: Sequence[float] | None = None,
    chosen_on: str = "",
) -> EarlyExit:
    """Choose a threshold of confidence on some images, and measure on others what stopping at it gives.

        m[t] = 1/t sum_{i <= t} logits[i],    p[t] = softmax(m[t] / temperature)
        confidence[t] = max_k p[t, k]                                   probability
                        p[t, first] - p[t, second]                      margin
                        1 - H(p[t]) / log K                             entropy
        a sample stops at the first t with confidence[t] >= threshold, at the latest at T, and answers argmax_k m[t, k]

    The threshold is the confidence, among those measured on `choosing`, with the smallest mean number of steps at which
    no more than a share `max_loss` of the samples is lost against all T steps. All are tried, from the logits of one
    run: as the threshold falls past a sample's highest confidence so far, that sample stops one step earlier, so hits
    and steps of every threshold are running sums over the sorted confidences.

    Choose on images that the network was not trained on, and not on test images. It is surer of images that it was
    trained on than of new ones, and more often right after one step. The first makes a threshold chosen on them too
    high, the second makes it too low: on new images more or less may be lost than was allowed. With `hold_out`, a
    recipe keeps images aside that give an unbiased choice. Choose on many: of 200 images, 0.005 is a single one, and
    the lowest of all thresholds that pass is in part the luckiest.

    `testing` is run twice: once in calls of T steps, for the columns of all samples and the curve, and once streamed,
    one step at a time, where samples that have stopped leave the batch. With one step there is nothing to gain: the
    result then has the threshold infinity and the accuracy of the one step.

    Args:
        model: Called as `model(images, steps)`, giving logits `[T, B, K]`, and as `run_until_confident` calls it.
        choosing: Batches of images and labels `[B]`. The means of their logits are kept, T N K numbers of 8 bytes.
        testing: Batches likewise; other images.
        steps: T. Sequences must have as many steps; of longer ones the first are used.
        max_loss: Accuracy that may be lost on `choosing`, as a share: 0.005 is half a point. 0 allows no loss there.
        measure: What confidence is.
        temperature: By which logits are divided; `fit` takes the one with the smallest cross-entropy on `choosing`,
            over all steps, between 0.01 (where all answers there are right, the colder the better) and 100. It changes
            no answer, but the order of samples by confidence.
        energy_by_step: Energy that one sample takes at each step [J], for the mean energy with early exit. It is the
            same for all samples: that those which stop late may be those which spike more is not seen.
        chosen_on: What the images of `choosing` are, for the table.

    Returns:
        The threshold, and what it gives on either set.

    Raises:
        TypeError: The model does not stream.
        ValueError: A loader is empty, both are one object, sequences are too short, images or logits are not finite,
            or an argument is out of range.

    Source: Li et al. 2023, "SEENN: Towards Temporal Spiking Early-Exit Neural Networks" (SEENN-I: one threshold on the
    largest probability). Differs from it in: the threshold is chosen on held-out images for a stated loss.

    >>> from ranvier.models import mlp
    >>> new, other = ([(torch.rand(8, 4), torch.arange(8) % 3)] for _ in range(2))
    >>> early_exit(mlp([4, 8, 3]), new, other, steps=4, max_loss=1.0).choosing.stopped
    (8, 0, 0, 0)
    """
    steps = check_count("steps", steps)
    check_choice("measure", measure, get_args(Measure))
    if not 0 <= max_loss <= 1:
        raise ValueError(f"max_loss is {max_loss}, but must be a share from 0 to 1: half a point is max_loss=0.005.")
    if temperature != "fit":
        check_temperature(temperature)
    if choosing is testing:
        raise ValueError(
            "choosing and testing are the same images, so the result would be that of the best threshold for them. "
            "Pass held-out training images to choose on: train, held_out = images.hold_out(2000, seed=0)."
        )
    energy = _energy(energy_by_step, steps)
    with evaluating(model), torch.inference_mode():
        means, labels = _record(model, choosing, steps)
        if temperature == "fit":
            temperature = _fit_temperature(means, labels)
        sure = confidence(means, measure, temperature)
        hits, ties = _score(means, labels)
        candidates = _Candidates.of(sure, hits)
        best = candidates.choose(max_loss)
        threshold = float(candidates.threshold[best])
        stops = _stops(sure, threshold)
        chosen = _exits(stops, _at(hits, stops), _at(ties, stops), hits, ties, candidates.curve())
        tested, differing = _test(model, testing, steps, threshold, measure, temperature)
    return EarlyExit(threshold, measure, temperature, max_loss, chosen, tested, differing, chosen_on, energy)


def _means(logits: Tensor) -> Tensor:
    """Means of the first 1 .. T logits, float64 `[T, B, K]`, added in the order in which a stream adds them."""
    totals = accumulate(logits.double().unbind(0))
    return torch.stack([mean_of(total, t, logits.dtype) for t, total in enumerate(totals, 1)])


def _score(means: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hits and ties for the first place as `score_by_step` counts them, by sample: `[..., B, K]` to bool `[..., B]`."""
    index = labels.expand(means.shape[:-1]).unsqueeze(-1)
    true = means.gather(-1, index).squeeze(-1)
    best_other = means.scatter(-1, index, -torch.inf).amax(-1)
    return true > best_other, true == best_other


def _stops(sure: Tensor, threshold: float) -> Tensor:
    """Step after which each sample stops, 1 .. T: `[T, B]` to `[B]`."""
    return 1 + (sure[:-1].cummax(0).values < threshold).sum(0) if len(sure) > 1 else torch.ones_like(sure[0]).long()


def _at(values: Tensor, stops: Tensor) -> Tensor:
    """For each sample, what `values` `[T, B]` held when it stopped."""
    return values.gather(0, stops.unsqueeze(0) - 1).squeeze(0)


class _Candidates(NamedTuple):
    """Every threshold that makes a difference, falling, with the steps and hits that it gives."""

    threshold: Tensor
    steps: Tensor
    """Of all samples together."""
    hits: Tensor
    total: int

    @classmethod
    def of(cls, sure: Tensor, hits: Tensor) -> "_Candidates":
        """Try all thresholds on confidences and hits `[T, N]`.

        Let M[t] be the highest confidence in steps 1 .. t < T. A sample stops at the first t with M[t] >= threshold,
        so falling past M[t] moves it from stopping at t + 1 to stopping at t: the total of steps falls by one, that of
        hits changes by hit[t] - hit[t+1].
        """
        steps, total = sure.shape
        highest, order = sure[:-1].cummax(0).values.flatten().sort(descending=True)
        gained = (hits[:-1].long() - hits[1:].long()).flatten()[order].cumsum(0)
        lost = torch.arange(1, len(highest) + 1)
        last = torch.ones_like(highest, dtype=torch.bool)  # of equal confidences: they stop together
        last[:-1] = highest[1:] != highest[:-1]
        return cls(
            torch.cat([torch.tensor([math.inf], dtype=sure.dtype), highest[last]]),
            torch.cat([torch.zeros(1, dtype=torch.int64), -lost[last]]) + steps * total,
            torch.cat([torch.zeros(1, dtype=torch.int64), gained[last]]) + hits[-1].sum(),
            total,
        )

    def choose(self, max_loss: float) -> int:
        """Number of the lowest threshold that is accurate enough."""
        allowed = math.floor(max_loss * self.total + 1e-9)  # 0.29 * 100 is a little below 29
        return int((self.hits >= self.hits[0] - allowed).nonzero()[-1])

    def curve(self) -> ExitCurve:
        """Points spread over the mean steps, both ends among them."""
        wanted = torch.linspace(float(self.steps[0]), float(self.steps[-1]), POINTS, dtype=torch.float64)
        shown = torch.searchsorted(-self.steps.double(), -wanted).clamp_max(len(self.steps) - 1).unique()
        return ExitCurve(
            tuple(self.threshold[shown].tolist()),
            tuple((self.steps[shown].double() / self.total).tolist()),
            tuple((self.hits[shown].double() / self.total).tolist()),
        )


def _exits(stops: Tensor, hit: Tensor, tie: Tensor, hits: Tensor, ties: Tensor, curve: ExitCurve) -> Exits:
    """Counts by step from samples `[N]` that stopped, and from all `[T, N]` at every step."""
    groups = [stops == t for t in range(1, len(hits) + 1)]
    everyone = AccuracyByStep(tuple(hits.sum(1).tolist()), tuple(ties.sum(1).tolist()), len(stops))
    stopped, right, tied = ([int((group & which).sum()) for group in groups] for which in (stops > 0, hit, tie))
    return Exits(tuple(stopped), tuple(right), tuple(tied), everyone, curve)


def _record(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], steps: int) -> tuple[Tensor, Tensor]:
    """Mean logits `[T, N, K]` and labels of a set, on the CPU."""
    device = device_of(model)
    means: list[Tensor] = []
    labels: list[Tensor] = []
    for images, truth in loader:
        frames = frames_of(model, images, steps, device)
        logits = _logits(model, frames, truth, f"batch {len(means)} of the images to choose on")
        means.append(_means(logits).cpu())
        labels.append(truth.cpu())
    if not means:
        raise ValueError("the loader gave no samples to choose a threshold on. Check the data set or its split.")
    return torch.cat(means, 1), torch.cat(labels)


def _test(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    threshold: float,
    measure: Measure,
    temperature: float,
) -> tuple[Exits, int]:
    """Run a set in calls of T steps and streamed; also count the samples on which the two differ."""
    device = device_of(model)
    columns: list[list[Tensor]] = []
    for images, labels in loader:
        labels = labels.to(device)
        frames = frames_of(model, images, steps, device)
        means = _means(_logits(model, frames, labels, f"batch {len(columns)} of the test images"))
        sure = confidence(means, measure, temperature)
        hits, ties = _score(means, labels)
        answers = run_until_confident(model, images, steps, threshold, measure=measure, temperature=temperature)
        hit, tie = _score(answers.logits, labels)
        expected = _stops(sure, threshold)
        differs = (answers.steps != expected) | (answers.predictions != _at(means.argmax(-1), expected))
        columns.append([sure, hits, ties, answers.steps, hit, tie, differs])
    if not columns:
        raise ValueError("the loader gave no samples to test on. Check the data set or its split.")
    sure, hits, ties, stops, hit, tie, differs = (torch.cat(parts, -1).cpu() for parts in zip(*columns, strict=True))
    return _exits(stops, hit, tie, hits, ties, _Candidates.of(sure, hits).curve()), int(differs.sum())


def _logits(model: nn.Module, frames: Frames, labels: Tensor, what: str) -> Tensor:
    """Logits `[T, B, K]` of one call of all steps."""
    # A sequence of one step is a constant input, too: both give one step.
    images = frames.images[0] if len(frames.images) == 1 else frames.images
    logits = model(images, frames.steps)
    check_logits(logits, labels.to(logits.device))
    check_streamed_logits(logits, frames.steps, frames.images.shape[1])
    check_finite(frames.images, logits, what)
    return logits


def _fit_temperature(means: Tensor, labels: Tensor) -> float:
    """Temperature at which the mean cross-entropy over all steps is smallest.

    In b = 1 / temperature it is convex, with slope mean(sum_k p_k (m_k - m_label)): bisection finds its minimum.
    """
    leads = means - means.gather(-1, labels.expand(means.shape[:-1]).unsqueeze(-1))
    low, high = math.log(1 / HOTTEST), math.log(1 / COLDEST)
    for _ in range(40):
        middle = (low + high) / 2
        slope = ((leads * math.exp(middle)).softmax(-1) * leads).sum(-1).mean()
        low, high = (middle, high) if slope <= 0 else (low, middle)  # 0 where all are right and too cold to tell
    return math.exp(-(low + high) / 2)


def _energy(by_step: Sequence[float] | None, steps: int) -> tuple[float, ...] | None:
    if by_step is None:
        return None
    if len(by_step) != steps or not all(0 <= value < math.inf for value in by_step):
        raise ValueError(
            f"energy_by_step is {list(by_step)}, but must be {steps} energies [J], one for each step and none negative."
        )
    return tuple(map(float, by_step))


def _finite(value: float) -> float | None:
    return None if value == math.inf else value
