"""Graphs whose spikes are bytes. Weights and thresholds have few bits, so that int8 and bfloat16 round nothing."""

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, fx, nn

from ranvier import models
from ranvier.conversion import ConvertedSNN, convert
from ranvier.conversion.spiking import GraphSNN
from ranvier.conversion.trace_network import trace_network
from ranvier.export import InferenceNetwork, byte_spikes, inference, to_inference
from ranvier.export.byte_spikes import ByteConv2d, BytePool2d, Bytes, Numbers
from ranvier.export.lean_neurons import Lean, LeanConvertedIF
from ranvier.kernels import native_byte_convolution, native_convolved_scan, precision
from ranvier.nn import LIF, LIFB, Neuron, Readout, TimeFolded
from ranvier.nn.structure import Activation, Chain, conv_norm

STEPS = 3


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True, params=["onednn", "native", None])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "onednn" and byte_spikes.byte_kernels() != "onednn":
        pytest.skip("needs a CPU with AVX-512 and a torch with oneDNN; other cases run elsewhere")
    if request.param == "native" and native_byte_convolution.obstacle() is not None:
        pytest.skip(str(native_byte_convolution.obstacle()))
    if request.param == "native" and native_convolved_scan.obstacle() is None:
        pytest.skip("what has a matrix unit has instructions for bfloat16")
    # Numbers that are no bytes are float32 where ours run: they are for processors without instructions for bfloat16.
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: request.param != "native")
    monkeypatch.setattr(inference, "byte_kernels", lambda: "native")
    monkeypatch.setattr(byte_spikes, "byte_kernels", lambda: request.param)


class Block(nn.Module):
    """Two convolutions beside an identity, and a ReLU after their sum, as in ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x).relu()) + x).relu()


class Twice(nn.Module):
    """One convolution at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.shared(self.first(x).relu()).relu()).relu()
        return self.last(x.mean((2, 3)))


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)]


ANNS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "plain": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()),
            *(nn.Conv2d(8, 8, 1), nn.ReLU(), *head(8)),
        ),
        {"ByteConv2d": 2, "Numbers": 1},
    ),
    "residual": (
        lambda: nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), Block(8), Block(8), *head(8)),
        {"ByteConv2d": 4, "Numbers": 3},
    ),
    "grouped": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()),
            *(nn.Conv2d(8, 4, 1, groups=2), nn.ReLU(), *head(4)),
        ),
        {"ByteConv2d": 2, "Numbers": 1},
    ),
    "average pooling": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 1), nn.ReLU()),
            *(nn.AvgPool2d(2, padding=1), nn.Conv2d(8, 8, 1), nn.ReLU(), *head(8)),
        ),
        {"ByteConv2d": 1, "BytePool2d": 1, "Numbers": 2},
    ),
    "one convolution twice": (Twice, {"ByteConv2d": 2, "Numbers": 1}),
}


def few_bits(snn: ConvertedSNN, *, binary: bool = False) -> ConvertedSNN:
    """Thresholds of 1/2 to 2, or of 1 with binary spikes; weights whose products with them are 0 or +-1/2; biases and
    potentials of few bits.
    """
    for neuron in snn.neurons.values():
        count = len(neuron.v_init)
        neuron.threshold = torch.ones(count) if binary else 2.0 ** torch.randint(-1, 2, (count,))
        neuron.binary = binary
        neuron.bias = torch.randint(-1, 2, (STEPS, count)) / 8
        neuron.v_init = neuron.threshold / 2
    worths = {len(neuron.threshold): neuron.threshold for neuron in snn.neurons.values()}
    for neuron in snn.neurons.values():  # all layers of one width share thresholds, whichever gets their spikes
        neuron.threshold = worths[len(neuron.threshold)].clone()
    for layer in snn.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            signs = torch.randint(-1, 2, layer.weight.shape).float() / 2
            channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
            if channels in worths:
                worth = worths[channels]
                if isinstance(layer, nn.Conv2d):
                    worth = worth.view(layer.groups, 1, -1, 1, 1).expand(-1, len(signs) // layer.groups, -1, 1, 1)
                    worth = worth.flatten(0, 1)
                signs = signs / worth
            layer.weight.copy_(signs)
            if layer.bias is not None:
                layer.bias.copy_(torch.randint(-2, 3, layer.bias.shape) / 4)
    return snn


def converted(name: str, *, signed: bool = False, binary: bool = False) -> tuple[ConvertedSNN, Tensor]:
    make, _ = ANNS[name]
    images = torch.randint(0, 4, (6, 2, 8, 8)) / 2
    return few_bits(
        convert(make(), images, steps=STEPS, threshold="max", bias="none", signed=signed), binary=binary
    ), images


def count(fast: nn.Module) -> dict[str, int]:
    kinds = [type(part).__name__ for part in fast.modules() if isinstance(part, ByteConv2d | BytePool2d | Numbers)]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def sent_by(fast: InferenceNetwork) -> list[Tensor]:
    """What each neuron sent."""
    found: list[Tensor] = []
    for part in fast.modules():
        if isinstance(part, Lean):
            part.register_forward_hook(lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out))
    return found


