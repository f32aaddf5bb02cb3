"""Both networks side by side: the numbers of each alone, in order; changes act at once, and memory is let go."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ranvier.conversion.walk import fire, walk
from ranvier.nn import ConvertedIF

from .architectures import build
from .dyadic import NETS, dyadic, exact, images, twins

STEPS = 5

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def mlp(depth: int = 3, width: int = 6) -> nn.Module:
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())]
    return exact(nn.Sequential(*layers, nn.Linear(width, 3)))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("steps", [1, STEPS])
def test_gives_what_each_network_gives(name: str, steps: int) -> None:
    kind, shape = NETS[name]
    ann, x = exact(kind()), images(3, *shape)
    graph, snn = twins(ann, x, steps=steps)
    logits_ann, logits_snn = walk(graph, snn, x, steps)
    assert torch.equal(logits_ann, ann(x))
    assert torch.equal(logits_snn, snn(x, steps))


@pytest.mark.parametrize("name", ["resnet18", "densenet", "shufflenet", "inception", "conv1d"])
def test_architectures(name: str) -> None:
    ann, x = build(name)
    graph, snn = twins(ann.double(), x.double())
    logits_ann, logits_snn = walk(graph, snn, x.double(), 2)
    # The same modules and functions on the same tensors: no tolerance.
    assert torch.equal(logits_ann, graph(x.double()))
    assert torch.equal(logits_snn, snn(x.double(), 2))


def test_visits_come_in_order_with_what_the_networks_compute() -> None:
    kind, shape = NETS["joined"]
    x = images(3, *shape)
    graph, snn = twins(exact(kind()), x, steps=STEPS)
    activations: dict[str, Tensor] = {}
    currents: dict[str, Tensor] = {}
    for name, neuron in snn.neurons.items():
        graph.get_submodule(name).register_forward_hook(lambda _, __, a, name=name: activations.__setitem__(name, a))
        neuron.register_forward_pre_hook(lambda _, args, name=name: currents.__setitem__(name, args[0]))
    graph(x)
    snn(x, STEPS)
    order = list(currents)
    expected = dict(currents)

    def visit(name: str, neuron: ConvertedIF, current: Tensor, activation: Tensor) -> Tensor:
        assert name == order.pop(0)
        assert neuron is snn.neurons[name]
        assert current.shape == (STEPS, *activation.shape)
        assert torch.equal(current, expected[name])
        assert torch.equal(activation, activations[name])
        return fire(name, neuron, current, activation)

    walk(graph, snn, x, STEPS, visit)
    assert order == []


def test_a_change_acts_on_what_comes_after_and_stays() -> None:
    x = images(4, 6)
    graph, snn = twins(mlp(), x, steps=STEPS)
    first, second, _ = snn.neurons
    unchanged = snn(x, STEPS)
    currents: list[dict[str, Tensor]] = []

    def visit(name: str, neuron: ConvertedIF, current: Tensor, activation: Tensor) -> Tensor:
        if name == first:
            currents.append({})
            neuron.bias = neuron.bias + dyadic(6, seed=3)
        currents[-1][name] = current
        return neuron(current)

    _, logits = walk(graph, snn, x, STEPS, visit)
    assert not torch.equal(logits, unchanged)
    assert torch.equal(logits, snn(x, STEPS)), "what was changed stays changed"
    walk(graph, snn, x, STEPS, visit)
    assert torch.equal(currents[0][first], currents[1][first]), "nothing before the change is affected"
    assert not torch.equal(currents[0][second], currents[1][second])


def test_what_a_visit_returns_is_what_the_next_layer_receives() -> None:
    x = images(4, 6)
    graph, snn = twins(mlp(), x, steps=STEPS)
    *_, last = snn.neurons
    sent = dyadic(STEPS, 4, 6, seed=5)
    _, logits = walk(graph, snn, x, STEPS, lambda name, neuron, current, a: sent if name == last else neuron(current))
    assert torch.equal(logits, graph.get_submodule("6")(sent))


@pytest.mark.parametrize("steps", [1, STEPS])
def test_layers_that_spikes_reach_are_visited_before_they_run(steps: int) -> None:
    """Not those before the first neuron, which see the image, even where one step makes them look alike."""
    kind, shape = NETS["joined"]
    x = images(3, *shape)
    graph, snn = twins(exact(kind()), x, steps=steps)
    outputs: dict[str, Tensor] = {}
    for name in ("mix", "head"):
        graph.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: outputs.__setitem__(name, y))
    graph(x)
    seen: list[str] = []

    def visit(name: str, layer: Any, received: Tensor, wanted: Tensor) -> None:
        seen.append(name)
        assert layer is snn.network.get_submodule(name)
        assert len(received) == steps * len(x)
        assert torch.equal(wanted, outputs[name])
        if name == "head":
            layer.weight.zero_()
            layer.bias.fill_(0.5)

    _, logits = walk(graph, snn, x, steps, visit_layer=visit)
    assert seen == ["mix", "head"]
    assert (logits == 0.5).all()


@pytest.fixture
def hide_what_there_is() -> Iterator[Callable[[], None]]:
    """Hides all objects that there are when it is called from the garbage collector, and so from `live_bytes`."""

    def hide() -> None:
        gc.collect()
        gc.freeze()

    yield hide
    gc.unfreeze()


def live_bytes() -> int:
    """Memory of all tensors that are not hidden, each storage once."""
    # Not subclasses: the compiler leaves fake tensors behind, which have no storage.
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def test_values_are_dropped_after_their_last_use(hide_what_there_is: Callable[[], None]) -> None:
    """In a chain, as much is held at the last neuron as at the second: nothing of the layers between."""
    width, batch = 64, 128
    ann = mlp(depth=6, width=width)
    x = images(batch, width)
    graph, snn = twins(ann, x, steps=STEPS)
    hide_what_there_is()
    held: list[int] = []

    def visit(name: str, neuron: ConvertedIF, current: Tensor, activation: Tensor) -> Tensor:
        held.append(live_bytes() // (4 * batch * width))
        return neuron(current)

    walk(graph, snn, x, STEPS, visit)
    # Currents of T frames (the first is one frame, seen at all steps), and in the ANN a current and the activation.
    assert held == [1 + 2] + [STEPS + 2] * 5


def test_a_shortcut_is_kept_until_it_joins(hide_what_there_is: Callable[[], None]) -> None:
    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
            self.head = nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            first = x = self.layers[0](x).relu()
            for layer in self.layers[1:4]:
                x = layer(x).relu()
            x = x + first
            for layer in self.layers[4:]:
                x = layer(x).relu()
            return self.head(x)

    x = images(128, 64)
    graph, snn = twins(exact(Far()), x, steps=STEPS)
    hide_what_there_is()
    held: list[int] = []

    def visit(name: str, neuron: ConvertedIF, current: Tensor, activation: Tensor) -> Tensor:
        held.append(live_bytes() // (4 * 128 * 64))
        return neuron(current)

    walk(graph, snn, x, STEPS, visit)
    one, shortcut = STEPS + 2, STEPS + 1
    assert held == [1 + 2, one + shortcut, one + shortcut, one + shortcut, one, one]
