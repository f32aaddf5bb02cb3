"""The spiking graph: against the ANN's own forward run step by step, with a loop of neurons for its activations."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranvier import models
from ranvier.conversion import ConvertedSNN, GraphSNN
from ranvier.dynamics import ConvertedState
from ranvier.evaluation import accuracy_by_step, firing_rates
from ranvier.nn import ConvertedIF
from ranvier.provenance import cpp_compiler

from .dyadic import NETS, Constants, dyadic, exact, images, twins

STEPS, BATCH = 5, 3


every_net = pytest.mark.parametrize("name", NETS)


def build(name: str, *, signed: bool = False, biased: bool = False) -> tuple[nn.Module, ConvertedSNN, Tensor]:
    """An exact ANN, its spiking network, and images; `biased`: with biases that differ from step to step."""
    kind, shape = NETS[name]
    ann = exact(kind())
    x = images(BATCH, *shape)
    _, snn = twins(ann, x, steps=STEPS, signed=signed)
    if biased:
        for number, neuron in enumerate(snn.neurons.values()):
            neuron.bias = dyadic(STEPS, len(neuron.threshold), seed=50 + number)
    return ann, snn, x


class LoopOfNeurons:
    """Stands in for the activation of a `Net`: the k-th call of a step runs the k-th layer of neurons for that step."""

    def __init__(self, neurons: list[ConvertedIF]) -> None:
        self.neurons = neurons
        self.v: list[Tensor] = []
        self.count: list[Tensor] = []
        self.sent: list[list[Tensor]] = [[] for _ in neurons]
        self.step, self.layer = 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        neuron, k = self.neurons[self.layer], self.layer
        shape = (-1, *[1] * (x.ndim - 2))
        if self.step == 0:
            self.v.append(neuron.v_init.view(shape).expand_as(x))
            self.count.append(torch.zeros_like(x))
        row = neuron.bias[self.step if len(neuron.bias) > 1 else 0]
        h = self.v[k] + x - row.view(shape)
        s = (h >= neuron.threshold.view(shape)).float()
        if neuron.signed:
            s[(h < 0) & (self.count[k] > 0)] = -1.0
        self.count[k] = self.count[k] + s
        y = s * neuron.threshold.view(shape)
        self.v[k] = h - y
        self.sent[k].append(y)
        self.layer += 1
        return y


@torch.no_grad()
def step_by_step(ann: nn.Module, snn: ConvertedSNN, frames: list[Tensor]) -> tuple[Tensor, LoopOfNeurons]:
    """Logits `[T, B, K]` of the ANN's own forward with a loop of neurons for its activations."""
    loop = LoopOfNeurons(list(snn.neurons.values()))
    before = ann.act
    del ann.act
    ann.act = loop
    logits = []
    for loop.step, frame in enumerate(frames):
        loop.layer = 0
        logits.append(ann(frame))
    del ann.act
    ann.act = before
    return torch.stack(logits), loop


@every_net
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_forward_of_the_ann_step_by_step(name: str, signed: bool, biased: bool) -> None:
    ann, snn, x = build(name, signed=signed, biased=biased)
    expected, loop = step_by_step(ann, snn, [x] * STEPS)
    assert torch.equal(snn(x, STEPS), expected)
    assert all(0 < torch.stack(sent).count_nonzero() < torch.stack(sent).numel() for sent in loop.sent)
    if biased:  # currents alone hardly ask for a spike back
        assert any((torch.stack(sent) < 0).any() for sent in loop.sent) == signed
    assert expected.std(0).max() > 0, "spikes vary"


@every_net
def test_a_constant_image_equals_the_sequence_of_it(name: str) -> None:
    _, snn, x = build(name, biased=True)
    assert torch.equal(snn(x, steps=STEPS), snn(x.expand(STEPS, *x.shape)))
    assert torch.equal(snn(x, steps=STEPS), snn(x.expand(STEPS, *x.shape), steps=STEPS))


@every_net
def test_sequences_of_different_images(name: str) -> None:
    ann, snn, x = build(name)
    frames = torch.stack([x, x.flip(0), 0 * x, x, x])
    assert torch.equal(snn(frames), step_by_step(ann, snn, list(frames))[0])


@pytest.mark.parametrize(
    ("name", "once", "each_step"),
    [
        ("plain", ["enter"], ["conv", "head"]),
        ("joined", ["enter", "conv"], ["mix", "head"]),
        ("skip_from_input", ["enter"], ["narrow", "last"]),
    ],
)
def test_what_comes_before_the_neurons_runs_once(name: str, once: list[str], each_step: list[str]) -> None:
    _, snn, x = build(name)
    seen: dict[str, int] = {}
    for path in (*once, *each_step):
        layer = snn.network.get_submodule(path)
        layer.register_forward_hook(lambda _, args, __, path=path: seen.__setitem__(path, len(args[0])))
    snn(x, STEPS)
    assert seen == {**dict.fromkeys(once, BATCH), **dict.fromkeys(each_step, STEPS * BATCH)}
    snn(x.expand(STEPS, *x.shape))
    assert set(seen.values()) == {STEPS * BATCH}


