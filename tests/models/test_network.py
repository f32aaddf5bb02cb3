"""What every network promises, tested on all of them at small sizes. Counts and layouts: the file of each network."""

import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from ranvier import models
from ranvier.kernels import dispatch
from ranvier.models import Network
from ranvier.nn import IF, LIF, LIFB, PLIF, BatchNorm, TimeFolded
from ranvier.nn.structure import Activation, Chain, NeuronFactory

Builder = Callable[..., Network]

NETWORKS: dict[str, tuple[Builder, int]] = {
    "mlp": (partial(models.mlp, [3 * 8 * 8, 16, 12, 10]), 8),
    "vgg": (partial(models.vgg, (4, "A", 8), num_classes=10, in_channels=3, image_size=8, hidden=(6,)), 8),
    "conv4": (partial(models.conv4, 10, 3, image_size=8), 8),
    "vggsnn": (partial(models.vggsnn, 10, 3, image_size=16), 16),
    "snn6": (partial(models.snn6, 10, 3, image_size=16), 16),
    "vgg16": (partial(models.vgg16, image_size=32, hidden=(64, 64)), 32),
    # Gains for a threshold four times that of the neurons: at its own, a fresh ResNet-19 hardly fires.
    "resnet19": (partial(models.resnet19, v_threshold=2.0), 8),
    "resnet20": (models.resnet20, 8),
    "resnet9": (models.resnet9, 16),
    "sew_resnet18": (models.sew_resnet18, 8),
    "sew_resnet18_imagenet": (partial(models.sew_resnet18, stem="imagenet"), 32),
    "sew_resnet34": (models.sew_resnet34, 8),
    "spikformer": (partial(models.spikformer, image_size=16, depth=2, dim=32, heads=2), 16),
}
"""Builder and image size; all take three channels and have ten classes."""

NEURONS: dict[str, NeuronFactory] = {
    "IF": IF,
    "LIF": LIF,
    "PLIF": PLIF,
    "LIFB": LIFB,
    "LIFB_factory": lambda channels: LIFB(channels, burst_init=1.5),
    "ReLU": lambda channels: nn.ReLU(),
}

SAME_PARTS = ("conv4", "vggsnn", "snn6", "vgg16", "sew_resnet18_imagenet", "sew_resnet34")
"""Networks that are larger layouts of another one here: tested with one neuron, and marked slow."""

every_network = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SAME_PARTS else []) for name in NETWORKS]
)

STEPS, BATCH = 3, 2

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
"""A convolution may add in another order at another batch size, memory layout or when compiled. In float64 that moves
a potential by some 1e-16; a spike flips only where a potential lies that close to its threshold."""


