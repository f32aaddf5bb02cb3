import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from ranvier import models
from ranvier.export.receipt import BATCH, ROUNDING, ExportError, Parity, Port, Receipt, Runner, check_parity
from ranvier.nn import IF, Readout, TimeFolded
from ranvier.nn.structure import Activation

from .networks import build

STEPS = 2
OPEN = (Port("images", (BATCH, 12), "float32", ""),)
FIXED = (Port("images", (8, 12), "float32", ""),)


def faithful(model: nn.Module) -> Runner:
    return lambda images: (model(images, STEPS),)


def altered(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Runner:
    """A file whose logits `[T, B, K]` went through `change`."""
    return lambda images: (change(model(images, STEPS).clone()),)


def with_samples(logits: Tensor, count: int, by: float) -> Tensor:
    logits[-1, :count, 0] += by
    return logits


@torch.no_grad()
def parity(call: Runner, model: nn.Module, images: Tensor, inputs: tuple[Port, ...] = OPEN) -> Parity:
    return check_parity(model, call, inputs, images, STEPS, streaming=False)


def test_what_is_equal() -> None:
    model, images = build("mlp-lif")
    found = parity(faithful(model), model, images)
    assert (found.difference, found.flipped, found.agreement) == (0.0, 0, 1.0)
    assert (found.samples, found.batch_sizes) == (9, (8, 1))
    assert found.tolerance == pytest.approx(2**-16 * model(images, STEPS).abs().max().item())


def test_batches() -> None:
    """An open batch is tried at a second size; a fixed one at its own only."""
    model, images = build("mlp-lif")
    assert parity(faithful(model), model, images, FIXED).batch_sizes == (8,)
    assert parity(faithful(model), model, images[:1]).batch_sizes == (1, 2)


@torch.no_grad()
def test_rounding_passes_and_more_does_not() -> None:
    model, images = build("mlp-lif")
    top = float(model(images, STEPS).abs().max())
    found = parity(altered(model, lambda logits: logits + 0.5 * ROUNDING * top), model, images)
    assert found.flipped == 0
    assert found.difference == pytest.approx(0.5 * ROUNDING * top, rel=0.05)  # float32
    with pytest.raises(ExportError, match=r"in 9 of 9 samples by more than rounding .* moves 0 of these"):
        parity(altered(model, lambda logits: logits + 2 * ROUNDING * top), model, images)


@pytest.mark.parametrize("images", [2, 8])
@pytest.mark.parametrize("wrong", [1, 2])
def test_not_one_sample_may_differ_by_what_rounding_does_not_explain(images: int, wrong: int) -> None:
    model, x = build("mlp-lif")
    with pytest.raises(ExportError, match=f"in {wrong} of {images} samples .* moves 0 of these"):
        parity(altered(model, lambda logits: with_samples(logits, wrong, 9.0)), model, x[:images], FIXED)


def on_the_edge(weight: float = 1.0, other: float = -(2.0**-26)) -> tuple[models.Network, Tensor]:
    """A network that rounding decides: 1 - 2^-26 is 1 in float32, which meets the threshold, and less in float64."""
    torch.manual_seed(0)
    linear = nn.Linear(2, 1, bias=False)
    model = models.Network(TimeFolded(linear), Activation(IF(v_threshold=1.0)), Readout(1, 2), frame_dims=(2,))
    model.requires_grad_(False)
    linear.weight.copy_(torch.tensor([[weight, other]]))
    return model, torch.ones(8, 2)


def with_silent(model: models.Network, images: Tensor, silent: Tensor) -> Runner:
    """A file in which some samples `[B]` never fire."""
    logits = model.readout(model(images, STEPS).new_zeros(STEPS, len(images), 1))
    logits = torch.where(silent.view(1, -1, 1), logits, model(images, STEPS))
    return lambda batch: (logits[:, : len(batch)],)


def test_float64_says_how_far_rounding_goes() -> None:
    """A file in which nothing fires passes if float64 does not fire either."""
    model, images = on_the_edge()
    silent = with_silent(model, images, torch.ones(8, dtype=torch.bool))
    found = parity(silent, model, images)
    assert found.flipped == found.samples == 9
    assert next(model.parameters()).dtype == torch.float32, "the network is as it was"
    images[:, 0] = 1.5
    with pytest.raises(ExportError, match=r"in 9 of 9 samples .* moves 0 of these"):
        parity(silent, model, images)


@pytest.mark.parametrize("sample", range(8))
def test_each_flipped_sample_has_to_be_one_that_rounding_moves(sample: int) -> None:
    """Of eight only the first three lie on the edge."""
    model, images = on_the_edge()
    images[3:, 0] = 1.5
    wrong = with_silent(model, images, torch.arange(8) == sample)
    if sample < 3:
        assert parity(wrong, model, images, FIXED).flipped == 1
    else:
        with pytest.raises(ExportError, match="in 1 of 8 samples .* moves 0 of these"):
            parity(wrong, model, images, FIXED)


@pytest.mark.parametrize(("below", "explained"), [(2.0**-23, True), (2.0**-21, True), (2.0**-16, False)])
def test_roundings_that_float64_does_not_show(below: float, explained: bool) -> None:
    """Below the threshold in float32 and in float64; another runtime, a few roundings off, may fire."""
    model, images = on_the_edge(1 - below, 0.0)
    assert torch.equal(model(images, 1), model.double()(images.double(), 1).float())
    model.float()
    fires = model.readout(torch.ones(STEPS, 8, 1))
    call: Runner = lambda batch: (torch.cat([fires[:, :1], model(batch, STEPS)[:, 1:]], 1),)  # noqa: E731
    if explained:
        assert parity(call, model, images, FIXED).flipped == 1
    else:
        with pytest.raises(ExportError, match="in 1 of 8 samples"):
            parity(call, model, images, FIXED)


def test_where_rounding_decides_everything_sizes_count() -> None:
    """Three times what float64 changes is too much."""
    model, images = on_the_edge()
    ours, silent = model(images, STEPS), model.readout(torch.zeros(STEPS, 8, 1))

    def further(factor: float) -> Runner:
        logits = ours + factor * (silent - ours)
        return lambda batch: (logits[:, : len(batch)],)

    assert parity(further(2.9), model, images).flipped == 9
    with pytest.raises(ExportError, match="moves 9 of these"):
        parity(further(3.1), model, images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: logits[:1], r"gives logits \[1, 8, 3\], but the network \[2, 8, 3\]"),
        (lambda logits: logits * torch.nan, r"logits differ by up to nan, in 9 of 9 samples"),
        (lambda logits: logits.view(2, 8, 3), r"does not run on a batch of 1: .*invalid for input"),
    ],
)
def test_broken_files(change: Callable[[Tensor], Tensor], message: str) -> None:
    model, images = build("mlp-lif")
    with pytest.raises(ExportError, match=message):
        parity(altered(model, change), model, images)


