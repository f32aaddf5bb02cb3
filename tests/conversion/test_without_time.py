from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ranvier import models
from ranvier.conversion.recording import ConversionError
from ranvier.conversion.without_time import without_time
from ranvier.nn import IF, LIFB, QCFS, BatchNorm, Neuron, Readout, TimeFolded
from ranvier.nn.structure import Activation, Chain, Concat, NeuronFactory, conv_norm


def relu(channels: int) -> nn.Module:
    return nn.ReLU()


def dense(neuron: NeuronFactory = relu) -> models.Network:
    """Branches side by side, and such among them: blocks, layers, and the input itself in both ways to write it."""
    inner = Concat(nn.Identity(), Chain(TimeFolded(nn.Conv2d(4, 2, 1)), Activation(neuron(2))))
    grown = Concat(Chain(), BatchNorm(4), Activation(neuron(4)), Chain(inner, TimeFolded(nn.AvgPool2d(3, 1, 1))))
    body = Chain(Activation(neuron(4)), grown, TimeFolded(nn.AdaptiveAvgPool2d(1)))
    return models.Network(conv_norm(3, 4), body, Readout(18, 5))


@pytest.mark.parametrize("neuron", [relu, QCFS])
@pytest.mark.parametrize("build", [models.resnet20, models.sew_resnet18, dense])
def test_equals_one_step(build: Callable[..., models.Network], neuron: Callable[[int], nn.Module]) -> None:
    torch.manual_seed(0)
    network = build(neuron=neuron).eval()
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(without_time(network)(images), network(images, steps=1)[0])


def test_layers_are_shared_and_named_alike() -> None:
    network = models.resnet20(neuron=QCFS)
    ann = without_time(network)
    assert ann.get_submodule("body.9.0.branch.0.0") is network.get_submodule(
        "body.layers.9.layers.0.branch.layers.0.0.0"
    )
    assert {id(parameter) for parameter in ann.parameters()} == {id(parameter) for parameter in network.parameters()}
    assert ann.training
    assert not without_time(network.eval()).training


def test_branches_are_shared_and_named_alike() -> None:
    network = dense()
    ann = without_time(network)
    for ours, theirs in (
        ("body.1.branches.1.norm", "body.layers.1.branches.1"),
        ("body.1.branches.3.0.branches.1.0", "body.layers.1.branches.3.layers.0.branches.1.layers.0.0"),
    ):
        assert ann.get_submodule(ours) is network.get_submodule(theirs)
    assert {id(parameter) for parameter in ann.parameters()} == {id(parameter) for parameter in network.parameters()}


def test_neurons_in_branches_are_noted_in_the_order_in_which_they_run() -> None:
    neurons: dict[str, Neuron] = {}
    network = dense(LIFB)
    without_time(network, neurons)
    assert list(neurons) == ["body.0", "body.1.branches.2", "body.1.branches.3.0.branches.1.1"]
    ran: list[nn.Module] = []

    def note(neuron: nn.Module, inputs: tuple[Tensor, ...], spikes: Tensor) -> None:
        ran.append(neuron)

    for neuron in neurons.values():
        neuron.register_forward_hook(note)
    network(torch.rand(2, 3, 8, 8), steps=1)
    assert ran == list(neurons.values())


def test_neurons_in_branches_are_refused() -> None:
    kinds = iter([nn.ReLU(), IF(), nn.ReLU()])  # the innermost is built first
    with pytest.raises(ConversionError, match=r"body.1.branches.2 \(IF\): the network spikes already"):
        without_time(dense(lambda channels: next(kinds)))


def test_neurons_are_refused() -> None:
    with pytest.raises(ConversionError, match=r"body.0 \(IF\): the network spikes already"):
        without_time(models.mlp([4, 3, 2], neuron=IF))


def test_other_blocks_are_refused() -> None:
    network = models.spikformer(image_size=8, depth=1, dim=16, heads=2, neuron=relu)
    with pytest.raises(ConversionError, match=r"body.11.branch \(SelfAttention\) cannot be converted: .* without it"):
        without_time(network)
