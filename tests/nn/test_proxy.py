"""Layers with two modes: each against the formula of its mode, and the modes against each other."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ranvier.kernels import compile_whole
from ranvier.nn import IF, LIF, BatchNorm, Carry, ConvertedIF, ProxyActivation, ProxyNorm, analog
from ranvier.nn.structure import Chain

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
"""The same float64 formula, summed up in another order."""


def currents(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def converted(threshold: float = 1.0) -> ConvertedIF:
    neuron = ConvertedIF(3)
    neuron.threshold.fill_(threshold)
    neuron.v_init.fill_(threshold / 2)
    return neuron


# Activation


def test_spiking_mode_is_the_neuron() -> None:
    x = currents(4, 2, 3)
    neuron = IF(v_threshold=1.0)
    assert torch.equal(ProxyActivation(neuron)(x), neuron(x))


@pytest.mark.parametrize(
    ("rectification", "expected"),
    [("relu", [0.0, 0.0, 0.5, 2.0, 7.0]), ("clipped", [0.0, 0.0, 0.5, 2.0, 2.0]), ("none", [-3.0, 0.0, 0.5, 2.0, 7.0])],
)
def test_analog_mode_is_the_activation(rectification: str, expected: list[float]) -> None:
    layer = ProxyActivation(IF(), rectification, ceiling=2.0)  # type: ignore[arg-type]
    with analog(layer):
        assert layer(torch.tensor([[[-3.0, 0.0, 0.5, 2.0, 7.0]]])).flatten().tolist() == expected


@given(share=st.floats(-2, 3), threshold=st.floats(0.1, 4), steps=st.integers(1, 12))
def test_the_mean_of_the_spikes_is_the_clipped_activation_up_to_half_a_spike(
    share: float, threshold: float, steps: int
) -> None:
    """Why the two modes agree: soft reset, half a threshold to start from, and spikes worth the threshold."""
    layer = ProxyActivation(ConvertedIF(1), "clipped", threshold)
    assert isinstance(layer.neuron, ConvertedIF)
    layer.neuron.threshold.fill_(threshold)
    layer.neuron.v_init.fill_(threshold / 2)
    x = torch.full((1, 1, 1), share * threshold, dtype=torch.float64)
    with analog(layer):
        activation = layer(x).item()
    mean = layer(x.expand(steps, 1, 1)).mean().item()
    # The thresholds of the neuron are float32.
    assert abs(mean - activation) <= threshold / 2 / steps + 1e-6 * threshold * steps


def test_the_analog_mode_carries_no_state() -> None:
    layer = Chain(ProxyActivation(IF()), ProxyActivation(converted()))
    x = currents(2, 2, 3)
    carry = Carry()
    with analog(layer):
        layer(x, carry)
    assert carry.finish() == ()
    carry = Carry()
    first = layer(x[:1], carry)
    second = layer(x[1:], Carry(carry.finish()))
    assert torch.equal(torch.cat([first, second]), layer(x))


def test_wrong_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="rectification is 'gelu'"):
        ProxyActivation(IF(), "gelu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ceiling is 0"):
        ProxyActivation(IF(), "clipped", ceiling=0)


# Normalisation


def normal(x: Tensor, mean: Tensor, var: Tensor, norm: BatchNorm) -> Tensor:
    def shaped(value: Tensor) -> Tensor:
        return value.view(-1, 1, 1)

    scaled = (x - shaped(mean)) / shaped(var + norm.eps).sqrt()
    return scaled * shaped(norm.weight.detach()) + shaped(norm.bias.detach())


def norms(separate: bool) -> ProxyNorm:
    norm = ProxyNorm(3, separate=separate, gain=1.5, momentum=0.25).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm.bias.copy_(torch.rand(3, generator=generator))
    for buffer in norm.buffers():
        buffer.copy_(torch.rand(3, generator=generator) + 0.5)
    return norm


def batch(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel of `[T, B, C, H, W]`."""
    axes = (0, 1, 3, 4)
    return x.mean(axes), x.var(axes, correction=0)


def moved(before: Tensor, x: Tensor, of: str) -> Tensor:
    """A running average after one batch."""
    axes = (0, 1, 3, 4)
    return 0.75 * before + 0.25 * (x.mean(axes) if of == "mean" else x.var(axes))


