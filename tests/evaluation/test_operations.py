"""Operations against counting every spike over every connection in plain Python, and against SpikingJelly's counters.

Weights and images are multiples of 1/8, so that currents are exact and no spike depends on the order of additions.
"""

import io
import json
import math
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from ranvier.conversion import ConversionError, convert, decouple
from ranvier.dynamics import NeuronState
from ranvier.evaluation import (
    LayerOperations,
    NeuronOperations,
    Operations,
    count_operations,
    firing_rates,
    record_spikes,
)
from ranvier.models import Network, mlp, resnet19, spikformer
from ranvier.models.vgg import vgg
from ranvier.nn import IF, LIF, LIFB, PLIF, AffineIF, BatchNorm, Neuron, Readout, TimeFolded
from ranvier.nn.structure import Activation, Block, Chain, NeuronFactory, Residual

STEPS = 3
SHAPE = (2, 6, 5)


# Networks and images that compute exactly


def eighths(*shape: int, seed: int, low: int = 0, high: int = 8) -> Tensor:
    """Multiples of 1/8."""
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)) / 8


def exact(model: nn.Module) -> Any:
    """The model with weights that are multiples of a power of two, as large as makes some neurons fire and some not."""
    with torch.no_grad():
        for number, layer in enumerate(model.modules()):
            if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
                size = 2.0 ** round(math.log2(4 / math.sqrt(layer.weight[0].numel())))
                layer.weight.copy_(size * eighths(*layer.weight.shape, seed=number, low=-7))
                if layer.bias is not None:
                    layer.bias.copy_(eighths(len(layer.bias), seed=100 + number, low=-2, high=2))
    return model.eval()


def images(count: int = 4, seed: int = 0) -> Tensor:
    return eighths(count, *SHAPE, seed=seed)


def loader(*batches: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(batch, torch.zeros(len(batch), dtype=torch.int64)) for batch in batches]


def network(*body: nn.Module, features: int, encoder: nn.Module | None = None) -> Network:
    """The encoder makes 4 channels of 6 x 5; parts of the body without neurons run on folded time."""
    layers = [part if isinstance(part, Block) else TimeFolded(part) for part in body]
    first = encoder or nn.Conv2d(2, 4, 3, padding=1)
    return exact(Network(TimeFolded(first), Chain(*layers), Readout(features, 3)))


def bursting(strength: float) -> NeuronFactory:
    return lambda channels: LIFB(channels, burst_init=strength)


NEURONS: dict[str, NeuronFactory] = {
    "lif": LIF,
    "lif soft": lambda channels: LIF(channels, reset="soft"),
    "if": lambda channels: IF(channels, v_threshold=1.0),
    "if soft": lambda channels: IF(channels, v_threshold=1.0, reset="soft"),
    "plif": PLIF,
    "lifb": bursting(1.5),
    "lifb soft": lambda channels: LIFB(channels, burst_init=1.5, reset="soft"),
    "lifb weak": bursting(0.25),
    "lifb negative": bursting(-0.5),
}


# Counting by hand


def inputs_of(layer: nn.Module, shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """For every connection of a layer the place of its input: for each output, over the inputs that it sums."""
    if isinstance(layer, nn.Linear):
        for _ in range(layer.out_features):
            yield from product(*map(range, shape))
        return
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    outputs = layer(torch.zeros(1, *shape)).shape[2:]
    per_group_in, per_group_out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    for channel in range(layer.out_channels):
        group = channel // per_group_out
        for output in product(*map(range, outputs)):
            for c in range(per_group_in):
                for tap in product(*map(range, layer.kernel_size)):
                    place = tuple(
                        output[a] * layer.stride[a] + tap[a] * layer.dilation[a] - int(layer.padding[a])
                        for a in range(len(tap))
                    )
                    if all(0 <= i < size for i, size in zip(place, shape[1:], strict=True)):
                        yield (group * per_group_in + c, *place)


def connections(layer: nn.Module, shape: Sequence[int]) -> int:
    return sum(1 for _ in inputs_of(layer, shape))


def by_loops(layer: nn.Module, events: Tensor) -> tuple[float, ...]:
    """Events `[T, B, ...]` over connections: accumulates at each step for one image."""
    places = list(inputs_of(layer, events.shape[2:]))
    counts = []
    for step in events.tolist():
        count = 0.0
        for frame in step:
            for place in places:
                value = frame
                for index in place:
                    value = value[index]
                count += value
        counts.append(count / len(step))
    return tuple(counts)


def events_of(spikes: Tensor) -> Tensor:
    """1 for a spike, 2 for a burst, which sends neither 0 nor 1."""
    return torch.where(spikes == 0, 0.0, torch.where(spikes == 1, 1.0, 2.0))


def in_windows(events: Tensor, pool: nn.AvgPool2d) -> Tensor:
    """Events `[T, B, C, H, W]` that each window of an average pooling takes in."""
    kernel, stride, padding = int(pool.kernel_size), int(pool.stride), int(pool.padding)  # type: ignore[arg-type]
    found = torch.zeros(*events.shape[:3], *pool(events[0]).shape[-2:])
    for i, j in product(*map(range, found.shape[3:])):
        for y, x in product(range(kernel), repeat=2):
            row, column = i * stride - padding + y, j * stride - padding + x
            if 0 <= row < events.shape[3] and 0 <= column < events.shape[4]:
                found[..., i, j] += events[..., row, column]
    return found


def emitted(model: nn.Module, batch: Tensor, steps: int | None = STEPS) -> list[Tensor]:
    """What neurons send, in the order in which they run; neither silent nor saturated."""
    spikes = list(record_spikes(model, batch, steps).values())
    rates = [float((each != 0).float().mean()) for each in spikes]
    assert all(0.02 < rate < 0.9 for rate in rates), rates
    return spikes


def silent(layer: LayerOperations) -> bool:
    return not any(layer.accumulates)


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear)]


# (a) Every spike over every connection


def by_hand(factory: NeuronFactory) -> Network:
    """Stride, padding and kernels that differ by axis, pooling, groups, linear layers."""
    return network(
        Activation(factory(4)),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1)),
        Activation(factory(6)),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 9, 3, padding=1, groups=3),
        Activation(factory(9)),
        nn.Flatten(1),
        nn.Linear(54, 12),
        Activation(factory(12)),
        features=12,
    )