@every_net
@pytest.mark.parametrize("signed", [False, True])
def test_streaming_equals_one_call(name: str, signed: bool) -> None:
    """T calls of one step, and two calls of several, bit for bit; with biases that depend on the step."""
    _, snn, x = build(name, signed=signed, biased=True)
    whole = snn(x, STEPS)
    state: tuple[ConvertedState, ...] | None = None
    for t in range(STEPS):
        logits, state = snn(x, 1, state=state, return_state=True)
        assert torch.equal(logits[0], whole[t]), t
    first, state = snn(x, 2, return_state=True)
    kept = [part.v.clone() for part in state]
    assert torch.equal(first, whole[:2])
    assert torch.equal(snn(x, STEPS - 2, state=state), whole[2:])
    assert all(torch.equal(part.v, v) for part, v in zip(state, kept, strict=True)), "the state is not modified"
    frames = x.expand(3, *x.shape)
    assert torch.equal(snn(frames, state=state), whole[2:])


def test_a_readout_that_forgets() -> None:
    """The answer after t steps is the leaky average of the logits of the plain network, however many steps follow."""
    _, snn, x = build("joined", biased=True)
    plain = snn(x, STEPS)
    snn.readout_decay = 0.5
    logits = snn(x, STEPS)
    for t in range(1, STEPS + 1):
        shares = 0.5 ** torch.arange(t - 1, -1, -1)
        expected = (shares.view(-1, 1, 1) * plain[:t]).sum(0) / shares.sum()
        torch.testing.assert_close(logits[:t].mean(0), expected)
        assert torch.equal(snn(x, t), logits[:t])
    state: tuple[Any, ...] | None = None
    for t in range(STEPS):
        step, state = snn(x, 1, state=state, return_state=True)
        assert torch.equal(step[0], logits[t]), t
    assert state is not None
    assert len(state) == len(snn.neurons) + 1
    with pytest.raises(ValueError, match="state holds"):
        snn(x, 1, state=snn(x, 1, return_state=True)[1][:-1])


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_decays_out_of_range(decay: float) -> None:
    _, snn, _ = build("plain")
    with pytest.raises(ValueError, match=r"readout_decay is .*, but must lie between 0 and 1"):
        GraphSNN(snn.network, (4,), readout_decay=decay)


def test_a_smaller_batch_gives_the_same_rows() -> None:
    _, snn, x = build("joined", biased=True)
    whole = snn(x, STEPS)
    assert torch.equal(snn(x[:2], STEPS), whole[:, :2])
    assert torch.equal(snn(x[2:], STEPS), whole[:, 2:])


def test_fewer_and_more_steps() -> None:
    _, snn, x = build("plain")
    assert torch.equal(snn(x, 2), snn(x, STEPS)[:2])
    assert torch.equal(snn(x, 2 * STEPS)[:STEPS], snn(x, STEPS))
    _, snn, x = build("plain", biased=True)
    assert torch.equal(snn(x, 2), snn(x, STEPS)[:2])
    with pytest.raises(ValueError, match=f"step {STEPS + 1} was asked for, but .* steps 1 to {STEPS}"):
        snn(x, STEPS + 1)


def test_it_is_a_network_of_its_own() -> None:
    """Neither layers nor constants are shared with the traced ANN; nothing trains; neurons are named as in the ANN."""
    ann = exact(Constants())
    x = images(BATCH, 2, 6, 6)
    graph, snn = twins(ann, x)
    before = graph(x)
    with torch.no_grad():
        for tensor in snn.state_dict().values():
            tensor.zero_()
    assert torch.equal(graph(x), before)
    assert not snn.training
    assert not any(parameter.requires_grad for parameter in snn.parameters())
    assert list(snn.neurons) == ["relu", "relu_1"]
    assert [len(neuron.threshold) for neuron in snn.neurons.values()] == [4, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.zeros(3, 6, 6), "steps": 2}, r"3 dimensions"),
        ({"images": torch.zeros(2, 2, 3, 2, 6, 6), "steps": 2}, r"6 dimensions"),
        ({"images": torch.zeros(3, 2, 6, 6), "steps": 0}, "steps is 0"),
        ({"images": torch.zeros(3, 2, 6, 6)}, "number of time steps is open"),
        ({"images": torch.zeros(4, 3, 2, 6, 6), "steps": 3}, "4 steps, but steps=3"),
        ({"images": torch.zeros(0, 3, 2, 6, 6)}, "T = 0 steps"),
    ],
)
def test_wrong_input(arguments: dict, message: str) -> None:
    _, snn, _ = build("plain")
    with pytest.raises(ValueError, match=message):
        snn(**arguments)


