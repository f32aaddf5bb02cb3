"""Rectification and clipping against torch's own, in value, gradient and what is kept for backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranvier.dynamics import clip, relu
from ranvier.nn import fold_time, unfold_time

Activation = Callable[[Tensor], Tensor]
OURS: dict[str, Activation] = {"relu": relu, "clip": lambda x: clip(x, -0.5, 2)}
TORCHS: dict[str, Activation] = {"relu": torch.relu, "clip": lambda x: x.clamp(-0.5, 2)}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=50, deadline=None)
@given(numbers=st.lists(st.sampled_from([-9.0, -1.0, -0.5, -0.0, 0.0, 0.25, 2.0, 2.5, torch.inf, -torch.inf])))
def test_values_and_gradients_are_those_of_torch(name: str, dtype: torch.dtype, numbers: list[float]) -> None:
    x = torch.tensor(numbers, dtype=dtype)
    upstream = torch.arange(1, len(x) + 1, dtype=dtype)
    results = []
    for activation in (OURS[name], TORCHS[name]):
        leaf = x.clone().requires_grad_()
        y = activation(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, upstream)))
        with torch.no_grad():
            assert torch.equal(activation(leaf), y)
    (ours, gradient), (theirs, expected) = results
    assert torch.equal(ours, theirs)
    assert ours.dtype == gradient.dtype == dtype
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("name", OURS)
def test_second_derivatives(name: str) -> None:
    x = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(OURS[name], x)
    assert torch.autograd.gradgradcheck(OURS[name], x)


@pytest.mark.parametrize("name", OURS)
def test_nothing_else_is_kept_for_backward(name: str) -> None:
    """Of a product with a weight, whose gradient needs the activation: no mask beside it."""
    kept: list[Tensor] = []
    x, weight = torch.randn(64, 3, requires_grad=True), torch.randn(3, requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        OURS[name](x) * weight
    assert not any(tensor.dtype == torch.bool for tensor in kept)
    places = {tensor.data_ptr() for tensor in kept}
    assert len(places) <= (2 if name == "relu" else 3)  # weight and activation; clip keeps its input


def test_compiled_code_keeps_no_mask() -> None:
    """The whole point: where torch's own has compiled code keep a mask, ours has it keep numbers that it needs anyway.

    That is between layers that see steps apart, as all do in a network here.
    """
    kept: dict[str, list[torch.dtype]] = {}
    for label, activation in (("ours", relu), ("torch's", torch.relu)):
        torch.compiler.reset()
        conv, norm = torch.nn.Conv2d(8, 8, 3), torch.nn.BatchNorm2d(8)

        @torch.compile
        def layer(
            x: Tensor, conv: torch.nn.Module = conv, norm: torch.nn.Module = norm, activation: Activation = activation
        ) -> Tensor:
            y: Tensor = conv(fold_time(activation(unfold_time(norm(x), 1))))
            return y

        backward: Any = layer(torch.randn(4, 8, 9, 9)).grad_fn
        kept[label] = [tensor.dtype for tensor in backward.saved_tensors]
    assert torch.bool not in kept["ours"]
    assert torch.bool in kept["torch's"]  # else torch has learned it, and our own can go
