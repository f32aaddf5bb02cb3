"""Moving what spikes are worth into weights: the same numbers, bit for bit, from neurons that send only 0 and 1.

Weights, constants and strengths are multiples of powers of two, so that both graphs add without rounding.
"""

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from ranvier.conversion.recording import ConversionError
from ranvier.conversion.trace import trace
from ranvier.conversion.vocabulary import LAYERS, from_json, to_json
from ranvier.conversion.weighted_spikes import weigh_spikes

from .dyadic import dyadic, exact

CHANNELS, SIDE = 4, 6
BATCH = 5
FIRST = torch.tensor([2.0, 0.25, -1.5, 0.0])
SECOND = torch.tensor([1.0, 3.0, -0.5, 1.75])
STRENGTHS = {"act_a": FIRST, "act_b": SECOND}
"""Of two layers of neurons: above 1, 1 (a burst like any spike), below, 0, negative."""

Something = Callable[..., Tensor]


class Burst(nn.Module):
    """A burst neuron at one step: 0, 1 or its strength."""

    def __init__(self, strength: Tensor) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        fired, burst = Pair()(x).chunk(2, 1)
        return fired + (self.strength.view(-1, *[1] * (x.ndim - 2)) - 1) * burst


class Pair(nn.Module):
    """The two neurons that it is, at one step."""

    def forward(self, x: Tensor) -> Tensor:
        fired, burst = (x >= 0.25).float(), (x >= 0.5).float()
        assert 0.1 < fired.mean() < 0.9
        assert 0.05 < burst.mean() < fired.mean()
        return torch.cat((fired, burst), 1)


class Net(nn.Module):
    """Two layers of neurons on images `[B, 2, 6, 6]`, then something, then one of three ends."""

    def __init__(self, something: Something, end: nn.Module, *parts: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, CHANNELS, 3, padding=1)
        self.second = nn.Conv2d(2, CHANNELS, 3, padding=1)
        self.act_a, self.act_b = nn.ReLU(), nn.ReLU()
        self.something = something
        self.parts = nn.ModuleList(parts)
        self.end = end
        self.register_buffer("per_channel", dyadic(CHANNELS, 1, 1, seed=71))
        self.register_buffer("map", dyadic(1, CHANNELS, SIDE, SIDE, seed=72))
        self.register_buffer("places", dyadic(1, 1, SIDE, SIDE, seed=73))

    def forward(self, x: Tensor) -> Tensor:
        y = self.something(self, self.act_a(self.first(x)), self.act_b(self.second(x)))
        y = self.end(y)
        return y.sum((2, 3)) if y.ndim == 4 else y


def ends() -> dict[str, nn.Module]:
    """What comes after: nothing, a linear layer on flattened values, or a convolution."""
    return {
        "output": nn.Flatten(1),
        "linear": nn.Sequential(nn.Flatten(1), nn.LazyLinear(3)),
        "conv": nn.LazyConv2d(3, 3, padding=1),
    }


def images(count: int = BATCH) -> Tensor:
    return dyadic(count, 2, SIDE, SIDE, seed=100)


def built(something: Something, end: str, *parts: nn.Module) -> fx.GraphModule:
    """A traced network with exact weights."""
    net = Net(something, ends()[end], *copy.deepcopy(parts)).eval()
    net(images())  # lazy layers take their sizes
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eps = 0.0  # a scale of 1 / sqrt(1) or 1 / sqrt(4)
            module.running_var.copy_(4.0 ** torch.arange(module.num_features).remainder(2))
            module.running_mean.copy_(dyadic(module.num_features, seed=74) * module.affine)
    return trace(exact(net), images(), move_max_pool=False)


def has(graph: fx.GraphModule, name: str) -> bool:
    return any(path == name for path, _ in graph.named_modules())


def replaced(graph: fx.GraphModule, stand_ins: dict[str, nn.Module]) -> fx.GraphModule:
    """The graph with other modules in the place of its activations."""
    graph = copy.deepcopy(graph)
    for name, module in stand_ins.items():
        assert has(graph, name)
        graph.set_submodule(name, module)
    return graph


