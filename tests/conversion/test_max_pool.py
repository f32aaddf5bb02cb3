from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ranvier.conversion import Settings, convert, load, save
from ranvier.conversion.spiking import pool_sums
from ranvier.conversion.trace import ConversionError, trace
from ranvier.conversion.trace_network import trace_network
from ranvier.conversion.vocabulary import MAX_POOLS
from ranvier.evaluation import energy
from ranvier.export import to_inference, to_nir, to_program
from ranvier.nn import QCFS


class Net(nn.Module):
    """A convolution, something that pools, and a linear layer that takes whatever size."""

    def __init__(self, something: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.other = nn.Conv2d(3, 8, 3)
        self.parts = nn.ModuleList(parts)
        self.something = something
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.something(self.conv(x), self.other(x), *self.parts)
        return self.head(F.relu(x).mean((2, 3))[:, :4])


def order(graph: fx.GraphModule) -> list[str]:
    """Modules by path, max-poolings as `max`, and joints, in the order in which they run."""
    names = []
    for node in graph.graph.nodes:
        if node.op == "call_module":
            names.append(node.target)
        elif node.target in MAX_POOLS:
            names.append("max")
        elif node.op == "call_function" and node.target.__name__ in ("cat", "add"):
            names.append(node.target.__name__)
    return names[:-2]  # without the activation and layer that come last


def pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True)


def traced(something: Callable[..., Tensor], *parts: nn.Module) -> fx.GraphModule:
    """The graph, after the check on other images that pooling commutes exactly, at the borders, too."""
    torch.manual_seed(0)
    ann = Net(something, *parts).eval()
    graph = trace(ann, torch.randn(2, 3, 9, 9))
    images = torch.randn(5, 3, 9, 9)
    torch.testing.assert_close(graph(images), ann(images).detach(), rtol=1e-5, atol=1e-6)
    return graph


def test_pooling_moves_before_the_activation() -> None:
    assert order(traced(lambda x, y: pool(F.relu(x)))) == ["conv", "max", "relu"]


def test_pooling_moves_before_qcfs_and_its_copies_share_nothing() -> None:
    graph = traced(lambda x, y, act: pool(act(x)) + act(y)[:, :, :4, :4], QCFS(levels=4))
    assert order(graph) == ["conv", "other", "max", "parts.0", "parts.0_1", "add"]
    assert graph.get_submodule("parts.0").ceiling is not graph.get_submodule("parts.0_1").ceiling


def test_adaptive_and_repeated_pooling_move() -> None:
    assert order(traced(lambda x, y: F.adaptive_max_pool2d(F.relu(x), 2))) == ["conv", "max", "relu"]
    assert order(traced(lambda x, y: pool(F.dropout(pool(F.relu(x)), 0.1, False)))) == ["conv", "max", "max", "relu"]


def test_1d_pooling_moves() -> None:
    assert order(traced(lambda x, y: F.max_pool1d(x.relu().flatten(2), 7)[..., None])) == ["conv", "max", "relu"]


def test_an_activation_with_other_users_stays_for_them() -> None:
    def both(x: Tensor, y: Tensor) -> Tensor:
        x = F.relu(x)
        return pool(x) + F.avg_pool2d(x, 3, stride=2, padding=1)

    assert order(traced(both)) == ["conv", "relu", "max", "relu_2", "add"]


def test_pooling_twice_from_one_activation() -> None:
    def twice(x: Tensor, y: Tensor) -> Tensor:
        x = F.relu(x)
        return pool(x) - F.max_pool2d(x, 2, stride=2, ceil_mode=True)[:, :, :4, :4]

    assert order(traced(twice)) == ["conv", "max", "relu_2", "max", "relu", "add"]


def test_pooling_moves_through_concatenation() -> None:
    graph = traced(lambda x, y: pool(torch.cat([F.relu(x), F.relu(y)], 1)))
    assert order(graph) == ["conv", "other", "max", "relu", "max", "relu_1", "cat"]


def test_pooling_of_one_activation_concatenated_with_itself() -> None:
    def doubled(x: Tensor, y: Tensor) -> Tensor:
        x = F.relu(x)
        return pool(torch.cat([x, x[:, 1:], x], 1))

    assert order(traced(doubled)) == ["conv", "max", "relu", "max", "relu_2", "cat"]


def test_of_a_concatenation_only_activations_are_passed() -> None:
    graph = traced(lambda x, y: pool(torch.cat([F.relu(x), y], 1)))
    assert order(graph) == ["conv", "other", "max", "relu", "max", "cat"]


def test_pooling_moves_through_rearrangements() -> None:
    graph = traced(lambda x, y: pool(F.pad(F.channel_shuffle(F.relu(x), 2)[:, 1:, ::2].mT, (1, 1))))
    assert order(graph) == ["conv", "max", "relu"]


@pytest.mark.parametrize(
    ("something", "expected"),
    [
        (lambda x, y: pool(x), ["conv", "max"]),
        (lambda x, y, norm: norm(pool(x)), ["conv", "max", "parts.0"]),
        (lambda x, y: pool(x + F.relu(y)), ["conv", "other", "relu", "add", "max"]),
        (lambda x, y: pool(F.avg_pool2d(x, 2)), ["conv", "max"]),
        (lambda x, y: pool(F.pad(x, (1, 1), value=1.0)), ["conv", "max"]),
    ],
)
def test_pooling_of_currents_stays(something: Callable[..., Tensor], expected: list[str]) -> None:
    parts = [nn.BatchNorm2d(8)] if "parts.0" in expected else []
    assert order(traced(something, *parts)) == expected


