"""QCFS against values computed by hand, its primitive, and the neuron that it stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranvier.dynamics import converted_scan, qcfs


# Ceiling 1, 4 levels: 0.25 apart, and rounded to the nearest, so that boundaries lie at 0.125, 0.375, 0.625, 0.875.
@pytest.mark.parametrize(
    ("x", "y"),
    [
        (-5.0, 0.0),
        (-0.125, 0.0),  # floor(0) from here on, floor(-1) and clipped before
        (0.0, 0.0),
        (0.125 - 2**-10, 0.0),
        (0.125, 0.25),  # a tie rounds up
        (0.25, 0.25),
        (0.375, 0.5),  # tie
        (0.5, 0.5),
        (0.625 - 2**-10, 0.5),
        (0.625, 0.75),  # tie
        (0.875, 1.0),  # tie: the ceiling, half a step below it
        (1.0, 1.0),
        (1.125, 1.0),
        (5.0, 1.0),  # saturated
        (torch.inf, 1.0),
        (-torch.inf, 0.0),
    ],
)
def test_by_hand(x: float, y: float) -> None:
    assert qcfs(torch.tensor(x), torch.tensor(1.0), levels=4).item() == y
    assert qcfs(torch.tensor(4 * x), torch.tensor(4.0), levels=4).item() == 4 * y  # powers of two scale floats exactly


def test_one_level_is_a_step() -> None:
    y = qcfs(torch.tensor([-1.0, 0.75, 1.0, 9.0]), torch.tensor(2.0), levels=1)
    assert y.tolist() == [0.0, 0.0, 2.0, 2.0]  # 1 = ceiling / 2 ties


def test_ceiling_per_channel() -> None:
    x = torch.full((2, 3, 4, 5), 0.75)
    y = qcfs(x, torch.tensor([0.5, 1.0, 2.0]), levels=2)
    assert y.shape == x.shape
    # 0.75 * 2 / 0.5 + 0.5 = 3.5, clipped; 0.75 * 2 + 0.5 = 2; 0.75 + 0.5 = 1.25
    for channel, expected in enumerate([0.5, 1.0, 1.0]):
        assert (y[:, channel] == expected).all()
    assert qcfs(x[:, :, 0, 0], torch.tensor([0.5, 1.0, 2.0]), levels=2).tolist() == [[0.5, 1.0, 1.0]] * 2


def primitive(x: Tensor, ceiling: Tensor, levels: int) -> Tensor:
    """What the straight-through gradient with respect to x is that of: the clip without the floor."""
    return ceiling / levels * (x * levels / ceiling + 0.5).clamp(0, levels)


@pytest.mark.parametrize(("ceiling", "levels"), [(1.0, 4), (2.5, 8), (0.3, 1)])
def test_gradient_is_that_of_the_clip(ceiling: float, levels: int) -> None:
    """Tails, both kinks and everything between; the points are off the kinks, where there is no derivative."""
    half = ceiling / levels / 2
    kinks = torch.tensor([-half, ceiling - half], dtype=torch.float64)
    x = torch.linspace(-ceiling, 2 * ceiling, 301, dtype=torch.float64)
    x = torch.cat([x, kinks - 1e-4, kinks + 1e-4])
    x = x[((x.unsqueeze(1) - kinks).abs() > 1e-5).all(1)].requires_grad_()
    top = torch.tensor(ceiling, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(qcfs(x, top, levels).sum(), x)
    h = 1e-6  # below the distance to the kinks; the primitive is linear beside them, so that only rounding is left
    difference = (primitive(x + h, top, levels) - primitive(x - h, top, levels)).detach() / (2 * h)
    assert torch.allclose(gradient, difference, rtol=0, atol=1e-8)  # rounding of float64 over h: 1e-16 / 1e-6
    inside = ((x > kinks[0]) & (x < kinks[1])).detach()
    assert torch.allclose(gradient, inside.double(), rtol=0, atol=1e-15)
    assert 0 < inside.double().mean() < 1


def test_gradient_of_the_ceiling() -> None:
    ceiling, levels = 2.0, 4  # steps of 0.5; the clip acts below -0.25 and above 1.75
    x = torch.tensor([-3.0, -0.3, -0.2, 0.2, 0.6, 1.1, 1.7, 1.8, 2.1, 9.0], dtype=torch.float64)
    y = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0], dtype=torch.float64)
    between = (y - x) / ceiling
    expected = torch.where(x < -0.25, 0.0, torch.where(x > 1.75, 1.0, between))
    for value, sent, derivative in zip(x, y, expected, strict=True):
        top = torch.tensor(ceiling, dtype=torch.float64, requires_grad=True)
        out = qcfs(value, top, levels)
        assert out.item() == sent
        (gradient,) = torch.autograd.grad(out, top)
        assert gradient.item() == pytest.approx(derivative.item(), abs=1e-14)  # a few roundings of float64


def test_gradient_of_a_ceiling_per_channel_stays_in_its_channel() -> None:
    ceiling = torch.tensor([1.0, 2.0], requires_grad=True)
    x = torch.full((3, 2, 5), 10.0)
    (gradient,) = torch.autograd.grad(qcfs(x, ceiling, 4)[:, 1].sum(), ceiling)
    assert gradient.tolist() == [0.0, 15.0]  # 1 for each of the 3 x 5 saturated values


def test_bfloat16_keeps_levels() -> None:
    """With the 8 bits of bfloat16, x levels / ceiling + 1/2 would round across boundaries."""
    x = torch.linspace(-1, 4, 5000).bfloat16()
    ceiling = torch.tensor(3.3)
    y = qcfs(x, ceiling, levels=9)
    assert y.dtype == torch.bfloat16
    expected = qcfs(x.float(), ceiling, levels=9)
    assert torch.equal(y, expected.bfloat16())
    assert len(y.unique()) == 10
    naive = (x * (9 / 3.3) + 0.5).floor().clamp(0, 9) * (3.3 / 9)
    assert not torch.equal(naive, y)


def test_float64_stays() -> None:
    y = qcfs(torch.tensor([0.3], dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64), levels=3)
    assert y.dtype == torch.float64
    assert y.item() == pytest.approx(0.7 / 3, rel=1e-15)


@settings(max_examples=200, deadline=None)
@given(
    numerators=st.lists(st.integers(-256, 512), min_size=1, max_size=8),
    log_ceiling=st.integers(-3, 3),
    log_levels=st.integers(0, 4),
)
def test_equals_the_count_of_the_neuron(numerators: list[int], log_ceiling: int, log_levels: int) -> None:
    """Inputs are multiples of 1/64, ceilings and levels powers of two: no operation on either side rounds."""
    levels, ceiling = 2**log_levels, torch.tensor(2.0**log_ceiling)
    x = torch.tensor(numerators) / 64
    current = x.view(1, 1, -1).expand(levels, 1, len(x))
    threshold = ceiling.view(1)
    sent, _ = converted_scan(current, None, threshold, torch.zeros(1, 1), threshold / 2)
    assert torch.equal(sent.sum(0).flatten() / levels, qcfs(x, ceiling, levels))
