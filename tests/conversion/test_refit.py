"""Fitted weights: nothing where nothing is amiss, the right answer where a systematic error has one."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ranvier.conversion import ConvertedSNN, refit
from ranvier.conversion.bias import ftbc
from ranvier.conversion.refit import Refit
from ranvier.conversion.walk import Destination, walk

from .dyadic import NETS, exact, images, twins

STEPS = 4

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Tokens(nn.Module):
    """A linear layer on the last axis of `[B, 3, 4]`, which is not that of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.layer, self.head = nn.Conv1d(2, 3, 1), nn.Linear(4, 3), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.enter(x).relu()).flatten(1))


class Around(nn.Module):
    """A network around one layer: the one after the first activation, all of whose outputs tell, negative ones too."""

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        super().__init__()
        if isinstance(layer, nn.Linear):
            self.enter: nn.Module = nn.Linear(6, layer.in_features)
        else:
            self.enter = nn.Conv1d(2, 4, 1) if isinstance(layer, nn.Conv1d) else nn.Conv2d(2, 4, 1)
        self.layer = layer
        self.head = nn.Linear(2 * outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.enter(x).relu())
        return self.head(torch.cat([y.relu(), y], 1).flatten(1))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: Around(nn.Linear(8, 5), 5), (6,)),
    "no bias": (lambda: Around(nn.Linear(8, 5, bias=False), 5), (6,)),
    "last axis": (Tokens, (2, 4)),
    "conv2d": (lambda: Around(nn.Conv2d(4, 5, 3), 5 * 4 * 3), (2, 6, 5)),
    "padding": (lambda: Around(nn.Conv2d(4, 5, (3, 2), padding=(2, 1), bias=False), 5 * 8 * 6), (2, 6, 5)),
    "same": (lambda: Around(nn.Conv2d(4, 5, (2, 4), padding="same"), 5 * 6 * 5), (2, 6, 5)),
    "valid": (lambda: Around(nn.Conv2d(4, 5, 2, padding="valid"), 5 * 5 * 4), (2, 6, 5)),
    "stride": (lambda: Around(nn.Conv2d(4, 5, 3, stride=(2, 1), padding=1), 5 * 3 * 5), (2, 6, 5)),
    "dilation": (lambda: Around(nn.Conv2d(4, 5, 2, dilation=(2, 3)), 5 * 4 * 2), (2, 6, 5)),
    "conv1d": (lambda: Around(nn.Conv1d(4, 5, 3, stride=2, padding=2, dilation=2), 5 * 5), (2, 9)),
    "conv1d same": (lambda: Around(nn.Conv1d(4, 5, 4, padding="same"), 5 * 9), (2, 9)),
}
"""Network, and shape of an image; `layer` is what is fitted."""

every_layer = pytest.mark.parametrize("name", LAYERS)


def build(name: str, scale: float = 1.0) -> tuple[fx.GraphModule, ConvertedSNN, Tensor]:
    """Twins in float64 whose first activations are multiples of theta / T, which neurons send exactly, times `scale`.

    At a current c x with threshold c theta and potential c theta / 2 neurons fire as at x with theta and theta / 2, and
    send c times as much.
    """
    kind, shape = LAYERS[name]
    ann = exact(kind())
    first = next(ann.children())
    first.weight.sign_()
    first.bias.round_()
    x = images(128, *shape).round()
    graph, snn = twins(ann.double(), x.double(), steps=STEPS)
    neuron = next(iter(snn.neurons.values()))
    neuron.threshold.fill_(4.0 * scale)
    neuron.v_init.fill_(2.0 * scale)
    same = next(part for part in snn.network.children() if isinstance(part, type(first)))
    same.weight *= scale
    same.bias *= scale
    return graph, snn, x.double()


