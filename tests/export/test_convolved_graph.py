"""Graphs in which a convolution and its neurons are one kernel, against the same graphs in which they are two."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ranvier import models
from ranvier.conversion import ConvertedSNN, convert, decouple
from ranvier.conversion.spiking import GraphSNN
from ranvier.export import InferenceNetwork, to_inference
from ranvier.export.convolved_graph import ConvolvedActivation
from ranvier.kernels import native_convolved_scan
from ranvier.nn import LIF

from .networks import check_streamed_and_apart, close, round_weights

needs_unit = pytest.mark.skipif(
    native_convolved_scan.obstacle() is not None, reason=str(native_convolved_scan.obstacle())
)
STEPS = 3


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class Block(nn.Module):
    """Two convolutions beside a shortcut, and a ReLU after their sum, as in ResNet."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(ins, outs, 3, padding=1), nn.Conv2d(outs, outs, 3, padding=1)
        self.shortcut = nn.Identity() if ins == outs else nn.Conv2d(ins, outs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.shortcut(x) + self.second(self.first(x).relu())).relu()


class Apart(nn.Module):
    """One convolution that two neurons read, and one at two places, which tracing copies."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.read = (nn.Conv2d(32, 32, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.twice(self.twice(x).relu()).relu()
        y = self.read(x)
        return y.relu() + (y - 0.5).relu()


def ending(*parts: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)).eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "plain": (
        lambda: ending(
            *(nn.Conv2d(2, 32, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(32, 40, 3, padding=1), nn.ReLU()), channels=40
        ),
        1,
    ),
    "resnet": (lambda: ending(nn.Conv2d(2, 32, 3), nn.ReLU(), Block(32, 32), Block(32, 64), channels=64), 4),
    "apart": (lambda: ending(nn.Conv2d(2, 32, 3), nn.ReLU(), Apart(), channels=32), 3),
}


def made(name: str, *, signed: bool = False, **settings: Any) -> tuple[ConvertedSNN, Tensor]:
    """A converted network whose sums are exact at any precision, with a bias for each step, and images."""
    ann = NETWORKS[name][0]()
    images = torch.randint(-4, 5, (6, 2, 10, 10)) / 2
    snn = convert(ann, images, steps=STEPS, threshold="max", bias="none", signed=signed, **settings)
    round_weights(snn)
    for neuron in snn.neurons.values():
        neuron.threshold.fill_(2.0 ** -int(torch.randint(0, 2, ())))  # one, so that 8 bits hold the weights
        neuron.bias = torch.randint(-2, 3, (STEPS, neuron.bias.shape[1])) / 16
        neuron.v_init.copy_(neuron.threshold.view(-1, *[1] * (neuron.v_init.ndim - 1)) / 2)
    return snn, images


def apart(fast: InferenceNetwork) -> InferenceNetwork:
    """The same, with two kernels for each pair."""
    fast = copy.deepcopy(fast)
    for part in fast.modules():
        if isinstance(part, ConvolvedActivation):
            part.neuron.register_forward_hook(lambda *_: None)
    return fast


def first_pair(fast: InferenceNetwork) -> tuple[Any, ConvolvedActivation]:
    """The first activation that runs a convolution, and that convolution."""
    graph: Any = fast.network.network
    nodes = {str(node.target): node for node in graph.graph.nodes if node.op == "call_module"}
    for name, part in graph.named_modules():
        if isinstance(part, ConvolvedActivation):
            return graph.get_submodule(nodes[name].args[0].target), part
    raise AssertionError("there is none")


def activations(fast: nn.Module) -> int:
    return sum(isinstance(part, ConvolvedActivation) for part in fast.modules())


@needs_unit
@pytest.mark.parametrize(("precision", "signed"), [("bfloat16", False), ("bfloat16", True), ("int8", False)])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_computes_what_it_did(name: str, precision: Any, signed: bool) -> None:
    snn, images = made(name, signed=signed)
    fast = to_inference(snn, precision=precision)
    assert activations(fast) == NETWORKS[name][1]
    close(fast(images, STEPS), snn(images, STEPS))
    check_streamed_and_apart(fast, apart(fast), images)
    assert list(fast.network.sites) == list(snn.sites)  # type: ignore[union-attr]


@needs_unit
def test_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the four neurons behind the first, and two of them get the shortcut besides."""
    snn, images = made("resnet")
    fast = to_inference(snn)
    calls: list[tuple[Any, ...]] = []
    run = native_convolved_scan.PreparedConvolvedConverted.__call__
    monkeypatch.setattr(
        native_convolved_scan.PreparedConvolvedConverted,
        "__call__",
        lambda *given, **named: calls.append(given) or run(*given, **named),
    )
    fast(images, STEPS)
    assert [given[5] is not None for given in calls] == [False, True, False, True]