@pytest.mark.parametrize("name", NEURONS)
def test_equals_every_spike_over_every_connection(name: str) -> None:
    model = by_hand(NEURONS[name])
    batch = images()
    found = count_operations(model, loader(batch), STEPS)
    first, strided, grouped, hidden, readout = layers = layers_of(model)
    spikes = emitted(model, batch)
    a, b, c, d = map(events_of, spikes)
    assert ("lifb" in name) == bool((a == 2).any() or (b == 2).any())

    dense = connections(first, SHAPE)
    assert found.layers[0].multiply_accumulates == (dense, 0, 0)
    assert silent(found.layers[0])
    inputs = [a, in_windows(b, nn.AvgPool2d(2)), c.flatten(2), d]
    for layer, events, counted in zip((strided, grouped, hidden, readout), inputs, found.layers[1:], strict=True):
        assert counted.accumulates == by_loops(layer, events)
        assert counted.multiply_accumulates == (0, 0, 0)
    shapes = [SHAPE, (4, 6, 5), (6, 2, 3), (54,), (12,)]
    assert [layer.ann for layer in found.layers] == [
        connections(layer, shape) for layer, shape in zip(layers, shapes, strict=True)
    ]
    for counted, sent in zip(found.neurons, spikes, strict=True):
        assert counted.neurons == sent[0, 0].numel()
        assert counted.updates == counted.neurons * (2 if "lifb" in name else 1)
        assert counted.spikes == tuple(sum(s != 0 for s in step.flatten().tolist()) / 4 for step in sent)
        assert counted.bursts == tuple(sum(s not in (0, 1) for s in step.flatten().tolist()) / 4 for step in sent)
    assert found.accumulates == tuple(sum(layer.accumulates[t] for layer in found.layers) for t in range(STEPS))
    assert found.multiply_accumulates == (dense, 0, 0)
    events = [a, b, c, d]
    assert found.spikes == tuple(float(sum(each[t].sum() for each in events) / 4) for t in range(STEPS))
    assert found.updates == sum(layer.updates for layer in found.neurons)
    assert (found.samples, found.steps, found.whole_images) == (4, STEPS, False)


def test_on_paper() -> None:
    """One spike at a corner of 3 x 3 pixels reaches 2 x 2 places of a padded 3 x 3 convolution, one at the centre 9."""
    model = network(Activation(IF(1, v_threshold=1.0)), nn.Conv2d(1, 2, 3, padding=1), Activation(IF(2)), features=18)
    model.encoder = TimeFolded(nn.Identity())
    batch = torch.zeros(2, 1, 3, 3)
    batch[0, 0, 0, 0], batch[1, 0, 1, 1] = 1.0, 0.5  # fires always; every second step
    found = count_operations(model, loader(batch), 2).layers[0]
    assert found.accumulates == (2 * 4 / 2, 2 * (4 + 9) / 2)
    assert found.ann == 2 * (4 * 4 + 4 * 6 + 9)  # corners, edges, centre: 49 for each channel, not 81


sizes = st.integers(1, 3)


@given(
    inputs=sizes,
    outputs=sizes,
    groups=st.integers(1, 2),
    kernel=st.tuples(sizes, sizes),
    stride=st.tuples(sizes, sizes),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_any_convolution(
    inputs: int, outputs: int, groups: int, kernel: Any, stride: Any, padding: Any, dilation: Any, seed: int
) -> None:
    shape = (inputs * groups, 6, 7)
    layer = nn.Conv2d(shape[0], outputs * groups, kernel, stride, padding, dilation, groups)
    features = layer(torch.zeros(1, *shape)).numel()
    model = Network(TimeFolded(nn.Identity()), Chain(Activation(LIF()), TimeFolded(layer)), Readout(features, 2))
    batch = 2 * eighths(2, *shape, seed=seed)
    found = count_operations(model, loader(batch), 2).layers[0]
    (spikes,) = record_spikes(model, batch, 2).values()
    assert found.accumulates == by_loops(layer, spikes)
    assert found.ann == connections(layer, shape)


POOLS = {
    "overlapping": nn.AvgPool2d(3, stride=1),
    "padded": nn.AvgPool2d(3, stride=2, padding=1),
    "padding not averaged": nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
    "over the edge": nn.AvgPool2d(4, stride=2, ceil_mode=True),
    "other divisor": nn.AvgPool2d(2, divisor_override=3),
}


@pytest.mark.parametrize("neuron", ["lif", "lifb"])
@pytest.mark.parametrize("name", POOLS)
def test_any_average_pooling(name: str, neuron: str) -> None:
    """A spike counts once in each window that takes it in."""
    pool = POOLS[name]
    features = 3 * pool(torch.zeros(4, 6, 5))[0].numel()
    model = network(Activation(NEURONS[neuron](4)), pool, nn.Conv2d(4, 3, 3, padding=1), features=features)
    found = count_operations(model, loader(images()), STEPS)
    events = in_windows(events_of(emitted(model, images())[0]), pool)
    assert found.layers[1].accumulates == by_loops(layers_of(model)[1], events)
    assert found.layers[2].multiply_accumulates == (features * 3,) * STEPS  # what a layer sends is no spike


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (4, 2), (7, 5)])
def test_adaptive_pooling(rows: int, columns: int) -> None:
    """Windows from floor(i n / m) to ceil((i + 1) n / m), which overlap or repeat where sizes do not divide."""
    pool = nn.AdaptiveAvgPool2d((rows, columns))
    model = network(Activation(LIF()), pool, nn.Flatten(1), features=4 * rows * columns)
    (spikes,) = emitted(model, images())
    total = [0.0] * STEPS
    for t, i, j in product(range(STEPS), range(rows), range(columns)):
        window = spikes[t, ..., i * 6 // rows : -(-(i + 1) * 6 // rows), j * 5 // columns : -(-(j + 1) * 5 // columns)]
        total[t] += float(window.sum()) / 4
    found = count_operations(model, loader(images()), STEPS).layers[1]
    assert found.accumulates == tuple(3 * count for count in total)


@pytest.mark.parametrize("neuron", ["lif", "lifb"])
def test_sums_of_spikes_hand_them_on(neuron: str) -> None:
    """As in SEW ResNet: two spikes in one place are two accumulates for each output."""
    factory = NEURONS[neuron]
    branch = Chain(TimeFolded(nn.Conv2d(4, 4, 3, padding=1)), Activation(factory(4)))
    model = network(Activation(factory(4)), Residual(branch, Chain()), nn.Conv2d(4, 2, 1), features=60)
    found = count_operations(model, loader(images()), STEPS)
    first, second = map(events_of, emitted(model, images()))
    assert (first + second).max() == (4 if neuron == "lifb" else 2)
    _, inner, outer, _ = layers_of(model)
    assert found.layers[1].accumulates == by_loops(inner, first)
    assert found.layers[2].accumulates == by_loops(outer, first + second)


@pytest.mark.parametrize("neuron", ["lif", "lifb"])
def test_sums_of_currents_cost_nothing(neuron: str) -> None:
    """As in ResNet-20: what is added enters a neuron, whose spikes alone reach the next layer."""
    factory = NEURONS[neuron]
    block = Residual(Chain(TimeFolded(nn.Conv2d(4, 4, 3, padding=1))), Chain())
    model = network(Activation(factory(4)), block, Activation(factory(4)), nn.Conv2d(4, 2, 1), features=60)
    found = count_operations(model, loader(images()), STEPS)
    first, second = map(events_of, emitted(model, images()))
    assert found.layers[1].accumulates == by_loops(layers_of(model)[1], first)
    assert found.layers[2].accumulates == by_loops(layers_of(model)[2], second)


@pytest.mark.parametrize("neuron", ["lif", "lifb"])
def test_spikes_of_different_worth_are_all_counted(neuron: str) -> None:
    """A pooled spike is worth 1/4 of another: each reaches the next layer at its own weight, as an accumulate."""
    factory = NEURONS[neuron]
    pooled = Chain(TimeFolded(nn.Conv2d(4, 4, 1)), Activation(factory(4)), TimeFolded(nn.AvgPool2d(2)))
    strided = Chain(TimeFolded(nn.Conv2d(4, 4, 2, stride=2)), Activation(factory(4)))
    model = network(Activation(factory(4)), Residual(pooled, strided), nn.Conv2d(4, 2, 3, padding=1), features=12)
    found = count_operations(model, loader(images()), STEPS)
    _, a, b = map(events_of, emitted(model, images()))
    expected = by_loops(layers_of(model)[3], in_windows(a, nn.AvgPool2d(2)) + b)
    assert found.layers[3].accumulates == expected
    assert found.layers[3].multiply_accumulates == (0, 0, 0)


@pytest.mark.parametrize("neuron", ["lif", "lifb"])
def test_max_pooling_passes_what_is_largest(neuron: str) -> None:
    model = network(Activation(NEURONS[neuron](4)), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), features=6)
    found = count_operations(model, loader(images()), STEPS)
    (spikes,) = emitted(model, images())
    events = events_of(F.max_pool2d(spikes.flatten(0, 1), 2).unflatten(0, (STEPS, -1)))
    assert found.layers[1].accumulates == by_loops(layers_of(model)[1], events)


