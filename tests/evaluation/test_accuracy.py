"""Accuracy by time step on cases small enough to count by hand."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ranvier.evaluation import AccuracyByStep, accuracy_by_step, score_by_step
from ranvier.nn import LIF, BatchNorm


class Fixed(nn.Module):
    """Answers with the logits that it is shown as images, `[B, T, K]`."""

    def forward(self, images: Tensor, steps: int | None) -> Tensor:
        logits = images.transpose(0, 1)
        return logits if steps is None else logits[:steps]


# Three classes, three steps; columns: sample 0 (class 0), 1 (class 1), 2 (class 2).
LOGITS = torch.tensor(
    [
        # t = 1: hit; tie with class 0; miss
        [[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]],
        # sums at t = 2: [2, 5, 0] miss; [1, 2, 0] hit; [0, 1, 1] tie
        [[0.0, 4.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
        # sums at t = 3: [6, 5, 0] hit; [1, 2, 3] miss; [0, 1, 2] hit
        [[4.0, 0.0, 0.0], [0.0, 0.0, 3.0], [0.0, 0.0, 1.0]],
    ]
)
LABELS = torch.tensor([0, 1, 2])
HITS, TIES = (1, 1, 2), (1, 1, 0)


def test_by_hand() -> None:
    hits, ties = score_by_step(LOGITS, LABELS)
    assert tuple(hits.tolist()) == HITS
    assert tuple(ties.tolist()) == TIES


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_batches_add_up(batch: int) -> None:
    """Also a smaller last batch: every sample counts once."""
    images = LOGITS.transpose(0, 1)
    loader = list(zip(images.split(batch), LABELS.split(batch), strict=True))
    curve = accuracy_by_step(Fixed(), loader, 3)
    assert curve == AccuracyByStep(HITS, TIES, 3, silent=(0, 0, 0))
    assert curve.accuracy == (1 / 3, 1 / 3, 2 / 3)
    assert curve.final == 2 / 3
    assert accuracy_by_step(Fixed(), loader, 2) == AccuracyByStep(HITS[:2], TIES[:2], 3, silent=(0, 0))
    assert accuracy_by_step(Fixed(), loader) == curve


@pytest.mark.parametrize("value", [0.0, -3.0, 1e4])
def test_silence_is_a_miss_for_every_class(value: float) -> None:
    """An argmax without care for ties would give class 0 all its samples."""
    hits, ties = score_by_step(torch.full((4, 10, 10), value), torch.arange(10))
    assert hits.tolist() == [0] * 4
    assert ties.tolist() == [10] * 4


def test_a_tie_below_the_first_place_is_a_plain_miss() -> None:
    hits, ties = score_by_step(torch.tensor([[[1.0, 1.0, 2.0]]]), torch.tensor([0]))
    assert (hits.tolist(), ties.tolist()) == ([0], [0])


def test_nan_is_no_hit() -> None:
    hits, ties = score_by_step(torch.full((2, 3, 4), torch.nan), torch.tensor([0, 1, 2]))
    assert (hits.tolist(), ties.tolist()) == ([0, 0], [0, 0])


def test_float64_logits_are_compared_as_such() -> None:
    logits = torch.tensor([[[1.0, 1.0 + 1e-12]]], dtype=torch.float64)
    hits, ties = score_by_step(logits, torch.tensor([1]))
    assert (hits.tolist(), ties.tolist()) == ([1], [0])


@given(steps=st.integers(1, 5), batch=st.integers(1, 6), classes=st.integers(2, 4), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_equals_counting_one_sample_at_a_time(steps: int, batch: int, classes: int, seed: int) -> None:
    """Small integers make ties frequent and sums exact."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-2, 3, (steps, batch, classes), generator=generator).float()
    labels = torch.randint(0, classes, (batch,), generator=generator)
    hits, ties = score_by_step(logits, labels)
    for t in range(steps):
        means = [[sum(logits[: t + 1, b, k].tolist()) / (t + 1) for k in range(classes)] for b in range(batch)]
        true = [row[label] for row, label in zip(means, labels.tolist(), strict=True)]
        others = [max(row[:label] + row[label + 1 :]) for row, label in zip(means, labels.tolist(), strict=True)]
        assert hits[t] == sum(a > b for a, b in zip(true, others, strict=True))
        assert ties[t] == sum(a == b for a, b in zip(true, others, strict=True))


