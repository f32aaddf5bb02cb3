"""Tracing: what comes out equals what went in, and what cannot be converted says where, why and what to do."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ranvier import models
from ranvier.conversion.trace import ConversionError, trace
from ranvier.conversion.vocabulary import FUNCTIONS, MODULES, SITES, Rectifier, from_json, to_json
from ranvier.nn import LIF, QCFS

from .architectures import ARCHITECTURES, build

TOLERANCE = 1e-5
"""Of the largest output: some dozen layers in float32, summed in another order."""


def relu(channels: int) -> nn.Module:
    return nn.ReLU()


def assert_same(graph: nn.Module, ann: Callable[[Tensor], Tensor], images: Tensor) -> None:
    with torch.no_grad():
        expected, output = ann(images), graph(images)
    assert output.shape == expected.shape
    assert expected.abs().max() > 0
    assert (output - expected).abs().max() <= TOLERANCE * expected.abs().max()


def paths(graph: fx.GraphModule) -> list[str]:
    return [node.target for node in graph.graph.nodes if node.op == "call_module"]


def sites(graph: fx.GraphModule) -> list[str]:
    return [path for path in paths(graph) if isinstance(graph.get_submodule(path), SITES)]


def calls(graph: fx.GraphModule, name: str) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.target is FUNCTIONS[name]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    ann, images = build(name)
    before = copy.deepcopy(ann.state_dict())
    graph = trace(ann, images)
    assert ann.training
    assert all(parameter.requires_grad for parameter in ann.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in ann.state_dict().items())
    assert not any(tensor.requires_grad for tensor in graph.parameters())

    ann.eval()
    for num_samples in (7, 1):
        assert_same(graph, ann, torch.randn(num_samples, *images.shape[1:]))
    assert {node.op for node in graph.graph.nodes} <= {"placeholder", "call_module", "call_function", "get_attr", "output"}
    assert len(set(paths(graph))) == len(paths(graph)), "each module is used once"
    assert {type(graph.get_submodule(path)).__name__ for path in paths(graph)} <= MODULES.keys()

    loaded = from_json(json.loads(json.dumps(to_json(graph))))
    loaded.load_state_dict(graph.state_dict())
    assert loaded.code == graph.code
    assert_same(loaded, graph, images)


@pytest.mark.parametrize("neuron", [relu, QCFS])
@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (lambda neuron: models.mlp([64, 32, 10], neuron=neuron), (1, 8, 8)),
        (lambda neuron: models.conv4(image_size=8, neuron=neuron), (1, 8, 8)),
        (lambda neuron: models.vgg((8, 16, "A", 16, "A"), num_classes=10, in_channels=2, image_size=8, neuron=neuron), (2, 8, 8)),
        (lambda neuron: models.resnet19(neuron=neuron), (3, 4, 4)),
        (lambda neuron: models.resnet20(neuron=neuron), (3, 8, 8)),
        (lambda neuron: models.sew_resnet18(stem="imagenet", neuron=neuron), (3, 16, 16)),
    ],
    ids=["mlp", "conv4", "vgg", "resnet19", "resnet20", "sew_resnet18"],
)
def test_networks_of_ranvier(
    network: Callable[[Any], models.Network], shape: tuple[int, ...], neuron: Callable[[int], nn.Module]
) -> None:
    torch.manual_seed(0)
    ann = network(neuron).double()  # in float32 rounding moves a value across a step of QCFS now and then
    for module in ann.modules():
        if hasattr(module, "running_var"):
            module.running_var.uniform_(0.02, 0.1)
            module.running_mean.normal_(std=0.1)
    ann.eval()
    graph = trace(ann, torch.rand(3, *shape, dtype=torch.float64))
    assert_same(graph, lambda images: ann(images, steps=1)[0], torch.rand(5, *shape, dtype=torch.float64))
    assert len(sites(graph)) == sum(isinstance(module, nn.ReLU | QCFS) for module in ann.modules())


def test_names_are_those_of_the_ann() -> None:
    graph = trace(*build("resnet18"))
    assert paths(graph)[:8] == [
        "conv1",
        "relu",
        "layer1.0.conv1",
        "layer1.0.relu",
        "layer1.0.conv2",
        "layer1.0.relu_1",
        "layer1.1.conv1",
        "layer1.1.relu",
    ]
    assert "layer2.0.downsample.0" in paths(graph)
    assert "block1.1.relu_1" in paths(trace(*build("densenet")))


def test_networks_of_ranvier_keep_their_names() -> None:
    graph = trace(models.resnet20(neuron=QCFS), torch.rand(2, 3, 8, 8))
    assert paths(graph)[:6] == [
        "encoder.0",
        "body.0",
        "body.1.0.branch.0.0",
        "body.1.0.branch.1",
        "body.1.0.branch.2.0",
        "body.1.1",
    ]


def test_shared_layers_become_layers_of_their_own() -> None:
    graph = trace(*build("shared_weights"))
    assert paths(graph) == ["enter", "act", "conv", "act_1", "conv_1", "act_2", "conv_2", "act_3", "head"]
    assert graph.conv.weight is not graph.conv_1.weight
    assert torch.equal(graph.conv.weight, graph.conv_1.weight)


def test_ceilings() -> None:
    graph = trace(*build("mobilenet_v2"))
    assert {graph.get_submodule(path).ceiling for path in sites(graph)} == {6.0}
    ceilings = [graph.get_submodule(path).ceiling for path in sites(trace(*build("functional_mlp")))] if False else None
    assert ceilings is None


def test_sizes_are_constants() -> None:
    (shuffle, *_) = calls(trace(*build("shufflenet")), "permute")
    assert shuffle.args[0].args[1] == [2, 8, 4, 4]
    assert shuffle.args[1] == [0, 2, 1, 3, 4]


class Net(nn.Module):
    """A convolution, something, and a linear layer, on images `[B, 3, 8, 8]`."""

    def __init__(self, something: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.parts = nn.ModuleList(parts)
        self.something = something
        self.head = nn.LazyLinear(10)
        self.eval()
        with torch.random.fork_rng():
            self(images(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.something(self.conv(x), *self.parts).flatten(1))


def images(num_samples: int = 4) -> Tensor:
    return torch.randn(num_samples, 3, 8, 8, generator=torch.Generator().manual_seed(0))
