"""Tracing: what comes out equals what went in, and what cannot be converted says where, why and what to do."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ranvier import models
from ranvier.conversion import convert, decouple
from ranvier.conversion.trace import ConversionError, size_that_is_needed, trace
from ranvier.conversion.translation import HANDLERS
from ranvier.conversion.vocabulary import FUNCTIONS, MODULES, SITES, from_json, to_json
from ranvier.nn import LIF, QCFS

from .architectures import ARCHITECTURES, build

TOLERANCE = 1e-5
"""Of the largest output: some dozen layers in float32, summed in another order."""


def relu(channels: int) -> nn.Module:
    return nn.ReLU()


def small_vgg(neuron: Callable[[int], nn.Module]) -> models.Network:
    return models.vgg((8, 16, "A", 16, "A"), num_classes=10, in_channels=3, image_size=8, hidden=(32,), neuron=neuron)


def assert_same(graph: Callable[[Tensor], Tensor], ann: Callable[[Tensor], Tensor], images: Tensor) -> None:
    with torch.no_grad():
        expected, output = ann(images.clone()), graph(images)
    assert output.shape == expected.shape
    assert expected.abs().max() > 0
    assert (output - expected).abs().max() <= TOLERANCE * expected.abs().max()


def paths(graph: fx.GraphModule) -> list[str]:
    return [node.target for node in graph.graph.nodes if node.op == "call_module"]


def sites(graph: fx.GraphModule) -> list[nn.Module]:
    modules = [graph.get_submodule(path) for path in paths(graph)]
    return [module for module in modules if isinstance(module, SITES)]


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

    ann.eval()
    for num_samples in (7, 1):
        assert_same(graph, ann, torch.randn(num_samples, *images.shape[1:]))
    assert not graph.training
    assert not any(parameter.requires_grad for parameter in graph.parameters())
    assert len(set(paths(graph))) == len(paths(graph)), "each module is used once"
    assert {type(graph.get_submodule(path)).__name__ for path in paths(graph)} <= MODULES.keys()

    loaded = from_json(json.loads(json.dumps(to_json(graph))))
    loaded.load_state_dict(graph.state_dict())
    assert to_json(loaded) == to_json(graph)
    assert_same(loaded, graph, images)


@pytest.mark.parametrize("neuron", [relu, QCFS])
@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (lambda neuron: models.mlp([64, 32, 10], neuron=neuron), (1, 8, 8)),
        (lambda neuron: models.conv4(image_size=8, neuron=neuron), (1, 8, 8)),
        (small_vgg, (3, 8, 8)),
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
    ann = network(neuron).double()  # in float32, rounding moves a value across a step of QCFS now and then
    for module in ann.modules():
        if hasattr(module, "running_var"):
            module.running_var.uniform_(0.02, 0.1)
            module.running_mean.normal_(std=0.1)
    ann.eval()
    graph = trace(ann, torch.rand(3, *shape, dtype=torch.float64))
    assert_same(graph, lambda images: ann(images, steps=1)[0], torch.rand(5, *shape, dtype=torch.float64))
    assert len(sites(graph)) == sum(isinstance(module, nn.ReLU | QCFS) for module in ann.modules())


def test_names_are_those_of_the_ann() -> None:
    names = paths(trace(*build("resnet18")))
    assert names[:6] == ["conv1", "relu", "layer1.0.conv1", "layer1.0.relu", "layer1.0.conv2", "layer1.0.relu_1"]
    assert "layer2.0.downsample.0" in names
    names = paths(trace(*build("densenet")))
    assert names[:5] == ["conv0", "block1.0.norm1", "block1.0.relu", "block1.0.conv1", "block1.0.relu_1"]


def test_names_are_those_of_the_network_of_ranvier() -> None:
    names = paths(trace(models.resnet20(neuron=QCFS), torch.rand(2, 3, 8, 8)))
    assert names[:3] == ["encoder.0", "body.0", "body.1.0.branch.0.0"]
    assert names[-2:] == ["body.9.1", "readout.1"]


def test_names_do_not_collide() -> None:
    class Colliding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(F.relu(self.relu(F.relu(x))))

    assert paths(trace(Colliding(), torch.rand(2, 3))) == ["relu", "relu_0", "relu_1", "relu_2", "relu_0_1", "relu_1_1"]


class Parts(nn.Module):
    """Layers under the names that its user gave them; one of them stands deeper."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        first, second, third, fourth = names
        self.parts = nn.ModuleDict({first: nn.Linear(4, 8), second: nn.ReLU()})
        self.add_module(third, nn.Linear(8, 3))
        self.within = nn.ModuleDict({fourth: nn.Sequential(nn.Linear(3, 3), nn.ReLU())})
        self.last = (third, fourth)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts.values():
            x = part(x)
        return self.within[self.last[1]](self._modules[self.last[0]](x))


