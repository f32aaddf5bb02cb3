"""Corrections against a plain re-implementation on dense networks, and what they promise."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ranvier.conversion import ConvertedSNN, Settings, convert
from ranvier.conversion.bias import VARIANTS, Variant, ftbc, light, potential
from ranvier.conversion.walk import walk
from ranvier.data import load_digits
from ranvier.nn import QCFS, ConvertedIF

from .dyadic import dyadic, exact, images, twins

STEPS, BATCH = 4, 32


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def mlp(*sizes: int, seed: int = 0) -> nn.Sequential:
    pairs = list(itertools.pairwise(sizes))
    layers = [part for pair in pairs[:-1] for part in (nn.Linear(*pair), nn.ReLU())]
    return exact(nn.Sequential(*layers, nn.Linear(*pairs[-1])), seed)


def small(seed: int = 0, *, signed: bool = False) -> tuple[nn.Sequential, fx.GraphModule, ConvertedSNN, list[Tensor]]:
    """Three hidden layers in float64, and batches. Thresholds lie above all activations."""
    ann = mlp(8, 12, 10, 8, 3, seed=seed).double()
    batches = [images(BATCH, 8, seed=200 + number).double() for number in range(5)]
    graph, snn = twins(ann, torch.cat(batches), steps=STEPS, signed=signed)
    return ann, graph, snn, batches


class Dense:
    """A dense spiking network and its correction, written without any part of the library."""

    def __init__(self, ann: nn.Sequential, snn: ConvertedSNN, *, signed: bool = False) -> None:
        self.layers = [part for part in ann if isinstance(part, nn.Linear)]
        self.thresholds = [neuron.threshold.double() for neuron in snn.neurons.values()]
        self.starts = [neuron.v_init.double() for neuron in snn.neurons.values()]
        self.biases = [torch.zeros(STEPS, len(theta)).double() for theta in self.thresholds]
        self.signed = signed

    def fire(self, u: Tensor, theta: Tensor, count: Tensor) -> Tensor:
        spikes = (u >= theta).double()
        return spikes - ((u < 0) & (count > 0)).double() if self.signed else spikes

    def run(self, layer: int, currents: list[Tensor]) -> list[Tensor]:
        theta, v, count, sent = self.thresholds[layer], self.starts[layer], torch.zeros(()), []
        for t, current in enumerate(currents):
            u = v + current - self.biases[layer][t]
            s = self.fire(u, theta, count)
            v, count = u - theta * s, count + s
            sent.append(theta * s)
        return sent

    def currents(self, x: Tensor, layer: int) -> list[Tensor]:
        """What reaches a layer, through what is corrected by now."""
        sequence = [x] * STEPS
        for k in range(layer):
            sequence = self.run(k, [self.layers[k](y) for y in sequence])
        return [self.layers[layer](y) for y in sequence]

    def activations(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.layers[:-1]:
            x = layer(x).relu()
            found.append(x)
        return found

    def ftbc(self, x: Tensor, step_size: float, variant: Variant) -> None:
        for k, a in enumerate(self.activations(x)):
            theta, v, count = self.thresholds[k], self.starts[k], torch.zeros(())
            for t, current in enumerate(self.currents(x, k)):
                u = v + current - (0 if variant == "V3" else self.biases[k][t])
                s = self.fire(u, theta, count)
                change = step_size * (theta * s - a).mean(0)
                if variant == "V1":
                    u = u - change
                elif variant == "V3":
                    u = u - (theta * s - a)
                if variant != "V2":
                    s = self.fire(u, theta, count)
                v, count = u - theta * s, count + s
                self.biases[k][t] += change


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ftbc_equals_a_plain_implementation(variant: Variant, signed: bool) -> None:
    """Exactly: with power-of-two batches and step size all sums are exact, but for float32 in which biases are kept."""
    ann, graph, snn, batches = small(signed=signed)
    plain = Dense(ann, snn, signed=signed)
    for number, batch in enumerate(batches):
        ftbc(graph, snn, batch, STEPS, step_size=0.5, variant=variant)
        plain.ftbc(batch, 0.5, variant)
        for neuron, expected in zip(snn.neurons.values(), plain.biases, strict=True):
            assert neuron.bias.shape == expected.shape
            assert (neuron.bias - expected).abs().max() < 1e-6, number
        assert all(bias.any(1).all() for bias in plain.biases), "every layer and step has biases"
    expected = torch.stack(plain.currents(batches[0], 3))
    assert torch.allclose(snn(batches[0], STEPS), expected, rtol=0, atol=1e-5)  # float32 biases, no spike moved
    if signed:
        sent = [torch.stack(plain.run(k, plain.currents(batches[0], k))) for k in range(3)]
        assert any((y < 0).any() for y in sent)


def test_variants_differ() -> None:
    found = []
    for variant in VARIANTS:
        _, graph, snn, batches = small()
        for batch in batches[:2]:
            ftbc(graph, snn, batch, STEPS, step_size=0.5, variant=variant)
        found.append(torch.cat([neuron.bias.flatten() for neuron in snn.neurons.values()]))
    for one, other in itertools.combinations(found, 2):
        assert (one - other).abs().max() > 0.01


def test_unknown_variant() -> None:
    _, graph, snn, batches = small()
    with pytest.raises(ValueError, match="'V4'.*'V1', 'V2', 'V3'"):
        ftbc(graph, snn, batches[0], STEPS, variant="V4")  # type: ignore[arg-type]


def convnet() -> nn.Module:
    return exact(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 3, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12, 3),
        )
    )


def mean_errors(graph: fx.GraphModule, snn: ConvertedSNN, x: Tensor, steps: int) -> list[Tensor]:
    """Of each layer, `[T, C]`: mean over samples and positions of what is sent less the activation."""
    found = []

    def visit(name: str, neuron: ConvertedIF, current: Tensor, activation: Tensor) -> Tensor:
        sent: Tensor = neuron(current)
        found.append((sent - activation).transpose(1, 2).flatten(2).mean(2))
        return sent

    walk(graph, snn, x, steps, visit)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_round_of_a_convolution_is_the_mean_over_samples_and_positions(variant: Variant) -> None:
    """At the first step no variant has anything to go on from: b = step size times the error."""
    x = images(16, 1, 5, 5)
    graph, snn = twins(convnet(), x)
    error = mean_errors(graph, snn, x, 1)[0]
    ftbc(graph, snn, x, STEPS, step_size=0.25, variant=variant)
    first, second = snn.neurons.values()
    assert first.bias.shape == (STEPS, 4)
    assert second.bias.shape == (STEPS, 3)
    assert torch.allclose(first.bias[0], 0.25 * error[0], rtol=0, atol=1e-6)  # float32 means of 400 values
    assert error.abs().max() > 0.1


def test_a_bfloat16_network_stays_one() -> None:
    x = torch.rand(16, 8).bfloat16()
    ann = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16()
    for variant in VARIANTS:
        graph, snn = twins(ann, x)
        ftbc(graph, snn, x, STEPS, variant=variant)
        assert snn(x, STEPS).dtype == torch.bfloat16
        assert all(neuron.bias.dtype == torch.float32 for neuron in snn.neurons.values())


def test_no_rounds_give_the_uncorrected_network() -> None:
    x, ann = torch.rand(100, 8), mlp(8, 12, 10, 3)
    none = convert(ann, x, steps=STEPS, bias="none")
    zero = convert(ann, x, steps=STEPS, bias="ftbc", settings=Settings(rounds=(0,)))
    assert torch.equal(none(x, STEPS), zero(x, STEPS))
    assert zero.report is not None
    assert [candidate.rounds for candidate in zero.report.candidates] == [0]


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network trained on digits for seconds, images to calibrate on, and others."""
    data = load_digits()
    x, y, rest = data.train.images.flatten(1) / 255, data.train.labels, data.test.images.flatten(1) / 255
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.Adam(ann.parameters(), 3e-3)
    with torch.enable_grad():
        for _ in range(15):
            for batch in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(ann(x[batch]), y[batch]).backward()
                optimizer.step()
    assert (ann(rest).argmax(1) == data.test.labels).float().mean() > 0.9
    return ann, x, rest