# Decoupled and converted networks


@pytest.mark.parametrize("strength", [1.5, 1.0, 0.0, -0.5])
def test_a_burst_is_two_events_also_where_its_value_does_not_tell(strength: float) -> None:
    """At a strength of 1 a burst looks like a spike, at 0 like silence: the pairs show both."""
    model = by_hand(bursting(strength))
    pairs = decouple(model, images())
    found = count_operations(model, loader(images()), STEPS)
    _, strided, grouped, hidden, readout = layers_of(model)
    halves = [spikes.chunk(2, 2) for spikes in record_spikes(pairs, images(), STEPS).values()]
    a, b, c, d = (first + second for first, second in halves)
    inputs = [a, in_windows(b, nn.AvgPool2d(2)), c.flatten(2), d]
    for layer, events, counted in zip((strided, grouped, hidden, readout), inputs, found.layers[1:], strict=True):
        assert counted.accumulates == by_loops(layer, events)
    for counted, (first, second) in zip(found.neurons, halves, strict=True):
        assert counted.spikes == tuple((first.sum((1, 2, 3, 4)[: first.ndim - 1]) / 4).tolist())
        assert counted.bursts == tuple((second.sum((1, 2, 3, 4)[: first.ndim - 1]) / 4).tolist())
    assert all(any(layer.bursts) for layer in found.neurons[:2])


def summing(neuron: NeuronFactory) -> Network:
    """Sums of two layers' spikes in front of a convolution, whose copies after decoupling are three."""
    branch = Chain(TimeFolded(nn.Conv2d(4, 4, 3, padding=1)), Activation(neuron(4)))
    inner = Residual(Chain(TimeFolded(nn.Conv2d(4, 4, 3, padding=1))), Chain())
    parts = (Residual(branch, Chain()), inner, Activation(neuron(4)), nn.AvgPool2d(2), nn.Conv2d(4, 5, 2))
    return network(Activation(neuron(4)), *parts, Activation(neuron(5)), features=10)


@pytest.mark.parametrize("build", [by_hand, summing])
def test_a_decoupled_network_counts_as_the_one_it_was_made_from(build: Any) -> None:
    """Also its ANN, which has no copies."""
    model = build(bursting(1.5))
    pairs = decouple(model, images())
    assert len(layers_of(pairs)) > len(layers_of(model))
    assert count_operations(pairs, loader(images()), STEPS) == count_operations(model, loader(images()), STEPS)


@pytest.mark.parametrize("strength", [None, 1.5])
def test_a_layer_that_is_used_twice_is_no_copy(strength: float | None) -> None:
    """Its second use, `body.1.branch.0_1`, is named like a copy, and added to the first."""
    twice = TimeFolded(nn.Conv2d(4, 4, 1))
    neuron = LIF if strength is None else bursting(strength)
    block = Residual(Chain(twice), Chain(TimeFolded(nn.MaxPool2d(3, 1, 1)), twice))
    model = network(Activation(neuron(4)), block, Activation(neuron(4)), features=120)
    found = count_operations(model, loader(images()), STEPS)
    assert [layer.ann for layer in found.layers] == [connections(layers_of(model)[0], SHAPE), 480, 480, 360]
    assert count_operations(decouple(model, images()), loader(images()), STEPS) == found


