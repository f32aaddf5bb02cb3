"""A spiking network as a graph of one step: with its neurons put back it computes the same, step by step."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ranvier import models
from ranvier.conversion import ConversionError, TracedNetwork, trace_network
from ranvier.conversion.trace_network import IMAGE_SIZE, example_images
from ranvier.conversion.vocabulary import ChannelAffine, Rectifier
from ranvier.models import Network
from ranvier.nn import IF, LIF, LIFB, PLIF, BatchNorm, Neuron, Readout, TimeFolded
from ranvier.nn.structure import Activation, Chain, NeuronFactory, Residual, conv_norm

NETWORKS = {
    "mlp": (lambda neuron: models.mlp([12, 8, 6, 5], neuron=neuron), (12,)),
    "vgg": (
        lambda neuron: models.vgg((4, "A", 8), num_classes=5, in_channels=2, image_size=8, neuron=neuron),
        (2, 8, 8),
    ),
    "resnet20": (lambda neuron: models.resnet20(neuron=neuron), (3, 8, 8)),
}


@torch.no_grad()
def lively(name: str, neuron: NeuronFactory) -> tuple[Network, Tensor]:
    """A network in float64, with the statistics of the images."""
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    network = build(neuron).double().train()
    x = torch.rand(4, *shape, dtype=torch.float64)
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 1, 2)
            nn.init.uniform_(module.bias, 0, 0.6)
    network(x, steps=2)
    return network.eval(), x


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("neuron", [IF, LIF, PLIF, LIFB])
@torch.no_grad()
def test_the_graph_over_time_is_the_network(name: str, neuron: type[Neuron]) -> None:
    network, x = lively(name, neuron)
    traced = trace_network(network, x)
    expected = network(x, 5)
    assert expected.std(0).max() > 0
    # Normalisation is folded in float64: some hundred roundings.
    torch.testing.assert_close(traced.to_snn()(x, 5), expected, rtol=0, atol=1e-13 * float(expected.abs().max()))
    assert {type(found) for found in traced.neurons.values()} == {neuron}
    assert not any(isinstance(module, BatchNorm | ChannelAffine) for module in traced.graph.modules())


def test_neurons_stand_where_they_ran() -> None:
    kinds = iter([IF, LIFB, PLIF])
    network = models.mlp([4, 3, 3, 3, 2], neuron=lambda channels: next(kinds)(channels, v_threshold=0.25))
    traced = trace_network(network)
    assert [(name, type(neuron)) for name, neuron in traced.neurons.items()] == [
        ("body.0", IF),
        ("body.2", LIFB),
        ("body.4", PLIF),
    ]
    assert all(isinstance(traced.graph.get_submodule(name), Rectifier) for name in traced.neurons)
    assert all(neuron.params.v_threshold == 0.25 for neuron in traced.neurons.values())
    assert list(traced.to_snn().sites) == list(traced.neurons)
    assert traced.frame_dims == (2, 4)


def test_one_neuron_in_two_places() -> None:
    """Two layers in the graph, with a state each, as in the network."""
    shared = Activation(LIFB(4))
    body = Chain(shared, TimeFolded(nn.Linear(4, 4)), shared)
    torch.manual_seed(0)
    network = Network(TimeFolded(nn.Linear(3, 4)), body, Readout(4, 2), frame_dims=(2,)).double()
    x = 4 * torch.rand(5, 3, dtype=torch.float64)
    traced = trace_network(network, x)
    first, second = traced.neurons.values()
    assert first is not second
    assert torch.equal(traced.to_snn()(x, 4), network(x, 4))
    assert len(traced.to_snn()(x, 4, return_state=True)[1]) == 2


def modes(network: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in network.named_modules()}


def test_the_network_is_not_modified() -> None:
    """Neither parameters nor statistics, nor the mode of modules, of which some may be frozen."""
    network, x = lively("resnet20", LIFB)
    network.train()
    frozen = [module for module in network.modules() if isinstance(module, BatchNorm)][1::2]
    for module in frozen:
        module.eval()
    before, mode = copy.deepcopy(network.state_dict()), modes(network)
    for images in (x, None):
        traced = trace_network(network, images)
        assert modes(network) == mode
        assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())
    with torch.no_grad():
        for tensor in (*traced.graph.state_dict().values(), *(n.strength for n in traced.neurons.values())):
            assert not tensor.requires_grad
            tensor.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert not any(neuron.training for neuron in traced.neurons.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_traced_in_float32(dtype: torch.dtype) -> None:
    network, x = lively("resnet20", LIFB)
    network, x = network.to(dtype), x.to(dtype)
    for images in (x, x.float(), None):
        snn = trace_network(network, images).to_snn()
        assert {tensor.dtype for tensor in snn.state_dict().values()} == {torch.float32}
    assert {tensor.dtype for tensor in network.state_dict().values()} >= {dtype}
    expected = copy.deepcopy(network).float()(x.float(), 1)
    torch.testing.assert_close(snn(x.float(), 1), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    graph = snn.to(dtype)
    assert {tensor.dtype for tensor in trace_network(graph, x).graph.state_dict().values()} == {torch.float32}


def test_a_graph_says_what_does_not_fit() -> None:
    network, x = lively("vgg", LIF)
    snn = trace_network(network, x).to_snn()
    assert snn.image_size == network.image_size == 8
    with pytest.raises(ValueError, match="8x9 pixels, but this network was built for 8x8"):
        snn(torch.rand(2, 2, 8, 9).double(), 2)
    with pytest.raises(ValueError, match=r"cannot take the images, of shape \[2, 3, 8, 8\]: .*channels.* Pass a batch"):
        trace_network(snn, torch.rand(2, 3, 8, 8).double())
    with pytest.raises(ValueError, match=r"cannot take the images, of shape \[2, 2, 4, 4\]: .*built for 8x8"):
        trace_network(snn, torch.rand(2, 2, 4, 4).double())


def test_a_compiled_network_is_looked_into() -> None:
    network, x = lively("mlp", LIF)
    assert torch.equal(trace_network(torch.compile(network)).to_snn()(x, 3), network(x, 3))


def test_max_pooling_stays_behind_its_neurons() -> None:
    """In an ANN it moves in front of them; here neurons were trained as they stand."""
    body = Chain(Activation(LIF()), TimeFolded(nn.MaxPool2d(2), nn.Flatten()))
    network = Network(TimeFolded(nn.Conv2d(1, 4, 3, padding=1)), body, Readout(64, 2), image_size=8)
    names = [
        node.name for node in trace_network(network).graph.graph.nodes if "relu" in node.name or "pool" in node.name
    ]
    assert names[-1] == "max_pool2d"
    x = 4 * torch.rand(3, 1, 8, 8)
    assert torch.equal(trace_network(network).to_snn()(x, 4), network(x, 4))


def test_flattened_features_and_images() -> None:
    """A network on `[B, K]` or `[B, C, H, W]` stays one, whichever it was traced with."""
    network, x = lively("mlp", LIF)
    for example in (x, x.view(4, 3, 2, 2), None):
        snn = trace_network(network, example).to_snn()
        assert torch.equal(snn(x, 3), network(x, 3))
        assert torch.equal(snn(x.view(4, 3, 2, 2), 3), network(x, 3))


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (models.mlp([12, 8, 5]), (12, 1, 1)),
        (models.vgg((4, "A", 8), num_classes=5, in_channels=2, image_size=16), (2, 16, 16)),
        (models.resnet20(in_channels=1), (1, IMAGE_SIZE, IMAGE_SIZE)),
        (Network(TimeFolded(nn.Linear(7, 3)), Chain(Activation(LIF())), Readout(3, 2), frame_dims=(2,)), (7,)),
    ],
    ids=["mlp", "vgg", "resnet20", "features"],
)
def test_example_images(network: Network, shape: tuple[int, ...]) -> None:
    state = torch.get_rng_state()
    assert example_images(network, 3).shape == (3, *shape)
    assert torch.equal(torch.get_rng_state(), state)
    assert example_images(network.double()).dtype == torch.float64
    network(example_images(network), steps=1)


def test_nothing_tells_the_shape_of_images() -> None:
    network = Network(
        nn.Identity(), Chain(Activation(LIF()), TimeFolded(nn.Linear(3, 3))), Readout(3, 2), frame_dims=(2,)
    )
    with pytest.raises(ValueError, match="neither convolution nor linear layer before its first neuron.*Pass a batch"):
        trace_network(network)
    assert isinstance(trace_network(network, torch.rand(2, 3)), TracedNetwork)


def test_made_up_images_do_not_fit() -> None:
    network = Network(conv_norm(2, 4), Chain(Activation(LIF())), Readout(64, 2))  # of 4x4, which it does not say
    with pytest.raises(
        ValueError, match=r"cannot take images that were made up for it, of shape \[2, 2, 32, 32\]: mat1"
    ):
        trace_network(network)
    with pytest.raises(
        ValueError, match=r"cannot take the images, of shape \[2, 2, 8, 8\]: .* Pass a batch of its images"
    ):
        trace_network(network, torch.rand(2, 2, 8, 8))
    with pytest.raises(TypeError, match="images are a tensor of torch.uint8"):
        trace_network(network, torch.zeros(2, 2, 4, 4, dtype=torch.uint8))
    assert list(trace_network(network, torch.rand(2, 2, 4, 4)).neurons) == ["body.0"]


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid()


def of(*layers: nn.Module) -> Network:
    return Network(TimeFolded(nn.Linear(4, 4)), Chain(*layers), Readout(4, 2), frame_dims=(2,))


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (
            nn.Linear(4, 2),
            TypeError,
            "network is a Linear, but must be a Network of ranvier.models. Build it from encoder",
        ),
        (LIFB, TypeError, "network is a type"),
        (of(), ConversionError, "Network has no neuron of ranvier.nn: it is an ANN"),
        (of(Activation(nn.ReLU())), ConversionError, "Network has no neuron"),
        (
            of(Activation(LIF()), Activation(nn.ReLU())),
            ConversionError,
            r"body.1.*no neuron, but an activation of an ANN",
        ),
        (of(Activation(LIF()), nn.ReLU()), ConversionError, r"body.1 .*no neuron, but an activation of an ANN"),
        (of(Activation(LIF()), nn.Sigmoid()), ConversionError, "sigmoid has no counterpart"),
        (of(Activation(LIF()), Gate()), ConversionError, r"body.1 \(Gate\) cannot be converted"),
        (
            models.spikformer(image_size=8, depth=1, dim=16, heads=2),
            ConversionError,
            r"\(SelfAttention\) cannot be converted: .*Self-attention multiplies values that both depend on the images",
        ),
    ],
)
def test_what_is_no_spiking_network(network: nn.Module, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trace_network(network)


def test_normalisation_of_spikes_stays() -> None:
    """No layer before it could take it in."""
    body = Chain(Residual(Chain(Activation(LIF(4))), Chain()), BatchNorm(4), Activation(LIF(4)))
    network = Network(TimeFolded(nn.Linear(3, 4)), body, Readout(4, 2), frame_dims=(2,))
    traced = trace_network(network)
    assert sum(isinstance(module, ChannelAffine) for module in traced.graph.modules()) == 1
