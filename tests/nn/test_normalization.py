"""Batch normalisation over time against torch's own, folded and step by step."""

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from ranvier.nn import BatchNorm

STEPS, BATCH, CHANNELS = 4, 3, 5
Statistics = Literal["folded", "per_step"]

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
"""Same float64 formula; torch may add in another order for another memory layout."""


def pair(statistics: Statistics, momentum: float = 0.1) -> tuple[BatchNorm, nn.BatchNorm2d]:
    """Ours and torch's with the same, not trivial, parameters."""
    ours = BatchNorm(CHANNELS, statistics=statistics, momentum=momentum).double()
    theirs = nn.BatchNorm2d(CHANNELS, momentum=momentum).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("weight", "bias"):
            values = torch.rand(CHANNELS, dtype=torch.float64, generator=generator) + 0.5
            getattr(ours, name).copy_(values)
            getattr(theirs, name).copy_(values)
    return ours, theirs


def apply(norm: nn.BatchNorm2d, x: Tensor, statistics: Statistics) -> Tensor:
    if statistics == "per_step":
        return torch.stack([norm(step) for step in x])
    return norm(x.flatten(0, 1)).view_as(x)


def sequence(seed: int = 0) -> Tensor:
    """A different mean and scale at every step, so that the two statistics differ."""
    x = torch.randn(STEPS, BATCH, CHANNELS, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    step = torch.arange(1, STEPS + 1).view(-1, 1, 1, 1, 1)
    return x * step + step


@pytest.mark.parametrize("statistics", ["folded", "per_step"])
@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_training_equals_torch(statistics: Statistics, momentum: float) -> None:
    ours, theirs = pair(statistics, momentum)
    for seed in range(3):
        x = sequence(seed).requires_grad_()
        weight = sequence(seed + 10)
        got, expected = ours(x), apply(theirs, x, statistics)
        torch.testing.assert_close(got, expected, **CLOSE)
        gradients = torch.autograd.grad((weight * got).sum(), [x, *ours.parameters()])
        wanted = torch.autograd.grad((weight * expected).sum(), [x, *theirs.parameters()])
        for mine, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(mine, other, **CLOSE)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, **CLOSE)
    torch.testing.assert_close(ours.running_var, theirs.running_var, **CLOSE)


@pytest.mark.parametrize("statistics", ["folded", "per_step"])
def test_evaluation_equals_torch_and_leaves_the_averages(statistics: Statistics) -> None:
    ours, theirs = pair(statistics)
    ours(sequence())
    apply(theirs, sequence(), statistics)
    ours.eval()
    theirs.eval()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    torch.testing.assert_close(ours(sequence(1)), apply(theirs, sequence(1), statistics), **CLOSE)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_the_two_statistics_differ_in_training_and_agree_in_evaluation() -> None:
    folded, _ = pair("folded")
    per_step, _ = pair("per_step")
    assert not torch.allclose(folded(sequence()), per_step(sequence()))
    per_step.load_state_dict(folded.state_dict())
    assert torch.equal(folded.eval()(sequence()), per_step.eval()(sequence()))


def test_normalised_by_hand() -> None:
    x = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64).view(2, 2, 1)  # two steps of two samples
    folded = BatchNorm(1, gain=2.0, eps=1e-14).double()
    # Mean 4, variance 5.
    torch.testing.assert_close(folded(x).flatten(), 2 * (x.flatten() - 4) / 5**0.5, **CLOSE)
    per_step = BatchNorm(1, gain=2.0, eps=1e-14, statistics="per_step").double()
    assert per_step(x).flatten().tolist() == pytest.approx([-2, 2, -2, 2], rel=1e-12)  # mean 2 and 6, deviation 1
    # Momentum 0.1 from 0: first 0.1 * 2, then 0.9 * 0.2 + 0.1 * 6.
    assert per_step.running_mean.item() == pytest.approx(0.78, rel=1e-12)


@pytest.mark.parametrize("shape", [(4, 6, CHANNELS), (4, 6, CHANNELS, 3), (4, 2, CHANNELS, 3, 3, 3)])
@pytest.mark.parametrize("statistics", ["folded", "per_step"])
def test_any_number_of_positions(shape: tuple[int, ...], statistics: Statistics) -> None:
    torch.manual_seed(0)
    y = BatchNorm(CHANNELS, statistics=statistics).double()(torch.randn(shape, dtype=torch.float64))
    others = [axis for axis in range(len(shape)) if axis != 2]
    assert y.shape == shape
    assert y.mean(others).abs().max() < 1e-12  # float64


def test_gain_is_the_initial_scale() -> None:
    assert BatchNorm(2, gain=0.35).weight.tolist() == pytest.approx([0.35] * 2)
    assert BatchNorm(2).bias.tolist() == [0.0, 0.0]


def test_state_dict_fits_torchs() -> None:
    assert set(BatchNorm(2).state_dict()) == {"weight", "bias", "running_mean", "running_var"}


def test_printed_form() -> None:
    assert repr(BatchNorm(7, statistics="per_step")) == "BatchNorm(7, statistics='per_step')"


def test_unknown_statistics_raise() -> None:
    with pytest.raises(ValueError, match=r"statistics is 'layer', but must be one of 'folded', 'per_step'"):
        BatchNorm(2, statistics="layer")  # type: ignore[arg-type]


def test_one_step_without_time_axis_raises() -> None:
    with pytest.raises(ValueError, match=r"input has shape \[3\], but must be time-first"):
        BatchNorm(3)(torch.zeros(3))