@pytest.fixture(autouse=True)
def _reference_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run neurons by their reference at every size: compared here are networks, and compiling takes long."""
    monkeypatch.setattr(dispatch, "SMALL", sys.maxsize)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """All networks share the code of `Network.forward`, of which the compiler keeps eight versions."""
    yield
    torch.compiler.reset()


def build(name: str, neuron: NeuronFactory = LIFB) -> tuple[Network, Tensor]:
    """A network in float64 that fires in every layer, in evaluation mode, and images `[B, C, H, W]`."""
    torch.manual_seed(0)
    builder, size = NETWORKS[name]
    network = builder(neuron=neuron).double()
    images = torch.randn(BATCH, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, BatchNorm):
                module.momentum = 1.0
        network(torch.randn(2, 4, 3, size, size, dtype=torch.float64))
    return network.eval(), images


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("vggsnn", "sew_resnet34")])
def test_no_layer_of_a_fresh_network_is_silent(name: str) -> None:
    """A silent layer passes nothing on, and all classes score alike."""
    torch.manual_seed(0)
    builder, size = NETWORKS[name]
    network = builder(neuron=LIF).train()
    recorded: dict[str, Tensor] = {}
    for path, module in network.named_modules():
        if isinstance(module, LIF):
            module.register_forward_hook(lambda _, __, spikes, path=path: recorded.__setitem__(path, spikes))
    network(torch.randn(4, 3, size, size), steps=4)
    assert all(spikes.any() for spikes in recorded.values()), [k for k, v in recorded.items() if not v.any()]


@pytest.mark.parametrize(
    ("name", "neuron"),
    [(name, neuron) for name in NETWORKS if name not in SAME_PARTS for neuron in NEURONS]
    + [pytest.param(name, "LIFB", marks=pytest.mark.slow) for name in SAME_PARTS],
)
def test_every_neuron_trains(name: str, neuron: str) -> None:
    torch.manual_seed(0)
    builder, size = NETWORKS[name]
    network = builder(neuron=NEURONS[neuron])
    logits = network(torch.randn(BATCH, 3, size, size), steps=STEPS)
    assert logits.shape == (STEPS, BATCH, 10)
    logits.square().mean().backward()
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@every_network
def test_constant_input_equals_its_repetition(name: str) -> None:
    network, images = build(name)
    torch.testing.assert_close(network(images.expand(STEPS, *images.shape)), network(images, steps=STEPS), **CLOSE)


@every_network
def test_streaming_equals_one_call(name: str) -> None:
    network, images = build(name)
    frames = torch.stack([images, images.flip(0), -images])
    expected, final = network(frames, return_state=True)
    assert len(expected.unique(dim=0)) == STEPS, "the network is silent: this test would show nothing"
    state, logits = None, []
    for frame in frames:
        step, state = network(frame, steps=1, state=state, return_state=True)
        logits.append(step)
    torch.testing.assert_close(torch.cat(logits), expected, **CLOSE)
    for got, want in zip(state, final, strict=True):
        torch.testing.assert_close(got.v, want.v, **CLOSE)
    torch.testing.assert_close(
        network(frames[2:], state=network(frames[:2], return_state=True)[1]), expected[2:], **CLOSE
    )


def test_streaming_is_exact_where_arithmetic_is() -> None:
    # Weights and input are multiples of 1/64 and small: every sum is exact in float32, in whatever order it is taken.
    torch.manual_seed(0)
    network = models.mlp([16, 12, 8, 4]).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randint(-40, 60, parameter.shape) / 64)
    images = torch.randint(0, 64, (5, 16)) / 64
    state, logits = None, []
    for _ in range(6):
        step, state = network(images, steps=1, state=state, return_state=True)
        logits.append(step)
    expected = network(images, steps=6)
    assert len(expected.unique(dim=0)) > 2, "the network is silent: this test would show nothing"
    assert torch.equal(torch.cat(logits), expected)


@every_network
def test_encoder_convolves_a_constant_input_once(name: str) -> None:
    network, images = build(name, LIF)
    first = next(module for module in network.encoder.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    sizes = []
    first.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    network(images, steps=STEPS)
    network(images.expand(STEPS, *images.shape))
    assert sizes == [BATCH, STEPS * BATCH]


def logits_and_gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    logits = model(images, steps=2)
    return [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]


@every_network
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_without_graph_break(name: str) -> None:
    network, images = build(name)
    network.train()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits_and_gradients(compiled, images), logits_and_gradients(network, images), **CLOSE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch 2.13 importing itself
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["vgg", "spikformer"])
def test_compiled_for_speed_equals_eager(name: str) -> None:
    network, images = build(name)
    compiled = torch.compile(network, fullgraph=True)
    torch.testing.assert_close(logits_and_gradients(compiled, images), logits_and_gradients(network, images), **CLOSE)


@every_network
def test_channels_last_changes_nothing(name: str) -> None:
    network, images = build(name)
    expected = network(images, steps=STEPS)
    network.to(memory_format=torch.channels_last)
    logits = network(images.to(memory_format=torch.channels_last), steps=STEPS)
    torch.testing.assert_close(logits, expected, **CLOSE)


@every_network
def test_errors_name_shape_and_remedy(name: str) -> None:
    network, images = build(name, LIF)
    with pytest.raises(ValueError, match=r"Pass it: model\(images, steps=4\)"):
        network(images)
    with pytest.raises(ValueError, match="at least one time step"):
        network(images, steps=0)
    with pytest.raises(ValueError, match=r"3 steps, but steps=2\. Leave steps out"):
        network(images.expand(3, *images.shape), steps=2)
    with pytest.raises(ValueError, match="dimensions"):
        network(images[None, None], steps=1)
    with pytest.raises(ValueError, match="T = 0 steps"):
        network(images.expand(0, *images.shape))


@pytest.mark.parametrize("name", ["vgg", "vgg16", "spikformer"])
def test_wrong_image_size(name: str) -> None:
    network, images = build(name, LIF)
    size = images.shape[-1]
    with pytest.raises(ValueError, match=rf"{size}x{size + 1} pixels, but this network was built for {size}x{size}"):
        network(torch.zeros(BATCH, 3, size, size + 1), steps=1)


@every_network
def test_wrong_channels(name: str) -> None:
    network, images = build(name, LIF)
    wanted = rf"{images[0].numel()}\. Resize" if name == "mlp" else r"3\. Convert them, or build it with in_channels=2"
    with pytest.raises(ValueError, match=rf"images have shape .* this network was built for {wanted}"):
        network(images[:, :2], steps=1)


def test_a_first_layer_that_was_exchanged() -> None:
    network, images = build("vgg", LIF)
    network.set_submodule("encoder.0.0", nn.Conv2d(2, 4, 3, padding=1, dtype=torch.float64))
    assert network(images[:, :2], steps=1).shape == (1, BATCH, 10)


class Rearranged(nn.Module):
    """Images with channels last, and a first layer that is not the first to run."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Conv2d(2, 4, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.flatten(0, 1).movedim(-1, 1))).unflatten(0, x.shape[:2])


@pytest.mark.parametrize(
    ("encoder", "shape"),
    [
        (Rearranged(), (2, 8, 8, 3)),
        (TimeFolded(nn.LazyConv2d(4, 1)), (2, 3, 8, 8)),
        (TimeFolded(nn.Flatten(2), nn.Linear(64, 4)), (2, 3, 8, 8)),
        (TimeFolded(nn.Flatten(1), nn.Linear(12, 4)), (0, 3, 2, 2)),
    ],
)
def test_encoders_of_ones_own(encoder: nn.Module, shape: tuple[int, ...]) -> None:
    body = Chain(Activation(IF()))
    network = Network(encoder, body, nn.Flatten(2))
    assert network(torch.rand(shape), steps=2).shape[:2] == (2, shape[0])


@pytest.mark.parametrize("name", ["resnet19", "resnet20", "sew_resnet18"])
def test_global_pooling_takes_any_image_size(name: str) -> None:
    network, images = build(name, LIF)
    assert network(images[..., :5], steps=1).shape == (1, BATCH, 10)


def test_state_of_another_network_or_batch_size() -> None:
    network, images = build("vgg", LIF)
    _, state = network(images, steps=1, return_state=True)
    with pytest.raises(ValueError, match="has more neurons"):
        network(images, steps=1, state=state[:-1])
    for wanted in (True, False):
        with pytest.raises(ValueError, match="has 3 neurons"):
            network(images, steps=1, state=[*state, state[0]], return_state=wanted)
    with pytest.raises(ValueError, match="keep the batch size while streaming"):
        network(images[:1], steps=1, state=state)
