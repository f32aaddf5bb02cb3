"""Early exit: the rule on cases counted by hand, and the stream against the rule on one call of all steps."""

import io
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ranvier import models
from ranvier.conversion import ConvertedSNN, convert
from ranvier.evaluation import (
    AccuracyByStep,
    Answers,
    EarlyExit,
    ExitCurve,
    Exits,
    accuracy_by_step,
    early_exit,
    run_until_confident,
)
from ranvier.evaluation.early_exit import POINTS
from ranvier.evaluation.streaming import Measure
from ranvier.kernels import dispatch
from ranvier.nn import LIF, LIFB, BatchNorm

STEPS, BATCH = 5, 24
MEASURES: tuple[Measure, ...] = ("probability", "margin", "entropy")


@pytest.fixture(autouse=True)
def _reference_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run neurons by their reference at every size: compiling takes long, and the stream is what is compared."""
    monkeypatch.setattr(dispatch, "SMALL", sys.maxsize)


every_measure = pytest.mark.parametrize("measure", MEASURES)


class Told(nn.Module):
    """Answers with the logits that it is shown as a constant image, `[B, T, K]`; its state is the number of steps."""

    def forward(
        self, images: Tensor, steps: int, *, state: tuple[int] | None = None, return_state: bool = False
    ) -> Any:
        (start,) = state or (0,)
        logits = images[:, start : start + steps].transpose(0, 1)
        return (logits, (start + steps,)) if return_state else logits


# Two classes, two steps, class 0 is true everywhere; the columns are the lead of class 0 at t = 1 and t = 2.
LEADS = torch.tensor([[3.0, 3.0], [1.0, 1.0], [-2.0, 4.0], [-0.5, 2.5]])
TOLD = torch.stack([LEADS, torch.zeros(4, 2)], -1)  # [B, T, K]
TRUE = torch.zeros(4, dtype=torch.int64)
# All are right after both steps (mean leads 3, 1, 1, 1), the first two after one. Confidence at t = 1 is
# sigmoid |lead|: 0.953, 0.731, 0.881, 0.622, so that as the threshold falls samples 0, 2, 1 and 3 stop early.
FALLING = [1 / (1 + math.exp(-lead)) for lead in (3.0, 2.0, 1.0, 0.5)]


def loader(images: Tensor, labels: Tensor, size: int = 100) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), labels.split(size), strict=True))


def told(images: Tensor = TOLD, labels: Tensor = TRUE, **arguments: Any) -> EarlyExit:
    return early_exit(Told(), loader(images, labels), loader(images, labels), **{"steps": images.shape[1], **arguments})


@pytest.mark.parametrize(
    ("max_loss", "threshold", "stopped", "hits"),
    [
        (0.0, FALLING[0], (1, 3), (1, 3)),
        (0.24, FALLING[0], (1, 3), (1, 3)),  # less than one of four
        (0.25, FALLING[2], (3, 1), (2, 1)),  # sample 2 is lost; sample 1 then stops early for nothing
        (0.5, FALLING[3], (4, 0), (2, 0)),
        (1.0, FALLING[3], (4, 0), (2, 0)),
    ],
)
def test_by_hand(max_loss: float, threshold: float, stopped: tuple[int, ...], hits: tuple[int, ...]) -> None:
    result = told(max_loss=max_loss)
    assert result.threshold == pytest.approx(threshold)
    for exits in (result.choosing, result.testing):
        assert (exits.stopped, exits.hits, exits.ties) == (stopped, hits, (0, 0))
        assert exits.all_steps == AccuracyByStep((2, 4), (0, 0), 4)
        assert exits.curve.threshold == pytest.approx([math.inf, *FALLING])
        assert exits.curve.mean_steps == (2.0, 1.75, 1.5, 1.25, 1.0)
        assert exits.curve.accuracy == (1.0, 1.0, 0.75, 0.75, 0.5)
    assert result.differing == 0
    assert result.testing.mean_steps == (stopped[0] + 2 * stopped[1]) / 4
    assert result.testing.accuracy == sum(hits) / 4


def test_a_share_that_floats_round_down_is_allowed() -> None:
    """0.29 * 100 is a little below 29."""
    images = torch.cat([TOLD[2:3].expand(29, -1, -1), TOLD[:1].expand(71, -1, -1)])
    result = told(images, torch.zeros(100, dtype=torch.int64), max_loss=0.29)
    assert (result.testing.mean_steps, result.testing.accuracy) == (1.0, 0.71)


def test_chosen_on_some_and_measured_on_others() -> None:
    """The threshold passes the first and the third sample; the others are new ones of which one ties at step 2."""
    new = torch.tensor([[[2.5, 0.0], [0.0, 9.0]], [[0.1, 0.0], [0.0, 0.1]], [[0.0, 3.5], [9.0, 0.0]]])
    result = early_exit(Told(), loader(TOLD, TRUE), loader(new, TRUE[:3], 2), steps=2, max_loss=0.25)
    assert result.threshold == pytest.approx(FALLING[2])
    exits = result.testing
    assert (exits.stopped, exits.hits, exits.ties) == ((2, 1), (1, 0), (0, 1))
    assert exits.accuracy_by_exit == (0.5, 0.0)
    assert exits.share == (2 / 3, 1 / 3)
    assert exits.all_steps == AccuracyByStep((2, 1), (0, 1), 3)
    assert exits.curve.accuracy == pytest.approx([1 / 3, 0.0, 1 / 3, 2 / 3])  # 3.5, then 2.5, then 0.1 stop early


def test_measures_by_hand() -> None:
    """Probabilities 0.6, 0.3, 0.1 after the first step."""
    shares = torch.tensor([0.6, 0.3, 0.1])
    image = torch.stack([shares.log(), torch.tensor([0.0, 0.0, 50.0])]).unsqueeze(0)
    entropy = -sum(p * math.log(p) for p in shares.tolist())
    for measure, sure in zip(MEASURES, (0.6, 0.3, 1 - entropy / math.log(3)), strict=True):
        for threshold, steps in ((sure - 1e-6, 1), (sure + 1e-6, 2)):
            assert run_until_confident(Told(), image, 2, threshold, measure=measure).steps.tolist() == [steps]


def test_temperature_divides_the_logits() -> None:
    """A lead of 3 at temperature 2 is one of 1.5."""
    sure = 1 / (1 + math.exp(-1.5))
    for threshold, steps in ((sure - 1e-6, 1), (sure + 1e-6, 2)):
        assert run_until_confident(Told(), TOLD[:1], 2, threshold, temperature=2.0).steps.tolist() == [steps]


def test_fitted_temperature_by_hand() -> None:
    """Leads of 2 that are right three times in four: probability 3/4 is a lead of log 3."""
    leads = torch.tensor([2.0, 2.0, 2.0, -2.0]).view(4, 1, 1).expand(4, 3, 1)
    images = torch.cat([leads, torch.zeros(4, 3, 1)], -1)
    result = told(images, temperature="fit")
    assert result.temperature == pytest.approx(2 / math.log(3), rel=1e-6)
    assert result.threshold == pytest.approx(0.75)  # after step 1 nothing changes, so all stop there
    assert result.testing.stopped == (4, 0, 0)


def test_fitted_temperature_has_ends() -> None:
    """Where all are right, the colder the better; where all are wrong, the hotter."""
    assert told(TOLD.abs(), TRUE, temperature="fit").temperature == pytest.approx(0.01, rel=1e-4)
    assert told(TOLD.abs(), TRUE + 1, temperature="fit").temperature == pytest.approx(100, rel=1e-4)


def answer(logits: Tensor, threshold: float, measure: Measure) -> list[tuple[int, list[float]]]:
    """The rule in its own words, one sample at a time: steps and mean of `[T, B, K]`."""
    answers = []
    for sample in logits.double().unbind(1):
        for t in range(1, len(sample) + 1):
            mean = [sum(column) / t for column in zip(*sample[:t].tolist(), strict=True)]
            exponentials = [math.exp(value - max(mean)) for value in mean]
            p = sorted((e / sum(exponentials) for e in exponentials), reverse=True)
            entropy = -sum(q * math.log(q) for q in p if q > 0)
            sure = {"probability": p[0], "margin": p[0] - p[1], "entropy": 1 - entropy / math.log(len(p))}
            if sure[measure] >= threshold or t == len(sample):
                answers.append((t, mean))
                break
    return answers


def score(answers: list[tuple[int, list[float]]], labels: list[int]) -> tuple[int, int]:
    """Sum of steps, and strict hits."""
    hits = sum(
        all(mean[label] > other for k, other in enumerate(mean) if k != label)
        for (_, mean), label in zip(answers, labels, strict=True)
    )
    return sum(t for t, _ in answers), hits


@given(
    steps=st.integers(1, 5),
    batch=st.integers(1, 7),
    classes=st.integers(2, 4),
    seed=st.integers(0, 2**31),
    max_loss=st.sampled_from([0.0, 0.1, 0.29, 0.5, 1.0]),
    measure=st.sampled_from(MEASURES),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_equals_trying_every_threshold(
    steps: int, batch: int, classes: int, seed: int, max_loss: float, measure: Measure
) -> None:
    """Logits are multiples of 1/8, from few enough that samples share confidences and classes tie."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-12, 13, (steps, batch, classes), generator=generator) / 8
    labels = torch.randint(0, classes, (batch,), generator=generator)
    result = told(logits.transpose(0, 1), labels, max_loss=max_loss, measure=measure)
    curve = result.choosing.curve
    # Between two thresholds that follow each other nothing changes, so that rounding cannot matter in the middle.
    lower = [*curve.threshold[1:], -1.0]
    tried = []
    for threshold, below, mean_steps, accuracy in zip(
        curve.threshold, lower, curve.mean_steps, curve.accuracy, strict=True
    ):
        middle = (threshold + below) / 2 if threshold < math.inf else math.inf
        tried.append(score(answer(logits, middle, measure), labels.tolist()))
        assert tried[-1] == (pytest.approx(mean_steps * batch), pytest.approx(accuracy * batch))
    assert tried[-1][0] == batch  # the last one stops all samples at once
    good = [pair for pair in tried if tried[0][1] - pair[1] <= max_loss * batch]
    assert (sum(t * n for t, n in enumerate(result.choosing.stopped, 1)), sum(result.choosing.hits)) == min(good)
    assert result.choosing == result.testing
    assert result.differing == 0


