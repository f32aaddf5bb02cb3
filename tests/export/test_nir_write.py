"""What stands in a NIR file: units and numbers by hand, shapes of graphs, metadata, and what is refused."""

import copy
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranvier import models
from ranvier.conversion import ConversionError, ConvertedSNN, convert, decouple
from ranvier.export import NIRReceipt, from_nir, nir_write, to_nir
from ranvier.models import Network
from ranvier.nn import IF, LIF, LIFB, PLIF, AffineIF, BatchNorm, Neuron, Readout, TimeFolded
from ranvier.nn.structure import Activation, Chain, Concat, Residual

nir = pytest.importorskip("nir")
h5py = pytest.importorskip("h5py")

ONE = 1e-3
"""One millisecond."""


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Any]:
    """Writes a network and gives the graph that NIR reads, types checked, and the receipt."""

    def to_graph(model: nn.Module, images: Tensor | None = None, **settings: Any) -> Any:
        receipt = to_nir(model, tmp_path / "a.nir", images=images, **settings)
        graph = nir.read(tmp_path / "a.nir", type_check=True)
        assert isinstance(receipt, NIRReceipt)
        graph.receipt = receipt
        return graph

    return to_graph


def mlp(neuron: Callable[[int], nn.Module], sizes: tuple[int, ...] = (2, 3, 2)) -> Network:
    torch.manual_seed(0)
    return models.mlp(sizes, neuron=neuron)


def of_kind(graph: Any, *kinds: str) -> list[Any]:
    return [node for node in graph.nodes.values() if type(node).__name__ in kinds]


def all_are(array: np.ndarray, shape: tuple[int, ...], value: float) -> bool:
    """Every number is `value`, in every bit of the type that the array has."""
    return array.shape == shape and bool((array == array.dtype.type(value)).all())


def converted(ann: nn.Module, *shape: int, **settings: Any) -> tuple[ConvertedSNN, Tensor]:
    """A network made of an ANN with thresholds at its largest activations, and images."""
    generator = torch.Generator().manual_seed(0)
    settings = {"steps": 3, "threshold": "max", "bias": "none"} | settings
    snn = convert(ann, torch.rand(30, *shape, generator=generator), **settings)
    return snn, torch.rand(4, *shape, generator=generator)


# Units


@pytest.mark.parametrize("dt", [1e-3, 2.5e-4, 1e-4])
@pytest.mark.parametrize("tau", [1.0, 2.0, 3.7])
def test_lif_has_tau_in_seconds(write: Any, dt: float, tau: float) -> None:
    """tau steps of dt; input and potential are in one unit, so r = 1; rest and reset are 0."""
    (node,) = of_kind(write(mlp(partial(LIF, tau=tau, v_threshold=0.3)), dt=dt), "LIF")
    assert node.tau.dtype == np.float64
    np.testing.assert_array_equal(node.tau, np.full(3, tau * dt))
    assert all_are(node.r, (3,), 1)
    assert all_are(node.v_leak, (3,), 0)
    assert all_are(node.v_reset, (3,), 0)
    assert node.v_threshold.dtype == np.float32
    assert all_are(node.v_threshold, (3,), 0.3)


def test_lif_by_hand(write: Any) -> None:
    """tau = 2 steps of 1 ms are 2 ms."""
    (node,) = of_kind(write(mlp(LIF), dt=1e-3), "LIF")
    assert node.tau.tolist() == [0.002] * 3


@pytest.mark.parametrize(("dt", "r"), [(1e-3, 1000.0), (2.5e-4, 4000.0)])
def test_if_gains_one_over_dt(write: Any, dt: float, r: float) -> None:
    """dv/dt = r x for dt seconds adds x, so r = 1 / dt."""
    (node,) = of_kind(write(mlp(IF), dt=dt), "IF")
    assert all_are(node.r, (3,), r)
    assert all_are(node.v_threshold, (3,), 0.5)
    assert all_are(node.v_reset, (3,), 0)


