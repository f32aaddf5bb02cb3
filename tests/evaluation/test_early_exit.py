"""Early exit: thresholds chosen by hand and by trying all, and what is measured with them by streaming."""

import io
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from ranvier import models
from ranvier.evaluation import AccuracyByStep, EarlyExit, ExitCurve, Exits, accuracy_by_step, early_exit
from ranvier.evaluation.early_exit import POINTS
from ranvier.evaluation.streaming import Measure
from ranvier.kernels import dispatch
from ranvier.nn import LIF

from .streams import (
    BATCH,
    FALLING,
    MEASURES,
    NETWORKS,
    STEPS,
    TOLD,
    TRUE,
    Broken,
    NoState,
    NoStateReturned,
    Told,
    answer,
    build,
    loader,
)


@pytest.fixture(autouse=True)
def _reference_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run neurons by their reference at every size: compiling takes long, and the stream is what is compared."""
    monkeypatch.setattr(dispatch, "SMALL", sys.maxsize)


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


def scored(model: nn.Module, batches: list[tuple[Tensor, Tensor]], steps: int) -> AccuracyByStep:
    """Hits and ties; early exit does not count silent samples."""
    return replace(accuracy_by_step(model, batches, steps), silent=())


@given(seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
@settings(deadline=None, max_examples=20, derandomize=True)
def test_without_early_exit_it_is_accuracy_by_step(seed: int, dtype: torch.dtype) -> None:
    """Hits and ties to the last sample, also where sums of floats round."""
    generator = torch.Generator().manual_seed(seed)
    images = (torch.randint(-3, 4, (50, 6, 3), generator=generator) * 0.1).to(dtype)
    labels = torch.randint(0, 3, (50,), generator=generator)
    expected = scored(Told(), loader(images, labels), 6)
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
    assert result.testing.all_steps == scored(network, testing, STEPS)
    assert result.choosing.all_steps == scored(network, choosing, STEPS)


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


def test_sequences() -> None:
    network, images = build("lif")
    frames = torch.stack([images.roll(t, 0) for t in range(STEPS)])
    batches = [[(frames, torch.zeros(BATCH, dtype=torch.int64))] for _ in range(2)]
    assert early_exit(network, *batches, steps=3).testing.total == BATCH
    with pytest.raises(ValueError, match="a sequence of 5 steps"):
        early_exit(network, *batches, steps=6)


@pytest.mark.parametrize(
    ("model", "came"), [(NoState(), r"takes \(images, steps\)"), (NoStateReturned(), "returned a Tensor")]
)
def test_networks_that_do_not_stream(model: nn.Module, came: str) -> None:
    with pytest.raises(TypeError, match=rf"forward {came}, but .* return_state=True\) must return logits"):
        early_exit(model, loader(TOLD, TRUE), loader(TOLD, TRUE), steps=2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match="logits of batch 0 of the images to choose on hold NaN"):
        early_exit(Broken(value), loader(TOLD, TRUE), loader(TOLD, TRUE), steps=2)


def test_images_that_are_not_finite() -> None:
    network, images = build("lif")
    labels = torch.zeros(BATCH, dtype=torch.int64)
    broken = images.clone()
    broken[3, 0] = math.nan
    with pytest.raises(ValueError, match="batch 1 of the test images hold NaN"):
        early_exit(network, loader(images, labels), loader(images, labels) + loader(broken, labels), steps=STEPS)


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
    assert set(modes) == {(False, True)}
    assert (network.training, network.body.training, network.encoder.training) == (True, True, False)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


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
    assert testing["all_steps"] == {
        "hits": [2, 4],
        "ties": [0, 0],
        "total": 4,
        "silent": [],
        "accuracy": [0.5, 1.0],
    }
    assert testing["curve"]["threshold"][0] is None
    assert testing["curve"]["mean_steps"] == [2.0, 1.75, 1.5, 1.25, 1.0]


def test_a_group_without_samples_has_no_accuracy() -> None:
    exits = Exits((2, 0), (1, 0), (1, 0), AccuracyByStep((1, 1), (1, 1), 2), ExitCurve((), (), ()))
    assert exits.accuracy_by_exit == (0.5, None)