@given(seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
@settings(deadline=None, max_examples=20, derandomize=True)
def test_without_early_exit_it_is_accuracy_by_step(seed: int, dtype: torch.dtype) -> None:
    """Hits and ties to the last sample, also where sums of floats round."""
    generator = torch.Generator().manual_seed(seed)
    images = (torch.randint(-3, 4, (50, 6, 3), generator=generator) * 0.1).to(dtype)
    labels = torch.randint(0, 3, (50,), generator=generator)
    expected = accuracy_by_step(Told(), loader(images, labels), 6)
    result = told(images, labels)
    assert result.testing.all_steps == result.choosing.all_steps == expected
    assert sum(expected.ties) > 0


def test_a_long_curve_keeps_its_ends() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(400, 4, 3, generator=generator)
    labels = torch.randint(0, 3, (400,), generator=generator)
    curve = told(images, labels).testing.curve
    assert POINTS / 2 < len(curve) <= POINTS
    assert (curve.threshold[0], curve.mean_steps[0], curve.mean_steps[-1]) == (math.inf, 4.0, 1.0)
    assert list(curve.mean_steps) == sorted(curve.mean_steps, reverse=True)
    assert list(curve.threshold) == sorted(curve.threshold, reverse=True)
    assert max(a - b for a, b in zip(curve.mean_steps, curve.mean_steps[1:], strict=False)) < 0.05


# --- streaming ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def exact(model: nn.Module) -> nn.Module:
    """Parameters that are multiples of 1/8: sums are exact in float32, in whatever order and batch they are taken."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        last = name.startswith(("readout", "head"))  # small, or the first answer is as sure as the last
        parameter.copy_(torch.randint(-5, 6, parameter.shape, generator=generator) / (64 if last else 8))
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eps = 0.0
            module.weight.fill_(0.5)
            module.bias.fill_(0.25)
    return model.eval()


class AnnWithShortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enter(x))
        return self.head(torch.flatten(F.relu(self.conv(x)) + x, 1))


def converted(*, signed: bool) -> ConvertedSNN:
    """With a bias for each step, so that its state counts steps."""
    torch.manual_seed(0)
    ann = exact(AnnWithShortcut())
    batches = loader(torch.randint(0, 9, (32, 2, 4, 4)) / 8, torch.zeros(32, dtype=torch.int64))
    snn = convert(ann, batches, steps=STEPS, bias="ftbc", signed=signed)
    for number, neuron in enumerate(snn.neurons.values()):
        neuron.threshold.copy_(neuron.threshold.log2().round().exp2())
        generator = torch.Generator().manual_seed(number)
        neuron.bias = torch.randint(-8, 9, (STEPS, len(neuron.threshold)), generator=generator) / 8
        neuron.v_init.copy_((neuron.v_init * 8).round() / 8)
    return snn


NETWORKS: dict[str, Any] = {
    "lif": lambda: (exact(models.mlp([12, 48, 32, 3])), (12,)),
    "lifb": lambda: (exact(models.conv4(3, 2, image_size=8, neuron=LIFB)), (2, 8, 8)),
    "residual": lambda: (exact(models.resnet20(3, 2)), (2, 4, 4)),
    "converted": lambda: (converted(signed=False), (2, 4, 4)),
    "converted_signed": lambda: (converted(signed=True), (2, 4, 4)),
}


def build(name: str, batch: int = BATCH) -> tuple[nn.Module, Tensor]:
    network, shape = NETWORKS[name]()
    return network, torch.randint(0, 9, (batch, *shape), generator=torch.Generator().manual_seed(2)) / 8


@torch.no_grad()
def medium(network: nn.Module, images: Tensor, measure: Measure = "probability") -> float:
    """A threshold between the confidences of the first step, so that some samples stop there, and some do not."""
    p = run_until_confident(network, images, 1, math.inf).logits.softmax(-1).sort(-1, descending=True).values
    entropy = 1 - torch.special.entr(p).sum(-1) / math.log(p.shape[-1])
    sure = {"probability": p[:, 0], "margin": p[:, 0] - p[:, 1], "entropy": entropy}[measure].unique()
    assert len(sure) > 2, "all samples are equally sure: this test would show nothing"
    return float(sure[len(sure) // 2 - 1 : len(sure) // 2 + 1].mean())


def rule(logits: Tensor, threshold: float, measure: Measure = "probability") -> tuple[Tensor, Tensor]:
    """Steps and mean logits that the rule gives on logits `[T, B, K]` of one call."""
    answers = answer(logits, threshold, measure)
    return torch.tensor([t for t, _ in answers]), torch.tensor([mean for _, mean in answers], dtype=torch.float64)


@every_measure
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_stream_equals_the_rule_on_one_call_bit_for_bit(name: str, sequence: bool, measure: Measure) -> None:
    network, images = build(name)
    inputs = torch.stack([images.roll(t, 0) for t in range(STEPS)]) if sequence else images
    with torch.no_grad():
        logits = network(inputs, STEPS)
    assert len(logits.unique(dim=0)) == STEPS, "the network is silent: this test would show nothing"
    threshold = medium(network, images, measure)
    steps, means = rule(logits, threshold, measure)
    assert len(steps.unique()) > 1, "all samples stop at once: this test would show nothing"
    answers = run_until_confident(network, inputs, STEPS, threshold, measure=measure)
    assert torch.equal(answers.steps, steps)
    assert torch.equal(answers.logits, means)
    assert torch.equal(answers.predictions, means.argmax(-1))
    alone = [
        run_until_confident(network, inputs[:, b : b + 1] if sequence else inputs[b : b + 1], STEPS, threshold,
                            measure=measure) for b in range(4)
    ]  # fmt: skip
    assert torch.equal(torch.cat([one.logits for one in alone]), means[:4])
    assert torch.equal(torch.cat([one.steps for one in alone]), steps[:4])


@pytest.mark.parametrize("name", NETWORKS)
def test_measured_by_streaming(name: str) -> None:
    network, images = build(name, 60)
    labels = network(images, STEPS).detach().mean(0).argmax(-1)
    choosing, testing = loader(images[:20], labels[:20], 7), loader(images[20:], labels[20:], 16)
    result = early_exit(network, iter(choosing), iter(testing), steps=STEPS, max_loss=0.1)
    assert result.differing == 0
    with torch.no_grad():
        answers = answer(network(images[20:], STEPS), result.threshold - 1e-12, "probability")
    assert result.testing.stopped == tuple(sum(t == steps for t, _ in answers) for steps in range(1, STEPS + 1))
    assert (result.testing.mean_steps * 40, sum(result.testing.hits)) == score(answers, labels[20:].tolist())
    assert result.testing.all_steps == accuracy_by_step(network, testing, STEPS)
    assert result.choosing.all_steps == accuracy_by_step(network, choosing, STEPS)


@pytest.mark.parametrize("name", ["spikformer", "sew_resnet18"])
def test_untrained_networks_in_float64(name: str) -> None:
    """Rounding of 1e-16 moves no spike here, and no sample across the threshold."""
    torch.manual_seed(3)
    if name == "spikformer":
        network, size = models.spikformer(10, 3, image_size=16, depth=1, dim=32, heads=2), 16
    else:
        network, size = models.sew_resnet18(10, 3, neuron=LIFB), 8
    network = network.double()
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        network(torch.randn(2, 8, 3, size, size, dtype=torch.float64))  # or deep layers would be silent
    network.eval()
    images = torch.randn(8, 3, size, size, dtype=torch.float64)
    threshold = medium(network, images)
    with torch.no_grad():
        steps, means = rule(network(images, 4), threshold)
    answers = run_until_confident(network, images, 4, threshold)
    assert torch.equal(answers.steps, steps)
    torch.testing.assert_close(answers.logits, means, rtol=1e-9, atol=1e-9)


def test_reduced_precision_agrees_with_its_own_run() -> None:
    network, images = build("lif")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = network(images, STEPS)
        answers = run_until_confident(network, images, STEPS, 0.9)
    assert logits.dtype is torch.bfloat16
    steps, means = rule(logits, 0.9)
    assert torch.equal(answers.steps, steps)
    torch.testing.assert_close(answers.logits, means, rtol=1e-6, atol=1e-7)  # sums are rounded to float32


def test_stopped_samples_leave_the_batch() -> None:
    """One stops at step 2, two at once at step 3, and the last runs to the end although it is never sure."""
    rounds = torch.zeros(4, 5, 2)
    rounds[0, 1:, 0], rounds[1:3, 2:, 0] = 9.0, 9.0
    sizes = []

    class Counting(Told):
        def forward(self, images: Tensor, steps: int, **arguments: Any) -> Any:
            sizes.append(len(images))
            return super().forward(images, steps, **arguments)

    answers = run_until_confident(Counting(), rounds, 5, 0.9)
    assert sizes == [4, 4, 3, 1, 1]
    assert answers.steps.tolist() == [2, 3, 3, 5]
    assert answers.logits[:, 0].tolist() == [4.5, 3.0, 3.0, 0.0]
    sizes.clear()
    assert run_until_confident(Counting(), rounds, 5, 0.0).steps.tolist() == [1, 1, 1, 1]
    assert sizes == [4]


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: sizes that depend on values, and values one by one.

    Not `tolist`, which on a CPU passes no dispatcher: the check of finite numbers at the end, in place of the count of
    samples that are left after the last step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype is torch.bool for index in args[1] if index is not None
        )
        self.count += masked or name in ("nonzero", "masked_select", "_local_scalar_dense", "is_nonzero", "unique")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("threshold", "most"), [(0.0, 1), (0.9, 4), (math.inf, 4)])
def test_the_device_is_waited_for_once_a_step(threshold: float, most: int) -> None:
    network, images = build("converted_signed")
    with Waits() as waits:
        steps = run_until_confident(network, images, STEPS, threshold).steps
    assert waits.count <= min(most, steps.max())


# --- states ------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    seen: Tensor
    step: int


@dataclass(frozen=True)
class Record:
    seen: Tensor
    name: str
    nothing: None = None


STATES: dict[str, Any] = {
    "named_tuple": (lambda seen, step: (Pair(seen, step), Pair(seen, step)), lambda state: state[1]),
    "dataclass": (lambda seen, step: [Record(seen, "a"), step], lambda state: (state[0].seen, state[1])),
    "dictionary": (lambda seen, step: {"seen": seen, "n": {"step": step}}, lambda s: (s["seen"], s["n"]["step"])),
    "counter_as_tensor": (lambda seen, step: (seen, torch.tensor(step)), lambda state: (state[0], int(state[1]))),
    "empty_tensor": (lambda seen, step: (seen, step, torch.empty(0)), lambda state: state[:2]),
}


class Remembers(nn.Module):
    """Reads its logits from its state alone: the image is looked at in the first step only."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.pack, self.unpack = STATES[kind]

    def forward(self, images: Tensor, steps: int, *, state: Any = None, return_state: bool = False) -> Any:
        seen, start = (images, 0) if state is None else self.unpack(state)
        logits = seen[:, start : start + steps].transpose(0, 1)
        return (logits, self.pack(seen, start + steps)) if return_state else logits


@pytest.mark.parametrize("kind", STATES)
def test_states_of_any_make(kind: str) -> None:
    images = torch.randn(40, 5, 3, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 6.0).unsqueeze(1)
    steps, means = rule(images.transpose(0, 1), 0.7)
    assert len(steps.unique()) > 2
    answers = run_until_confident(Remembers(kind), images, 5, 0.7)
    assert torch.equal(answers.steps, steps)
    torch.testing.assert_close(answers.logits, means, rtol=1e-6, atol=1e-6)  # means here are not rounded to float32


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (torch.zeros(3, 4), ValueError, r"tensor of shape \[3, 4\], but the batch has 4 samples.*first axis"),
        ({1, 2}, TypeError, "holds a set, of which samples cannot be taken"),
    ],
)
def test_states_that_cannot_be_split(state: Any, error: type[Exception], message: str) -> None:
    class Odd(Told):
        def forward(self, images: Tensor, steps: int, **arguments: Any) -> Any:
            return super().forward(images, steps, return_state=True)[0], state

    with pytest.raises(error, match=message):
        run_until_confident(Odd(), TOLD, 2, 0.9)