@pytest.mark.parametrize("dt", [1e-3, 2.5e-4])
def test_plif_has_the_tau_that_it_learned(write: Any, dt: float) -> None:
    model = mlp(PLIF)
    model.body.layers[0].neuron.decay.fill_(-math.log(3.0))  # 1 + exp(log 3) = 4 steps
    (node,) = of_kind(write(model, dt=dt), "LIF")
    np.testing.assert_allclose(node.tau, 4 * dt, rtol=1e-6)  # the logarithm is in float32


def test_bursts_are_two_neurons_and_the_strength_is_in_the_weights(write: Any) -> None:
    model = mlp(LIFB)
    model.body.layers[0].neuron.strength.copy_(torch.tensor([1.5, 2.0, 0.5]))
    graph = write(model)
    first, second = graph.nodes["body_0"], graph.nodes["body_0_burst"]
    assert all_are(first.v_threshold, (3,), 0.5)
    assert all_are(second.v_threshold, (3,), 1.0)
    assert first.tau.tolist() == second.tau.tolist() == [0.002] * 3
    weight = model.readout[1].weight.numpy()
    spikes, bursts = graph.nodes["readout_1"], graph.nodes["readout_1_1"]
    np.testing.assert_array_equal(spikes.weight, weight)
    np.testing.assert_array_equal(bursts.weight, weight * np.float32([0.5, 1.0, -0.5]))
    assert type(bursts).__name__ == "Linear"  # the bias enters once
    assert {("body_0", "readout_1"), ("body_0_burst", "readout_1_1")} <= set(graph.edges)
    assert {("encoder_1", "body_0"), ("encoder_1", "body_0_burst")} <= set(graph.edges)
    assert {("readout_1", "output"), ("readout_1_1", "output")} <= set(graph.edges)


def test_converted_neurons_send_one_and_the_next_weights_take_the_threshold(write: Any) -> None:
    ann = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    snn, images = converted(ann, 2)
    (neuron,) = snn.neurons.values()
    neuron.threshold.copy_(torch.tensor([0.5, 1.0, 4.0]))
    graph = write(snn, images)
    (node,) = of_kind(graph, "IF")
    assert node.v_threshold.tolist() == [0.5, 1.0, 4.0]
    assert all_are(node.r, (3,), 1000)
    before, after = of_kind(graph, "Affine")
    if before.weight.shape[0] == 2:
        before, after = after, before
    np.testing.assert_array_equal(before.weight, ann[0].weight.numpy())
    np.testing.assert_array_equal(after.weight, ann[2].weight.numpy() * np.float32([0.5, 1.0, 4.0]))


def test_normalisation_is_folded_by_hand(write: Any) -> None:
    """gamma (w x - mean) / sqrt(var + eps) + beta, with 2 (3 x - 1) / 4 + 0.25 = 1.5 x - 0.25."""
    conv, norm = nn.Conv2d(1, 1, 1, bias=False), BatchNorm(1)
    conv.weight.fill_(3.0)
    for tensor, value in ((norm.weight, 2.0), (norm.bias, 0.25), (norm.running_mean, 1.0), (norm.running_var, 16.0)):
        tensor.fill_(value)
    norm.eps = 0.0
    model = Network(nn.Sequential(TimeFolded(conv), norm), Chain(Activation(LIF())), Readout(4, 2))
    graph = write(model, torch.rand(3, 1, 2, 2))
    (node,) = of_kind(graph, "Conv2d")
    assert node.weight.flatten().tolist() == [1.5]
    assert node.bias.tolist() == [-0.25]
    assert not set(Counter(type(node).__name__ for node in graph.nodes.values())) - {
        "Input", "Conv2d", "LIF", "Flatten", "Affine", "Output",
    }  # fmt: skip


# Graphs


def test_mlp_is_a_chain_without_flattening(write: Any) -> None:
    graph = write(mlp(LIF))
    assert set(graph.edges) == {
        ("input", "encoder_1"),
        ("encoder_1", "body_0"),
        ("body_0", "readout_1"),
        ("readout_1", "output"),
    }
    assert graph.nodes["input"].input_type["input"].tolist() == [2]
    assert graph.receipt.nodes == {"Input": 1, "Affine": 2, "LIF": 1, "Output": 1}
    assert graph.receipt.neurons == 3