class Twice(nn.Module):
    """A convolution without bias, used twice: only in a decoupled network would its second use be a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.conv = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1, bias=False)
        self.head = nn.Linear(120, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enter(x))
        return self.head(F.relu(self.conv(x) + self.conv(F.max_pool2d(x, 3, 1, 1))).flatten(1))


def test_a_layer_without_bias_that_is_used_twice_is_no_copy() -> None:
    snn = convert(exact(Twice()), images(40, seed=9), steps=2, threshold="max", bias="none")
    found = count_operations(snn, loader(images()), 2)
    assert [layer.ann for layer in found.layers[1:]] == [480, 480, 360]


class Small(nn.Module):
    """Everything on the way that moves spikes without changing them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(2, 4, 3, padding=1)
        self.conv = nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect")
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enter(x))
        x = F.channel_shuffle(torch.cat([x, 0.5 * x[:, 1:3]], 1), 2)
        x = F.interpolate(F.pad(x, (1, 0, 0, 0)), scale_factor=2)
        return self.head(F.relu(self.conv(F.avg_pool2d(x, 2))).mean((2, 3)))


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_converted_networks(signed: bool, decoupled: bool) -> None:
    """Spikes are worth their thresholds; a spike that is taken back is an event, too."""
    ann = exact(Small())
    snn: Any = convert(ann, images(40, seed=9), steps=4, threshold="max", bias="none", signed=signed)
    sent = list(record_spikes(snn, images(), 4).values())
    assert signed == any(bool((spikes < 0).any()) for spikes in sent)
    model = decouple(snn, images()) if decoupled else snn
    found = count_operations(model, loader(images()), 4)
    first, second = ((spikes != 0).float() for spikes in sent)
    x = first.flatten(0, 1)
    x = F.pad(F.channel_shuffle(torch.cat([x, x[:, 1:3]], 1), 2), (1, 0, 0, 0))
    x = F.pad(4 * x, (1, 1, 1, 1), mode="reflect").unflatten(0, (4, -1))  # each spike four times, then as one window
    assert found.layers[1].accumulates == by_loops(nn.Conv2d(6, 4, 3), x)
    assert found.layers[2].accumulates == by_loops(nn.Linear(4, 3), second.sum((3, 4)))
    assert [layer.ann for layer in found.layers] == [
        connections(ann.enter, SHAPE), connections(nn.Conv2d(6, 4, 3), (6, 8, 8)), 12,
    ]  # fmt: skip
    assert [layer.neurons for layer in found.neurons] == [120, 144]
    assert [layer.updates for layer in found.neurons] == [120, 144]
    assert found.neurons[0].spikes == tuple((first.sum((1, 2, 3, 4)) / 4).tolist())


