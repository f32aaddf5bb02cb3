"""What a spike does to the potential, and which gradient it leaves."""

from typing import Literal

import pytest
import torch

from ranvier.dynamics import Triangle, reset, spike

THRESHOLD = 0.5


@pytest.mark.parametrize(("mode", "expected"), [("hard", [0.25, 0.0, 0.0]), ("soft", [0.25, 0.0, 0.75])])
def test_values(mode: Literal["hard", "soft"], expected: list[float]) -> None:
    v = torch.tensor([0.25, 0.5, 1.25])
    s = torch.tensor([0.0, 1.0, 1.0])
    assert reset(v, s, THRESHOLD, mode, True).tolist() == expected
    assert reset(v, s, THRESHOLD, mode, False).tolist() == expected


@pytest.mark.parametrize(
    ("mode", "detach", "expected"),
    [
        # At v = 0.25 (silent) and 0.75 (fires) the triangle of width 0.5 has slope q = 1.
        ("hard", True, [1.0, 0.0]),  # 1 - s
        ("hard", False, [1 - 0.25, 0 - 0.75]),  # 1 - s - v q
        ("soft", True, [1.0, 1.0]),  # 1
        ("soft", False, [1 - 0.5, 1 - 0.5]),  # 1 - v_threshold q
    ],
)
def test_gradient(mode: Literal["hard", "soft"], detach: bool, expected: list[float]) -> None:
    v = torch.tensor([0.25, 0.75], requires_grad=True)
    after = reset(v, spike(v - THRESHOLD, Triangle()), THRESHOLD, mode, detach)
    (gradient,) = torch.autograd.grad(after.sum(), v)
    assert gradient.tolist() == expected