@pytest.mark.parametrize(("shape", "flat"), [((4,), False), ((4, 1, 1), False), ((1, 2, 2), True)])
def test_images_of_mlp_keep_their_shape_where_it_is_one(write: Any, shape: tuple[int, ...], flat: bool) -> None:
    graph = write(mlp(LIF, (4, 3, 2)), torch.rand(5, *shape))
    assert graph.nodes["input"].input_type["input"].tolist() == (list(shape) if flat else [4])
    flattened = of_kind(graph, "Flatten")
    assert len(flattened) == flat
    for node in flattened:
        assert (node.start_dim, node.end_dim) == (0, -1)
        assert node.input_type["input"].tolist() == [1, 2, 2]


def test_sums_are_edges_that_meet(write: Any) -> None:
    """A residual block adds currents; both reach the neuron, and nothing else does."""
    torch.manual_seed(0)
    graph = write(models.resnet20(3, 2).eval(), torch.rand(2, 2, 8, 8))
    sources = {source for source, target in graph.edges if target == "body_1_1"}
    assert sources == {"body_1_0_branch_2_0", "body_0"}
    sources = {source for source, target in graph.edges if target == "body_4_1"}
    assert sources == {"body_4_0_branch_2_0", "body_4_0_shortcut_0_0"}
    assert not of_kind(graph, "Scale")


def test_spikes_that_are_added_to_themselves_get_a_node_of_their_own(write: Any) -> None:
    """An edge counts once."""
    body = Chain(Activation(LIF()), Residual(Chain(), Chain()))
    model = Network(TimeFolded(nn.Linear(3, 4)), body, Readout(4, 2), frame_dims=(2,))
    model.encoder[0].bias.fill_(1.0)
    graph = write(model, torch.rand(5, 3))
    (node,) = of_kind(graph, "Scale")
    assert all_are(node.scale, (4,), 1)
    assert len(graph.edges) == len(set(graph.edges)) == 6
    assert graph.receipt.logit_difference < 1e-6  # one addition in another order


def test_groups_are_written_out(write: Any) -> None:
    """Depthwise: the weight of channel c stands at [c, c], zeros elsewhere."""
    conv = nn.Conv2d(3, 3, 3, padding=1, groups=3)
    model = Network(TimeFolded(conv), Chain(Activation(LIF())), Readout(48, 2))
    graph = write(model, torch.rand(2, 3, 4, 4))
    (node,) = of_kind(graph, "Conv2d")
    assert int(node.groups) == 1
    expected = np.zeros((3, 3, 3, 3), np.float32)
    expected[range(3), range(3)] = conv.weight[:, 0].numpy()
    np.testing.assert_array_equal(node.weight, expected)
    assert graph.receipt.largest_mismatch == 0


@pytest.mark.parametrize(("padding", "numbers"), [("same", [2, 2]), ("valid", [0, 0]), ((1, 2), [1, 2])])
def test_padding_is_written_in_numbers(write: Any, padding: Any, numbers: list[int]) -> None:
    conv = nn.Conv2d(1, 2, 5, padding=padding)
    features = conv(torch.rand(1, 1, 8, 8)).numel()
    graph = write(Network(TimeFolded(conv), Chain(Activation(LIF())), Readout(features, 2)), torch.rand(2, 1, 8, 8))
    (node,) = of_kind(graph, "Conv2d")
    assert node.padding.tolist() == numbers
    assert graph.receipt.largest_mismatch == 0


def test_groups_of_several_channels(write: Any) -> None:
    conv = nn.Conv1d(4, 6, 3, groups=2)
    dense = nn.Conv1d(4, 6, 3)
    dense.load_state_dict({"weight": nir_write._without_groups(conv), "bias": conv.bias})
    x = torch.rand(5, 4, 9)
    torch.testing.assert_close(dense(x), conv(x))