def corrected(
    digits: tuple[nn.Module, Tensor, Tensor], steps: int, rounds: int, variant: Variant = "V1"
) -> list[float]:
    """Relative mean error of each layer and step on unseen images, before and after rounds of FTBC."""
    ann, x, rest = digits
    graph, snn = twins(ann, x, steps=steps)
    order = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        ftbc(graph, snn, x[torch.randperm(len(x), generator=order)[:128]], steps, step_size=0.2, variant=variant)
    activations = [graph.get_submodule("0")(rest).relu()]
    activations.append(graph.get_submodule("2")(activations[0]).relu())
    errors = mean_errors(graph, snn, rest, steps)
    return [
        float(e / a.mean(0).sum()) for a, error in zip(activations, errors, strict=True) for e in error.abs().sum(1)
    ]


@pytest.mark.parametrize("variant", ["V1", "V2"])
def test_many_rounds_bring_the_mean_error_of_every_step_down(
    digits: tuple[nn.Module, Tensor, Tensor], variant: Variant
) -> None:
    """Thresholds are above all activations, so that every mean can be reached. What is left is the difference of means
    between 1197 images and 600 others, and the wandering with batches of 128."""
    before, after = corrected(digits, 3, 0), corrected(digits, 3, 150, variant)
    assert max(before) > 0.5
    assert max(after) < 0.1, after


