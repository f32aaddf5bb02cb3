"""The converted neuron as a module: buffers in, transmitted values out, nothing remembered."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ranvier import dynamics, evaluation, models
from ranvier.dynamics import ConvertedState
from ranvier.nn import LIF, ConvertedIF, Neuron

STEPS, CHANNELS = 4, 3


def calibrated(shape: tuple[int, ...] | None = None, signed: bool = True) -> ConvertedIF:
    """With numbers of its own in every buffer."""
    generator = torch.Generator().manual_seed(0)
    neuron = ConvertedIF(CHANNELS, steps=STEPS, shape=shape, signed=signed)
    neuron.threshold.copy_(torch.rand(CHANNELS, generator=generator) + 0.2)
    neuron.bias.copy_(torch.randn(STEPS, CHANNELS, generator=generator) / 4)
    neuron.v_init.copy_(torch.rand(neuron.v_init.shape, generator=generator))
    return neuron


def random_current(steps: int = STEPS, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(steps, batch, CHANNELS, 5, 5, generator=torch.Generator().manual_seed(seed)) + 0.2


def test_as_built_it_has_threshold_one_no_bias_and_half_a_threshold_to_start_from() -> None:
    neuron = ConvertedIF(2)
    assert neuron.threshold.tolist() == [1.0, 1.0]
    assert neuron.bias.tolist() == [[0.0, 0.0]]
    assert neuron.v_init.tolist() == [0.5, 0.5]
    assert neuron(torch.full((4, 1, 2), 0.5)).flatten(1).tolist() == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("shape", [None, (CHANNELS, 5, 5)])
@pytest.mark.parametrize("signed", [False, True])
def test_runs_its_scan_with_its_buffers(shape: tuple[int, ...] | None, signed: bool) -> None:
    neuron, current = calibrated(shape, signed), random_current()
    expected, end = dynamics.converted_scan(current, None, neuron.threshold, neuron.bias, neuron.v_init, signed)
    sent, state = neuron(current, return_state=True)
    assert torch.equal(sent, expected)
    assert torch.equal(state.v, end.v)
    assert (sent < 0).any() == signed


def test_calls_do_not_know_of_each_other() -> None:
    neuron, current = calibrated(), random_current()
    before = dict(vars(neuron))
    first = neuron(current)
    neuron(random_current(batch=7, seed=2), return_state=True)
    assert torch.equal(neuron(current), first)
    assert vars(neuron) == before


def test_streaming_equals_one_call_bit_for_bit() -> None:
    neuron, current = calibrated(), random_current()
    whole, state = neuron(current), None
    for t in range(STEPS):
        sent, state = neuron(current[t : t + 1], state, return_state=True)
        assert torch.equal(sent[0], whole[t])
    assert isinstance(state, ConvertedState)
    with pytest.raises(ValueError, match="step 5 was asked for"):
        neuron(current[:1], state)


@pytest.mark.parametrize("shape", [None, (CHANNELS, 5, 5)])
def test_state_dict_round_trip(shape: tuple[int, ...] | None) -> None:
    neuron, current = calibrated(shape), random_current()
    assert set(neuron.state_dict()) == {"threshold", "bias", "v_init"}
    assert not list(neuron.parameters())
    fresh = ConvertedIF(CHANNELS, steps=STEPS, shape=shape, signed=True)
    assert not torch.equal(fresh(current), neuron(current))
    fresh.load_state_dict(neuron.state_dict())
    duplicate = copy.deepcopy(neuron)
    neuron.threshold.fill_(100.0)  # neither shares memory
    for same in (fresh, duplicate):
        assert torch.equal(same(current), calibrated(shape)(current))


def test_state_dict_of_other_steps_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for bias"):
        ConvertedIF(CHANNELS, steps=STEPS + 1, signed=True).load_state_dict(calibrated().state_dict())


@pytest.mark.parametrize(
    ("neuron", "expected"),
    [
        (ConvertedIF(16), "ConvertedIF(16)"),
        (ConvertedIF(16, steps=8), "ConvertedIF(16, steps=8)"),
        (ConvertedIF(16, signed=True), "ConvertedIF(16, signed)"),
        (ConvertedIF(2, steps=4, shape=(2, 8, 6), signed=True), "ConvertedIF(2, steps=4, shape=[2, 8, 6], signed)"),
    ],
)
def test_printed_form(neuron: ConvertedIF, expected: str) -> None:
    assert repr(neuron) == expected


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"num_channels": 0}, TypeError, "channel count"),
        ({"num_channels": 0.5}, TypeError, "channel count"),
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"shape": (4, 5, 5)}, ValueError, r"shape is \[4, 5, 5\], but must begin with the 3 channels"),
        ({"implementation": "fast"}, ValueError, "implementation is 'fast'"),
    ],
)
def test_bad_arguments_raise(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ConvertedIF(**{"num_channels": CHANNELS, **given})


@pytest.mark.parametrize(
    ("current", "message"),
    [
        (torch.zeros(2, 2, 4, 5, 5), r"is for 3 channels, which need \[T, B, 3, ...\]"),
        (torch.zeros(2, 2, 3, 6, 6), r"calibrated for each neuron of \[3, 5, 5\]"),
        (torch.zeros(5, 2, 3, 5, 5), "steps 1 to 4"),
    ],
)
def test_input_that_does_not_fit_raises(current: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrated((CHANNELS, 5, 5))(current)


class TwoLayers(nn.Module):
    """Called as every network is; the second layer holds no converted neuron."""

    def __init__(self, first: Neuron) -> None:
        super().__init__()
        self.first, self.second = first, LIF(v_threshold=0.5)

    def forward(self, images: Tensor, steps: int) -> Tensor:
        current = images.expand(steps, *images.shape)
        return self.second(self.first(current)).flatten(2)


def test_firing_rates_count_spikes_whatever_they_carry() -> None:
    neuron = ConvertedIF(2)
    neuron.threshold.copy_(torch.tensor([2.0, 0.25]))
    neuron.v_init.copy_(torch.tensor([1.0, 0.125]))
    images = torch.tensor([[0.5, 0.25]])  # fires at t = 2 (1 + 2 * 0.5 = 2 ties), and at every step
    loader = [(images, torch.zeros(1, dtype=torch.int64))]
    activity = evaluation.firing_rates(TwoLayers(neuron), loader, steps=4)
    layer = activity.layers[0]
    assert (layer.name, layer.neurons) == ("first", 2)
    assert layer.firing_rate == (0.5, 1.0, 0.5, 0.5)
    assert layer.burst_rate == (0.0,) * 4  # a spike of 2 is one spike
    assert layer.mean_firing_rate == 0.625
    spikes = evaluation.record_spikes(TwoLayers(neuron), images, steps=4)["first"]
    assert spikes[:, 0].tolist() == [[0.0, 0.25], [2.0, 0.25], [0.0, 0.25], [0.0, 0.25]]


def test_firing_rates_count_spikes_taken_back() -> None:
    neuron = ConvertedIF(1, steps=2, signed=True)
    neuron.bias.copy_(torch.tensor([[-1.0], [1.0]]))  # sent at t = 1, taken back at t = 2: both cost a transmission
    activity = evaluation.firing_rates(TwoLayers(neuron), [(torch.zeros(1, 1), torch.zeros(1))], steps=2)
    assert activity.layers[0].firing_rate == (1.0, 1.0)


def test_networks_take_it_as_their_neuron() -> None:
    net = models.mlp([4, 8, 3], neuron=ConvertedIF)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    logits, state = net(x, steps=6), None
    for t in range(6):
        step, state = net(x, steps=1, state=state, return_state=True)
        assert torch.equal(step[0], logits[t])


def test_compiles_whole() -> None:
    """fullgraph=True raises at a graph break; inside, the reference is traced."""
    neuron = calibrated()
    compiled = torch.compile(neuron, fullgraph=True, backend="eager")
    assert torch.equal(compiled(random_current()), neuron(random_current()))
    torch._dynamo.reset()


def test_analog_by_hand() -> None:
    neuron = ConvertedIF(2, steps=2)
    neuron.threshold.copy_(torch.tensor([1.0, 2.0]))
    neuron.bias.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))  # a half on average
    current = torch.tensor([[-1.0, 1.0], [0.75, 9.0]]).unsqueeze(0)
    assert neuron.analog(current).tolist() == [[[0.0, 0.5], [0.25, 2.0]]]


def test_analog_is_what_is_sent_on_average() -> None:
    neuron = ConvertedIF(3)
    current = torch.rand(1, 5, 3, 4, generator=torch.Generator().manual_seed(0)) * 3 - 1
    sent = neuron(current.expand(200, -1, -1, -1)).mean(0)
    assert (sent - neuron.analog(current)[0]).abs().max() < 1.01 / 200