@pytest.mark.parametrize(
    ("pool", "kind", "kernel", "stride", "padding"),
    [
        (nn.AvgPool2d(2), "AvgPool2d", [2, 2], [2, 2], [0, 0]),
        (nn.AvgPool2d((4, 2), stride=(1, 2)), "AvgPool2d", [4, 2], [1, 2], [0, 0]),
        (nn.AvgPool2d(3, 2, padding=1), "AvgPool2d", [3, 3], [2, 2], [1, 1]),
        (nn.AdaptiveAvgPool2d(1), "AvgPool2d", [4, 8], [4, 8], [0, 0]),
        (nn.AdaptiveAvgPool2d((2, 4)), "AvgPool2d", [2, 2], [2, 2], [0, 0]),
        (lambda x: x.mean((2, 3)), "AvgPool2d", [4, 8], [4, 8], [0, 0]),
        (lambda x: x.mean((-1, -2), keepdim=True), "AvgPool2d", [4, 8], [4, 8], [0, 0]),
        (lambda x: x.sum((2, 3)), "SumPool2d", [4, 8], [4, 8], [0, 0]),
    ],
)
def test_every_way_to_pool(
    write: Any, pool: Any, kind: str, kernel: list[int], stride: list[int], padding: list[int]
) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)
            self.head = nn.LazyLinear(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(pool(F.relu(self.conv(x))).flatten(1))

    torch.manual_seed(0)
    ann = Pooled()
    ann(torch.rand(1, 1, 4, 8))
    graph = write(*converted(ann, 1, 4, 8))
    (node,) = of_kind(graph, "AvgPool2d", "SumPool2d")
    assert type(node).__name__ == kind
    assert (node.kernel_size.tolist(), node.stride.tolist(), node.padding.tolist()) == (kernel, stride, padding)
    assert graph.receipt.largest_mismatch == 0
    assert graph.receipt.logit_difference < 1e-5  # means are added in another order


@pytest.mark.parametrize("dims", [0, 1, 2])
@pytest.mark.parametrize("double", [False, True])
def test_normalisation_of_spikes_is_a_layer(write: Any, dims: int, double: bool) -> None:
    """No layer before it can take it: scale and shift of each channel stand on a diagonal, or in a 1x1 kernel."""
    torch.manual_seed(0)
    shape = (3, *(4,) * dims)
    build = (nn.Linear, partial(nn.Conv1d, kernel_size=1), partial(nn.Conv2d, kernel_size=1))[dims]
    norm = BatchNorm(3)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 1.5)
    body = Chain(Activation(LIF()), Residual(Chain(norm), Chain()), Activation(LIF()))
    model = Network(TimeFolded(build(3, 3)), body, Readout(3 * 4**dims, 2), frame_dims=(dims + 2,))
    model.encoder[0].bias.fill_(1.0)
    images = torch.rand(4, *shape)
    model, images = (model.double(), images.double()) if double else (model, images)
    graph = write(model, images)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    kind = ("Affine", "Conv1d", "Conv2d")[dims]
    (node,) = (node for name, node in graph.nodes.items() if type(node).__name__ == kind and "branch" in name)
    np.testing.assert_allclose(node.weight.reshape(3, 3), torch.diag(scale), rtol=1e-6)
    np.testing.assert_allclose(node.bias, norm.bias - norm.running_mean * scale, rtol=1e-5, atol=1e-6)
    assert node.weight.dtype == node.bias.dtype == (np.float64 if double else np.float32)
    assert graph.receipt.largest_mismatch == 0