@pytest.mark.parametrize("variant", ["V1", "V2"])
def test_biases_do_not_wind_up(variant: Variant) -> None:
    """Thresholds of half the mean activation: no bias can bring that about. It stops once the channel always fires."""
    ann, x, mean, graph, snn = out_of_reach()
    (neuron,) = snn.neurons.values()
    history = []
    for _ in range(3):
        for _ in range(100):
            ftbc(graph, snn, x, STEPS, step_size=0.5, variant=variant)
        history.append(neuron.bias.clone())
    assert (history[0][0] < -0.1 * mean).all(), "silence at the first step was corrected"
    assert (neuron(ann[0](x).expand(STEPS, -1, -1)) != 0).all(), "all fire at all steps"
    # 200 rounds with rounding errors of a float32 mean, 1e-7 each, do not add up to more.
    assert (history[2] - history[0]).abs().max() < 1e-4 * mean.min()
    plain = Dense(ann.double(), snn)
    for _ in range(100):
        plain.ftbc(x.double(), 0.5, variant)
    # What the bound keeps away: with the mean as target each round adds step size (mean - threshold) = mean / 4.
    assert (plain.biases[0].abs() > 20 * mean).all()


def test_rounds_of_v3_add_up() -> None:
    """It never sees what its biases do: on one batch every round adds the same."""
    _, x, _, graph, snn = out_of_reach()
    (neuron,) = snn.neurons.values()
    ftbc(graph, snn, x, STEPS, step_size=0.5, variant="V3")
    once = neuron.bias.clone()
    for _ in range(3):
        ftbc(graph, snn, x, STEPS, step_size=0.5, variant="V3")
    assert once.abs().max() > 0.1
    assert torch.allclose(neuron.bias, 4 * once, rtol=1e-5)  # float32 sums


def test_v3_stops_where_a_channel_always_fires() -> None:
    """From a full potential all fire at all steps, and send all that they can."""
    _, x, mean, graph, snn = out_of_reach()
    (neuron,) = snn.neurons.values()
    neuron.v_init.copy_(2 * mean)
    for _ in range(5):
        ftbc(graph, snn, x, STEPS, step_size=0.5, variant="V3")
    assert neuron.bias.abs().max() < 1e-5 * mean.min()  # float32 means; with the mean as target -1.25 of it