def assert_same(fast: nn.Module, snn: nn.Module, images: Tensor) -> None:
    expected = snn(images, STEPS)
    assert expected.std() > 0.1
    torch.testing.assert_close(fast(images, STEPS), expected, rtol=0, atol=2**-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ANNS)
def test_logits_of_the_network_and_where_bytes_go(name: str) -> None:
    snn, images = converted(name)
    before = {path: tensor.clone() for path, tensor in snn.state_dict().items()}
    fast = to_inference(snn, precision="int8")
    assert count(fast) == dict(sorted(ANNS[name][1].items()))
    assert_same(fast, snn, images)
    sent = sent_by(fast)
    fast(images, STEPS)
    assert {values.dtype for values in sent} == {torch.uint8}
    assert all(0 < values.float().mean() < 1 for values in sent)
    for path, tensor in snn.state_dict().items():
        assert torch.equal(tensor, before[path])
    assert not any(neuron.binary for neuron in snn.neurons.values())


def test_each_convolution_has_the_thresholds_of_its_own_neurons() -> None:
    snn, images = converted("plain")
    layers = [layer for layer in snn.modules() if isinstance(layer, nn.Conv2d | nn.Linear)][1:]
    for exponent, neuron, layer in zip((-1, 1, 0), snn.neurons.values(), layers, strict=True):
        neuron.threshold = 2.0 ** (exponent + torch.randint(-1, 2, (8,)))
        neuron.v_init = neuron.threshold / 2
        signs = torch.randint(-1, 2, layer.weight.shape) / 2
        layer.weight.copy_(signs / neuron.threshold.view(-1, *(1,) * (layer.weight.ndim - 2)))
    assert_same(to_inference(snn, precision="int8"), snn, images)