class Arithmetic(nn.Module):
    """Something between two layers, on `[B, 2, 4, 4]`."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.head = nn.Linear(32, 3)
        self.register_buffer("map", torch.arange(32.0).view(2, 4, 4) / 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.between(F.relu(self.first(x))))).flatten(1))


def write_converted(ann: nn.Module, path: Path) -> None:
    snn, images = converted(ann, 1, 4, 4)
    to_nir(snn, path, images=images)


def test_factors_of_each_neuron_are_a_scale(write: Any) -> None:
    """Times the threshold, which the spikes carried."""
    torch.manual_seed(0)
    factors = torch.arange(32.0).view(2, 4, 4) / 16
    snn, images = converted(Arithmetic(lambda x: x * factors), 1, 4, 4)
    graph = write(snn, images)
    (node,) = of_kind(graph, "Scale")
    threshold = next(iter(snn.neurons.values())).threshold.view(2, 1, 1)
    np.testing.assert_allclose(node.scale, factors * threshold, rtol=1e-6)
    assert graph.receipt.largest_mismatch == 0


@pytest.mark.parametrize(
    ("between", "match"),
    [
        (lambda x: x + torch.arange(32.0).view(2, 4, 4), "adds a constant.*bias of a layer"),
        (lambda x: x + x[:, :1], r"slice_axis.* cannot be said in NIR"),
        (lambda x: F.avg_pool2d(torch.cat((x, x), 2), (2, 1)), r"cat.* cannot be said in NIR.*Add instead"),
        (lambda x: x + x.mean((1, 2, 3), keepdim=True), r"pools over axes \[1, 2, 3\]|different shapes"),
        (lambda x: x + x.mean(2, keepdim=True), r"pools over axes \[2\].*height and width"),
    ],
)
def test_arithmetic_that_nir_cannot_say(tmp_path: Path, between: Callable[[Tensor], Tensor], match: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ConversionError, match=match):
        write_converted(Arithmetic(between), tmp_path / "a.nir")
    assert not list(tmp_path.iterdir())


def test_names_are_such_as_other_tools_take(write: Any) -> None:
    """No dots, slashes, words of Python or attributes of modules; and none twice."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"a/b": nn.Linear(6, 6), "a_b": nn.Linear(6, 6), "größe": nn.Linear(6, 6)})
            self.input, self.output = nn.Linear(6, 6), nn.Linear(6, 6)
            self._last = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in (self.input, *self.parts.values(), self.output):
                x = F.relu(layer(x))
            return self._last(x)

    torch.manual_seed(0)
    graph = write(*converted(Odd(), 6))
    assert len(of_kind(graph, "Affine")) == 6
    assert all(name.isidentifier() and name.isascii() for name in graph.nodes)
    assert {"input", "input_1", "parts_a_b", "parts_a_b_1", "output", "output_1", "node__last"} <= set(graph.nodes)
    assert graph.receipt.largest_mismatch == 0


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("body.3.branch.0", "body_3_branch_0"),
        ("0", "node_0"),
        ("lambda", "node_lambda"),
        ("forward", "node_forward"),
        ("training", "node_training"),
        ("_private", "node__private"),
        ("a b/c", "a_b_c"),
        ("", "node_"),
    ],
)
def test_node_names(name: str, written: str) -> None:
    assert nir_write.node_name(name) == written
    assert nir_write.node_name(written) == written  # the reader keeps them


# Metadata


def test_metadata_survive_hdf5(tmp_path: Path) -> None:
    """Texts, numbers, truth values and arrays, as they stand in the file."""
    ann = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    snn, images = converted(ann, 1, 4, 4, signed=True)
    (neuron,) = snn.neurons.values()
    neuron.bias, neuron.v_init = torch.randn(3, 2), torch.rand(2, 2, 2)
    to_nir(snn, tmp_path / "a.nir", images=images, dt=5e-4)
    with h5py.File(tmp_path / "a.nir") as file:
        metadata = file["node/metadata"]
        assert metadata["ranvier_format"][()] == 1
        assert metadata["dt"][()] == 5e-4
        assert metadata["dtype"][()] == b"float32"
        assert metadata["frame_dims"][()].tolist() == [4]
        assert metadata["written_by"][()].decode().startswith("ranvier ")
        (name,) = (name for name, node in file["node/nodes"].items() if node["type"][()] == b"IF")
        told = file[f"node/nodes/{name}/metadata"]
        assert {key: value[()] for key, value in told.items() if value.ndim == 0} == {
            "ranvier_neuron": b"ConvertedIF",
            "ranvier_reset": b"soft",
            "ranvier_signed": True,
            "ranvier_ties_fire": True,
        }
        np.testing.assert_array_equal(told["ranvier_bias"][()], neuron.bias.numpy())
        np.testing.assert_array_equal(told["ranvier_v_init"][()], neuron.v_init.numpy())