def out_of_reach() -> tuple[nn.Sequential, Tensor, Tensor, fx.GraphModule, ConvertedSNN]:
    """A layer with thresholds of half its mean activations, also returned, that is silent at the first step."""
    ann = exact(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    ann[0].bias.fill_(1.0)
    ann[0].weight.abs_()
    x = images(64, 6)
    mean = ann[0](x).mean(0)
    graph, snn = twins(ann, x)
    (neuron,) = snn.neurons.values()
    neuron.threshold.copy_(mean / 2)
    neuron.v_init.copy_(-mean)
    return ann, x, mean, graph, snn


def test_silent_channels_do_not_wind_up() -> None:
    """The other bound: an activation that is 0 everywhere asks for silence, and gets it in a few rounds."""
    ann = exact(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)))
    ann[0].bias.fill_(-6.0)
    x = images(64, 6)
    graph, snn = twins(ann, x)
    (neuron,) = snn.neurons.values()
    neuron.threshold.fill_(4.0)
    neuron.v_init.fill_(12.0)
    for _ in range(100):
        ftbc(graph, snn, x, STEPS, step_size=0.5)
    silent = neuron.bias.clone()
    assert not neuron(ann[0](x).expand(STEPS, -1, -1)).any()
    for _ in range(100):
        ftbc(graph, snn, x, STEPS, step_size=0.5)
    assert torch.equal(neuron.bias, silent)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("threshold", ["max", "qcfs"])
def test_one_calibration_serves_all_fewer_steps(variant: Variant, threshold: str) -> None:
    """Bit for bit: thresholds here are exact in binary, so that a layer gives the same at any number of steps."""
    activation: Callable[[], nn.Module] = nn.ReLU if threshold == "max" else lambda: QCFS(levels=4, ceiling_init=4.0)
    ann = nn.Sequential(nn.Linear(8, 12), activation(), nn.Linear(12, 8), activation(), nn.Linear(8, 3))
    for number, layer in enumerate(part for part in ann if isinstance(part, nn.Linear)):
        layer.weight.copy_(dyadic(*layer.weight.shape, seed=number))
        layer.bias.copy_(dyadic(*layer.bias.shape, seed=10 + number))
    x = images(64, 8)
    settings = Settings(rounds=(5,), batch_size=16, step_sizes=(0.5,), variant=variant, held_out=0.5)

    def biases(steps: int) -> list[Tensor]:
        snn = convert(ann, x, steps=steps, threshold=threshold, bias="ftbc", settings=settings)  # type: ignore[arg-type]
        return [neuron.bias for neuron in snn.neurons.values()]

    longest = biases(8)
    assert all(bias.any(1).all() for bias in longest)
    for steps in (1, 2, 5):
        for few, many in zip(biases(steps), longest, strict=True):
            assert torch.equal(few, many[:steps])


def test_one_calibration_serves_all_fewer_steps_with_percentiles() -> None:
    """Those thresholds are no round numbers: float64 keeps spikes where they are. Biases are kept in float32: 1e-6."""
    ann = mlp(8, 12, 8, 3).double()
    x = torch.rand(200, 8).double()
    settings = Settings(rounds=(4,), step_sizes=(0.4,), batch_size=40, percentile=99.0)
    found = {
        steps: convert(ann, x, steps=steps, threshold="percentile", bias="ftbc", settings=settings) for steps in (3, 8)
    }
    for few, many in zip(found[3].neurons.values(), found[8].neurons.values(), strict=True):
        assert (few.bias - many.bias[:3]).abs().max() < 1e-6
    assert torch.allclose(found[3](x, 3), found[8](x, 3), rtol=0, atol=1e-5)