class Mixed(nn.Module):
    """Spikes whose channels become something else before the last layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.enter = nn.Conv2d(2, 4, 3, padding=1)
        self.inner = nn.Conv1d(6, 6, 3, padding=1)
        self.last = {
            "reshaped": nn.Conv2d(8, 3, 2),
            "broadcast": nn.Conv2d(4, 3, 3, padding=1),
            "across channels": nn.Conv1d(6, 3, 3, padding=1),
        }[kind]
        self.register_buffer("map", 1 + eighths(4, 6, 5, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.enter(x))
        match self.kind:
            case "reshaped":
                y = y.reshape(len(y), 8, 3, 5)
            case "broadcast":
                y = y.mean((2, 3), keepdim=True) * self.map
            case "across channels":
                y = F.relu(self.inner(y.mean(1))) + y.mean(1)
        return self.last(y).flatten(1)


@pytest.mark.parametrize("kind", ["reshaped", "broadcast", "across channels"])
def test_channels_that_become_something_else(kind: str) -> None:
    ann = exact(Mixed(kind))
    snn = convert(ann, images(40, seed=9), steps=4, threshold="max", bias="none")
    events = [(spikes != 0).float() for spikes in emitted(snn, images(), 4)]
    arriving = {
        "reshaped": lambda: events[0].reshape(4, 4, 8, 3, 5),
        "broadcast": lambda: events[0].sum((3, 4), keepdim=True).expand_as(events[0]),
        "across channels": lambda: events[0].sum(2) + events[1],
    }[kind]()
    found = count_operations(snn, loader(images()), 4).layers[-1]
    assert found.accumulates == by_loops(ann.last, arriving)


def test_signed_spikes_do_not_cancel_in_a_window() -> None:
    pool = nn.AvgPool2d(2)
    ann = exact(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), pool, nn.Flatten(1), nn.Linear(24, 3)))
    snn = convert(ann, images(40, seed=9), steps=4, threshold="max", bias="none", signed=True)
    frames = eighths(4, 6, *SHAPE, seed=1, low=-8)
    (spikes,) = emitted(snn, frames, None)
    signs = (spikes / spikes.abs().max()).sign()
    assert (in_windows(signs, pool).abs() < in_windows(signs.abs(), pool)).any()
    found = count_operations(snn, loader(frames)).layers[1]
    assert found.accumulates == by_loops(ann[-1], in_windows(signs.abs(), pool).flatten(2))


class Signal(nn.Module):
    """Signals `[B, 2, 12]`."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(2, 4, 3, padding=1)
        self.conv = nn.Conv1d(4, 4, 3, padding=2, dilation=2, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool1d(F.relu(self.enter(x)), 2)
        return self.head(F.adaptive_avg_pool1d(F.relu(self.conv(x)), 2).flatten(1))


def test_signals() -> None:
    ann = exact(Signal())
    batch = eighths(3, 2, 12, seed=1)
    snn = convert(ann, eighths(40, 2, 12, seed=2), steps=4, threshold="max", bias="none")
    first, second = ((spikes != 0).float() for spikes in emitted(snn, batch, 4))
    found = count_operations(snn, loader(batch), 4)
    assert found.layers[1].accumulates == by_loops(ann.conv, first.unflatten(-1, (6, 2)).sum(-1))
    assert found.layers[2].accumulates == by_loops(ann.head, second.unflatten(-1, (2, 3)).sum(-1).flatten(2))


# What is not made of spikes


class Shifted(nn.Module):
    """Values between the activation and the last layer that no count of spikes can tell."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.enter, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(120, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.enter(x))
        match self.kind:
            case "number":
                y = y + 0.5
            case "constant":
                y = y + torch.arange(4.0).view(4, 1, 1)
            case "image":
                y = y + x[:, :1]
            case "blurred":
                y = F.interpolate(y, size=(6, 5), mode="bilinear")
            case "signs":
                y = F.max_pool2d(-y, 3, 1, 1)
        return self.head(y.flatten(1))


@pytest.mark.parametrize("kind", ["number", "constant", "image", "blurred"])
def test_layers_on_other_values_cost_every_connection_at_every_step(kind: str) -> None:
    snn = convert(exact(Shifted(kind)), images(40, seed=9), steps=4, threshold="max", bias="none")
    found = count_operations(snn, loader(images()), 4).layers[1]
    assert found.multiply_accumulates == (360,) * 4
    assert silent(found)


def test_spikes_of_different_signs_are_not_followed_through_a_maximum() -> None:
    model = network(Activation(LIF()), nn.MaxPool2d(3, 1, 1), nn.Flatten(1), features=120)
    model.encoder = TimeFolded(nn.Identity())
    assert not silent(count_operations(model, loader(images().repeat(1, 2, 1, 1)), 2).layers[0])
    polarity = (eighths(2, 3, 4, 6, 5, seed=0, low=-8) * 3).round()  # whole numbers that are pooled right away
    model.encoder = TimeFolded(nn.MaxPool2d(3, 1, 1), nn.Conv2d(4, 4, 1))
    assert silent(count_operations(model, loader(polarity)).layers[0])


def test_neurons_of_ones_own_are_spikes_only_if_they_send_spikes() -> None:
    class Sending(Neuron):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def scan(self, current: Tensor, state: NeuronState | None) -> tuple[Tensor, NeuronState]:
            return self.value * (current > 1), NeuronState(current[-1])

    for value, analog in ((1.0, False), (-1.0, False), (0.5, True), (2.0, True)):
        found = count_operations(network(Activation(Sending(value)), features=120), loader(images()), 2)
        assert any(found.layers[1].multiply_accumulates) == analog
        assert silent(found.layers[1]) == analog
        assert found.neurons[0].spikes[0] > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("graph", [False, True])
def test_half_precision_counts_as_float32(dtype: torch.dtype, graph: bool) -> None:
    """Of a network whose numbers have few bits, at any precision."""
    model = network(Activation(LIFB(4)), nn.Conv2d(4, 4, 3), Activation(LIF()), features=48).float()
    model = decouple(model, images()) if graph else model
    expected = count_operations(model, loader(images(), images(2)), 2)
    assert sum(expected.spikes) > 10
    for size in (torch.float32, dtype):
        batches = loader(images().to(size), images(2).to(size))
        assert count_operations(model.to(dtype), batches, 2) == expected
    assert next(model.parameters()).dtype == dtype


def test_potentials_are_no_spikes() -> None:
    """Of neurons that never fire, also where the potential happens to be 1 or 0 everywhere."""
    readout = AffineIF(tau=4.0, fires=False)
    found = count_operations(network(Activation(LIF()), Activation(readout), features=120), loader(images()), 2)
    fired, read = found.neurons
    assert sum(fired.spikes) > 10
    assert (read.neurons, read.spikes, read.firing_rate) == (120, (0, 0), (0, 0))
    assert found.spikes == fired.spikes
    copied = network(Activation(LIF()), Activation(AffineIF(tau=1.0, fires=False)), features=120)
    found = count_operations(copied, loader(images()), 2)
    assert found.neurons[1].spikes == (0, 0)
    assert found.layers[-1].multiply_accumulates == (360, 360)
    assert silent(found.layers[-1])


@pytest.mark.parametrize("order", [1, -1])
def test_values_that_are_no_spikes_once_are_none_in_any_batch(order: int) -> None:
    class Counting(Neuron):
        def scan(self, current: Tensor, state: NeuronState | None) -> tuple[Tensor, NeuronState]:
            return current.clamp(0, 2).floor(), NeuronState(current[-1])

    model = network(Activation(Counting()), features=60)
    model.encoder = TimeFolded(nn.Identity())
    plain, graded = images(), 2 * images()
    assert not any(count_operations(model, loader(plain), 2).layers[0].multiply_accumulates)
    found = count_operations(model, loader(*(plain, graded)[::order]), 2).layers[0]
    assert found.multiply_accumulates == (180, 180)
    assert silent(found)


def test_normalisation_that_no_layer_absorbs_is_a_layer() -> None:
    """As in the shortcuts of ResNet-19's first stage; behind a convolution it costs nothing."""
    norm = BatchNorm(4)
    block = Residual(Chain(TimeFolded(nn.Conv2d(4, 4, 3, padding=1)), BatchNorm(4)), Chain(norm))
    model = network(Activation(LIF()), block, Activation(LIF()), features=120)
    norm.running_mean.fill_(0.5)
    found = count_operations(model, loader(images()), STEPS)
    spikes = record_spikes(model, images(), STEPS)["body.layers.0.neuron"]
    assert [layer.name for layer in found.layers] == ["encoder", "body.1.branch.0", "body.1.shortcut.0", "readout.1"]
    assert found.layers[2].accumulates == tuple((spikes.sum((1, 2, 3, 4)) / 4).tolist())
    assert found.layers[2].ann == 120
    norm.running_mean.zero_()  # now it only scales, which moves on into the neuron's input
    assert len(count_operations(model, loader(images()), STEPS).layers) == 3


def test_event_frames_are_spikes_for_the_first_layer() -> None:
    """Whole numbers: n is n events, of either sign, at each step."""
    frames = torch.randint(-2, 4, (STEPS, 4, *SHAPE), generator=torch.Generator().manual_seed(0)).float()
    model = by_hand(LIF)
    found = count_operations(model, loader(frames))
    assert found.whole_images
    assert found.layers[0].accumulates == by_loops(layers_of(model)[0], frames.abs())
    assert found.multiply_accumulates == (0, 0, 0)
    still = count_operations(model, loader(frames[0]), STEPS).layers[0]
    assert still.accumulates == (found.layers[0].accumulates[0], 0, 0)  # once, as for any constant image
    assert still.ann == found.layers[0].ann


def test_events_that_are_pooled_first_do_not_cancel() -> None:
    model = network(Activation(LIF()), features=4 * 6, encoder=nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(2, 4, 1)))
    frames = torch.randint(-2, 4, (STEPS, 4, *SHAPE), generator=torch.Generator().manual_seed(0)).float()
    found = count_operations(model, loader(frames)).layers[0]
    assert found.accumulates == by_loops(nn.Conv2d(2, 4, 1), in_windows(frames.abs(), nn.AvgPool2d(2)))