def test_pooling_of_the_image_stays() -> None:
    ann = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 2))
    assert order(trace(ann, torch.rand(2, 3, 8, 8))) == ["max", "2"]


@pytest.mark.parametrize(
    ("something", "expected"),
    [
        (lambda x, y: pool(F.avg_pool2d(F.relu(x), 2)), ["conv", "relu", "max"]),
        (lambda x, y: pool(F.relu(x) + F.relu(y)), ["conv", "other", "relu", "relu_1", "add", "max"]),
        (lambda x, y: pool(-F.relu(x)), ["conv", "relu", "max"]),
        (lambda x, y: pool(torch.cat([F.relu(x), F.relu(y)], 2)), ["conv", "other", "relu", "relu_1", "cat", "max"]),
        (lambda x, y: pool(F.pad(F.relu(x), (1, 1), value=1.0)), ["conv", "relu", "max"]),
        (lambda x, y, norm: pool(norm(F.relu(x))), ["conv", "relu", "parts.0", "max"]),
    ],
)
def test_pooling_of_combined_activations_stays(something: Callable[..., Tensor], expected: list[str]) -> None:
    parts = [nn.BatchNorm2d(8)] if "parts.0" in expected else []
    assert order(traced(something, *parts)) == expected


def features(norm_after: bool) -> nn.Sequential:
    """Three blocks of convolution, normalisation, ReLU and max-pooling, as in VGG; or with the two in other order."""
    layers: list[nn.Module] = []
    channels = 3
    for _ in range(3):
        norm = nn.BatchNorm2d(16)
        norm.running_mean.normal_()
        norm.weight.data.uniform_(-1, 1.5)
        block = [nn.ReLU(), norm] if norm_after else [norm, nn.ReLU()]
        layers += [nn.Conv2d(channels, 16, 3, padding=1), *block, nn.MaxPool2d(2)]
        channels = 16
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 10)).eval()


def error(ann: nn.Module, snn: nn.Module, images: Tensor, steps: int) -> float:
    """Distance of mean logits, in standard deviations of the ANN's over images."""
    logits = ann(images).detach()
    distance = snn(images, steps).mean(0) - logits
    return float(distance.square().mean().sqrt() / (logits - logits.mean(0)).square().mean().sqrt())


@pytest.mark.parametrize("norm_after", [False, True])
def test_more_steps_bring_a_network_with_max_pooling_to_its_ann(norm_after: bool) -> None:
    """As 1 / T, which the largest current of each step does not: that is too large at any T."""
    torch.manual_seed(0)
    ann, images = features(norm_after), torch.randn(40, 3, 8, 8)
    snn = convert(ann, images, steps=1, threshold="max", bias="none", settings=Settings(held_out=0))
    errors = [error(ann, snn, images, steps) for steps in (16, 64, 256)]
    assert errors[0] < 2
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3


def test_streaming_gives_what_one_call_gives_bit_for_bit() -> None:
    torch.manual_seed(0)
    ann, images = features(norm_after=True), torch.randn(6, 3, 8, 8)
    snn = convert(ann, torch.randn(40, 3, 8, 8), steps=4, signed=True)
    together, state, parts = snn(images, 4), None, []
    for steps in (1, 2, 1):
        logits, state = snn(images, steps, state=state, return_state=True)
        parts.append(logits)
    assert torch.equal(torch.cat(parts), together)


def test_pooling_before_the_first_neuron_has_no_memory() -> None:
    ann = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)).eval()
    snn = convert(ann, torch.rand(40, 3, 8, 8), steps=2, bias="none")
    assert not any(node.target is pool_sums for node in snn.network.graph.nodes)
    _, state = snn(torch.rand(2, 3, 8, 8), 2, return_state=True)
    assert len(state) == 1


def test_saved_exported_counted_and_compiled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ann, images = features(norm_after=False), torch.randn(8, 3, 8, 8)
    snn = convert(ann, torch.randn(40, 3, 8, 8), steps=3)
    expected = snn(images, 3)
    save(snn, tmp_path / "snn.safetensors")
    assert torch.equal(load(tmp_path / "snn.safetensors")(images, 3), expected)
    fast = to_inference(snn, precision="float32", implementation="reference")
    torch.testing.assert_close(fast(images, 3), expected, rtol=1e-4, atol=1e-4)
    for streaming in (False, True):
        receipt = to_program(snn, tmp_path / "snn.pt2", images=images, steps=3, streaming=streaming)
        assert receipt.difference <= receipt.tolerance
    assert "max-pooling" in str([port.holds for port in receipt.inputs])
    again = trace_network(snn, images).to_snn()  # one step, and over time again
    assert torch.equal(again(images, 3), expected)
    assert energy(snn, [(images, torch.zeros(8, dtype=torch.long))], 3).total > 0
    with pytest.raises(ConversionError, match="max_pool.* cannot be said in NIR"):
        to_nir(snn, tmp_path / "snn.nir", images=images)