def test_a_network_that_forgets_its_state_is_found_out() -> None:
    """It takes a state but starts anew: every step repeats the first one."""

    class Forgets(Told):
        def forward(self, images: Tensor, steps: int, **arguments: Any) -> Any:
            return super().forward(images, steps, return_state=arguments.get("return_state", False))

    result = early_exit(Forgets(), loader(TOLD, TRUE), loader(TOLD, TRUE), steps=2, max_loss=0.0)
    assert result.differing == 2  # samples 2 and 3, whose second step would have put them right
    assert "2 samples stopped elsewhere" in printed(result)


# --- arguments ---------------------------------------------------------------------------------------------------


def test_one_step_has_nothing_to_gain() -> None:
    result = told(TOLD[:, :1])
    assert result.threshold == math.inf
    assert result.testing.mean_steps == 1.0
    assert result.testing.stopped == (4,)
    assert result.testing.accuracy == result.testing.all_steps.final == 0.5
    assert result.testing.curve == ExitCurve((math.inf,), (1.0,), (0.5,))
    assert "never stops before the last step" in str(result)


def test_sequences() -> None:
    network, images = build("lif")
    frames = torch.stack([images.roll(t, 0) for t in range(STEPS)])
    whole = run_until_confident(network, frames, None, 0.99)
    assert torch.equal(whole.logits, run_until_confident(network, frames, STEPS, 0.99).logits)
    first = run_until_confident(network, frames, 3, math.inf)
    assert torch.equal(first.logits, run_until_confident(network, frames[:3], None, math.inf).logits)
    with pytest.raises(ValueError, match=r"a sequence of 5 steps, but steps=6\. Pass longer sequences, or steps=5"):
        run_until_confident(network, frames, 6, 0.9)
    batches = [[(frames, torch.zeros(BATCH, dtype=torch.int64))] for _ in range(2)]
    assert early_exit(network, *batches, steps=3).testing.total == BATCH
    with pytest.raises(ValueError, match="a sequence of 5 steps"):
        early_exit(network, *batches, steps=6)