def test_metadata_of_each_kind(write: Any) -> None:
    (node,) = of_kind(write(mlp(partial(LIF, tau=3.7, v_threshold=0.3, reset="soft"))), "LIF")
    assert node.metadata == {
        "ranvier_neuron": "LIF",
        "ranvier_reset": "soft",
        "ranvier_tau_steps": 3.7,
        "ranvier_ties_fire": True,
        "ranvier_v_threshold": 0.3,
    }
    (node,) = of_kind(write(mlp(IF)), "IF")
    assert node.metadata == {"ranvier_neuron": "IF", "ranvier_ties_fire": True, "ranvier_v_threshold": 0.5}
    model = mlp(PLIF)
    (node,) = of_kind(write(model), "LIF")
    assert node.metadata["ranvier_decay"] == model.body.layers[0].neuron.decay.item()
    graph = write(mlp(LIFB))
    assert graph.nodes["body_0_burst"].metadata["ranvier_first_of_pair"] == "body_0"
    assert "ranvier_first_of_pair" not in graph.nodes["body_0"].metadata


def test_what_is_unsaid_is_told(write: Any) -> None:
    ties, soft = "a tie with the threshold fires", "soft reset"
    coupled = "reset by another neuron's spike"
    assert write(mlp(LIF)).receipt.unsaid == {ties: ("body.0",)}
    assert write(mlp(partial(IF, reset="soft"))).receipt.unsaid == {ties: ("body.0",), soft: ("body.0",)}
    assert write(mlp(LIFB)).receipt.unsaid == {ties: ("body.0", "body.0_burst"), coupled: ("body.0_burst",)}
    free = decouple(mlp(LIFB), free_running=True)
    assert write(free, torch.rand(2, 2)).receipt.unsaid == {ties: ("body.0", "body.0_burst")}
    snn, images = converted(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), 2, signed=True)
    (neuron,) = snn.neurons.values()
    assert set(write(snn, images).receipt.unsaid) == {ties, soft, "spikes that are taken back", "initial potential"}
    neuron.v_init.zero_()
    neuron.bias = torch.ones(3, 3)
    assert set(write(snn, images).receipt.unsaid) == {ties, soft, "spikes that are taken back", "bias of each step"}


# Precision


def test_double_precision_is_kept(write: Any) -> None:
    model = mlp(partial(LIF, v_threshold=0.3)).double()
    graph = write(model, torch.rand(3, 2, dtype=torch.float64))
    (node,) = of_kind(graph, "LIF")
    assert node.v_threshold.dtype == np.float64
    assert all_are(node.v_threshold, (3,), 0.3)
    for layer in of_kind(graph, "Affine"):
        assert layer.weight.dtype == layer.bias.dtype == np.float64
    np.testing.assert_array_equal(graph.nodes["encoder_1"].weight, model.encoder[1].weight.numpy())
    assert graph.metadata["dtype"] == "float64"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_written_as_float32(write: Any, dtype: torch.dtype) -> None:
    """Exactly; but a network that rounds all its values runs differently, which the receipt says."""
    model = mlp(LIF).to(dtype)
    graph = write(model, torch.rand(3, 2))
    weight = graph.nodes["encoder_1"].weight
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight, model.encoder[1].weight.float().numpy())
    assert graph.metadata["dtype"] == "float32"
    assert graph.receipt.logit_difference < 0.01  # bfloat16 has 8 bits
    assert next(model.parameters()).dtype == dtype


def test_normalisation_in_low_precision_is_folded_in_float32(write: Any) -> None:
    torch.manual_seed(0)
    model = models.vgg((4, "A"), num_classes=3, in_channels=1, image_size=4).bfloat16()
    graph = write(model, torch.rand(3, 1, 4, 4))
    assert graph.nodes["encoder_0"].weight.dtype == np.float32


def test_weights_in_other_layouts_are_written_in_order(write: Any) -> None:
    torch.manual_seed(0)
    model = models.vgg((4, "A", 6), num_classes=3, in_channels=2, image_size=4).eval()
    images = torch.rand(3, 2, 4, 4)
    plain = write(model, images)
    last = write(copy.deepcopy(model).to(memory_format=torch.channels_last), images)
    for name, node in plain.nodes.items():
        if type(node).__name__ == "Conv2d":
            np.testing.assert_array_equal(node.weight, last.nodes[name].weight)