def first_layer(graph: fx.GraphModule, snn: ConvertedSNN, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Mean input of the layer that is fitted, and its output in the ANN."""
    found: list[tuple[Tensor, Tensor]] = []

    def see(path: str, layer: nn.Module, spikes: Tensor, destination: Destination) -> None:
        if path == name:
            found.append((spikes.unflatten(0, (STEPS, -1)).mean(0), destination.output))

    walk(graph, snn, x, STEPS, visit_layer=see)
    return found[0]


def weights(layer: Any) -> Tensor:
    return torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1)


def regression(before: Tensor, received: Tensor, missed: Tensor) -> Tensor:
    """Weights after a linear regression of what is missed."""
    x = torch.cat([received, torch.ones(len(received), 1)], 1)
    squares = x.T @ x
    ridge = refit.RIDGE * squares.diagonal().mean() * torch.eye(len(squares)).double()
    return before + (torch.linalg.inv(squares + ridge) @ x.T @ missed).T


@every_layer
def test_exact_inputs_change_nothing(name: str) -> None:
    graph, snn, x = build(name)
    layer = snn.network.get_submodule("layer")
    before = layer.weight.clone()
    received, target = first_layer(graph, snn, x, "layer")
    assert torch.equal(layer(received), target), "inputs are exact"
    Refit(graph, snn, STEPS).update(x)
    assert (layer.weight - before).abs().max() < 1e-12  # float64 rounding of the products
    assert layer.bias is not None


@every_layer
def test_a_systematic_error_is_made_up_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that are too small by a quarter: weights grow by a third, exactly but for the ridge, here a tiny one."""
    monkeypatch.setattr(refit, "RIDGE", 1e-9)
    graph, snn, x = build(name, scale=0.75)
    path = "layer"
    layer, original = snn.network.get_submodule(path), graph.get_submodule(path)
    received, target = first_layer(graph, snn, x, path)
    missed = (layer(received) - target).abs().max()
    Refit(graph, snn, STEPS).update(x)
    assert missed > 0.5
    assert (layer(received) - target).abs().max() < 1e-5 * missed  # 1e-9 over the smallest directions of the inputs
    if name in ("linear", "no bias"):  # neighbouring patches of whole numbers may depend on each other
        assert torch.allclose(layer.weight, original.weight / 0.75, rtol=0, atol=1e-5)
        expected = torch.zeros(5).double() if original.bias is None else original.bias
        assert torch.allclose(layer.bias, expected, rtol=0, atol=1e-5)


def test_the_closed_form_over_two_batches() -> None:
    """D minimises |(W + D) x - z|^2 + ridge |D|^2: by another solver, with the ridge as rows of its own."""
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    batches = [torch.rand(40, 6).double(), torch.rand(24, 6).double()]
    graph, snn = twins(ann, torch.cat(batches), steps=STEPS)
    fit = Refit(graph, snn, STEPS)
    inputs, outputs = [], []
    for batch in batches:
        received, target = first_layer(graph, snn, batch, "2")
        inputs.append(torch.cat([received, torch.ones(len(batch), 1)], 1))
        outputs.append(target)
        fit.update(batch)
        x, z = torch.cat(inputs), torch.cat(outputs)
        ridge = refit.RIDGE * x.square().sum(0).mean()
        before = torch.cat([ann[2].weight, ann[2].bias.unsqueeze(1)], 1)
        rows = torch.cat([x, ridge.sqrt() * torch.eye(9).double()])
        wanted = torch.cat([z - x @ before.T, torch.zeros(9, 3)])
        expected = before + torch.linalg.lstsq(rows, wanted).solution.T
        layer = snn.network.get_submodule("2")
        assert (expected - before).abs().max() > 0.01
        assert torch.allclose(torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1), expected, rtol=0, atol=1e-9)


def test_later_layers_are_fitted_to_what_the_fitted_ones_before_send() -> None:
    """The second fit sees what is left after the first: fitting it to the old currents gives something else."""
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x = torch.rand(64, 6).double()
    graph, snn = twins(ann, x, steps=STEPS)
    Refit(graph, snn, STEPS).update(x)
    received, target = first_layer(graph, snn, x, "4")  # as it is now that the layer "2" is fitted
    expected = regression(weights(ann[4]), received, target - ann[4](received))
    assert torch.allclose(weights(snn.network.get_submodule("4")), expected, rtol=0, atol=1e-9)


def test_a_round_of_ftbc_on_the_same_pass() -> None:
    """Neurons are corrected for what the fitted layer gives them, and the next layer is fitted to what they send."""
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x = torch.rand(64, 6).double()
    graph, snn = twins(ann, x, steps=STEPS)
    _, only_biases = twins(ann, x, steps=STEPS)
    Refit(graph, snn, STEPS, step_size=0.5).update(x)
    ftbc(graph, only_biases, x, STEPS, step_size=0.5)
    (first, second), (first_alone, second_alone) = snn.neurons.values(), only_biases.neurons.values()
    assert torch.equal(first.bias, first_alone.bias)
    assert first.bias.abs().max() > 0.01
    assert not torch.equal(second.bias, second_alone.bias)
    for name in ("2", "4"):
        received, target = first_layer(graph, snn, x, name)  # with all biases and weights as they are now
        found = ann.get_submodule(name)(received)
        missed = target.relu() - found.relu() if name == "2" else target - found
        expected = regression(weights(ann.get_submodule(name)), received, missed)
        # Biases are kept in float32, but were used in float64 on the way.
        assert torch.allclose(weights(snn.network.get_submodule(name)), expected, rtol=0, atol=1e-5)


