"""Spikes and their sums as bits: nothing is lost, and gradients are those of an ordinary convolution."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ranvier import models
from ranvier.nn import IF, LIF, LIFB, PLIF, TimeFolded, keep_plainly, pack_spikes
from ranvier.nn.memory import PackedConv2d, pack, unpack
from ranvier.nn.structure import Activation, Chain


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 19), st.integers(1, 4), st.integers(1, 4)),
    largest=st.sampled_from([1, 2, 3, 4, 15, 16, 255]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    channels_last=st.booleans(),
    seed=st.integers(0, 100),
)
def test_nothing_is_lost(
    shape: tuple[int, ...], largest: int, dtype: torch.dtype, channels_last: bool, seed: int
) -> None:
    counts = torch.randint(largest + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if channels_last:
        counts = counts.contiguous(memory_format=torch.channels_last)
    packed = pack(counts, largest)
    assert packed.dtype == torch.uint8
    together = {1: 8, 2: 4, 3: 4, 4: 2, 15: 2, 16: 1, 255: 1}[largest]
    assert packed.numel() == counts[:, 0].numel() * -(-shape[1] // together)
    assert packed.untyped_storage().nbytes() == packed.numel()  # and keeps nothing else
    back = unpack(packed, shape[1], largest, dtype)
    assert back.dtype == dtype
    assert torch.equal(back, counts)


def convolved(conv: nn.Conv2d, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output and gradients."""
    x = x.clone().requires_grad_()
    y = conv(x)
    return [y, *torch.autograd.grad((y * upstream).sum(), [x, *conv.parameters()])]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("largest", [1, 3, 16])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 1, "stride": 2, "bias": False},
        {"kernel_size": 3, "dilation": 2, "groups": 3},
        {"kernel_size": (3, 1), "padding": (1, 0)},
    ],
)
def test_gradients_are_those_of_an_ordinary_convolution(
    settings: Any, largest: int, autocast: bool, channels_last: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(largest + 1, (2, 9, 7, 6), generator=generator).float()
    conv = nn.Conv2d(9, 12, **settings)
    if channels_last:
        x, conv = (either.to(memory_format=torch.channels_last) for either in (x, conv))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        upstream = torch.randn(conv(x).shape, generator=generator)
        expected = convolved(conv, x, upstream)
        conv.__class__ = PackedConv2d
        conv.largest = largest
        got = convolved(conv, x, upstream)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_backward_keeps_bits() -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    conv = PackedConv2d(16, 4, 3)
    conv.largest = 1
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        conv(torch.ones(2, 16, 8, 8))
    inputs = [tensor for tensor in saved if tensor is not conv.weight]
    assert [(tensor.dtype, tensor.numel()) for tensor in inputs] == [(torch.uint8, 2 * 8 * 8 * 16 // 8)]


def test_convolutions_that_are_given_spikes_are_found() -> None:
    sew = models.sew_resnet18()
    names = set(sew.state_dict())
    found = pack_spikes(sew)
    convolutions = [name for name, module in sew.named_modules() if isinstance(module, nn.Conv2d)]
    assert found == convolutions[1:]  # the first is given images
    assert set(sew.state_dict()) == names
    largest = [sew.get_submodule(name).largest for name in found]
    assert largest[:4] == [1, 1, 2, 1]  # the second block of a stage is given a sum of two
    assert max(largest) == 3


@pytest.mark.parametrize(("neuron", "count"), [(LIF, 2), (PLIF, 2), (IF, 2), (LIFB, 0), (lambda c: nn.ReLU(), 0)])
def test_what_is_analog_stays(neuron: Any, count: int) -> None:
    """Average pooling makes spikes analog, and a burst sends what it has learned."""
    layout = (4, 4, 4, "A", 4)
    network = models.vgg(layout, num_classes=3, in_channels=2, image_size=8, neuron=neuron)
    assert len(pack_spikes(network)) == count


def test_a_network_computes_the_same_and_compiles_whole() -> None:
    torch.manual_seed(0)
    network = models.vgg((4, 12, 5), num_classes=3, in_channels=2, image_size=8)
    x = torch.randn(2, 2, 8, 8)
    expected = network(x, 3)
    wanted = torch.autograd.grad(expected.sum(), list(network.parameters()))
    assert pack_spikes(network)
    for run in (network, torch.compile(network, fullgraph=True, backend="aot_eager")):
        got = run(x, 3)
        assert torch.equal(got, expected)
        for ours, theirs in zip(torch.autograd.grad(got.sum(), list(network.parameters())), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        assert torch.equal(network(x, 3), expected)


def test_gradients_of_gradients_are_refused() -> None:
    conv = PackedConv2d(2, 2, 3)
    conv.largest = 1
    x = torch.ones(1, 2, 5, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(conv(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class TwoPlaces(nn.Module):
    """One convolution on analog numbers and on spikes."""

    def __init__(self) -> None:
        super().__init__()
        conv = TimeFolded(nn.Conv2d(4, 4, 3, padding=1))
        self.body = Chain(conv, Activation(LIF(4)), conv)


def test_a_convolution_at_two_places_keeps_what_both_send() -> None:
    assert pack_spikes(TwoPlaces()) == []


def test_what_hooks_may_change_is_not_counted_on() -> None:
    network = models.vgg((4, 4, 4), num_classes=3, in_channels=2, image_size=8)
    activations = [module for module in network.modules() if isinstance(module, Activation)]
    activations[0].register_forward_hook(lambda module, given, sent: sent * 0.5)
    assert len(pack_spikes(network)) == 1


def test_a_network_within_a_wrapper_and_back() -> None:
    wrapper = nn.Sequential(models.vgg((4, 4, 4), num_classes=3, in_channels=2, image_size=8))
    assert len(pack_spikes(wrapper)) == 2
    keep_plainly(wrapper)
    assert not any(isinstance(module, PackedConv2d) for module in wrapper.modules())
    assert len(pack_spikes(wrapper)) == 2