@pytest.mark.parametrize("order", [1, -1])
def test_images_are_events_only_if_all_are(order: int) -> None:
    """A black image among others is no event image, whichever batch it comes in."""
    model = by_hand(LIF)
    batches = [torch.zeros(1, *SHAPE), images(1)][::order]
    found = count_operations(model, loader(*batches), STEPS)
    assert not found.whole_images
    assert found.multiply_accumulates == (connections(layers_of(model)[0], SHAPE), 0, 0)
    assert silent(found.layers[0])
    assert found == count_operations(model, loader(torch.cat(batches)), STEPS)


# Laws


@given(
    seed=st.integers(0, 100), cuts=st.lists(st.integers(1, 5), max_size=3), neuron=st.sampled_from(["if soft", "lifb"])
)
@settings(max_examples=10, deadline=None)
def test_counts_do_not_depend_on_how_images_are_batched(seed: int, cuts: list[int], neuron: str) -> None:
    model = by_hand(NEURONS[neuron])
    batch = images(6, seed)
    whole = count_operations(model, loader(batch), STEPS)
    apart = count_operations(model, loader(*batch.tensor_split(sorted(cuts))), STEPS)
    assert apart == whole


def test_counts_add_over_batches() -> None:
    model = by_hand(LIF)
    parts = [count_operations(model, loader(images(count, seed)), STEPS) for count, seed in ((2, 0), (3, 1))]
    both = count_operations(model, loader(images(2, 0), images(3, 1)), STEPS)
    assert both.samples == 5
    for index, layer in enumerate(both.layers):
        sums = [
            (2 * parts[0].layers[index].accumulates[t] + 3 * parts[1].layers[index].accumulates[t])
            for t in range(STEPS)
        ]
        assert [5 * count for count in layer.accumulates] == pytest.approx(sums, rel=1e-12)  # means, in float64


def test_a_constant_image_is_a_sequence_whose_first_layer_runs_once() -> None:
    model = by_hand(bursting(1.5))
    batch = images()
    once = count_operations(model, loader(batch), STEPS)
    frames = count_operations(model, [(batch.expand(STEPS, *batch.shape), torch.zeros(4))])
    assert frames.neurons == once.neurons
    assert frames.layers[1:] == once.layers[1:]
    assert once.layers[0].multiply_accumulates == (once.layers[0].ann, 0, 0)
    assert frames.layers[0].multiply_accumulates == (once.layers[0].ann,) * STEPS
    assert frames.ann == once.ann
    assert count_operations(model, [(batch.expand(STEPS, *batch.shape), torch.zeros(4))], STEPS) == frames


def test_the_first_steps_do_not_depend_on_how_many_follow() -> None:
    model = by_hand(LIF)
    short, long = (count_operations(model, loader(images()), steps) for steps in (1, 4))
    assert short.accumulates == long.accumulates[:1]
    assert short.multiply_accumulates == long.multiply_accumulates[:1]


@pytest.mark.parametrize("neuron", ["lif", "lifb"])
def test_a_silent_network_costs_its_encoder(neuron: str) -> None:
    model = by_hand(NEURONS[neuron])
    for parameter in model.encoder.parameters():
        nn.init.zeros_(parameter)
    found = count_operations(model, loader(images()), STEPS)
    assert found.spikes == found.accumulates == (0, 0, 0)
    assert found.multiply_accumulates == (found.layers[0].ann, 0, 0)
    assert found.ann == sum(layer.ann for layer in found.layers) > found.layers[0].ann
    assert found.neurons[0].neurons == 120
    assert all(layer.firing_rate == (0, 0, 0) for layer in found.neurons)


def test_the_ann_does_not_depend_on_spikes() -> None:
    model = by_hand(LIF)
    bright, dark = (count_operations(model, loader(factor * images()), STEPS) for factor in (2.0, 0.25))
    assert bright.spikes != dark.spikes
    assert [layer.ann for layer in bright.layers] == [layer.ann for layer in dark.layers]


# (d) Beside firing rates


@pytest.mark.parametrize("name", NEURONS)
def test_rates_agree_with_firing_rates(name: str) -> None:
    model = by_hand(NEURONS[name])
    activity = firing_rates(model, loader(images(3), images(1, seed=1)), STEPS)
    found = count_operations(model, loader(images(3), images(1, seed=1)), STEPS)
    for layer, counted in zip(activity.layers, found.neurons, strict=True):
        assert counted.neurons == layer.neurons
        # Rates are float32 quotients there.
        assert counted.firing_rate == pytest.approx(layer.firing_rate, rel=1e-6)
        bursts = tuple(count / counted.neurons for count in counted.bursts)
        assert bursts == pytest.approx(layer.burst_rate, rel=1e-6)


def test_burst_neurons_that_do_not_burst_are_still_one_neuron_each() -> None:
    """A current of 3/4 fires at the second step, v = 3/8, 9/16, and never bursts."""
    model = Network(TimeFolded(nn.Identity()), Chain(Activation(LIFB(2))), Readout(60, 3))
    batch = torch.full((2, 2, 6, 5), 0.75)
    (neurons,) = count_operations(model, loader(batch), 3).neurons
    assert (neurons.neurons, neurons.updates) == (60, 120)
    assert neurons.firing_rate == (0, 1, 0)
    assert neurons.bursts == (0, 0, 0)
    assert firing_rates(model, loader(batch), 3).layers[0].firing_rate == (0, 1, 0)


# (b) SpikingJelly


@pytest.fixture(scope="module")
def sj() -> ModuleType:
    reason = "needs spikingjelly: pip install --no-deps -r peers.txt"
    pytest.importorskip("spikingjelly.activation_based.neuron", reason=reason)
    return pytest.importorskip("spikingjelly.activation_based.op_counter", reason=reason)


