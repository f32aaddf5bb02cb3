from collections.abc import Callable

import pytest
import torch
from torch import nn

from ranvier import models
from ranvier.conversion.recording import ConversionError
from ranvier.conversion.without_time import without_time
from ranvier.nn import IF, QCFS


def relu(channels: int) -> nn.Module:
    return nn.ReLU()


@pytest.mark.parametrize("neuron", [relu, QCFS])
@pytest.mark.parametrize("build", [models.resnet20, models.sew_resnet18])
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


def test_neurons_are_refused() -> None:
    with pytest.raises(ConversionError, match=r"body.0 \(IF\): the network spikes already"):
        without_time(models.mlp([4, 3, 2], neuron=IF))


def test_other_blocks_are_refused() -> None:
    network = models.spikformer(image_size=8, depth=1, dim=16, heads=2, neuron=relu)
    with pytest.raises(ConversionError, match=r"body.11.branch \(SelfAttention\) cannot be converted: .* without it"):
        without_time(network)
