"""Accuracy at every time step, from one run."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ranvier.atomic import write_json
from ranvier.checks import check_logits
from ranvier.evaluation.mode import device_of, evaluating


@dataclass(frozen=True)
class AccuracyByStep:
    """Correct predictions after 1 .. T steps, among `total` samples.

    It reads as the sequence of its accuracies: `curve[0]` is that of the first step, `list(curve)` all of them.

    >>> curve = AccuracyByStep(hits=(6, 9), ties=(2, 0), total=10)
    >>> curve.accuracy
    (0.6, 0.9)
    >>> print(curve)
    T=1 60.00 %  T=2 90.00 %  (n = 10, ties 20.00 % 0.00 %)
    """

    hits: tuple[int, ...]
    ties: tuple[int, ...]
    total: int
    silent: tuple[int, ...] = ()
    """Samples without an output other than 0 up to each step: ties of all classes. Empty where not counted."""

    @property
    def accuracy(self) -> tuple[float, ...]:
        """Share of hits after t steps, in [0, 1]."""
        return tuple(hits / self.total for hits in self.hits)

    def __len__(self) -> int:
        return len(self.hits)

    def __getitem__(self, step: int) -> float:
        return self.accuracy[step]

    def __iter__(self) -> Iterator[float]:
        return iter(self.accuracy)

    @property
    def final(self) -> float:
        """Accuracy after all steps."""
        return self.accuracy[-1]

    def __str__(self) -> str:
        each = "  ".join(f"T={t} {100 * value:.2f} %" for t, value in enumerate(self.accuracy, 1))
        ties = " ".join(f"{100 * count / self.total:.2f} %" for count in self.ties)
        silent = " ".join(f"{100 * count / self.total:.2f} %" for count in self.silent)
        return f"{each}  (n = {self.total}, ties {ties}{f', silent {silent}' if any(self.silent) else ''})"

    def __rich__(self) -> Table:
        """Table for the terminal."""
        table = Table(title=f"Accuracy by time step (n = {self.total})", min_width=40)
        ties, silent = ([count / self.total for count in counts] for counts in (self.ties, self.silent))
        add_accuracy_columns(table, self.accuracy, ties, silent)
        return table

    def save(self, path: str | Path) -> None:
        """Write counts and accuracies as json."""
        write_json(path, {**asdict(self), "accuracy": self.accuracy})


def add_accuracy_columns(
    table: Table, accuracy: Sequence[float], ties: Sequence[float], silent: Sequence[float] = ()
) -> None:
    """Fill an empty table with a row for each step; shares in [0, 1]. Silence is shown only where there is some."""
    columns = {"accuracy %": accuracy, "ties %": ties} | ({"silent %": silent} if any(silent) else {})
    for name in ("T", *columns):
        table.add_column(name, justify="right")
    for t, shares in enumerate(zip(*columns.values(), strict=True), 1):
        table.add_row(str(t), *(f"{100 * share:.2f}" for share in shares))


def accuracy_by_step(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], steps: int | None = None
) -> AccuracyByStep:
    """Run a model once per batch and score the prediction after each number of steps.

        prediction after t steps = argmax_k 1/t sum_{i <= t} logits[i, k]

    The argmax is strict: a sample counts only if the true class scores above every other. A tie, such as the all-equal
    output of a silent network, is a miss; the share of ties for the first place with the true class is reported, and
    that of samples without any output so far.

    Args:
        model: Called as `model(images, steps)`; returns logits `[T, B, K]`. Evaluated in eval mode and put back.
        loader: Batches of images and labels `[B]`; moved to the model's device. On a CPU batches of
            `ranvier.data.evaluation_batch_size(steps)` are the fastest.
        steps: T; None for sequences, which bring their own.

    Returns:
        Hits, ties and silent samples after 1 .. T steps.

    Raises:
        TypeError: What the loader gives are no pairs of tensors.
        ValueError: The loader is empty, images are not finite, or the model does not return `[T, B, K]`.
    """
    device = device_of(model)
    hits: list[Tensor] = []
    ties: list[Tensor] = []
    silent: list[Tensor] = []
    finite: list[Tensor] = []
    total = 0
    with evaluating(model), torch.inference_mode():
        for batch in _batches(loader):
            images, labels = (part.to(device) for part in batch)
            logits = model(images, steps)
            batch_hits, batch_ties = score_by_step(logits, labels)
            hits.append(batch_hits)
            ties.append(batch_ties)
            silent.append((logits == 0).all(2).long().cumprod(0).sum(1))
            finite.append(images.sum(dtype=torch.float32).isfinite())  # neurons answer a NaN with silence
            total += len(labels)
    if total == 0:
        raise ValueError("the loader gave no samples, so there is no accuracy. Check the data set or its split.")
    if not bool(torch.stack(finite).all()):
        broken = [number for number, flag in enumerate(torch.stack(finite).tolist()) if not flag]
        raise ValueError(
            f"the images of batch {broken[0]} hold NaN or infinity ({len(broken)} such batches). Mend the data."
        )
    hits_by_step, ties_by_step, silent_by_step = (
        tuple(torch.stack(counts).sum(0).tolist()) for counts in (hits, ties, silent)
    )
    return AccuracyByStep(hits_by_step, ties_by_step, total, silent_by_step)


def _batches(loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of images and labels, or an error that says what came."""
    if not isinstance(loader, Iterable):
        raise TypeError(f"the loader is a {type(loader).__name__}, but must give batches (images, labels).")
    for number, batch in enumerate(loader):
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        if not pair or not all(isinstance(part, Tensor) for part in batch):
            came = f"{len(batch)} values" if isinstance(batch, tuple | list) else f"a {type(batch).__name__}"
            raise TypeError(f"batch {number} of the loader is {came}, but must be two tensors, (images, labels).")
        yield batch[0], batch[1]


def score_by_step(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Count hits and ties of the prefix means of `logits` `[T, B, K]`.

    Returns:
        Hits `[T]` and ties for first place `[T]`, int64, on the device of `logits`.

    >>> score_by_step(torch.tensor([[[1.0, 1.0]], [[3.0, 0.0]]]), torch.tensor([0]))
    (tensor([0, 1]), tensor([1, 0]))
    """
    check_logits(logits, labels)
    prefix_sum = logits.to(torch.promote_types(logits.dtype, torch.float32)).cumsum(0)  # the mean has the same order
    index = labels.expand(len(logits), -1).unsqueeze(-1)
    true = prefix_sum.gather(2, index).squeeze(-1)
    best_other = prefix_sum.scatter(2, index, -torch.inf).amax(-1)
    return (true > best_other).sum(1), (true == best_other).sum(1)