@pytest.mark.parametrize(
    "names",
    [
        ("in", "class", "lambda", "out"),
        ("graph", "code", "meta", "recompile"),
        ("print_readable", "_code", "code", "graph"),
        ("class", "node_class", "node_graph", "is"),
    ],
    ids=str,
)
def test_names_that_graphs_have_no_room_for(names: tuple[str, ...]) -> None:
    """Words of Python, and attributes of graphs: nothing of the user's ANN has to be renamed."""
    torch.manual_seed(0)
    ann, images = Parts(*names), torch.rand(5, 4)
    graph = trace(ann, images)
    assert_same(graph, ann, images)
    again = from_json(json.loads(json.dumps(to_json(graph))))
    again.load_state_dict(graph.state_dict())
    assert_same(again, ann, images)
    assert len(paths(graph)) == 5
    snn = convert(ann, torch.rand(50, 4), steps=4, threshold="max", bias="none")
    assert snn(images, 4).shape == (4, 5, 3)
    assert decouple(snn, images, steps=4)(images, 4).allclose(snn(images, 4), atol=1e-5)


def test_shared_layers_become_layers_of_their_own() -> None:
    graph = trace(*build("shared_weights"))
    assert paths(graph) == ["enter", "act", "conv", "act_1", "conv_1", "act_2", "conv_2", "act_3", "head"]
    assert graph.conv.weight is not graph.conv_1.weight
    assert torch.equal(graph.conv.weight, graph.conv_1.weight)


def test_ceilings() -> None:
    assert {site.ceiling for site in sites(trace(*build("mobilenet_v2")))} == {6.0}
    assert [site.ceiling for site in sites(trace(*build("functional_mlp")))] == [None, 3.0, None]
    assert [site.ceiling for site in sites(trace(*build("lenet")))] == [None, None, 4.0]


def test_sizes_do_not_contain_the_number_of_samples() -> None:
    graph = trace(*build("shufflenet"))
    (permute, *_) = calls(graph, "permute")
    assert permute.args[0].args[1] == [2, 8, 4, 4]
    assert permute.args[1] == [0, 2, 1, 3, 4]