SPIKING = {
    "if hard": (lambda channels: IF(channels, v_threshold=1.0), {"v_threshold": 1.0, "v_reset": 0.0}),
    "if soft": (lambda channels: IF(channels, v_threshold=1.0, reset="soft"), {"v_threshold": 1.0, "v_reset": None}),
    "lif hard": (LIF, {"tau": 2.0, "v_threshold": 0.5, "v_reset": 0.0}),
    "lif soft": (
        lambda channels: LIF(channels, tau=4.0, v_threshold=0.25, reset="soft"),
        {"tau": 4.0, "v_threshold": 0.25, "v_reset": None},
    ),
}


def shared(neuron: NeuronFactory) -> Network:
    """What SpikingJelly counts: binary inputs everywhere, so neither averages nor sums of spikes."""
    return network(
        Activation(neuron(8)),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, stride=2),
        Activation(neuron(12)),
        nn.Conv2d(12, 12, 3, padding=1, groups=3),
        Activation(neuron(12)),
        nn.Conv2d(12, 16, (3, 1), padding=(2, 0), dilation=(2, 1)),
        Activation(neuron(16)),
        nn.Flatten(1),
        nn.Linear(256, 20),
        Activation(neuron(20)),
        features=20,
        encoder=nn.Conv2d(3, 8, 3, padding=1),
    )


def twin(model: Network, name: str) -> nn.Sequential:
    """The same layers and weights in SpikingJelly, multi-step."""
    from spikingjelly.activation_based import functional, layer, neuron

    def built(module: nn.Module) -> nn.Module:
        match module:
            case Activation():
                kind = neuron.IFNode if name.startswith("if") else neuron.LIFNode
                return kind(**SPIKING[name][1])
            case nn.Conv2d():
                settings = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
                other = layer.Conv2d(module.in_channels, module.out_channels, *settings)
            case nn.Linear():
                other = layer.Linear(module.in_features, module.out_features)
            case nn.MaxPool2d():
                return layer.MaxPool2d(2)
            case _:
                return layer.Flatten()
        other.load_state_dict(module.state_dict())
        return other

    parts = [part for module in (model.encoder, *model.body.layers, model.readout) for part in unfolded(module)]  # type: ignore[union-attr]
    net = nn.Sequential(*map(built, parts)).eval()
    functional.set_step_mode(net, "m")
    return net


def unfolded(module: nn.Module) -> list[nn.Module]:
    return list(module) if isinstance(module, TimeFolded) else [module]


def counted_by(counter: Any, sj: ModuleType, net: nn.Module, x: Tensor) -> Any:
    with sj.DispatchCounterMode([counter]), torch.no_grad():
        net(x)
    return counter


@pytest.mark.parametrize("name", SPIKING)
def test_accumulates_are_those_of_spikingjelly(sj: ModuleType, name: str) -> None:
    """Their synaptic operations, layer by layer: equal, and so within 1 %."""
    model = shared(SPIKING[name][0])
    batch = eighths(4, 3, 16, 16, seed=3)
    found = count_operations(model, loader(batch), STEPS)
    assert all(0.05 < sum(layer.firing_rate) / STEPS < 0.8 for layer in found.neurons)
    theirs = counted_by(sj.SynOpCounter(), sj, twin(model, name), batch.expand(STEPS, *batch.shape))
    assert 4 * sum(found.accumulates) == theirs.get_total() > 10_000
    by_layer = [sum(counts.values()) for name, counts in theirs.get_counts().items() if name.count(".") == 1]
    assert [count for count in by_layer if count] == [4 * sum(layer.accumulates) for layer in found.layers[1:]]
    # They count no synaptic operation for the analog image; we, multiply-accumulates.
    assert silent(found.layers[0])


def test_after_average_pooling_spikingjelly_counts_a_dense_layer(sj: ModuleType) -> None:
    """Averages are not binary, so that it counts multiply-accumulates there; we, the spikes that were pooled."""
    layer = nn.Conv2d(4, 3, 3)
    model = network(Activation(LIF()), nn.AvgPool2d(2), layer, features=27, encoder=nn.Conv2d(2, 4, 3, padding=1))
    batch = eighths(2, 2, 10, 10, seed=0)
    counted = count_operations(model, loader(batch), 1).layers[1]
    (spikes,) = emitted(model, batch, 1)
    averages = F.avg_pool2d(spikes[0], 2)
    assert counted_by(sj.SynOpCounter(), sj, layer, averages).get_total() == 0
    assert counted_by(sj.MACCounter(), sj, layer, averages).get_total() == 2 * counted.ann  # without padding
    assert counted.accumulates == by_loops(layer, in_windows(spikes, nn.AvgPool2d(2)))
    assert counted.multiply_accumulates == (0,)


def test_multiply_accumulates_of_spikingjelly_differ_by_padding_and_repetition(sj: ModuleType) -> None:
    """Without padding, and per run of the first layer, they are equal."""
    model = network(
        Activation(LIF()), nn.Conv2d(4, 4, 3), Activation(LIF()), nn.Flatten(1), features=4 * 12 * 12,
        encoder=nn.Conv2d(3, 4, 3),
    )  # fmt: skip
    batch = eighths(2, 3, 16, 16, seed=3)
    theirs = counted_by(sj.MACCounter(), sj, twin(model, "lif hard"), batch.expand(STEPS, *batch.shape)).get_total()
    found = count_operations(model, loader(batch), STEPS)
    assert 2 * STEPS * sum(found.multiply_accumulates) == theirs  # they run the first layer at every step
    # The ANN: the same layers with ReLU, once.
    parts = (model.encoder[0], nn.ReLU(), model.body.layers[1][0], nn.ReLU(), *model.readout)  # type: ignore[union-attr]
    assert 2 * found.ann == counted_by(sj.MACCounter(), sj, nn.Sequential(*parts), batch).get_total()

    padded = network(Activation(LIF()), nn.Flatten(1), features=4 * 256, encoder=nn.Conv2d(3, 4, 3, padding=1))
    theirs = counted_by(sj.MACCounter(), sj, padded.encoder[0], batch).get_total()
    ours = 2 * count_operations(padded, loader(batch), STEPS).layers[0].ann
    assert theirs == 2 * 4 * 3 * 9 * 16 * 16  # zeros of the padding included
    assert ours == 2 * 4 * 3 * (3 * 16 - 2) ** 2  # along each axis 16 outputs see 3 inputs, but two see only 2
    assert ours / theirs == pytest.approx((46 / 48) ** 2)