def test_shared_statistics_are_those_of_the_analog_mode() -> None:
    norm, x = norms(separate=False), currents(1, 5, 3, 2, 2)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    y = norm(x)  # training, but spiking: as it will run
    torch.testing.assert_close(y, normal(x, mean, var, norm), **CLOSE)
    assert torch.equal(norm.running_mean, mean)
    with analog(norm):
        torch.testing.assert_close(norm(x), normal(x, *batch(x), norm), **CLOSE)
    torch.testing.assert_close(norm.running_mean, moved(mean, x, "mean"), **CLOSE)
    torch.testing.assert_close(norm.running_var, moved(var, x, "var"), **CLOSE)
    norm.eval()
    expected = normal(x, norm.running_mean, norm.running_var, norm)
    torch.testing.assert_close(norm(x), expected, **CLOSE)
    with analog(norm):
        torch.testing.assert_close(norm(x), expected, **CLOSE)


def test_separate_statistics_are_those_of_each_mode() -> None:
    norm, x, spikes = norms(separate=True), currents(1, 5, 3, 2, 2), currents(2, 5, 3, 2, 2, seed=1)
    before = {name: value.clone() for name, value in norm.named_buffers()}
    with analog(norm):
        torch.testing.assert_close(norm(x), normal(x, *batch(x), norm), **CLOSE)
    assert norm.analog_mean is not None
    assert norm.analog_var is not None
    torch.testing.assert_close(norm.analog_mean, moved(before["analog_mean"], x, "mean"), **CLOSE)
    assert torch.equal(norm.running_mean, before["running_mean"])
    y = norm(spikes)
    mean, var = before["running_mean"], before["running_var"]
    for step, got in zip(spikes.split(1), y.split(1), strict=True):
        torch.testing.assert_close(got, normal(step, *batch(step), norm), **CLOSE)
        mean, var = moved(mean, step, "mean"), moved(var, step, "var")
    torch.testing.assert_close(norm.running_mean, mean, **CLOSE)
    torch.testing.assert_close(norm.running_var, var, **CLOSE)
    norm.eval()
    torch.testing.assert_close(norm(x), normal(x, mean, var, norm), **CLOSE)
    with analog(norm):
        torch.testing.assert_close(norm(x), normal(x, norm.analog_mean, norm.analog_var, norm), **CLOSE)


@pytest.mark.parametrize("separate", [False, True])
def test_a_frozen_normalisation_learns_nothing(separate: bool) -> None:
    norm = norms(separate).eval()
    before = copy.deepcopy(norm.state_dict())
    with analog(norm):
        norm(currents(1, 5, 3, 2, 2)).sum().backward()
    norm(currents(2, 5, 3, 2, 2))
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())
    assert norm.weight.grad is not None  # scale and shift still train


def test_what_is_stored() -> None:
    assert set(ProxyNorm(2).state_dict()) == set(BatchNorm(2).state_dict())
    assert set(ProxyNorm(2, separate=True).state_dict()) == {*BatchNorm(2).state_dict(), "analog_mean", "analog_var"}


# The mode


def test_the_mode_is_put_back_after_errors_and_when_nested() -> None:
    net = nn.Sequential(ProxyActivation(IF()), ProxyNorm(3), nn.ReLU())
    with analog(net):
        with analog(net[0]):
            pass
        assert net[0].analog is net[1].analog is True
    with pytest.raises(RuntimeError), analog(net):
        net(torch.zeros(1, 2, 4))  # of three channels
    assert net[0].analog is net[1].analog is False


def test_each_mode_is_compiled_once() -> None:
    """The mode is a constant of the graph: a change selects the other graph, and makes no new one."""
    net = Chain(ProxyNorm(3), ProxyActivation(converted()))
    x = currents(2, 5, 3, 2, 2).float()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = compile_whole(net.eval())
    for _ in range(3):
        assert torch.equal(compiled(x), net(x))
        with analog(compiled):
            torch.testing.assert_close(compiled(x), net(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch.compiler.reset()


def test_a_converted_neuron_says_itself_what_it_stands_for() -> None:
    neuron = ConvertedIF(2)
    neuron.threshold.copy_(torch.tensor([1.0, 2.0]))
    layer = ProxyActivation(neuron, "own")
    x = torch.tensor([[-1.0, 1.5], [9.0, 9.0]]).unsqueeze(0)
    with analog(layer):
        assert layer(x).tolist() == [[[0.0, 1.5], [1.0, 2.0]]]
    with pytest.raises(ValueError, match="a LIF has none"):
        ProxyActivation(LIF(), "own")