def test_streaming_starts_from_zeros_and_carries() -> None:
    """A file that counts its calls in its state."""
    model, images = build("ann")
    inputs = (*OPEN, Port("state_0", (BATCH, 2), "float32", ""), Port("state_1", (), "int64", ""))
    seen: list[tuple[tuple[int, ...], float, int]] = []

    def call(batch: Tensor, total: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        assert step.dtype == torch.int64
        seen.append((tuple(total.shape), float(total.sum()), int(step)))
        return model(batch, 1)[0], total + 1, step + 1

    with torch.no_grad():
        found = check_parity(model, call, inputs, images, 3, streaming=True)
    assert found.flipped == 0
    assert seen == [((8, 2), 16.0 * t, t) for t in range(3)] + [((1, 2), 2.0 * t, t) for t in range(3)]


def receipt(**changes: object) -> Receipt:
    values: dict = {
        "path": "a[b].onnx",
        "format": "onnx",
        "steps": 4,
        "streaming": False,
        "opset": 20,
        "bytes": 2048,
        "inputs": (Port("images", (BATCH, 3, 8, 8), "float32", "a constant input"),),
        "outputs": (Port("logits", (4, BATCH, 10), "float32", "scores"),),
        "checked_with": "onnxruntime 1",
        "difference": 1.5e-7,
        "tolerance": 2e-5,
        "flipped": 0,
        "agreement": 1.0,
        "samples": 9,
        "batch_sizes": (8, 1),
        "versions": {"ranvier": "0"},
    }
    return Receipt(**{**values, **changes})


def test_receipt_in_words() -> None:
    assert str(receipt()) == (
        "a[b].onnx: onnx, 4 steps, 2 KiB; logits differ by 1.5e-07 at most (rounding: 2.0e-05), "
        "100 % equal answers in batches of 8 and 1, run by onnxruntime 1"
    )
    assert "spikes flipped in 2 of 9 samples, 88.89 % equal" in str(receipt(flipped=2, agreement=8 / 9))
    assert "one step, state in and out" in str(receipt(streaming=True))


def test_receipt_as_a_table() -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(receipt())
    text = capture.get()
    assert "a[b].onnx: onnx, opset 20, 4 steps, 2 KiB" in text
    assert "[batch, 3, 8, 8]" in text, "brackets are no markup"
    assert "1.5e-07" in text


def test_receipt_as_json(tmp_path: Path) -> None:
    receipt().save(tmp_path / "receipt.json")
    content = json.loads((tmp_path / "receipt.json").read_text())
    assert content["difference"] == 1.5e-7
    assert content["inputs"] == [
        {"name": "images", "shape": ["batch", 3, 8, 8], "dtype": "float32", "holds": "a constant input"}
    ]