class Net(nn.Module):
    """A convolution, something, an activation and a linear layer, on images `[B, 3, 8, 8]`."""

    def __init__(self, something: Callable[..., Tensor], *parts: nn.Module, features: int = 256) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.parts = nn.ModuleList(parts)
        self.something = something
        self.head = nn.Linear(features, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.something(self.conv(x), *self.parts)
        return self.head(F.relu(x).flatten(1))


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def in_place_under_two_names(x: Tensor) -> Tensor:
    y = x.sub_(0.5)
    return x.relu_() + y  # y is x, so this is 2 relu(x - 0.5)


class SeenThrough(torch.autograd.Function):
    """An activation with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(0, 1)


def follows_shapes(x: Tensor) -> Tensor:
    assert x.shape[1:] == (4, 8, 8), f"{x.shape} {x!r}"
    return F.relu(x) if x.ndim == 4 and len(x) and x.is_floating_point() else x


@pytest.mark.parametrize(
    ("something", "num_sites"),
    [
        (in_place_under_two_names, 2),
        (SeenThrough.apply, 2),
        (follows_shapes, 2),
        (lambda x: sum([x, x.relu(), 1.0, 2 - x / 2]), 2),
        (lambda x: F.dropout2d(nn.Identity()(x), training=False).to(x.device).contiguous().type_as(x).data, 1),
        (lambda x: torch.addmm(torch.ones(4), x.mean((2, 3)), torch.ones(4, 4))[..., None, None] - x, 1),
        (lambda x: F.relu6(torch.linspace(0, 1, 4)[:, None, None] * x * torch.tensor(2.0)), 2),
        (lambda x: torch.cat([x[:, :1], x.relu()[:, -3:]], axis=1), 2),
        (lambda x: nn.ReplicationPad2d((0, 7, 0, 7))(x.sum(axis=(-1, -2), keepdims=True)) - x, 1),
        (lambda x: torch.rsub(x * torch.tensor(2.0), 1) - torch.ones(4, 1, 1), 1),
        (lambda x: torch.cat([*torch.split(x, 1, 1)[:3], x.narrow(1, 3, 1)], 1) + x.chunk(1, 1)[0], 1),
        (lambda x: torch.permute(x[:, ..., 2:, None, :].squeeze(3), (0, 1, 3, 2)).sum(3)[..., None] + x, 1),
        (lambda x: torch.ops.aten.relu.default(x.swapaxes(2, 3)), 2),
    ],
)
def test_ways_of_writing(something: Callable[..., Tensor], num_sites: int) -> None:
    ann = Net(something)
    graph = trace(ann, IMAGES)
    assert_same(graph, ann.eval(), torch.randn(3, 3, 8, 8))
    assert len(sites(graph)) == num_sites


def test_what_is_not_used_is_not_looked_at() -> None:
    def with_an_unused_branch(x: Tensor) -> Tensor:
        F.gelu(x).softmax(0)
        return x

    assert paths(trace(Net(with_an_unused_branch), IMAGES)) == ["conv", "relu", "head"]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_padding_that_keeps_the_size() -> None:
    ann = Net(lambda x, conv: conv(x), nn.Conv2d(4, 4, (3, 4), padding="same", dilation=(2, 1)))
    graph = trace(ann, IMAGES)
    assert_same(graph, ann.eval(), IMAGES)
    (pad,) = calls(graph, "pad")
    assert pad.args[1:] == ([1, 2, 2, 2], "constant")


def test_weights_may_be_computed() -> None:
    ann = Net(lambda x, conv: conv(x), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)))
    graph = trace(ann, IMAGES)
    assert paths(graph) == ["conv", "parts.0", "relu", "head"]
    assert_same(graph, ann.eval(), IMAGES)


def test_a_compiled_ann_is_traced_as_it_was_written() -> None:
    assert paths(trace(torch.compile(Net(F.relu)), IMAGES)) == ["conv", "relu", "relu_1", "head"]


def test_inference_mode_leaves_no_trace() -> None:
    with torch.inference_mode():
        graph = trace(Net(F.relu), torch.rand(2, 3, 8, 8))
    graph.head.weight.mul_(2)  # raises for tensors of inference mode


def test_images_may_be_changed_in_place() -> None:
    class Normalising(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.5))

    images = IMAGES.clone()
    ann = Normalising(F.relu)
    graph = trace(ann, images)
    assert torch.equal(images, IMAGES)
    assert_same(graph, ann.eval(), IMAGES)


def assigned(x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x


def filled(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape)
    y += x
    return y


def changed_through_a_view(x: Tensor) -> Tensor:
    x[:, 0].relu_()
    return x


def branching(x: Tensor) -> Tensor:
    if x.mean() > 0:
        return -x
    return x


RECTIFY = "Use nn.ReLU or ranvier.nn.QCFS in its place"
NORMALISE = "Use batch normalisation"
CONSTANTS = "Only constants may be factors"
SAMPLES = "Leave the first axis to the samples"
SAME = "must not depend on their number, on chance"


@pytest.mark.parametrize(
    ("something", "parts", "fragments"),
    [
        (lambda x, act: act(x), [nn.GELU()], ["parts.0 (GELU)", "gelu has no counterpart", RECTIFY]),
        (lambda x, act: act(x), [nn.SiLU()], ["parts.0 (SiLU)", "silu", RECTIFY]),
        (lambda x, act: act(x), [nn.LeakyReLU()], ["leaky_relu", RECTIFY]),
        (lambda x, act: act(x), [nn.PReLU()], ["prelu", RECTIFY]),
        (lambda x, act: act(x), [nn.Threshold(0.1, 0)], ["threshold", RECTIFY]),
        (lambda x, act: act(x), [nn.Hardtanh()], ["hardtanh from -1.0 to 1.0", "Clamp from 0"]),
        (lambda x: torch.sigmoid(x), [], ["sigmoid", RECTIFY]),
        (lambda x: x.tanh(), [], ["tanh", RECTIFY]),
        (lambda x: x.clamp(-1, 1), [], ["clamp from -1 to 1", "Clamp from 0"]),
        (lambda x, norm: norm(x), [nn.LayerNorm(8)], ["parts.0 (LayerNorm)", NORMALISE]),
        (lambda x, norm: norm(x), [nn.GroupNorm(2, 4)], ["parts.0 (GroupNorm)", NORMALISE]),
        (lambda x, norm: norm(x), [nn.InstanceNorm2d(4)], ["parts.0 (InstanceNorm2d)", NORMALISE]),
        (lambda x, norm: norm(x), [nn.BatchNorm2d(4, track_running_stats=False)], ["track_running_stats=True"]),
        (lambda x: x.softmax(1), [], ["softmax", "Return logits"]),
        (lambda x: F.log_softmax(x, 1), [], ["log_softmax", "Return logits"]),
        (lambda x, conv: conv(x), [nn.ConvTranspose2d(4, 4, 1)], ["conv_transpose2d", "Convertible are"]),
        (lambda x, lstm: lstm(x[:, 0])[0], [nn.LSTM(8, 32)], ["lstm", "Its gates multiply"]),
        (lambda x: x * x.mean((2, 3), keepdim=True), [], ["mul multiplies two values", CONSTANTS]),
        (lambda x: x @ x.mT, [], ["matmul multiplies two values", CONSTANTS]),
        (lambda x: torch.ones(8, 8) @ x, [], ["matmul multiplies by a constant from the left", "nn.Linear"]),
        (lambda x: x / x.sum(), [], ["sum does not keep samples apart", SAMPLES]),
        (lambda x: x.pow(2), [], ["pow has no counterpart", "Convertible are"]),
        (lambda x: x.div(2, rounding_mode="floor"), [], ["rounding_mode='floor'", "without rounding"]),
        (lambda x: F.scaled_dot_product_attention(x, x, x), [], ["scaled_dot_product_attention", "without attention"]),
        (
            lambda x, attention: attention(x[:, 0], x[:, 0], x[:, 0])[0][:, None] - x,
            [nn.MultiheadAttention(8, 2)],
            ["parts.0 (MultiheadAttention)", "multi_head_attention_forward", "without attention"],
        ),
        (
            lambda x, embedding: embedding(x.clamp(0, 3).long())[..., 0],
            [nn.Embedding(4, 3)],
            ["long turns torch.float32 into torch.int64", "Keep to torch.float32"],
        ),
        (lambda x: torch.mul(x, 2, out=x), [], ["mul is called in a way that cannot be translated", "Convertible are"]),
        (lambda x: F.linear(x, torch.ones(8))[..., None] - x, [], ["linear has a weight of shape [8]", "Use a matrix"]),
        (
            lambda x: torch.addmm(torch.ones(1, 4), x.mean((2, 3)), torch.ones(4, 4))[..., None, None] - x,
            [],
            ["addmm is called in a form that is no linear layer", "Use nn.Linear"],
        ),
        (lambda x: torch.einsum("bchw,kc->bkhw", x, torch.ones(4, 4)), [], ["einsum", "nn.Linear or as a conv"]),
        (lambda x: x[:, [0, 1, 2, 3]], [], ["__getitem__ picks by a list", "Use slices"]),
        (lambda x: x.expand(-1, -1, 8, 8) - x[:, :, :1].expand(-1, -1, 8, 8), [], ["expand repeats values", "broad"]),
        (lambda x: x.double().float(), [], ["double turns torch.float32 into torch.float64", "Keep to torch.float32"]),
        (lambda x: F.max_pool2d(x, 1, return_indices=True)[0], [], ["max_pool2d_with_indices", "Convertible are"]),
        (lambda x: F.dropout(x), [], ["dropout is on in evaluation", "training=self.training"]),
        (lambda x: x + torch.randn_like(x), [], ["randn_like", "no random numbers"]),
        (lambda x: x + torch.randn(8), [], [SAME, "draw no random numbers"]),
        (lambda x: x * random.random(), [], [SAME]),
        (lambda x: x / len(x), [], [SAME]),
        (lambda x: x + torch.ones(len(x), 1, 1, 1), [], [SAME]),
        (lambda x: F.relu(x) if len(x) == 2 else x, [], [SAME]),
        (lambda x: x.clamp(0, len(x)), [], [SAME]),
        (lambda x: torch.cat([x, torch.zeros(len(x), 0, 8, 8)], 1), [], ["cat joins data with a constant", "pad"]),
        (lambda x: torch.cat([x, x])[: len(x)], [], ["cat does not keep samples apart", SAMPLES]),
        (lambda x: x.transpose(0, 1).transpose(0, 1), [], ["transpose does not keep", SAMPLES]),
        (lambda x: x + x[:, :2].transpose(0, 1).transpose(0, 1).sum(1, True), [], ["transpose does not", SAMPLES]),
        (lambda x: torch.cat(x.split(2)), [], ["split does not keep samples apart", SAMPLES]),
        (lambda x: x + x[:2].mean(0, True), [], ["__getitem__ does not keep samples apart", SAMPLES]),
        (lambda x: x - x.mean(0, keepdim=True), [], ["mean does not keep samples apart", SAMPLES]),
        (lambda x: x.view(-1, 1, 8, 8).view(-1, 4, 8, 8), [], ["view does not keep samples apart", SAMPLES]),
        (lambda x: x[-3:], [], ["logits"]),
        (lambda x: torch.stack([x, x])[0], [], ["stack does not keep samples apart", SAMPLES]),
        (lambda x: x.view(4, 256), [], ["fails on 2 of them", "shape '[4, 256]' is invalid", "no fixed batch size"]),
        (assigned, [], ["x[:, 0] = 0", "__setitem__ writes into a tensor", "Compute a new one"]),
        (filled, [], ["y += x", "add writes into a tensor", "Compute a new one"]),
        (changed_through_a_view, [], ["changed in place under another name", "Leave out the underscore"]),
        (
            branching,
            [],
            ["if x.mean() > 0:", "__bool__ turns data into a Python value", "leave the value, or the branch"],
        ),
        (lambda x: x * x.std().item(), [], ["item turns data into a Python value", "leave the value"]),
        (lambda x: torch.from_numpy(np.maximum(x.numpy(), 0)), [], ["numpy turns data into", "leave the value"]),
        (lambda x: F.avg_pool2d(F.relu(x), 2).amax((2, 3)), [], ["amax", "nn.AdaptiveMaxPool2d(1)"]),
    ],
)
def test_refusals(something: Callable[..., Tensor], parts: list[nn.Module], fragments: list[str]) -> None:
    features = 4 if "amax" in fragments else 256
    with pytest.raises(ConversionError) as raised:
        trace(Net(something, *parts, features=features), IMAGES)
    message = str(raised.value)
    assert [fragment for fragment in fragments if fragment not in message] == [], message
    if fragments != ["logits"]:
        assert "test_trace.py:" in message


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def test_places_name_the_module_and_the_line_of_the_user() -> None:
    with pytest.raises(
        ConversionError, match=r'^parts\.0\.act \(GELU\) at .*/test_trace.py:\d+, "return self.act\(x\)": '
    ):
        trace(Net(lambda x, block: block(x), Block()), IMAGES)
    with pytest.raises(ConversionError, match=r"^2\.0 \(SiLU\): silu has no counterpart"):
        trace(nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Sequential(nn.SiLU()), nn.Linear(8, 2)), IMAGES)


class Returning(nn.Module):
    """Its argument applied to images."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.parts)


@pytest.mark.parametrize(
    ("ann", "images", "fragments"),
    [
        (Returning(lambda x: (x.relu().flatten(1), x)), IMAGES, ["returns a tuple", "Wrap it in a module"]),
        (Returning(lambda x: {"logits": x.relu()}), IMAGES, ["returns a dict", "Wrap it in a module"]),
        (Returning(lambda x: x.relu()), IMAGES, ["shape [4, 3, 8, 8]", "logits [B, K]", "End it in a flatten"]),
        (Returning(lambda x: x.relu().flatten(1)[-3:]), IMAGES, ["shape [3, 192] for images [4, 3, 8, 8]"]),
        (
            Returning(lambda x: (x.mean((1, 2)).relu() + x.mean((1, 2))[:, None]).sum(1)),
            IMAGES,
            ["adds samples of shapes [8] and [1, 8]", "mixes samples", "the same number of axes"],
        ),
        (Returning(lambda x: x.flatten(1) * float("nan")), IMAGES, ["not finite", "trained network"]),
        (Returning(lambda x: x.flatten(1)), IMAGES, ["no activation", "with nn.ReLU or ranvier.nn.QCFS"]),
        (Returning(lambda x: torch.zeros(len(x), 10)), IMAGES, ["does not depend on the images", "no numpy"]),
        (Returning(lambda x, y: x), IMAGES, ["cannot take calibration images of shape [4, 3, 8, 8]", "missing 1"]),
        (
            Net(F.relu),
            torch.rand(2, 1, 8, 8),
            ["cannot take calibration images of shape [2, 1, 8, 8]", "as in training"],
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4), LIF()), IMAGES, ["2 (LIF)", "spikes already", "neuron=QCFS"]),
        (models.mlp([192, 8, 10]), IMAGES, ["body.layers.0.neuron (LIF)", "spikes already", "neuron=QCFS"]),
        (
            models.spikformer(10, image_size=8, patch_size=4, depth=1, dim=16, heads=2, neuron=relu),
            IMAGES,
            ["body.11.branch (SelfAttention)", "multiplies values that both depend on the images", "resnet20"],
        ),
        (
            Returning(lambda x, network: network(x, steps=1)[0], models.mlp([192, 8, 10], neuron=relu)),
            IMAGES,
            ["parts.0 (Network)", "has a time axis", "without_time(network)"],
        ),
    ],
)
def test_networks_that_are_refused(ann: nn.Module, images: Tensor, fragments: list[str]) -> None:
    with pytest.raises(ConversionError) as raised:
        trace(ann, images)
    assert [fragment for fragment in fragments if fragment not in str(raised.value)] == [], str(raised.value)