# Strict


@pytest.mark.parametrize("threshold", [0.5, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strict_thresholds_are_the_next_lower_numbers(write: Any, threshold: float, dtype: torch.dtype) -> None:
    images = torch.rand(3, 2, dtype=dtype)
    (node,) = of_kind(write(mlp(partial(LIF, v_threshold=threshold)).to(dtype), images, strict=True), "LIF")
    exact = np.array(threshold, dtype=str(dtype).removeprefix("torch."))
    assert node.v_threshold.dtype == exact.dtype
    assert (node.v_threshold < exact).all()
    assert (np.nextafter(node.v_threshold, exact.dtype.type(np.inf)) == exact).all()
    assert "ranvier_ties_fire" not in node.metadata


@pytest.mark.parametrize("neuron", [IF, LIF, PLIF])
def test_strict_leaves_nothing_unsaid(write: Any, neuron: Any) -> None:
    assert write(mlp(neuron), strict=True).receipt.unsaid == {}


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: (mlp(partial(LIF, reset="soft")), None), r"soft reset \(body\.0\)"),
        (lambda: (mlp(LIFB), None), r"reset by another neuron's spike \(body\.0_burst\)"),
        (
            lambda: converted(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), 2, signed=True),
            r"soft reset \(1\); spikes that are taken back \(1\); initial potential \(1\)",
        ),
        (
            lambda: (models.mlp([4, *[3] * 5, 2], neuron=partial(IF, reset="soft")), None),
            r"soft reset \(body\.0, body\.2, body\.4 and 2 more\)",
        ),
    ],
    ids=["soft", "bursts", "converted", "many"],
)
def test_strict_refuses_and_writes_nothing(
    tmp_path: Path, build: Callable[[], tuple[nn.Module, Tensor | None]], match: str
) -> None:
    model, images = build()
    path = tmp_path / "a.nir"
    path.write_text("old")
    with pytest.raises(ValueError, match=rf"NIR cannot say everything about this network: {match}.*strict=False"):
        to_nir(model, path, images=images, strict=True)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_strict_takes_pairs_that_run_free(write: Any) -> None:
    graph = write(decouple(mlp(LIFB), free_running=True), torch.rand(3, 2), strict=True)
    assert len(of_kind(graph, "LIF")) == 2
    assert graph.receipt.plain_spike_mismatch == 0


# Refusals


class Unknown(Neuron):
    """A neuron of somebody's own."""

    def __init__(self, num_channels: int | None = None) -> None:
        super().__init__(num_channels=num_channels)
        self.params = LIF().params

    def scan(self, current: Tensor, state: Any) -> Any:
        return LIF().scan(current, state)


def network(*layers: nn.Module, features: int = 16) -> Network:
    """Images `[B, 1, 4, 4]` through `layers`, after a first neuron."""
    return Network(TimeFolded(nn.Conv2d(1, 1, 1)), Chain(Activation(LIF()), *layers), Readout(features, 2))