# What is refused, and what is left alone


def test_self_attention_is_refused_by_name() -> None:
    model = spikformer(num_classes=3, in_channels=1, image_size=16, dim=16, depth=1, heads=2)
    with pytest.raises(ConversionError, match="Self-attention"):
        count_operations(model, loader(torch.rand(2, 1, 16, 16)), 2)


def test_max_pooling_of_weak_bursts_is_refused_as_in_decoupling() -> None:
    model = network(Activation(LIFB(4, burst_init=0.5)), nn.MaxPool2d(2), nn.Flatten(1), features=24)
    with pytest.raises(ConversionError, match="does not commute with decoupling"):
        count_operations(model, loader(images()), 2)


def test_other_modules_are_refused() -> None:
    with pytest.raises(TypeError, match="model is a Sequential, but must be a Network"):
        count_operations(nn.Sequential(nn.Linear(2, 2), LIF()), loader(torch.rand(1, 2)), 2)


@pytest.mark.parametrize("given", [[], loader(torch.zeros(0, *SHAPE))])
def test_no_samples_raise(given: Any) -> None:
    with pytest.raises(ValueError, match="the loader gave no samples"):
        count_operations(by_hand(LIF), given, 2)
    with pytest.raises(ValueError, match="the loader gave no samples"):
        count_operations(by_hand(LIF), loader(images()), 2, batches=0)


@pytest.mark.parametrize(
    ("batches", "steps", "message"),
    [
        ([images(), images()[..., :4]], 2, r"\[2, 6, 5\] after the batch axis and 2 steps. Count them apart"),
        ([images().expand(2, 4, *SHAPE), images().expand(3, 4, *SHAPE)], None, "and 3 steps, but those of the first"),
        ([images() / 0], 2, "NaN or infinity"),
        ([images()], None, "the number of time steps is open"),
        ([images().expand(3, 4, *SHAPE)], 2, "3 steps, but steps=2"),
    ],
)
def test_images_that_cannot_be_counted_together(batches: list[Tensor], steps: int | None, message: str) -> None:
    model = network(Activation(LIF()), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), features=4)
    with pytest.raises(ValueError, match=message):
        count_operations(model, loader(*batches), steps)


def test_batches_limit_the_run_and_draw_no_more() -> None:
    drawn = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(5):
            drawn.append(number)
            yield images(2, number), torch.zeros(2)

    model = by_hand(LIF)
    found = count_operations(model, batches(), STEPS, batches=2)
    assert drawn == [0, 1]
    assert found == count_operations(model, loader(images(2, 0), images(2, 1)), STEPS)


def test_the_model_is_left_as_it_was() -> None:
    """Burst strengths, modes and what it computes; also where it was compiled, or its gradients are off."""
    torch.manual_seed(0)
    model = vgg((4, "A", 6, "A"), num_classes=3, in_channels=2, image_size=8, neuron=bursting(1.7))
    batch = torch.rand(3, 2, 8, 8)
    model.train()
    model.encoder.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    found = count_operations(model, loader(batch), STEPS)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    with torch.inference_mode():
        assert count_operations(torch.compile(model), loader(batch), STEPS) == found  # type: ignore[arg-type]


@pytest.mark.parametrize("neuron", [LIF, bursting(1.7)])
def test_networks_of_the_library(neuron: NeuronFactory) -> None:
    """With normalisation, which is folded; images may be flattened for an mlp."""
    torch.manual_seed(0)
    model = resnet19(neuron=neuron)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.fill_(0.1)
    found = count_operations(model, loader(torch.rand(1, 3, 8, 8)), 2)
    assert len(found.layers) == 19 + 2 + 1  # convolutions of two shortcuts, and the normalisation of another
    flat = mlp([64, 12, 3], neuron=neuron)
    batch = torch.rand(2, 1, 8, 8)
    found = count_operations(flat, loader(batch), 2)
    assert found == count_operations(flat, loader(batch.flatten(1)), 2)
    assert [layer.ann for layer in found.layers] == [64 * 12, 12 * 3]


# Results

OPERATIONS = Operations(
    (LayerOperations("a", (0.0, 0.0), (1000.0, 0.0), 1000.0), LayerOperations("b", (30.0, 2040.5), (0.0, 0.0), 5000.0)),
    (NeuronOperations("n", 10, (3.0, 5.0), (1.0, 2.0), pairs=True), NeuronOperations("m", 4, (0.0, 1.0), (0.0, 0.0))),
    samples=8,
)


def test_totals_by_hand() -> None:
    assert OPERATIONS.steps == 2
    assert OPERATIONS.accumulates == (30, 2040.5)
    assert OPERATIONS.multiply_accumulates == (1000, 0)
    assert OPERATIONS.spikes == (4, 8)
    assert OPERATIONS.updates == 24
    assert OPERATIONS.ann == 6000
    assert [layer.firing_rate for layer in OPERATIONS.neurons] == [(0.3, 0.5), (0.0, 0.25)]


def test_shown_and_saved(tmp_path: Path) -> None:
    assert str(OPERATIONS) == (
        "2,070 accumulates and 1,000 multiply-accumulates for an image over 2 steps; "
        "the ANN 6,000 multiply-accumulates (n = 8)"
    )
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(OPERATIONS)
    text = console.export_text()
    assert "Operations for an image, over all 2 steps (n = 8)" in text
    rows = [[cell.strip() for cell in line.strip("│ \n").split("│")] for line in text.splitlines()]
    assert ["b", "2,070", "0", "5,000"] in rows
    assert ["all", "2,070", "1,000", "6,000"] in rows
    assert ["n", "10", "8", "3", "0.400"] in rows
    OPERATIONS.save(tmp_path / "operations.json")
    saved = json.loads((tmp_path / "operations.json").read_text())
    assert saved["layers"][1]["accumulates"] == [30.0, 2040.5]
    assert saved["neurons"][0]["firing_rate"] == [0.3, 0.5]
    assert (saved["spikes"], saved["updates"], saved["ann"], saved["steps"]) == ([4, 8], 24, 6000, 2)
