"""One step of a network over time: the graph that it was made from, and copies of its neurons."""

import torch
from torch import fx, nn

from ranvier.conversion import decouple
from ranvier.conversion.one_step import one_step
from ranvier.conversion.spiking import GraphSNN, spiking
from ranvier.conversion.vocabulary import Rectifier
from ranvier.models import mlp
from ranvier.nn import LIFB, LIFPair

from .dyadic import Residual, exact, images, twins


def over_time(step: fx.GraphModule, neurons: dict[str, nn.Module], frame_dims: tuple[int, ...]) -> GraphSNN:
    return GraphSNN(spiking(step, neurons), frame_dims, None)


@torch.no_grad()
def test_a_converted_network_made_again_from_its_step() -> None:
    x = images(5, 2, 6, 6)
    _, snn = twins(exact(Residual()), x)
    step, neurons = one_step(snn, x)
    assert list(neurons) == list(snn.neurons)
    assert torch.equal(over_time(step, neurons, snn.frame_dims)(x, 4), snn(x, 4))


@torch.no_grad()
def test_its_neurons_and_weights_are_copies() -> None:
    x = images(5, 2, 6, 6)
    _, snn = twins(exact(Residual()), x)
    before = snn(x, 4)
    step, neurons = one_step(snn, x)
    for tensor in (*step.state_dict().values(), *(t for one in neurons.values() for t in one.state_dict().values())):
        tensor.fill_(3.0)
    assert torch.equal(snn(x, 4), before)


@torch.no_grad()
def test_a_decoupled_network_and_the_shapes_of_its_pairs() -> None:
    """A pair has twice the channels of its current, which the layer behind it must be told."""
    burst = exact(mlp([4, 6, 5, 3], neuron=LIFB))
    x = images(7, 4)
    snn = decouple(burst, x)
    step, neurons = one_step(snn, x)
    pairs = {name for name, neuron in neurons.items() if isinstance(neuron, LIFPair)}
    assert pairs
    for node in step.graph.nodes:
        if node.target in pairs:
            assert isinstance(step.get_submodule(node.target), Rectifier)
            assert node.meta["sizes"][0] == 2 * node.args[0].meta["sizes"][0]
    assert torch.equal(over_time(step, neurons, snn.frame_dims)(x, 4), burst(x, 4))