def test_an_ann_that_remembers_is_refused() -> None:
    runs = iter(range(100))
    ann = Net(lambda x: x if next(runs) < 4 else 2 * x)  # the output is checked, two runs recorded, two compared
    with pytest.raises(ConversionError, match="returns something else when it runs on the same images again"):
        trace(ann, IMAGES)


def test_a_graph_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HANDLERS, "neg", lambda draft, x: x)  # a mistake in the translation
    with pytest.raises(ConversionError, match=r"differs from the ANN by .* of its largest output"):
        trace(Net(lambda x: -x), IMAGES)


def test_an_ann_that_cannot_be_copied_is_refused() -> None:
    ann = Net(F.relu)
    ann.generator = (item for item in "abc")
    with pytest.raises(ConversionError, match="Net cannot be copied: cannot pickle 'generator' object"):
        trace(ann, IMAGES)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_scripted_modules_are_refused() -> None:
    scripted = torch.jit.trace(nn.Linear(3, 3), torch.rand(2, 3))
    with pytest.raises(ConversionError, match=r"1 \(ScriptModule\): what torch.jit compiled cannot be looked into"):
        trace(nn.Sequential(nn.Flatten(), scripted), IMAGES)


def test_images_are_checked() -> None:
    with pytest.raises(TypeError, match=r"a tensor of torch.uint8, but .* images / 255"):
        trace(Net(F.relu), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"shape \[0, 3, 8, 8\], but must be at least one sample"):
        trace(Net(F.relu), IMAGES[:0])


def test_the_size_of_images_that_a_network_needs() -> None:
    flattens = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 4, 3))
    averages = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    images = torch.rand(5, 1, 8, 6)
    assert size_that_is_needed(trace(flattens.eval(), images), images) == (8, 6)
    assert size_that_is_needed(trace(averages.eval(), images), images) is None
    perceptron, numbers = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.rand(5, 4)
    assert size_that_is_needed(trace(perceptron.eval(), numbers), numbers) is None
    snn = convert(flattens, torch.rand(60, 1, 8, 6), steps=2, threshold="max", bias="none")
    with pytest.raises(ValueError, match="8x8 pixels, but this network was built for 8x6"):
        snn(torch.rand(2, 1, 8, 8), 2)
