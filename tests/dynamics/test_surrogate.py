"""Surrogates against their own primitive, and the spike function with their gradient."""

import pytest
import torch

from ranvier.dynamics import ATan, Rectangle, Sigmoid, Surrogate, Triangle, spike

SURROGATES = [
    Triangle(0.5),
    Triangle(1.25),
    ATan(2.0),
    ATan(0.7),
    Sigmoid(4.0),
    Sigmoid(25.0),
    Rectangle(0.5),
    Rectangle(1.25),
]

every_surrogate = pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)


@every_surrogate
def test_derivative_is_the_slope_of_the_primitive(surrogate: Surrogate) -> None:
    """Peak, flanks and tails, but not the corners of Triangle and Rectangle: there a central difference is a mean."""
    at = torch.tensor([0.0, 1e-3, 0.03, 0.1, 0.24, 0.49, 0.51, 0.8, 1.2, 1.3, 2.0, 5.0, 40.0], dtype=torch.float64)
    u = torch.cat([-at.flip(0), at])
    step = 1e-6
    slope = (surrogate.primitive(u + step) - surrogate.primitive(u - step)) / (2 * step)
    # A difference of values near 1 carries 1e-16 / 1e-6 = 1e-10 of rounding; its truncation is step * max|f''| (50) / 4
    # where the second derivative jumps (Triangle at 0 and at its ends), step^2 * |f'''| elsewhere.
    torch.testing.assert_close(surrogate.derivative(u), slope, rtol=0, atol=2e-5)


@every_surrogate
def test_primitive_rises_from_zero_to_one(surrogate: Surrogate) -> None:
    far = torch.tensor([-1e9, 0.0, 1e9], dtype=torch.float64)
    # The tail of the arc tangent is 2 / (pi^2 alpha |u|): 3e-10 here.
    torch.testing.assert_close(
        surrogate.primitive(far), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), rtol=0, atol=1e-9
    )
    u = torch.linspace(-3, 3, 601, dtype=torch.float64)
    assert (surrogate.primitive(u).diff() >= 0).all()


@every_surrogate
def test_area_of_the_derivative_is_the_rise_of_the_primitive(surrogate: Surrogate) -> None:
    u = torch.linspace(-2, 2, 400_001, dtype=torch.float64)
    area = torch.trapezoid(surrogate.derivative(u), u)
    rise = surrogate.primitive(u[-1]) - surrogate.primitive(u[0])
    # The trapezoid rule misses up to one cell (1e-5) times the height (at most 1) at each jump of Rectangle.
    torch.testing.assert_close(area, rise, rtol=0, atol=2e-5)


@every_surrogate
def test_derivative_peaks_at_threshold_and_is_even(surrogate: Surrogate) -> None:
    u = torch.linspace(0, 3, 301, dtype=torch.float64)
    slope = surrogate.derivative(u)
    assert slope[0] == slope.max()
    assert slope[0] > 0
    # The factors of the sigmoid swap, and with them one rounding.
    torch.testing.assert_close(slope, surrogate.derivative(-u), rtol=1e-15, atol=0)


@every_surrogate
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_finite_however_far_from_threshold(surrogate: Surrogate, dtype: torch.dtype) -> None:
    """exp(-alpha u) overflows at moderate distance: written with it, the sigmoid's gradient is NaN."""
    magnitudes = [0.0, 1e-30, 0.5, 1.0, 4.0, 50.0, 1e3, 1e10, 1e20, 1e30]
    u = torch.tensor([sign * m for m in magnitudes for sign in (-1, 1)], dtype=dtype, requires_grad=True)
    spikes = spike(u, surrogate)
    spikes.sum().backward()
    assert u.grad is not None
    for values in (spikes, u.grad, surrogate.primitive(u), surrogate.derivative(u)):
        assert values.isfinite().all()
        assert values.dtype == dtype
    assert u.grad[0] > 0
    assert u.grad[-1].item() < 1e-60  # the arc tangent's tail at 1e30 in float64; elsewhere 0


def test_triangle_slopes_by_hand() -> None:
    v = torch.tensor([0.5, 0.75, 1.0, 0.25, 0.0, -1.0], requires_grad=True)
    spike(v - 0.5, Triangle()).sum().backward()
    assert v.grad is not None
    assert v.grad.tolist() == [2, 1, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("surrogate", "u", "slope"),
    [
        (Triangle(2.0), 1.0, 0.25),
        (ATan(2.0), 1 / torch.pi, 0.5),  # 1 / (1 + 1)
        (ATan(4.0), 1 / torch.pi, 0.4),  # 2 / (1 + 4)
        (Sigmoid(4.0), 0.0, 1.0),
        (Sigmoid(8.0), 0.0, 2.0),
        (Rectangle(0.25), 0.2, 2.0),
        (Rectangle(0.25), 0.25, 0.0),
    ],
    ids=str,
)
def test_slopes_by_hand(surrogate: Surrogate, u: float, slope: float) -> None:
    got = surrogate.derivative(torch.tensor(u, dtype=torch.float64)).item()
    assert got == pytest.approx(slope, rel=1e-14)  # a few roundings of float64


def test_spike_fires_at_a_tie() -> None:
    u = torch.tensor([-1.0, -1e-30, -0.0, 0.0, 1e-30, 1.0])
    assert spike(u, Triangle()).tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_spike_keeps_the_dtype_and_scales_the_gradient(dtype: torch.dtype) -> None:
    u = torch.tensor([0.0, 0.25], dtype=dtype, requires_grad=True)
    s = spike(u, Triangle())
    assert s.dtype == dtype
    (gradient,) = torch.autograd.grad(s, u, torch.tensor([3.0, -5.0], dtype=dtype))
    assert gradient.tolist() == [6, -5]


@pytest.mark.parametrize("surrogate", [Triangle, ATan, Sigmoid, Rectangle])
@pytest.mark.parametrize("width", [0.0, -1.0, float("nan")])
def test_bad_widths_raise(surrogate: type[Triangle], width: float) -> None:
    with pytest.raises(ValueError, match=r"surrogate is .*must be greater than 0"):
        surrogate(width)


def test_surrogates_are_values() -> None:
    assert Triangle(0.5) == Triangle()
    assert Triangle(0.5) != Triangle(0.6)
    assert Triangle(0.5) != Rectangle(0.5)
    assert hash(ATan(2.0)) == hash(ATan())