class Named(nn.Module):
    """Layers with names that new parts of the graph would have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 1)
        self.avg_pool2d_of_bytes, self.fold_time_2_numbers = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(self.first(x).relu(), kernel_size=2, stride=1)
        x = self.avg_pool2d_of_bytes(self.second(x).relu()).relu()
        return self.fold_time_2_numbers(x.mean((2, 3)))


def test_new_parts_replace_no_layer_of_their_name() -> None:
    images = torch.randint(0, 4, (6, 2, 8, 8)) / 2
    snn = few_bits(convert(Named(), images, steps=STEPS, threshold="max", bias="none"))
    fast = to_inference(snn, precision="int8")
    assert count(fast) == {"ByteConv2d": 2, "BytePool2d": 1, "Numbers": 1}
    assert {"avg_pool2d_of_bytes_", "fold_time_2_numbers_"} <= {
        name for name, _ in fast.network.network.named_children()
    }
    assert_same(fast, snn, images)


def test_a_layer_that_the_graph_runs_twice_keeps_its_weights() -> None:
    """Its inputs may be worth different things."""
    snn, _ = converted("one convolution twice")
    graph = snn.network
    first, second = (
        node
        for node in graph.graph.nodes
        if "shared" in str(node.target) and node.op == "call_module"
        if isinstance(graph.get_submodule(str(node.target)), nn.Conv2d)
    )
    second.target = first.target
    graph.recompile()
    with pytest.raises(ValueError, match="has no effect"):
        to_inference(snn, precision="int8")


def test_a_neuron_that_the_graph_runs_twice_sends_numbers() -> None:
    snn, images = converted("residual")
    graph = snn.network
    first, second, *_ = (
        node
        for node in graph.graph.nodes
        if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), Activation)
    )
    second.target = first.target
    graph.recompile()
    fast = to_inference(snn, precision="int8")
    assert count(fast) == {"ByteConv2d": 2, "Numbers": 2}
    assert_same(fast, snn, images)


def test_streams_as_a_whole_call() -> None:
    snn, images = converted("residual")
    fast = to_inference(snn, precision="int8")
    whole, state = fast(images, STEPS), None
    for t in range(STEPS):
        logits, state = fast(images, 1, state=state, return_state=True)
        torch.testing.assert_close(logits[0], whole[t])


def test_neurons_that_were_binary_stay_so_and_their_weights_as_they_are() -> None:
    snn, images = converted("plain", binary=True)
    fast = to_inference(snn, precision="int8")
    assert_same(fast, snn, images)
    assert all(part.worth is None for part in fast.modules() if isinstance(part, Numbers))


def test_signed_neurons_send_numbers() -> None:
    with pytest.raises(ValueError, match="converted neurons \\(but signed ones\\)"):
        to_inference(converted("plain", signed=True)[0], precision="int8")
    snn, images = converted("plain")
    list(snn.neurons.values())[1].signed = True
    fast = to_inference(snn, precision="int8")
    assert count(fast) == {"ByteConv2d": 1, "Numbers": 1}
    assert_same(fast, snn, images)


def graph_of(pool: nn.Module, neuron: Callable[[int], Neuron]) -> tuple[GraphSNN, Tensor]:
    """A network of `ranvier.models` as a graph: pooling comes behind its neurons."""
    body = Chain(
        *(Activation(neuron(8)), TimeFolded(pool), conv_norm(8, 8), Activation(neuron(8)), conv_norm(8, 8)),
        *(Activation(neuron(8)), TimeFolded(pool, nn.Flatten(1))),
    )
    model = models.Network(conv_norm(1, 8), body, Readout(32, 5)).eval()
    images = torch.randint(0, 4, (4, 1, 8, 8)) / 2
    snn = trace_network(model, images).to_snn()
    for layer in snn.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.copy_(torch.randint(-1, 2, layer.weight.shape) / 2)
            if layer.bias is not None:
                layer.bias.fill_(0.25)
    return snn, images


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2)])
def test_pooling_behind_neurons_pools_bytes(pool: nn.Module) -> None:
    snn, images = graph_of(pool, LIF)
    fast = to_inference(snn, precision="int8")
    assert count(fast) == {"ByteConv2d": 2, "BytePool2d": 2, "Numbers": 1}
    assert_same(fast, snn, images)


def test_burst_neurons_send_numbers() -> None:
    with pytest.raises(ValueError, match="has no effect"):
        to_inference(graph_of(nn.AvgPool2d(2), LIFB)[0], precision="int8")


def test_neurons_and_layers_with_hooks_stay() -> None:
    snn, images = converted("plain")
    sites = [part for part in snn.modules() if isinstance(part, Activation)]
    sites[0].register_forward_hook(lambda _, __, out: None)
    fast = to_inference(snn, precision="int8")
    assert count(fast) == {"ByteConv2d": 1, "Numbers": 1}
    assert_same(fast, snn, images)
    layers = [part for part in snn.modules() if isinstance(part, nn.Conv2d)]
    layers[2].register_forward_pre_hook(lambda _, given: None)
    with pytest.raises(ValueError, match="has no effect"):
        to_inference(snn, precision="int8")
    snn, images = graph_of(nn.MaxPool2d(2), LIF)
    next(iter(snn.sites.values())).register_forward_hook(lambda _, __, out: None)
    fast = to_inference(snn, precision="int8")
    assert count(fast) == {"ByteConv2d": 1, "BytePool2d": 1, "Numbers": 1}
    assert_same(fast, snn, images)


def test_copies_and_files() -> None:
    snn, images = converted("residual")
    fast = to_inference(snn, precision="int8")
    expected = fast(images, STEPS)
    assert torch.equal(copy.deepcopy(fast)(images, STEPS), expected)
    file = io.BytesIO()
    torch.save(fast.state_dict(), file)
    other = to_inference(converted("residual")[0], precision="int8")
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(images, STEPS), expected)


def test_worths_by_hand() -> None:
    """Bytes of two channels worth 2 and 0.5, summed over four pixels."""
    came = Bytes(divisor=4, most=4, worth=torch.tensor([2.0, 0.5]))
    x = torch.tensor([3, 4], dtype=torch.uint8).view(1, 2, 1, 1)
    assert Numbers(came)(x).flatten().tolist() == [1.5, 0.5]
    assert Numbers(came)(x.flatten(1)).tolist() == [[1.5, 0.5]]
    layer = nn.Conv2d(2, 1, 1, bias=False)
    layer.weight.copy_(torch.tensor([1.0, -4.0]).view(1, 2, 1, 1))
    found = ByteConv2d(layer, came)
    assert found.weight.flatten().tolist() == [127, -127]
    assert found(x).item() == pytest.approx(1.5 * 1 - 0.5 * 4, rel=2**-8)


def test_the_graph_is_sound_and_other_precisions_use_the_prepared_neurons() -> None:
    snn, images = converted("residual")
    fast = to_inference(snn, precision="float32")
    assert any(type(part) is LeanConvertedIF for part in fast.modules())
    torch.testing.assert_close(fast(images, STEPS), snn(images, STEPS))
    graph = to_inference(snn, precision="int8").network.network
    assert isinstance(graph, fx.GraphModule)
    graph.graph.lint()
