"""ReLU as a module."""

import pytest
import torch
from torch import nn

from ranvier import conversion
from ranvier.nn import ReLU


def test_is_nn_relu() -> None:
    module = ReLU(3)
    assert isinstance(module, nn.ReLU)
    assert repr(module) == "ReLU()"
    x = torch.randn(4, 3, 5, requires_grad=True)
    y, expected = module(x), nn.ReLU()(x)
    assert torch.equal(y, expected)
    upstream = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(gradient, *torch.autograd.grad(expected, x, upstream))


def test_refuses_a_channel_count_that_is_none() -> None:
    with pytest.raises(TypeError, match="channel count"):
        ReLU(0)


def test_is_converted_with_gradients_on_or_off() -> None:
    ann = nn.Sequential(nn.Linear(4, 8), ReLU(8), nn.Linear(8, 3))
    graphs = [conversion.trace(ann, torch.rand(5, 4)).code]
    with torch.no_grad():
        graphs.append(conversion.trace(ann, torch.rand(5, 4, requires_grad=True)).code)
    assert graphs[0] == graphs[1]


def test_is_exported() -> None:
    ann = nn.Sequential(nn.Linear(4, 8), ReLU(8), nn.Linear(8, 3)).eval()
    x = torch.rand(5, 4)
    program = torch.export.export(ann, (x,))
    assert torch.equal(program.module()(x), ann(x))