def test_a_network_without_ranks_takes_a_sequence_where_steps_are_open() -> None:
    class Sums(nn.Module):
        """Logits are the frame."""

        def forward(self, images: Tensor, steps: int, *, state: Any = None, return_state: bool = False) -> Any:
            return images.unsqueeze(0), ()

    frames = torch.tensor([[[1.0, 0.0], [9.0, 0.0]], [[9.0, 0.0], [0.0, 0.0]]])
    assert run_until_confident(Sums(), frames, None, 0.9).steps.tolist() == [2, 1]


def test_constant_input_needs_steps() -> None:
    network, images = build("lif")
    with pytest.raises(ValueError, match=r"Pass it: model\(images, steps=4\)"):
        run_until_confident(network, images, None, 0.9)


class NoState(nn.Module):
    def forward(self, images: Tensor, steps: int) -> Tensor:
        return images.transpose(0, 1)[:steps]


class NoStateReturned(nn.Module):
    def forward(self, images: Tensor, steps: int, **_: Any) -> Tensor:
        return images.transpose(0, 1)[:steps]


@pytest.mark.parametrize(
    ("model", "came"), [(NoState(), r"takes \(images, steps\)"), (NoStateReturned(), "returned a Tensor")]
)
def test_networks_that_do_not_stream(model: nn.Module, came: str) -> None:
    for run in (
        lambda: run_until_confident(model, TOLD, 2, 0.9),
        lambda: early_exit(model, loader(TOLD, TRUE), loader(TOLD, TRUE), steps=2),
    ):
        with pytest.raises(TypeError, match=rf"forward {came}, but .* return_state=True\) must return logits"):
            run()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite(value: float) -> None:
    class Broken(Told):
        def forward(self, images: Tensor, steps: int, **arguments: Any) -> Any:
            logits = super().forward(images, steps, **arguments)
            broken = (logits[0] if isinstance(logits, tuple) else logits).clone()
            broken[-1, -1, 1] = value
            return (broken, logits[1]) if isinstance(logits, tuple) else broken

    for threshold in (0.0, 0.9):
        with pytest.raises(ValueError, match="logits of these images hold NaN or infinity.*diverged"):
            run_until_confident(Broken(), TOLD, 2, threshold)
    with pytest.raises(ValueError, match="logits of batch 0 of the images to choose on hold NaN"):
        early_exit(Broken(), loader(TOLD, TRUE), loader(TOLD, TRUE), steps=2)


