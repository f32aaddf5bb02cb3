"""Blocks: layers in order, states handed on, branches added or put side by side."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ranvier.nn import IF, LIF, LIFB, BatchNorm, Carry, TimeFolded
from ranvier.nn.structure import Activation, Block, Chain, Concat, Residual, activation, conv_norm, linear


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


def side_by_side() -> Concat:
    """A block, the input itself, one with a different neuron, and a layer: channels 4, 3, 3 and 2."""
    torch.manual_seed(0)
    return Concat(
        Chain(TimeFolded(linear(3, 4)), Activation(LIF(4, v_threshold=0.125, implementation="reference"))),
        Chain(),
        Activation(LIFB(3, burst_init=1.5, v_threshold=0.125, implementation="reference")),
        TimeFolded(linear(3, 2)),
    )


def test_concat_by_hand() -> None:
    block = side_by_side()
    x = random_current()
    enter, last = block.branches[0].layers[0], block.branches[3]
    first, third = LIF(v_threshold=0.125)(enter(x)), LIFB(3, burst_init=1.5, v_threshold=0.125)(x)
    expected = torch.cat([first, x, third, last(x)], 2)
    assert torch.equal(block(x), expected)
    assert 0 < first.mean() < 1
    assert set(third.unique().tolist()) == {0, 1, 1.5}


def test_channels_of_numbers() -> None:
    """Two steps of one image with two channels of two pixels: channels stay whole, steps and pixels where they are."""
    x = torch.arange(8.0).view(2, 1, 2, 1, 2)
    out = Concat(nn.Identity(), TimeFolded(nn.ReLU()), nn.MaxPool3d(1))(x - 4)
    assert out.shape == (2, 1, 6, 1, 2)
    assert out[0].flatten().tolist() == [-4, -3, -2, -1, 0, 0, 0, 0, -4, -3, -2, -1]
    assert out[1].flatten().tolist() == [0, 1, 2, 3] * 3


@given(widths=st.lists(st.integers(0, 4), min_size=1, max_size=5), image=st.booleans())
@settings(deadline=None, max_examples=30, derandomize=True)
def test_each_branch_has_its_own_channels(widths: list[int], image: bool) -> None:
    """In order, whatever their number and widths; 0 stands for the identity."""
    torch.manual_seed(0)
    x = torch.rand(2, 3, 3, 4, 5) if image else torch.rand(2, 3, 3)
    kind = (lambda width: nn.Conv2d(3, width, 1)) if image else (lambda width: nn.Linear(3, width))
    branches = [TimeFolded(kind(width)) if width else Chain() for width in widths]
    parts = Concat(*branches)(x).split([width or 3 for width in widths], 2)
    for branch, part in zip(branches, parts, strict=True):
        assert torch.equal(part, branch(x))


def test_states_pass_through_branches_in_order() -> None:
    block = Chain(side_by_side(), TimeFolded(linear(12, 5)), Activation(IF(5, implementation="reference")))
    x = random_current()
    expected = block(x)
    assert 0 < expected.mean() < 1
    state = None
    parts = []
    for part in x.split([2, 1, 3]):
        carry = Carry(state)
        parts.append(block(part, carry))
        state = carry.finish()
        assert [tuple(kept.v.shape) for kept in state] == [(2, 4), (2, 3), (2, 5)]
    assert torch.equal(torch.cat(parts), expected)


def test_branches_within_branches() -> None:
    """As in a DenseNet, where every block takes in what all before it gave."""
    x = random_current()
    inner = Concat(Chain(), Chain(Concat(Chain(), Chain())))
    assert torch.equal(Concat(inner, Residual(inner, inner))(x), torch.cat([x] * 3 + [2 * x] * 3, 2))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Leave no graphs behind for other tests."""
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_concat_compiles_without_graph_break() -> None:
    block = Chain(side_by_side(), TimeFolded(linear(12, 5)), Activation(IF(5, implementation="reference"))).double()

    def result(model: nn.Module) -> list[Tensor]:
        x = random_current().double().requires_grad_()
        spikes = model(x)
        return [spikes, *torch.autograd.grad(spikes.sum(), [x, *block.parameters()])]

    compiled = result(torch.compile(block, fullgraph=True, backend="aot_eager"))
    for one, other in zip(compiled, result(block), strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)  # sums of gradients in another order


def test_what_cannot_stand_side_by_side() -> None:
    with pytest.raises(ValueError, match=r"Concat got no branches.*Pass them: Concat\(Chain\(\), layer\)"):
        Concat()
    strided = Concat(conv_norm(2, 4), conv_norm(2, 6, stride=2))
    message = r"give shapes \[3, 1, 4, 8, 8\], \[3, 1, 6, 4, 4\], but must give \[T, B, C, ...\] .*the same stride"
    with pytest.raises(ValueError, match=message):
        strided(torch.rand(3, 1, 2, 8, 8))
    with pytest.raises(ValueError, match=r"give shapes \[3, 2, 4\], \[3, 2, 2, 2\], but"):
        Concat(Chain(), nn.Unflatten(2, (2, 2)))(torch.rand(3, 2, 4))
    with pytest.raises(ValueError, match=r"give shapes \[3, 2\], \[3, 2\], but must give \[T, B, C"):
        Concat(Chain(), Chain())(torch.rand(3, 2))


def test_activation_takes_any_activation() -> None:
    assert Activation(nn.ReLU())(torch.tensor([[[-1.0, 2.0]]])).tolist() == [[[0.0, 2.0]]]


def test_activation_mends_what_a_channel_count_did_to_relu() -> None:
    for kind in (nn.ReLU, nn.ReLU6):
        x = torch.tensor([[[-1.0, 2.0]]])
        assert activation(kind, 32)(x).tolist() == Activation(kind(32))(x).tolist() == [[[0.0, 2.0]]]  # type: ignore[arg-type]
        assert x.tolist() == [[[-1.0, 2.0]]]
    assert activation(lambda channels: nn.ReLU(inplace=True), 32).neuron.inplace


def test_a_factory_may_be_a_module() -> None:
    class Factory(nn.Module):
        def __call__(self, channels: int) -> nn.Module:
            return LIFB(channels)

    assert isinstance(activation(Factory(), 3).neuron, LIFB)


@pytest.mark.parametrize(
    ("neuron", "came"), [("lif", "'lif'"), (LIF(), r"LIF\("), (lambda channels: channels, "which made a int")]
)
def test_what_builds_no_neuron(neuron: Any, came: str) -> None:
    with pytest.raises(TypeError, match=rf"neuron is .*{came}.* must make a module .* neuron=LIF, or a function"):
        activation(neuron, 4)


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