@needs_unit
def test_graphs_of_other_neurons_have_them_too() -> None:
    network = models.vgg((32, 40, "A", 64), num_classes=3, in_channels=2, image_size=8, neuron=LIF).eval()
    images = torch.randint(-4, 5, (4, 2, 8, 8)) / 2
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.copy_(torch.randint(-2, 3, layer.weight.shape) / 8)
    fast = to_inference(decouple(network, images))
    assert activations(fast) == 2
    close(fast(images, STEPS), apart(fast)(images, STEPS))


@needs_unit
def test_names_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that were kept fit a network that was prepared where there is no unit."""
    snn, images = made("resnet")
    for precision in ("bfloat16", "int8"):
        fast = to_inference(snn, precision=precision)  # type: ignore[arg-type]
        assert activations(fast) == 4
        with monkeypatch.context() as patch:
            patch.setattr(native_convolved_scan, "obstacle", lambda: "none here")
            other = to_inference(snn, precision=precision)  # type: ignore[arg-type]
        assert activations(other) == 0
        kept = fast.state_dict()
        assert list(kept) == list(other.state_dict())
        other.load_state_dict({name: 2 * value if "bias" in name else value for name, value in kept.items()})
        fast.load_state_dict(other.state_dict())
        close(fast(images, STEPS), other(images, STEPS))


@needs_unit
def test_a_convolution_that_is_added_to_itself_takes_two_kernels() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(32, 32, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return (y + y).relu()

    ann = ending(nn.Conv2d(2, 32, 3), nn.ReLU(), Doubled(), channels=32)
    images = torch.rand(6, 2, 10, 10)
    fast = to_inference(convert(ann, images, steps=STEPS, threshold="max", bias="none"))
    assert activations(fast) == 0
    assert fast(images, STEPS).shape == (STEPS, 6, 5)


@needs_unit
def test_a_sum_of_another_shape_takes_two_kernels() -> None:
    """One that is the same at all places of an image."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(32, 32, 3, padding=1), nn.AdaptiveAvgPool2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x) + self.pool(x)).relu()

    ann = ending(nn.Conv2d(2, 32, 3), nn.ReLU(), Gated(), channels=32)
    images = torch.rand(6, 2, 10, 10)
    fast = to_inference(convert(ann, images, steps=STEPS, threshold="max", bias="none"))
    assert activations(fast) == 1
    close(fast(images, STEPS), apart(fast)(images, STEPS))


@needs_unit
def test_copies_and_what_is_written_to_run_alike() -> None:
    snn, images = made("resnet")
    fast = to_inference(snn)
    wanted = fast(images, STEPS)
    other = copy.deepcopy(fast)
    assert torch.equal(other(images, STEPS), wanted)
    conv, part = first_pair(other)
    conv.layer.weight.mul_(2)
    part.neuron.threshold.mul_(2)
    part.neuron.v_init.mul_(2)
    part.neuron.bias.mul_(2)
    assert not torch.equal(other(images, STEPS), wanted)
    close(other(images, STEPS), apart(other)(images, STEPS))
    assert torch.equal(fast(images, STEPS), wanted)


@needs_unit
@pytest.mark.parametrize("part", ["conv", "neuron"])
def test_hooks_see_what_they_would(part: str) -> None:
    snn, images = made("resnet")
    fast = to_inference(snn)
    wanted, seen = fast(images, STEPS), []
    conv, activation = first_pair(fast)
    handle = {"conv": conv, "neuron": activation.neuron}[part].register_forward_hook(
        lambda _, __, output: seen.append(output)
    )
    close(fast(images, STEPS), wanted)
    handle.remove()
    assert torch.equal(fast(images, STEPS), wanted)
    assert len(seen) == 1


@needs_unit
def test_too_many_steps_and_states_of_others_are_refused_as_ever() -> None:
    snn, images = made("resnet")
    fast = to_inference(snn)
    with pytest.raises(ValueError, match="calibrated for steps 1 to 3"):
        fast(images, STEPS + 1)
    _, states = fast(images, 1, return_state=True)
    with pytest.raises(ValueError, match="state"):
        fast(images[:2], 1, state=states)


@needs_unit
def test_a_compiler_sees_two() -> None:
    snn, images = made("resnet")
    fast = to_inference(snn)
    compiled = torch.compile(fast.network, backend="eager", fullgraph=True)
    images = images.bfloat16()
    close(compiled(images, STEPS).float(), fast.network(images, STEPS).float())


def test_elsewhere_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_convolved_scan, "obstacle", lambda: "none here")
    snn, images = made("resnet")
    fast = to_inference(snn)
    assert activations(fast) == 0
    assert isinstance(fast.network, GraphSNN)
    close(fast(images, STEPS), snn(images, STEPS))


def test_float32_and_other_implementations_have_none() -> None:
    snn, _ = made("plain")
    assert activations(to_inference(snn, precision="float32")) == 0
    assert activations(to_inference(snn, implementation="reference")) == 0
