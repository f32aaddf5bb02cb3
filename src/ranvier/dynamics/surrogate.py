"""The spike function and its surrogate gradients.

A spike is a Heaviside step of the distance to threshold, `s = H(u)`, `u = v - v_threshold`. Its derivative is zero
almost everywhere, so the backward pass uses the derivative of a smooth *primitive* instead. Each surrogate below is a
value: it states its primitive, and a test holds its derivative against finite differences of that primitive.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ranvier.checks import check_positive


class Surrogate(Protocol):
    """What a surrogate is: a primitive that rises from 0 to 1, and its derivative."""

    def primitive(self, u: Tensor) -> Tensor:
        """Smooth stand-in for `H(u)`."""

    def derivative(self, u: Tensor) -> Tensor:
        """Slope of `primitive` at `u`; used in place of the derivative of `H`."""


@dataclass(frozen=True)
class Triangle:
    """Triangular gradient of area 1, zero outside `|u| < width`.

        primitive(u)  = (1 + x)^2 / 2      for -1 <= x <= 0,   x = u / width
                        1 - (1 - x)^2 / 2  for  0 <= x <= 1,   0 below, 1 above
        derivative(u) = max(0, 1 / width - |u| / width^2)

    Args:
        width: Half-width, unit of `v_threshold`. The default 0.5 gives a peak of 2.

    Source: "QGate" with a = 1 / width = 2 in Zhao et al. 2025 (temporal consistency). The burst-neuron paper prints a
    sign in place of the gate, which is unbounded for |u| > width; the gate is what both methods use.

    >>> Triangle().derivative(torch.tensor([0.0, 0.25, 0.5, 9.0])).tolist()
    [2.0, 1.0, 0.0, 0.0]
    """

    width: float = 0.5

    def __post_init__(self) -> None:
        check_positive("width of the triangle surrogate", self.width)

    def primitive(self, u: Tensor) -> Tensor:
        """Quadratic S-curve."""
        x = (u / self.width).clamp(-1, 1)
        return torch.where(x < 0, (1 + x).square() / 2, 1 - (1 - x).square() / 2)

    def derivative(self, u: Tensor) -> Tensor:
        """Triangle of peak `1 / width`."""
        return (1 / self.width - u.abs() / self.width**2).clamp(min=0)


@dataclass(frozen=True)
class ATan:
    """Arc-tangent gradient: heavy tails, never exactly zero.

        primitive(u)  = atan(pi / 2 * alpha * u) / pi + 1 / 2
        derivative(u) = alpha / 2 / (1 + (pi / 2 * alpha * u)^2)

    Args:
        alpha: Steepness, the peak is `alpha / 2`. Same meaning as in SpikingJelly and snnTorch.

    Source: Fang et al. 2021 (PLIF).

    >>> ATan().derivative(torch.tensor([0.0, 1e30])).tolist()
    [1.0, 0.0]
    """

    alpha: float = 2.0

    def __post_init__(self) -> None:
        check_positive("alpha of the arc-tangent surrogate", self.alpha)

    def primitive(self, u: Tensor) -> Tensor:
        """Scaled arc tangent."""
        return torch.atan(math.pi / 2 * self.alpha * u) / math.pi + 0.5

    def derivative(self, u: Tensor) -> Tensor:
        """Lorentz curve of peak `alpha / 2`; the square of a huge `u` is infinite, and its inverse zero."""
        return self.alpha / 2 / (1 + (math.pi / 2 * self.alpha * u).square())


@dataclass(frozen=True)
class Sigmoid:
    """Logistic gradient.

        primitive(u)  = sigmoid(alpha * u)
        derivative(u) = alpha * sigmoid(alpha * u) * sigmoid(-alpha * u)

    Both factors lie in [0, 1], so nothing overflows; the form `alpha * exp(-alpha u) / (1 + exp(-alpha u))^2` gives NaN
    where the exponential does.

    Args:
        alpha: Steepness, the peak is `alpha / 4`.

    Source: the default steepness is SpikingJelly's.

    >>> Sigmoid().derivative(torch.tensor([0.0, -1e4])).tolist()
    [1.0, 0.0]
    """

    alpha: float = 4.0

    def __post_init__(self) -> None:
        check_positive("alpha of the sigmoid surrogate", self.alpha)

    def primitive(self, u: Tensor) -> Tensor:
        """Logistic function."""
        return torch.sigmoid(self.alpha * u)

    def derivative(self, u: Tensor) -> Tensor:
        """Bell of peak `alpha / 4`."""
        return self.alpha * torch.sigmoid(self.alpha * u) * torch.sigmoid(-self.alpha * u)


@dataclass(frozen=True)
class Rectangle:
    """Rectangular gradient of area 1: constant inside `|u| < width`, zero outside.

        primitive(u)  = clamp(u / (2 width) + 1 / 2, 0, 1)
        derivative(u) = 1 / (2 width)  for |u| < width, else 0

    Args:
        width: Half-width, unit of `v_threshold`. The default 0.5 gives a peak of 1.

    Source: Wu et al. 2018 (STBP), its rectangular form.

    >>> Rectangle().derivative(torch.tensor([0.0, 0.49, 0.5])).tolist()
    [1.0, 1.0, 0.0]
    """

    width: float = 0.5

    def __post_init__(self) -> None:
        check_positive("width of the rectangle surrogate", self.width)

    def primitive(self, u: Tensor) -> Tensor:
        """Linear ramp."""
        return (u / (2 * self.width) + 0.5).clamp(0, 1)

    def derivative(self, u: Tensor) -> Tensor:
        """Box of height `1 / (2 width)`."""
        return (u.abs() < self.width).to(u.dtype) / (2 * self.width)


def spike(u: Tensor, surrogate: Surrogate) -> Tensor:
    """Heaviside step with the surrogate's gradient.

        forward:  s = 1 if u >= 0 else 0      (a tie fires)
        backward: ds/du = surrogate.derivative(u)

    Args:
        u: Distance to threshold, `v - v_threshold`, any shape.
        surrogate: Gradient to use.

    Returns:
        Spikes in {0, 1}, shape and dtype of `u`.

    >>> spike(torch.tensor([-0.1, 0.0, 0.1]), Triangle()).tolist()
    [0.0, 1.0, 1.0]
    """
    return _Spike.apply(u, surrogate)


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(u: Tensor, surrogate: Surrogate) -> Tensor:
        return (u >= 0).to(u.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Surrogate], output: Tensor) -> None:
        u, ctx.surrogate = inputs
        ctx.save_for_backward(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        return grad * ctx.surrogate.derivative(u), None
