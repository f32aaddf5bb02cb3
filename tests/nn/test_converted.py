"""The converted neuron as a module: buffers in, transmitted values out, nothing remembered."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ranvier import dynamics, evaluation, models
from ranvier.dynamics import ConvertedState
from ranvier.nn import LIF, ConvertedIF, Neuron
from ranvier.nn.converted import AboveZero, fixed_copy

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
    with torch.no_grad():
        for parameter in net.parameters():  # eighths: sums are exact, in whichever order a processor takes them
            parameter.copy_((8 * parameter).round() / 8)
    x = torch.randint(-8, 9, (5, 4), generator=torch.Generator().manual_seed(0)) / 4
    logits, state = net(x, steps=6), None
    assert len(logits.unique()) > 5
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


numbers = st.floats(-1e6, 1e6, width=32)


@settings(derandomize=True, deadline=None)
@given(initial=st.floats(2**-10, 2**10, width=32), one=numbers, other=numbers)
def test_thresholds_stay_above_zero_and_in_order(initial: float, one: float, other: float) -> None:
    keep = AboveZero(torch.tensor([initial]))
    low, high = keep(torch.tensor([min(one, other)])), keep(torch.tensor([max(one, other)]))
    assert 0 < low <= high
    assert keep(torch.tensor([initial])) == initial
    for p in (one, other):
        if p >= initial / 16:
            assert keep(torch.tensor([p])) == p, "above the floor nothing is changed"


def test_thresholds_fall_smoothly() -> None:
    """The slope of either piece at the floor is 1; everywhere it is that of finite differences, and never 0."""
    keep = AboveZero(torch.full((5,), 16.0, dtype=torch.float64))  # a floor of 1
    p = torch.tensor([2.0, 1.0, 1 - 1e-9, 0.0, -30.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(keep(p).sum(), p)
    assert slope[:2].tolist() == [1, 1]
    assert slope[2:].tolist() == pytest.approx([1, 1 / 4, 1 / 32**2])
    assert torch.autograd.gradcheck(keep, (p[[0, 3, 4, 4, 4]],))


def taught(neuron: ConvertedIF, rate: float, updates: int = 20) -> ConvertedIF:
    """Trained to send less, as crudely as plain gradient descent can."""
    optimizer = torch.optim.SGD(neuron.parameters(), lr=rate)
    for seed in range(updates):
        loss = neuron(random_current(seed=seed)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return neuron


@pytest.mark.parametrize("signed", [False, True])
def test_no_update_takes_a_threshold_below_zero(signed: bool) -> None:
    """And what is kept is what was trained, bit for bit."""
    neuron = calibrated(signed=signed)
    neuron.make_trainable(STEPS)
    taught(neuron, rate=2.0)
    p = neuron.parametrizations["threshold"].original
    assert p.min() < 0, "else nothing is shown"
    assert p.grad.isfinite().all()
    assert (p.grad != 0).all(), "from there it can come back"
    assert neuron.threshold.min() > 0
    fixed = neuron.fixed()
    assert set(fixed.state_dict()) == {"threshold", "bias", "v_init"}
    assert not list(fixed.parameters())
    assert torch.equal(fixed(random_current()), neuron(random_current()))
    assert (fixed(random_current()) != 0).any()


def test_training_starts_from_the_calibrated_numbers() -> None:
    neuron, current = calibrated(), random_current()
    expected = neuron(current)
    neuron.make_trainable(STEPS)
    assert torch.equal(neuron(current), expected)
    assert {type(getattr(neuron, name)) for name in ("bias", "v_init")} == {nn.Parameter}
    assert torch.equal(neuron.threshold, calibrated().threshold)


def test_steps_to_train_at() -> None:
    one_row, rows = ConvertedIF(CHANNELS), calibrated()
    one_row.make_trainable(8)
    assert one_row.bias.shape == (8, CHANNELS)
    with pytest.raises(ValueError, match=r"steps is 8, but the neuron has biases for 4 steps.*convert again.*steps=8"):
        rows.make_trainable(8)
    rows.make_trainable(2)
    assert torch.equal(rows.bias, calibrated().bias[:2])
    before = rows.threshold.detach().clone()
    rows.make_trainable(1)  # once more
    assert rows.bias.shape == (1, CHANNELS)
    assert torch.equal(rows.threshold, before)


@pytest.mark.parametrize("threshold", [0.0, -0.1, float("nan")])
def test_thresholds_that_cannot_be_trained(threshold: float) -> None:
    neuron = ConvertedIF(2)
    neuron.threshold[1] = threshold
    with pytest.raises(ValueError, match="has a threshold of .*, but thresholds must be greater than 0"):
        neuron.make_trainable(1)


def test_copies_of_a_neuron_in_training() -> None:
    """Neither they nor what is fixed shares anything with it."""
    network = nn.Sequential(nn.Linear(3, 3), calibrated())
    network[1].make_trainable(STEPS)
    duplicate, fixed = copy.deepcopy(network), fixed_copy(network)
    current = torch.randn(STEPS, 2, 3)
    expected = network(current)
    taught(duplicate[1], rate=2.0, updates=2)
    assert torch.equal(network(current), expected)
    taught(network[1], rate=2.0, updates=2)
    assert torch.equal(fixed(current), expected)
    assert not torch.equal(network(current), expected)
    assert [type(module) for module in fixed] == [nn.Linear, ConvertedIF]


def test_fixed_copies_keep_hooks_of_neurons_that_are_not_in_training() -> None:
    network, calls = nn.Sequential(calibrated()), []
    network[0].register_forward_hook(lambda *given: calls.append(1))
    fixed_copy(network)(torch.randn(STEPS, 2, CHANNELS))
    assert calls == [1]


def test_a_checkpoint_of_training_restores_it() -> None:
    """Also of thresholds below the floor: the numbers that the optimizer changes are those that are kept."""
    neuron, other = calibrated(), calibrated()
    for one in (neuron, other):
        one.make_trainable(STEPS)
    taught(neuron, rate=2.0)
    other.load_state_dict(neuron.state_dict())
    assert all(torch.equal(one, two) for one, two in zip(neuron.parameters(), other.parameters(), strict=True))
    assert torch.equal(other.threshold, neuron.threshold)


def test_training_compiles_whole() -> None:
    neuron, current = calibrated(), random_current()
    neuron.make_trainable(STEPS)
    compiled = torch.compile(neuron, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (neuron, compiled):
        neuron.zero_grad()
        run(current).square().sum().backward()
        gradients.append([p.grad.clone() for p in neuron.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)
    torch._dynamo.reset()