def folded(layer: nn.Module) -> TimeFolded:
    return TimeFolded(layer)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: network(Activation(Unknown())), r"body\.1: a Unknown has no counterpart in NIR.* IF, LIF, PLIF, LIFB"),
        (lambda: network(folded(nn.MaxPool2d(2)), features=4), r"max_pool2d.* cannot be said in NIR.*average pooling"),
        (lambda: network(folded(nn.ZeroPad2d(1)), features=36), r"pad.* cannot be said in NIR"),
        (
            lambda: network(Concat(Chain(), Activation(LIF())), features=32),
            r"body\.1 \(Concatenation\).*: cat .* cannot be said in NIR\. Add instead of concatenating",
        ),
        (lambda: network(folded(nn.Conv2d(1, 1, (3, 1))), features=8), r"kernel of \[3, 1\]"),
        (lambda: network(folded(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))), r"pad.* cannot be said"),
        (lambda: network(folded(nn.AvgPool2d(3, ceil_mode=True)), features=4), "rounds sizes up"),
        (lambda: network(folded(nn.AvgPool2d(3, 1, 1, count_include_pad=False))), "leaves padding out"),
        (lambda: network(folded(nn.AvgPool2d(2, divisor_override=3)), features=4), "divisor of its own"),
        (lambda: network(folded(nn.AdaptiveAvgPool2d(3)), features=9), "windows of unequal size"),
        (lambda: network(folded(nn.Linear(4, 4))), "maps the last axis"),
        (lambda: network(folded(nn.Unflatten(1, (1, 1)))), r"reshapes to \[1, 1, 4, 4\]"),
    ],
)
def test_parts_that_nir_cannot_say_are_named(tmp_path: Path, build: Callable[[], Network], match: str) -> None:
    path = tmp_path / "a.nir"
    path.write_text("old")
    with pytest.raises(ConversionError, match=match):
        to_nir(build(), path, images=torch.rand(2, 1, 4, 4))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_self_attention_is_named(tmp_path: Path) -> None:
    model = models.spikformer(3, 2, image_size=8, depth=1, dim=16, heads=2, patch_size=2)
    with pytest.raises(ConversionError, match="SelfAttention"):
        to_nir(model, tmp_path / "a.nir", images=torch.rand(2, 2, 8, 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dt", [0, -1e-3, math.nan, math.inf])
def test_steps_take_some_time(tmp_path: Path, dt: float) -> None:
    with pytest.raises(ValueError, match=f"dt is {dt}, but a step takes more than 0 seconds"):
        to_nir(mlp(LIF), tmp_path / "a.nir", dt=dt)
    assert not list(tmp_path.iterdir())


def test_neurons_of_others_go_back_as_they_came(tmp_path: Path) -> None:
    """IF, LIF, LI and I with numbers for each neuron: written, read, and written again, they are what they were."""
    rng = np.random.default_rng(0)
    shape = (2, 3)
    first = nir.NIRGraph(
        nodes={
            "input": nir.Input(input_type={"input": np.array(shape)}),
            "lif": nir.LIF(
                tau=rng.uniform(2e-3, 9e-3, shape),
                r=rng.uniform(1, 2, shape),
                v_leak=rng.normal(size=shape),
                v_threshold=rng.uniform(0.5, 1, shape),
                v_reset=rng.normal(size=shape),
            ),
            "if": nir.IF(
                r=rng.uniform(500, 900, shape), v_threshold=rng.uniform(0.5, 1, shape), v_reset=rng.normal(size=shape)
            ),
            "li": nir.LI(tau=rng.uniform(2e-3, 9e-3, shape), r=rng.uniform(1, 2, shape), v_leak=rng.normal(size=shape)),
            "i": nir.I(r=rng.uniform(500, 900, shape)),
            "output": nir.Output(output_type={"output": np.array(shape)}),
        },
        edges=[("input", "lif"), ("lif", "if"), ("if", "li"), ("li", "i"), ("i", "output")],
    )
    nir.write(tmp_path / "first.nir", first)
    network = from_nir(tmp_path / "first.nir", dt=1e-3, dtype=torch.float64)
    assert all(isinstance(neuron, AffineIF) for neuron in network.sites.values())
    receipt = to_nir(network, tmp_path / "second.nir", images=torch.rand(3, *shape, dtype=torch.float64), strict=True)
    second = nir.read(tmp_path / "second.nir")
    for kind in ("LIF", "IF", "LI", "I"):
        (before,), (after,) = of_kind(first, kind), of_kind(second, kind)
        for name, value in before.to_dict().items():
            if isinstance(value, np.ndarray):
                np.testing.assert_allclose(getattr(after, name), value, rtol=1e-14)  # x / dt * dt
    assert receipt.largest_mismatch == receipt.plain_spike_mismatch == receipt.logit_difference == 0
    assert set(receipt.spike_mismatch) == {name for name, n in network.sites.items() if n.params.fires}


def test_an_older_nir_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 1.0.7 graphs could not be read as they are, before 1.0.6 neurons had no reset potential."""
    monkeypatch.setattr(nir, "read", lambda filename: None)
    with pytest.raises(ImportError, match=r"nir is version .*1\.0\.7 or newer is needed: pip install"):
        nir_write.import_nir()