def test_images_that_are_not_finite() -> None:
    network, images = build("lif")
    labels = torch.zeros(BATCH, dtype=torch.int64)
    broken = images.clone()
    broken[3, 0] = math.nan
    with pytest.raises(ValueError, match=r"these images hold NaN or infinity\. Mend the data"):
        run_until_confident(network, broken, STEPS, 0.9)
    with pytest.raises(ValueError, match="batch 1 of the test images hold NaN"):
        early_exit(network, loader(images, labels), loader(images, labels) + loader(broken, labels), steps=STEPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"max_loss": -0.1}, "max_loss is -0.1, but must be a share from 0 to 1"),
        ({"max_loss": 5}, "half a point is max_loss=0.005"),
        ({"max_loss": math.nan}, "max_loss is nan"),
        ({"measure": "confidence"}, "measure is 'confidence', but must be one of 'probability', 'margin', 'entropy'"),
        ({"temperature": 0.0}, "temperature is 0.0, but must be greater than 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is infinity"),
        ({"energy_by_step": [1.0]}, "must be 2 energies"),
        ({"energy_by_step": [1.0, -1.0]}, "none negative"),
        ({"energy_by_step": [1.0, math.nan]}, "none negative"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        told(**arguments)


def test_wrong_arguments_of_the_stream() -> None:
    for arguments, message in (
        ({"threshold": math.nan}, "threshold is NaN"),
        ({"threshold": 0.5, "measure": "variance"}, "measure is 'variance'"),
        ({"threshold": 0.5, "temperature": -1.0}, "temperature is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            run_until_confident(Told(), TOLD, 2, **arguments)
    with pytest.raises(ValueError, match="steps is 0"):
        run_until_confident(Told(), TOLD, 0, 0.5)
    with pytest.raises(ValueError, match=r"shape \[0, 2, 2\]: no samples"):
        run_until_confident(Told(), TOLD[:0], 2, 0.5)
    with pytest.raises(TypeError, match="a network takes a floating torch.Tensor"):
        run_until_confident(Told(), TOLD.numpy(), 2, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least K = 2 classes"):
        run_until_confident(Told(), TOLD[..., :1], 2, 0.5)


def test_loaders() -> None:
    images = loader(TOLD, TRUE)
    with pytest.raises(ValueError, match="no samples to choose a threshold on"):
        early_exit(Told(), [], images, steps=2)
    with pytest.raises(ValueError, match="no samples to test on"):
        early_exit(Told(), images, [], steps=2)
    with pytest.raises(ValueError, match="are the same images"):
        early_exit(Told(), images, images, steps=2)


@pytest.mark.parametrize("fails", [False, True])
def test_runs_in_eval_mode_and_puts_each_module_back(fails: bool) -> None:
    network = models.conv4(3, 2, image_size=8).train()
    network.encoder.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = []
    neuron = next(module for module in network.modules() if isinstance(module, LIF))
    neuron.register_forward_hook(lambda *_: modes.append((network.training, torch.is_inference_mode_enabled())))
    images = torch.randn(4, 2, 8, 8)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield images, torch.zeros(4, dtype=torch.int64)
        if fails:
            raise OSError("disk gone")

    if fails:
        with pytest.raises(OSError, match="disk gone"):
            early_exit(network, batches(), batches(), steps=2)
    else:
        early_exit(network, batches(), batches(), steps=2)
    run_until_confident(network, images, 2, 0.5)
    assert set(modes) == {(False, True)}
    assert (network.training, network.body.training, network.encoder.training) == (True, True, False)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_answers_unpack() -> None:
    answers = Answers(torch.tensor([[0.0, 2.0, 2.0]]), torch.tensor([3]))
    logits, steps = answers
    assert (logits.shape, steps.tolist(), answers.predictions.tolist()) == ((1, 3), [3], [1])


# --- what is reported --------------------------------------------------------------------------------------------


def test_energy_by_hand() -> None:
    """Three of four samples stop after 2 J, one runs on for 3 J more."""
    result = told(max_loss=0.25, energy_by_step=[2.0, 3.0])
    assert result.testing.stopped == (3, 1)
    assert result.energy == (3 * 2 + 1 * 5) / 4
    assert result.energy_of_all_steps == 5.0
    assert "2.75 J a sample instead of 5 J (45 % less)" in printed(result)
    without = told(max_loss=0.25)
    assert (without.energy, without.energy_of_all_steps) == (None, None)
    assert " J " not in printed(without)


def printed(result: EarlyExit) -> str:
    console = Console(record=True, file=io.StringIO(), width=200)
    console.print(result)
    return console.export_text()


def test_shown() -> None:
    result = told(max_loss=0.25, chosen_on="4 of these")
    assert str(result) == (
        "stops at probability >= 0.7311: 75.00 % after 1.25 of 2 steps, 100.00 % after all  "
        "(n = 4, ties 0.00 % and 0.00 %)"
    )
    columns = [list(column.cells) for column in result.__rich__().columns]
    assert columns == [
        ["1", "2", "mean 1.25"],
        ["75.00", "25.00", "100.00"],
        ["66.67", "100.00", "75.00"],
        ["0.00", "0.00", "0.00"],
        ["50.00", "100.00", "100.00"],
        ["0.00", "0.00", "0.00"],
    ]
    text = printed(result)
    assert "chosen on 4 of these; there 75.00 % after 1.25 steps, 100.00 % after all" in text
    assert "allowed to lose 25 points" in text
    assert "elsewhere" not in text
    assert "at temperature 0.5" in str(told(temperature=0.5))
    everyone = told(max_loss=1.0).__rich__().columns[2]
    assert list(everyone.cells) == ["50.00", "-", "50.00"]  # nobody stops after step 2


def test_saved_as_json_that_any_reader_takes(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no json")

    for steps in (1, 2):
        told(TOLD[:, :steps], max_loss=0.25, energy_by_step=[1.0] * steps).save(tmp_path / "e.json")
        saved = json.loads((tmp_path / "e.json").read_text(), parse_constant=refuse)
    assert saved["threshold"] == pytest.approx(FALLING[2])
    assert saved["measure"] == "probability"
    assert (saved["energy"], saved["energy_of_all_steps"]) == (1.25, 2.0)
    assert saved["testing"] == saved["choosing"]
    testing = saved["testing"]
    assert (testing["stopped"], testing["hits"], testing["ties"]) == ([3, 1], [2, 1], [0, 0])
    assert (testing["accuracy"], testing["mean_steps"], testing["total"]) == (0.75, 1.25, 4)
    assert testing["accuracy_by_exit"] == [2 / 3, 1.0]
    assert testing["all_steps"] == {"hits": [2, 4], "ties": [0, 0], "total": 4, "accuracy": [0.5, 1.0]}
    assert testing["curve"]["threshold"][0] is None
    assert testing["curve"]["mean_steps"] == [2.0, 1.75, 1.5, 1.25, 1.0]


def test_a_group_without_samples_has_no_accuracy() -> None:
    exits = Exits((2, 0), (1, 0), (1, 0), AccuracyByStep((1, 1), (1, 1), 2), ExitCurve((), (), ()))
    assert exits.accuracy_by_exit == (0.5, None)