class Residual(nn.Module):
    """A sum of what two layers make of an image, or of one and its input, in front of an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.layer, self.other = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).relu()
        x = (self.layer(x) + x).relu()
        y = self.last(x)
        return self.head((y + self.other(x)).relu())


def test_what_is_added_and_rectified_next_counts() -> None:
    """An identity brings its own error; a layer before what is added to it is fitted alone, and that to the sum."""
    torch.manual_seed(0)
    ann = Residual().double()
    x = torch.rand(64, 6).double()
    graph, snn = twins(ann, x, steps=STEPS)
    Refit(graph, snn, STEPS).update(x)
    first, second, _ = snn.neurons.values()
    current: Any = snn.network.get_submodule("enter")(x).expand(STEPS, -1, -1)
    spikes = first(current).mean(0)
    activation = ann.enter(x).relu()
    missed = (ann.layer(activation) + activation).relu() - (ann.layer(spikes) + spikes).relu()
    fitted: Any = snn.network.get_submodule("layer")
    assert (weights(fitted) - weights(ann.layer)).abs().max() > 0.01
    assert torch.allclose(weights(fitted), regression(weights(ann.layer), spikes, missed), rtol=0, atol=1e-9)

    sent = first(current)
    later = second(fitted(sent) + sent).mean(0)
    activation = (ann.layer(activation) + activation).relu()
    last: Any = snn.network.get_submodule("last")
    alone = ann.last(activation) - ann.last(later)
    assert torch.allclose(weights(last), regression(weights(ann.last), later, alone), rtol=0, atol=1e-9)
    wanted = (ann.last(activation) + ann.other(activation)).relu()
    missed = wanted - (last(later) + ann.other(later)).relu()
    other: Any = snn.network.get_submodule("other")
    assert torch.allclose(weights(other), regression(weights(ann.other), later, missed), rtol=0, atol=1e-9)


def test_sweeps_descend() -> None:
    """From sweep to sweep a layer in front of an activation misses less, down to where inputs no longer tell."""
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x = torch.rand(256, 6).double()
    graph, snn = twins(ann, x, steps=STEPS)
    layer: Any = snn.network.get_submodule("2")
    found, slopes = [], []
    for _ in range(60):
        received, target = first_layer(graph, snn, x, "2")
        y = layer(received)
        # The convex function whose gradient is that of the rectified outputs: half a square where they are positive.
        found.append(float((y.relu().square() / 2 - target.relu() * y).sum()))
        slopes.append(float(((y.relu() - target.relu()).T @ received).abs().max()))
        Refit(graph, snn, STEPS).update(x)
    assert all(after <= before + 1e-9 for before, after in pairwise(found))
    assert found[0] - found[2] > 0.5 * (found[0] - found[-1]) > 0
    assert slopes[-1] < 0.05 * slopes[0]


@pytest.mark.parametrize("name", NETS)
def test_no_worse_on_what_it_was_fitted_to(name: str) -> None:
    kind, shape = NETS[name]
    x = images(200, *shape)
    graph, snn = twins(exact(kind()), x, steps=STEPS)
    logits = graph(x)
    before = (snn(x, STEPS).mean(0) - logits).square().sum()
    for _ in range(2):
        Refit(graph, snn, STEPS).update(x)
    assert (snn(x, STEPS).mean(0) - logits).square().sum() < before


def test_what_is_left_alone() -> None:
    """Grouped convolutions, layers before the first neuron (at one step, too), and everything in the ANN."""
    torch.manual_seed(0)
    ann = nn.Sequential(
        nn.Conv2d(2, 4, 1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 9, 3),
    )
    x = torch.rand(32, 2, 5, 5)
    for steps in (1, STEPS):
        graph, snn = twins(ann, x, steps=steps)
        of_ann = {key: tensor.clone() for key, tensor in graph.state_dict().items()}
        before = {key: tensor.clone() for key, tensor in snn.network.state_dict().items()}
        Refit(graph, snn, steps).update(x)
        changed = {key for key, tensor in snn.network.state_dict().items() if not torch.equal(tensor, before[key])}
        assert changed == {"4.weight", "4.bias", "7.weight", "7.bias"}
        assert all(torch.equal(tensor, of_ann[key]) for key, tensor in graph.state_dict().items())


def test_a_layer_whose_inputs_are_silent() -> None:
    """Nothing arrives, so that only the bias can be fitted, to the mean output; the sums are not singular."""
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.rand(64, 6)
    graph, snn = twins(ann, x)
    snn.neurons["1"].bias.fill_(100.0)
    Refit(graph, snn, STEPS).update(x)
    layer = snn.network.get_submodule("2")
    assert torch.equal(layer.weight, ann[2].weight)
    # The sums are N for the bias and 0 for the 8 weights, so the ridge is RIDGE N / 9.
    expected = ann[2].bias + (graph(x).mean(0) - ann[2].bias) / (1 + refit.RIDGE / 9)
    assert torch.allclose(layer.bias, expected, rtol=0, atol=1e-5)


def test_positions_are_thinned_out_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the positions finds the same weights, and never are more rows fitted than allowed."""
    monkeypatch.setattr(refit, "RIDGE", 1e-9)
    monkeypatch.setattr(refit, "MAX_ROWS", 128 * 7)
    sizes: list[tuple[int, int]] = []
    rows = Refit._rows

    def count(self: Refit, layer: Any, *values: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        found = rows(self, layer, *values)
        sizes.append((len(found[0]), len(found[1])))
        return found

    monkeypatch.setattr(Refit, "_rows", count)
    graph, snn, x = build("stride", scale=0.75)
    received, target = first_layer(graph, snn, x, "layer")
    Refit(graph, snn, STEPS).update(x)
    assert sizes[0] == (128 * 7, 128 * 7)  # of 128 * 15
    layer = snn.network.get_submodule("layer")
    assert (layer(received) - target).abs().max() < 1e-4
