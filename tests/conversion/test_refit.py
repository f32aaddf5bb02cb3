"""Fitted weights: nothing where nothing is amiss, the right answer where a systematic error has one."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, fx, nn

from ranvier.conversion import ConvertedSNN, refit
from ranvier.conversion.bias import ftbc
from ranvier.conversion.refit import Refit
from ranvier.conversion.walk import walk

from .dyadic import exact, images, twins

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
        return self.head(self.layer(self.enter(x).relu()).relu().flatten(1))


def between(layer: nn.Module, outputs: int) -> nn.Module:
    """A network around one convolution on 4 channels: the layer after the first activation."""
    enter = nn.Conv1d(2, 4, 1) if isinstance(layer, nn.Conv1d) else nn.Conv2d(2, 4, 1)
    return nn.Sequential(enter, nn.ReLU(), layer, nn.ReLU(), nn.Flatten(), nn.Linear(outputs, 3))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)),
        (6,),
        "2",
    ),
    "no bias": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)),
        (6,),
        "2",
    ),
    "last axis": (Tokens, (2, 4), "layer"),
    "conv2d": (lambda: between(nn.Conv2d(4, 5, 3), 5 * 4 * 3), (2, 6, 5), "2"),
    "padding": (lambda: between(nn.Conv2d(4, 5, (3, 2), padding=(2, 1), bias=False), 5 * 8 * 6), (2, 6, 5), "2"),
    "same": (lambda: between(nn.Conv2d(4, 5, (2, 4), padding="same"), 5 * 6 * 5), (2, 6, 5), "2"),
    "valid": (lambda: between(nn.Conv2d(4, 5, 2, padding="valid"), 5 * 5 * 4), (2, 6, 5), "2"),
    "stride": (lambda: between(nn.Conv2d(4, 5, 3, stride=(2, 1), padding=1), 5 * 3 * 5), (2, 6, 5), "2"),
    "dilation": (lambda: between(nn.Conv2d(4, 5, 2, dilation=(2, 3)), 5 * 4 * 2), (2, 6, 5), "2"),
    "conv1d": (lambda: between(nn.Conv1d(4, 5, 3, stride=2, padding=2, dilation=2), 5 * 5), (2, 9), "2"),
    "conv1d same": (lambda: between(nn.Conv1d(4, 5, 4, padding="same"), 5 * 9), (2, 9), "2"),
}
"""Network, shape of an image, and the name of the layer after the first activation."""

every_layer = pytest.mark.parametrize("name", LAYERS)


def build(name: str, scale: float = 1.0) -> tuple[fx.GraphModule, ConvertedSNN, Tensor]:
    """Twins in float64 whose first activations are multiples of theta / T, which neurons send exactly, times `scale`.

    At a current c x with threshold c theta and potential c theta / 2 neurons fire as at x with theta and theta / 2, and
    send c times as much.
    """
    kind, shape, _ = LAYERS[name]
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

    def see(path: str, layer: nn.Module, spikes: Tensor, target: Tensor) -> None:
        if path == name:
            found.append((spikes.unflatten(0, (STEPS, -1)).mean(0), target))

    walk(graph, snn, x, STEPS, visit_layer=see)
    return found[0]


@every_layer
def test_exact_inputs_change_nothing(name: str) -> None:
    graph, snn, x = build(name)
    layer = snn.network.get_submodule(LAYERS[name][2])
    before = layer.weight.clone()
    received, target = first_layer(graph, snn, x, LAYERS[name][2])
    assert torch.equal(layer(received), target), "inputs are exact"
    Refit(graph, snn, STEPS).update(x)
    assert (layer.weight - before).abs().max() < 1e-12  # float64 rounding of the products
    assert layer.bias is not None


@every_layer
def test_a_systematic_error_is_made_up_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that are too small by a quarter: weights grow by a third, exactly but for the ridge, here a tiny one."""
    monkeypatch.setattr(refit, "RIDGE", 1e-9)
    graph, snn, x = build(name, scale=0.75)
    path = LAYERS[name][2]
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
    x1 = torch.cat([received, torch.ones(64, 1)], 1)
    before = torch.cat([ann[4].weight, ann[4].bias.unsqueeze(1)], 1)
    squares = x1.T @ x1
    ridge = refit.RIDGE * squares.diagonal().mean() * torch.eye(9).double()
    expected = before + (torch.linalg.inv(squares + ridge) @ x1.T @ (target - x1 @ before.T)).T
    layer = snn.network.get_submodule("4")
    assert torch.allclose(torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1), expected, rtol=0, atol=1e-9)


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
        x1 = torch.cat([received, torch.ones(64, 1)], 1)
        before = torch.cat([ann.get_submodule(name).weight, ann.get_submodule(name).bias.unsqueeze(1)], 1)
        squares = x1.T @ x1
        ridge = refit.RIDGE * squares.diagonal().mean() * torch.eye(9).double()
        expected = before + (torch.linalg.inv(squares + ridge) @ x1.T @ (target - x1 @ before.T)).T
        layer = snn.network.get_submodule(name)
        # Biases are kept in float32, but were used in float64 on the way.
        assert torch.allclose(torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1), expected, rtol=0, atol=1e-5)


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

    def count(self: Refit, layer: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        found = rows(self, layer, x, target)
        sizes.append((len(found[0]), len(found[1])))
        return found

    monkeypatch.setattr(Refit, "_rows", count)
    graph, snn, x = build("stride", scale=0.75)
    received, target = first_layer(graph, snn, x, "2")
    Refit(graph, snn, STEPS).update(x)
    assert sizes[0] == (128 * 7, 128 * 7)  # of 128 * 15
    layer = snn.network.get_submodule("2")
    assert (layer(received) - target).abs().max() < 1e-4