def network() -> nn.Module:
    """Has a normalisation whose averages training mode would move."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = BatchNorm(3)
            self.frozen = BatchNorm(3)
            self.neuron = LIF(3)

        def forward(self, images: Tensor, steps: int | None) -> Tensor:
            return self.neuron(self.frozen(self.norm(images.expand(steps or 1, -1, -1))))

    model = Network()
    model.train()
    model.frozen.eval()
    return model


@pytest.mark.parametrize("fails", [False, True])
def test_runs_in_eval_mode_and_puts_each_module_back(fails: bool) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = []
    model.neuron.register_forward_hook(
        lambda *_: modes.append((model.norm.training, torch.is_inference_mode_enabled()))
    )

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        yield torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
        if fails:
            raise OSError("disk gone")

    if fails:
        with pytest.raises(OSError, match="disk gone"):
            accuracy_by_step(model, loader(), 2)
    else:
        accuracy_by_step(model, loader(), 2)
    assert modes == [(False, True)]
    assert [model.training, model.norm.training, model.frozen.training] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_eval_mode_stays() -> None:
    model = network().eval()
    accuracy_by_step(model, [(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))], 2)
    assert not any(module.training for module in model.modules())


def test_empty_loader_raises() -> None:
    with pytest.raises(ValueError, match=r"the loader gave no samples.*data set or its split"):
        accuracy_by_step(Fixed(), [], 2)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (5, "the loader is a int, but must give batches"),
        ([torch.zeros(2, 3)], "batch 0 of the loader is a Tensor, but must be two tensors"),
        ([(torch.zeros(2, 3), torch.zeros(2), 1)], "batch 0 of the loader is 3 values"),
        ([(torch.zeros(2, 3), [0, 1])], "batch 0 of the loader is 2 values, but must be two tensors"),
    ],
)
def test_loaders_of_something_else_raise(loader: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        accuracy_by_step(Fixed(), loader, 2)


def test_logits_without_time_raise() -> None:
    class Flat(nn.Module):
        def forward(self, images: Tensor, steps: int | None) -> Tensor:
            return images

    with pytest.raises(ValueError, match=r"logits have shape \[4, 3\], but must be \[T, B, K\]"):
        accuracy_by_step(Flat(), [(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))])


def test_silent_samples_are_counted_up_to_each_step() -> None:
    outputs = torch.zeros(3, 5, 2)
    outputs[0, 1, 0] = outputs[2, 2, 1] = outputs[1, 1, 1] = 1  # samples 0, 3 and 4 never answer, 2 does at the end
    images = outputs.transpose(0, 1)
    labels = torch.zeros(5, dtype=torch.int64)
    curve = accuracy_by_step(Fixed(), [(images[:4], labels[:4]), (images[4:], labels[4:])], 3)
    assert curve.silent == (4, 4, 3)
    assert str(curve).endswith("silent 80.00 % 80.00 % 60.00 %)")
    assert list(curve.__rich__().columns[-1].cells) == ["80.00", "80.00", "60.00"]
    assert curve.hits == (1, 0, 0)  # sample 1 for class 0 at first, then a tie


def test_shown_and_saved(tmp_path: Path) -> None:
    curve = AccuracyByStep(HITS, TIES, 3)
    assert str(curve) == "T=1 33.33 %  T=2 33.33 %  T=3 66.67 %  (n = 3, ties 33.33 % 33.33 % 0.00 %)"
    curve.save(tmp_path / "curve.json")
    saved = json.loads((tmp_path / "curve.json").read_text())
    assert saved == {"hits": [1, 1, 2], "ties": [1, 1, 0], "total": 3, "silent": [], "accuracy": [1 / 3, 1 / 3, 2 / 3]}
    columns = [list(column.cells) for column in curve.__rich__().columns]
    assert columns == [["1", "2", "3"], ["33.33", "33.33", "66.67"], ["33.33", "33.33", "0.00"]]


def test_curve_reads_as_a_sequence() -> None:
    curve = AccuracyByStep(hits=(5, 8), ties=(0, 0), total=10)
    assert (len(curve), curve[0], curve[-1], list(curve)) == (2, 0.5, 0.8, [0.5, 0.8])
