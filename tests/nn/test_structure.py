"""Blocks: layers in order, states handed on, branches added."""

import pytest
import torch
from torch import Tensor, nn

from ranvier.nn import IF, LIF, BatchNorm, Carry, TimeFolded
from ranvier.nn.structure import Activation, Block, Chain, Residual, conv_norm


def random_current() -> Tensor:
    return torch.rand(6, 2, 3, generator=torch.Generator().manual_seed(1))


def network() -> Chain:
    torch.manual_seed(0)
    branch = Chain(TimeFolded(nn.Linear(3, 3)), Activation(LIF(3)))
    return Chain(Activation(IF(3)), Residual(branch, Chain()), Activation(LIF(3)))


def test_chain_and_residual_by_hand() -> None:
    block = network()
    x = random_current()
    spikes = IF()(x)
    linear = block.layers[1].branch.layers[0]
    expected = LIF()(LIF()(linear(spikes)) + spikes)
    assert torch.equal(block(x), expected)
    assert 0 < expected.mean() < 1


def test_states_pass_through_blocks() -> None:
    block = network()
    x = random_current()
    state = None
    parts = []
    for part in x.split([2, 1, 3]):
        carry = Carry(state)
        parts.append(block(part, carry))
        state = carry.finish()
        assert len(state) == 3
    assert torch.equal(torch.cat(parts), block(x))


def test_activation_takes_any_activation() -> None:
    assert Activation(nn.ReLU())(torch.tensor([[[-1.0, 2.0]]])).tolist() == [[[0.0, 2.0]]]


def test_empty_chain_is_the_identity() -> None:
    x = random_current()
    assert torch.equal(Chain()(x), x)


def test_block_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Block()


@pytest.mark.parametrize(("kernel_size", "stride", "size"), [(3, 1, 8), (1, 1, 8), (3, 2, 4), (1, 2, 4), (7, 2, 4)])
def test_conv_norm_keeps_the_size_at_stride_one(kernel_size: int, stride: int, size: int) -> None:
    layers = conv_norm(2, 6, kernel_size, stride=stride, statistics="per_step", gain=0.5)
    assert layers(torch.rand(4, 3, 2, 8, 8)).shape == (4, 3, 6, size, size)
    conv, norm = layers[0][0], layers[1]
    assert conv.bias is None
    assert isinstance(norm, BatchNorm)
    assert norm.statistics == "per_step"
    assert norm.weight.tolist() == [0.5] * 6