def rising(x: Tensor) -> tuple[fx.GraphModule, ConvertedSNN]:
    """Currents all lie between 0 and the threshold, and potentials start at 0: every rate comes out too low."""
    ann = exact(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))
    for layer in (ann[0], ann[2]):
        layer.weight.abs_()
        layer.bias.abs_()
    graph, snn = twins(ann, x)
    for neuron in snn.neurons.values():
        neuron.v_init.zero_()
    return graph, snn


def test_light_takes_the_error_of_the_time_mean_away() -> None:
    """A potential that starts at 0 keeps on average half a threshold from being sent: an error of theta / 2T.

    Its mean, taken off the current at each step, is what a start at theta / 2 would give. What is left is the
    difference in how the rest is spread over [0, theta), far smaller.
    """
    x = images(512, 6)
    graph, snn = rising(x)
    before = [error.mean(0).abs().mean() for error in mean_errors(graph, snn, x, STEPS)]
    light(graph, snn, [x], STEPS)
    after = [error.mean(0).abs().mean() for error in mean_errors(graph, snn, x, STEPS)]
    assert all(neuron.bias.shape == (1, 8) for neuron in snn.neurons.values())
    theta = snn.neurons["1"].threshold.mean()
    assert before[0] == pytest.approx(float(theta / (2 * STEPS)), rel=0.2)
    assert after[0] < 0.2 * before[0]
    assert after[1] < 0.3 * before[1]


def test_light_is_the_mean_of_the_batches() -> None:
    x = images(96, 6)
    batches = [x[:32], x[32:64], x[64:]]
    graph, snn = rising(x)
    errors = [mean_errors(graph, snn, batch, STEPS)[0].mean(0) for batch in batches]
    light(graph, snn, batches, STEPS)
    first, second = snn.neurons.values()
    assert torch.allclose(first.bias[0], torch.stack(errors).mean(0), rtol=0, atol=1e-6)  # float32
    # The second layer was measured with the first corrected: by the batches up to each.
    again, plain = rising(x)[1], []
    for number, batch in enumerate(batches, 1):
        again.neurons["1"].bias = torch.stack(errors[:number]).mean(0, keepdim=True)
        plain.append(mean_errors(graph, again, batch, STEPS)[1].mean(0))
    assert torch.allclose(second.bias[0], torch.stack(plain).mean(0), rtol=0, atol=1e-5)


def test_potential_is_the_mean_error_of_each_neuron() -> None:
    x = images(48, 1, 5, 5)
    batches = [x[:16], x[16:]]
    graph, snn = twins(convnet(), x)
    first, second = snn.neurons.values()
    start = first.v_init.clone().view(4, 1, 1)
    current, wanted = [], []
    for batch in batches:
        current = graph.get_submodule("0")(batch)
        sent = first(current.expand(STEPS, *current.shape))
        wanted.append(STEPS * (current.relu() - sent.mean(0)).mean(0))
    potential(graph, snn, batches, STEPS)
    assert first.v_init.shape == (4, 5, 5)
    assert second.v_init.shape == (3, 2, 2)
    assert torch.allclose(first.v_init - start, torch.stack(wanted).mean(0), rtol=0, atol=1e-5)  # float32
    assert (first.v_init - start).abs().max() > 0.1


def test_potential_takes_the_error_of_the_time_mean_away() -> None:
    """As for `light`, neuron by neuron; the potential is corrected as a whole, and not in T parts."""
    x = images(512, 6)
    graph, snn = rising(x)
    before = [error.mean(0).abs().mean() for error in mean_errors(graph, snn, x, STEPS)]
    potential(graph, snn, [x], STEPS)
    after = [error.mean(0).abs().mean() for error in mean_errors(graph, snn, x, STEPS)]
    assert after[0] < 0.2 * before[0]
    assert after[1] < 0.3 * before[1]
    assert all((neuron.bias == 0).all() for neuron in snn.neurons.values())