def run(graph: fx.GraphModule, stand_ins: dict[str, nn.Module], x: Tensor) -> Tensor:
    return replaced(graph, stand_ins)(x)


class Sizes(fx.Interpreter):
    """Every node knows the shape of a sample of what it computes."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op not in ("output", "get_attr"):
            assert n.meta["sizes"] == tuple(result.shape[1:]), n
        return result


def check(graph: fx.GraphModule, weighed: fx.GraphModule, strengths: dict[str, Tensor] = STRENGTHS) -> None:
    """Both graphs give the same for neurons that burst, on batches of any size."""
    strengths = {name: strength for name, strength in strengths.items() if has(graph, name)}
    pairs = dict.fromkeys(strengths, Pair())
    for x in (images(), images(2)):
        expected = run(graph, {name: Burst(strength) for name, strength in strengths.items()}, x)
        assert expected.std(0).max() > 0
        assert torch.equal(run(weighed, pairs, x), expected)
    Sizes(replaced(weighed, pairs)).run(images())
    assert to_json(from_json(json.loads(json.dumps(to_json(weighed))))) == to_json(weighed)
    assert not any(parameter.requires_grad for parameter in weighed.parameters())
    assert not weighed.training


def emissions(strengths: dict[str, Tensor] = STRENGTHS) -> dict[str, Sequence[Tensor | None]]:
    """What the spikes of pairs are worth."""
    return {name: (None, strength - 1) for name, strength in strengths.items()}


def copies(weighed: fx.GraphModule) -> int:
    """Layers of the end, and of the parts: of how many inputs each is a sum."""
    names = [name for name, module in weighed.named_modules() if isinstance(module, LAYERS)]
    return len([name for name in names if not name.startswith(("first", "second"))])


def summed_up(weighed: fx.GraphModule) -> bool:
    """Whether spikes are multiplied by what they are worth, rather than weights."""
    return any(node.op == "get_attr" and str(node.target).startswith("worth") for node in weighed.graph.nodes)


class Case(NamedTuple):
    """What comes after neurons, and how many layers there are then if a linear layer or a convolution follows.

    One for each summand, and just one where spikes have to be summed up first, since a layer can only tell apart what
    differs along its own axis; that many more where `parts` has layers.
    """

    something: Something
    linear: int = 2
    conv: int = 2
    parts: tuple[nn.Module, ...] = ()


NONE_FOLLOWS = 0
"""In the place of a count: no convolution can follow."""

CASES = {
    "as it is": Case(lambda net, a, b: a),
    "one and the other": Case(lambda net, a, b: a + b, 3, 3),
    "twice": Case(lambda net, a, b: a + a, 3, 3),
    "a difference": Case(lambda net, a, b: a - b, 4, 4),
    "a sum of sums": Case(lambda net, a, b: (a + b) + (b + a), 5, 5),
    "a factor": Case(lambda net, a, b: a * -0.5),
    "a quotient": Case(lambda net, a, b: a / 4),
    "a factor per channel": Case(lambda net, a, b: a * net.per_channel),
    "a factor per place": Case(lambda net, a, b: a * net.places, 2, 1),
    "a factor per value": Case(lambda net, a, b: net.map * a, 2, 1),
    "a factor that repeats": Case(lambda net, a, b: a.sum(1, keepdim=True) * net.per_channel, 1, 1),
    "a number": Case(lambda net, a, b: a + 0.5, 1, 1),
    "a number minus": Case(lambda net, a, b: 1 - a, 1, 1),
    "a constant": Case(lambda net, a, b: a + net.map, 1, 1),
    "a current": Case(lambda net, a, b: a + net.parts[0](b), 4, 4, (nn.Conv2d(4, 4, 1),)),
    "broadcast": Case(lambda net, a, b: a + b[:, 1:2], 1, 1),
    "average pooling": Case(lambda net, a, b: F.avg_pool2d(a, 2)),
    "overlapping pooling": Case(lambda net, a, b: F.avg_pool2d(a, 4, 2, 1)),
    "adaptive pooling": Case(lambda net, a, b: F.adaptive_avg_pool2d(a, 3)),
    "pooled sums": Case(lambda net, a, b: F.avg_pool2d(a + b, 2), 3, 3),
    "pooling of unlike places": Case(lambda net, a, b: F.avg_pool2d(a * net.places, 2), 1, 1),
    "pooling along one axis": Case(lambda net, a, b: F.avg_pool1d(a.flatten(2), 4).unflatten(2, (3, 3))),
    "nearest": Case(lambda net, a, b: F.interpolate(a, scale_factor=2)),
    "bilinear": Case(lambda net, a, b: F.interpolate(a, scale_factor=2, mode="bilinear")),
    "sum over places": Case(lambda net, a, b: a.sum((2, 3)), 2, NONE_FOLLOWS),
    "sum over places, kept": Case(lambda net, a, b: a.sum((-1, 2), keepdim=True)),
    "mean over channels": Case(lambda net, a, b: a.mean(1), 1, NONE_FOLLOWS),
    "mean over channels, kept": Case(lambda net, a, b: a.mean(1, keepdim=True), 1, 1),
    "joined": Case(lambda net, a, b: torch.cat([a, b], 1)),
    "joined with itself": Case(lambda net, a, b: torch.cat([a, b, a], 1)),
    "joined with a current": Case(lambda net, a, b: torch.cat([net.parts[0](b), a, b], 1), 4, 4, (nn.Conv2d(4, 2, 1),)),
    "joined sums": Case(lambda net, a, b: torch.cat([a + b, b, a * 2], 1), 3, 3),
    "joined weighted": Case(lambda net, a, b: torch.cat([-a, b / 2], 1)),
    "joined again": Case(lambda net, a, b: torch.cat([torch.cat([a, b], 1), a], 1)),
    "joined along rows": Case(lambda net, a, b: torch.cat([a, b], 2), 2, 1),
    "joined along columns": Case(lambda net, a, b: torch.cat([a, a], -1)),
    "stacked": Case(lambda net, a, b: torch.stack([a, b], 2).flatten(1, 2)),
    "padded": Case(lambda net, a, b: F.pad(a, (1, 2, 0, 3))),
    "cropped": Case(lambda net, a, b: F.pad(a, (-1, 0, 0, -2))),
    "more channels": Case(lambda net, a, b: F.pad(a, (0, 0, 0, 0, 1, 2))),
    "reflected": Case(lambda net, a, b: F.pad(a, (1, 1, 2, 0), mode="reflect")),
    "padded places": Case(lambda net, a, b: F.pad(a * net.places, (1, 2)), 2, 1),
    "padded with ones": Case(lambda net, a, b: F.pad(a, (1, 2), value=1.0), 1, 1),
    "permuted": Case(lambda net, a, b: a.permute(0, 2, 3, 1), 2, 1),
    "transposed": Case(lambda net, a, b: a.mT),
    "shuffled": Case(lambda net, a, b: F.channel_shuffle(a, 2)),
    "pixels to channels": Case(lambda net, a, b: F.pixel_unshuffle(a, 2)),
    "channels to pixels": Case(lambda net, a, b: F.pixel_shuffle(a, 2), 2, 1),
    "other channels": Case(lambda net, a, b: a[:, 1::2]),
    "other places": Case(lambda net, a, b: a[:, :, 1:, ::2]),
    "one channel": Case(lambda net, a, b: a[:, 2], 2, NONE_FOLLOWS),
    "halves": Case(lambda net, a, b: a.chunk(2, 1)[0] + b.chunk(2, 1)[1], 3, 3),
    "reshaped": Case(lambda net, a, b: a.reshape(len(a), 2, 8, 9), 2, 1),
    "normalised": Case(lambda net, a, b: net.parts[0](a), 1, 1, (nn.BatchNorm2d(4),)),
    "scaled": Case(lambda net, a, b: net.parts[0](a), 2, 2, (nn.BatchNorm2d(4, affine=False),)),
    "for two": Case(
        lambda net, a, b: net.parts[0](a) + net.parts[1](a), 5, 5, (nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 3, padding=1))
    ),
    "grouped": Case(lambda net, a, b: net.parts[0](a), 3, 3, (nn.Conv2d(4, 6, 3, groups=2),)),
    "depthwise": Case(lambda net, a, b: net.parts[0](a), 3, 3, (nn.Conv2d(4, 8, 3, groups=4),)),
    "strided": Case(
        lambda net, a, b: net.parts[0](a),
        3,
        3,
        (nn.Conv2d(4, 5, 3, stride=2, dilation=2, padding=2, padding_mode="circular"),),
    ),
    "along one axis": Case(
        lambda net, a, b: net.parts[0](a.flatten(2)).unflatten(2, (3, 6)), 3, 3, (nn.Conv1d(4, 2, 2, 2, groups=2),)
    ),
    "on the last axis": Case(lambda net, a, b: net.parts[0](a.permute(0, 2, 3, 1)), 3, 3, (nn.Linear(4, 5),)),
    "on another axis": Case(lambda net, a, b: net.parts[0](a), 2, 2, (nn.Linear(6, 5),)),
    "normalised after the sum": Case(
        lambda net, a, b: net.parts[1](net.parts[0](a)), 3, 3, (nn.Conv2d(4, 3, 1, bias=False), nn.BatchNorm2d(3))
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers_straight_to_the_output(name: str) -> None:
    graph = built(CASES[name].something, "output", *CASES[name].parts)
    before = to_json(graph), copy.deepcopy(graph.state_dict())
    check(graph, weigh_spikes(graph, emissions()))
    assert to_json(graph) == before[0]
    assert all(torch.equal(tensor, before[1][key]) for key, tensor in graph.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers_through_a_linear_layer(name: str) -> None:
    case = CASES[name]
    graph = built(case.something, "linear", *case.parts)
    weighed = weigh_spikes(graph, emissions())
    check(graph, weighed)
    assert copies(weighed) == case.linear
    assert summed_up(weighed) == (case.linear == 1 or name == "on another axis")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.conv is not NONE_FOLLOWS])
def test_the_same_numbers_through_a_convolution(name: str) -> None:
    case = CASES[name]
    graph = built(case.something, "conv", *case.parts)
    weighed = weigh_spikes(graph, emissions())
    check(graph, weighed)
    assert copies(weighed) == case.conv
    assert summed_up(weighed) == (case.conv == 1 or name == "on another axis")


def test_weights_by_hand() -> None:
    """`W diag(strength - 1)`: each column of a linear layer, each input channel of a convolution, times its own."""
    graph = built(lambda net, a, b: a.sum((2, 3)), "linear")
    weighed = weigh_spikes(graph, emissions())
    plain, extra = weighed.get_submodule("end.1"), weighed.get_submodule("end.1_1")
    assert torch.equal(plain.weight, graph.get_submodule("end.1").weight)
    assert torch.equal(extra.weight, plain.weight * (FIRST - 1))
    assert extra.bias is None
    assert torch.equal(plain.bias, graph.get_submodule("end.1").bias)

    graph = built(lambda net, a, b: net.parts[0](a), "output", nn.Conv2d(4, 6, 3, groups=2))
    weighed = weigh_spikes(graph, emissions())
    extra = weighed.get_submodule("parts.0_1")
    expected = graph.get_submodule("parts.0").weight.clone()
    for output in range(6):
        for place in range(2):  # outputs 0, 1, 2 see channels 0 and 1, outputs 3, 4, 5 channels 2 and 3
            expected[output, place] *= FIRST[2 * (output // 3) + place] - 1
    assert torch.equal(extra.weight, expected)


def test_no_weights_for_what_does_not_burst() -> None:
    graph = built(lambda net, a, b: torch.cat([b.sum((2, 3)), a.sum((2, 3))], 1), "linear")
    weighed = weigh_spikes(graph, {"act_a": (None, FIRST - 1)})
    plain, extra = weighed.get_submodule("end.1"), weighed.get_submodule("end.1_1")
    assert torch.equal(extra.weight[:, CHANNELS:], plain.weight[:, CHANNELS:] * (FIRST - 1))
    assert not extra.weight[:, :CHANNELS].any()


def test_other_neurons_stay() -> None:
    """Without an entry a spike is worth 1, with one entry that much, and the layer after it is not copied."""
    graph = built(lambda net, a, b: torch.cat([a, b], 1), "conv")
    fired = nn.Sequential(Pair(), nn.Unflatten(1, (2, CHANNELS)))

    class Fired(nn.Module):
        def __init__(self, worth: Tensor) -> None:
            super().__init__()
            self.worth = worth

        def forward(self, x: Tensor) -> Tensor:
            return fired(x)[:, 0] * self.worth.view(-1, 1, 1)

    thresholds = torch.tensor([0.5, 2.0, 0.25, 1.0])
    one = torch.ones(CHANNELS)
    weighed = weigh_spikes(graph, {"act_a": (thresholds,)})
    assert copies(weighed) == 1
    expected = run(graph, {"act_a": Fired(thresholds), "act_b": Fired(one)}, images())
    assert torch.equal(run(weighed, {"act_a": Fired(one), "act_b": Fired(one)}, images()), expected)

    weighed = weigh_spikes(graph, {"act_b": (None, SECOND - 1)})
    assert copies(weighed) == 2
    expected = run(graph, {"act_a": Fired(one), "act_b": Burst(SECOND)}, images())
    assert torch.equal(run(weighed, {"act_a": Fired(one), "act_b": Pair()}, images()), expected)

    weighed = weigh_spikes(graph, {})
    assert to_json(weighed) == to_json(graph)


@pytest.mark.parametrize(
    "something",
    [lambda net, a, b: F.relu(net.parts[0](a)), lambda net, a, b: F.relu(net.parts[0](a) - 0.5 + b)],
    ids=["current", "current and spikes"],
)
def test_neurons_after_neurons(something: Something) -> None:
    graph = built(something, "conv", nn.Conv2d(4, 4, 1))
    strengths = {**STRENGTHS, "relu": FIRST}
    weighed = weigh_spikes(graph, emissions(strengths))
    check(graph, weighed, strengths)
    assert copies(weighed) == 4


def test_a_sum_that_many_use_is_computed_once() -> None:
    graph = built(lambda net, a, b: (a + 0.5) + F.relu(a + b) + F.relu(a), "linear")
    weighed = weigh_spikes(graph, emissions())
    sums = [node for node in weighed.graph.nodes if str(node.target).startswith("worth")]
    assert len(sums) == 3  # of a, and of both parts of a + b


@given(
    strengths=st.lists(st.integers(-16, 16), min_size=CHANNELS, max_size=CHANNELS),
    groups=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=25, derandomize=True)
def test_any_strength(strengths: list[int], groups: int, seed: int) -> None:
    conv = nn.Conv2d(CHANNELS, CHANNELS, 3, groups=groups, padding=1)
    strength = torch.tensor(strengths) / 4
    graph = built(lambda net, a, b: F.avg_pool2d(torch.cat([net.parts[0](a) + a, a], 1), 2), "linear", conv)
    weighed = weigh_spikes(graph, {"act_a": (None, strength - 1)})
    x = dyadic(BATCH, 2, SIDE, SIDE, seed=seed)
    assert torch.equal(run(weighed, {"act_a": Pair()}, x), run(graph, {"act_a": Burst(strength)}, x))


def pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True)


AT_LEAST_ONE = {"act_a": torch.tensor([1.0, 1.25, 3.0, 2.0]), "act_b": torch.tensor([1.5, 1.0, 1.0, 4.0])}


@pytest.mark.parametrize(
    ("something", "count"),
    [
        (lambda net, a, b: pool(a), 2),
        (lambda net, a, b: pool(pool(a)), 2),
        (lambda net, a, b: F.adaptive_max_pool2d(a, 2), 2),
        (lambda net, a, b: F.max_pool1d(a.flatten(2), 4)[..., None], 2),
        (lambda net, a, b: pool(a) + F.avg_pool2d(pool(b), 1), 3),
        (lambda net, a, b: pool(F.pad(a[:, 1:], (1, 0))), 2),
        (lambda net, a, b: pool(F.channel_shuffle(a, 2)), 2),
        (lambda net, a, b: pool(torch.cat([a, b], 1)), 2),
        (lambda net, a, b: pool(torch.cat([net.parts[0](b), a], 1)), 4),
        (lambda net, a, b: pool(net.parts[0](a)), 3),
    ],
)
def test_max_pooling_part_by_part(something: Something, count: int) -> None:
    """Where a burst is worth at least a spike, spikes grow with the potential, and so does each of their parts."""
    parts = [nn.Conv2d(4, 4, 1)] if "parts" in something.__code__.co_names else []
    graph = built(something, "conv", *parts)
    weighed = weigh_spikes(graph, emissions(AT_LEAST_ONE))
    check(graph, weighed, AT_LEAST_ONE)
    assert copies(weighed) == count
    assert not summed_up(weighed)


def test_why_max_pooling_is_refused() -> None:
    """Two places, one that spikes and one that bursts at strength 0.5: the maximum is 1, that of the parts 1 and 1."""
    fired, burst = torch.tensor([[[1.0, 1.0]], [[0.0, 1.0]]])
    strength = 0.5
    assert F.max_pool1d(fired + (strength - 1) * burst, 2).item() == 1
    assert (F.max_pool1d(fired, 2) + (strength - 1) * F.max_pool1d(burst, 2)).item() == 0.5


@pytest.mark.parametrize(
    ("something", "strength", "why"),
    [
        (lambda net, a, b: pool(a), 0.75, "of bursts of strength 0.75, less than a spike's 1"),
        (lambda net, a, b: pool(a), -1.5, "of bursts of strength -1.5, less"),
        (lambda net, a, b: pool(torch.cat([b, a], 1)), 0.5, "strength 0.5"),
        (lambda net, a, b: pool(F.pad(a, (1, 1))), 0.5, "strength 0.5"),
        (lambda net, a, b: pool(a + b), 2.0, "what bursts were combined to"),
        (lambda net, a, b: pool(a + a), 2.0, "what bursts were combined to"),
        (lambda net, a, b: pool(-a), 2.0, "what bursts were combined to"),
        (lambda net, a, b: pool(a * net.places), 2.0, "what bursts were combined to"),
        (lambda net, a, b: pool(F.avg_pool2d(a, 2)), 2.0, "what bursts were combined to"),
        (lambda net, a, b: pool(torch.cat([a, -b], 1)), 2.0, "what bursts were combined to"),
        (lambda net, a, b: pool(F.pixel_shuffle(a, 2)), 2.0, "over bursts of different strengths"),
        (lambda net, a, b: pool(torch.cat([a, b], 2)), 2.0, "over bursts of different strengths"),
        (lambda net, a, b: F.max_pool1d(a.flatten(1)[:, None], 2), 2.0, "over bursts of different strengths"),
    ],
)
def test_max_pooling_that_does_not_commute_is_refused(something: Something, strength: float, why: str) -> None:
    graph = built(something, "linear")
    given = {"act_a": torch.tensor([1.0, strength, 3.0, 1.5]), "act_b": torch.ones(4)}
    message = rf"test_weighted_spikes.py:.*pool.d takes the maximum .*{why}.* does not commute .*Use average pooling"
    with pytest.raises(ConversionError, match=message):
        weigh_spikes(graph, {name: emission for name, emission in emissions(given).items() if has(graph, name)})


@pytest.mark.parametrize(
    "something",
    [
        lambda net, a, b: pool(-a),
        lambda net, a, b: pool(a + b),
        lambda net, a, b: pool(F.avg_pool2d(a, 2)),
        lambda net, a, b: F.max_pool1d((a * net.places).flatten(1)[:, None], 2),
    ],
)
def test_max_pooling_without_bursts_stays(something: Something) -> None:
    """Whatever neurons without bursts send is one part, and may be pooled as it is."""
    graph = built(something, "linear")
    weighed = weigh_spikes(graph, {})
    assert torch.equal(weighed(images()), graph(images()))


def test_attributes_of_nodes() -> None:
    """What is added to the graph stands where the value it comes from stood."""
    graph = built(lambda net, a, b: a + 0.5, "linear")
    weighed = weigh_spikes(graph, emissions())
    (product,) = (node for node in weighed.graph.nodes if node.name.startswith("mul"))
    assert product.meta["place"].path == "act_a"