def test_wrong_state() -> None:
    _, snn, x = build("plain")
    _, state = snn(x, 1, return_state=True)
    with pytest.raises(ValueError, match="more neurons"):
        snn(x, 1, state=state[:1])
    with pytest.raises(ValueError, match="holds 3 neuron states"):
        snn(x, 1, state=(*state, state[0]), return_state=True)
    with pytest.raises(ValueError, match="batch size"):
        snn(x[:2], 1, state=state)


def test_evaluation() -> None:
    ann, snn, x = build("residual", biased=True)
    labels = torch.tensor([0, 1, 2])
    loader = [(x[:2], labels[:2]), (x[2:], labels[2:])]
    logits, loop = step_by_step(ann, snn, [x] * STEPS)
    sums = logits.cumsum(0)
    others = sums.masked_fill(F.one_hot(labels, 3).bool(), -torch.inf).amax(2)
    hits = sums.gather(2, labels.expand(STEPS, BATCH).unsqueeze(2)).squeeze(2) > others
    curve = accuracy_by_step(snn, loader, STEPS)
    assert curve.hits == tuple(hits.sum(1).tolist())
    activity = firing_rates(snn, loader, STEPS)
    assert len(activity.layers) == len(loop.sent) == 2
    for layer, sent in zip(activity.layers, loop.sent, strict=True):
        expected = [float((y != 0).float().mean()) for y in sent]
        assert layer.firing_rate == pytest.approx(expected, abs=1e-6)  # float32 counts and division
        assert layer.neurons == 4 * 6 * 6


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Leave no graphs behind for other tests."""
    yield
    torch.compiler.reset()


@pytest.mark.skipif(cpp_compiler() is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_as_one_graph() -> None:
    _, snn, x = build("joined", biased=True, signed=True)
    compiled = torch.compile(snn, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x, STEPS), snn(x, STEPS))  # exact in binary, so that fusing moves nothing


def limits(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "mlp":
        ann = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        return nn.Sequential(*ann, nn.Linear(32, 5)), torch.randn(50, 20)
    ann = models.resnet20(neuron=lambda channels: nn.ReLU())
    x = torch.rand(4, 3, 8, 8)
    ann.train()
    with torch.no_grad():
        ann(x, steps=1)  # statistics
    return ann.eval(), x


def with_maxima(ann: nn.Module, x: Tensor) -> tuple[nn.Module, ConvertedSNN]:
    """Twins in float64 whose thresholds are the largest activations on `x`, so that nothing is clipped."""
    graph, snn = twins(ann.double(), x)
    top: dict[str, Tensor] = {}
    for name in snn.neurons:
        graph.get_submodule(name).register_forward_hook(
            lambda _, __, a, name=name: top.__setitem__(name, a.transpose(0, 1).flatten(1).amax(1))
        )
    graph(x)
    for name, neuron in snn.neurons.items():
        neuron.threshold = top[name].clamp_min(1e-6)
        neuron.v_init = neuron.threshold / 2
    return graph, snn


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 4, 16, 64])
def test_one_hidden_layer_approaches_the_ann_within_the_bound(steps: int) -> None:
    """A current I <= theta, constant in time, from v = theta / 2: T steps send what rounding I to theta / T gives, so

    |mean y - relu(I)| <= theta / 2T,    |logits - logits of the ANN| <= sum_j |W_j| theta_j / 2T.
    """
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5)).double()
    x = torch.randn(200, 20).double()
    graph, snn = with_maxima(ann, x)
    error = (snn(x, steps).mean(0) - graph(x)).abs().amax(0)
    (neuron,) = snn.neurons.values()
    bound = ann[2].weight.abs() @ neuron.threshold / (2 * steps)
    assert (error <= bound * (1 + 1e-9)).all()  # float64 rounding
    assert (error > bound / 20).all(), "the bound is not trivial: all roundings rarely point one way"


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlp", "resnet20"])
def test_deep_networks_approach_the_ann(name: str) -> None:
    """Spikes reach deeper layers unevenly, which costs a few spikes whatever T: the error of the mean falls as 1/T."""
    ann, x = limits(name)
    graph, snn = with_maxima(ann, x.double())
    x = x.double()
    expected = graph(x)
    errors = [float((snn(x, t).mean(0) - expected).square().mean().sqrt() / expected.std()) for t in (4, 16, 64, 256)]
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-1] < 0.1, errors  # found: 0.003 and 0.04 of the spread of the logits
    assert errors[-1] < errors[0] / 4, errors
