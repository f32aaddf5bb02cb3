import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ranvier import models
from ranvier.conversion import ConvertedSNN
from ranvier.evaluation import accuracy_by_step, run_until_confident
from ranvier.export import Agreement, InferenceNetwork, agreement, to_inference
from ranvier.export import inference as module
from ranvier.export.inference import Precision
from ranvier.export.prepacked import Prepacked
from ranvier.kernels import native_convolved_scan, precision
from ranvier.nn import LIF, LIFB, BatchNorm, ProxyActivation, ProxyNorm, Readout, TimeFolded, analog, pack_spikes
from ranvier.nn.memory import PackedConv2d
from ranvier.nn.structure import Activation, Chain, Concat, Residual, conv_norm

from .networks import STEPS, build

NETWORKS: dict[str, tuple[Callable[[], models.SpikingNetwork], tuple[int, ...]]] = {
    "mlp": (lambda: models.mlp([12, 20, 20, 3]), (12,)),
    "vgg": (
        lambda: models.vgg((4, "A", 6, "A"), num_classes=3, in_channels=2, image_size=8, hidden=(8,), neuron=LIFB),
        (2, 8, 8),
    ),
    "resnet19": (lambda: models.resnet19(3, 2), (2, 4, 4)),
    "sew-resnet18": (lambda: models.sew_resnet18(3, 2), (2, 8, 8)),
    "sew-resnet18-imagenet": (lambda: models.sew_resnet18(3, 2, stem="imagenet"), (2, 32, 32)),
    "spikformer": (
        lambda: models.spikformer(3, 2, image_size=8, depth=1, dim=16, heads=2, patch_size=2, scale=0.5),
        (2, 8, 8),
    ),
}
LEFT = {"resnet19": 1, "sew-resnet18-imagenet": 1}
"""Normalisations that follow no layer: on the shortcut of the first stage, and behind a max-pooling."""

every_network = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _has_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `auto` chooses must not depend on the processor here."""
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: True)


def test_auto_is_bfloat16_where_there_are_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = random("vgg")
    fast = to_inference(model)
    assert (fast.precision, fast.dtype) == ("bfloat16", torch.bfloat16)
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: False)
    fast = to_inference(model)
    assert (fast.precision, fast.dtype) == ("float32", torch.float32)
    assert torch.equal(fast(images, STEPS), to_inference(model, precision="float32")(images, STEPS))


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def norms(model: nn.Module) -> list[BatchNorm]:
    return [part for part in model.modules() if isinstance(part, BatchNorm)]


def whole(low: int, high: int, size: int) -> Tensor:
    return torch.randint(low, high + 1, (size,)).float()


def random_statistics(model: models.SpikingNetwork) -> models.SpikingNetwork:
    """Running averages near those that let a network fire, and gains of both signs."""
    for norm in norms(model):
        size = len(norm.weight)
        norm.running_mean.copy_(0.3 * torch.randn(size))
        norm.running_var.copy_(norm.running_var * (0.5 + torch.rand(size)))
        norm.weight.copy_((0.5 + torch.rand(size)) * (1 - 2 * (torch.rand(size) < 0.3).float()))
        norm.bias.copy_(0.3 + 0.2 * torch.randn(size))
    return model


def random(name: str, batch: int = 8) -> tuple[models.SpikingNetwork, Tensor]:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model = make()
    for norm in norms(model):
        norm.momentum = 1.0
    model.train()(torch.randn(4, *shape), 2)
    return random_statistics(model.eval()), torch.randn(batch, *shape)


def dyadic(seed: int) -> tuple[models.SpikingNetwork, Tensor]:
    """Numbers of few bits: every product and sum is exact in bfloat16, in whatever order it is taken.

    Images are quarters in [-1, 1], weights quarters in [-1/2, 1/2], at most 12 to a neuron; scales are 1/2, 1 or 2, of
    both signs. Currents are then multiples of 1/32 below 8 + 2, hence of at most 9 bits before the scale of 2 and the
    shift, and mostly of 8: the assertion counts.
    """
    torch.manual_seed(seed)
    model = models.vgg((4, 6), num_classes=3, in_channels=1, image_size=4, neuron=LIF).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = torch.randint(-2, 3, layer.weight.shape) / 4
            kept = torch.rand(len(weight), weight[0].numel()).argsort(1) < 6
            layer.weight.copy_(weight * kept.view_as(weight))
            if layer.bias is not None:
                layer.bias.copy_(whole(-2, 2, len(layer.bias)) / 4)
    for norm in norms(model):
        size = len(norm.weight)
        norm.eps = 0.0
        norm.running_mean.copy_(whole(-2, 2, size) / 4)
        norm.running_var.copy_(4.0 ** whole(-1, 1, size))
        norm.weight.copy_(torch.where(torch.rand(size) < 0.3, -1.0, 1.0))
        norm.bias.copy_(whole(0, 2, size) / 4)
    return model, whole(-4, 4, 5 * 16).view(5, 1, 4, 4) / 4


@every_network
def test_folded_equals_the_network(name: str) -> None:
    model, images = random(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast = to_inference(model, precision="float32")
    expected = model(images, STEPS)
    assert len(expected[-1].unique(dim=0)) > 1, "the network is silent: this test would show nothing"
    # Folding moves a potential by some 1e-7, which flips a spike only where one lies so close to its threshold.
    torch.testing.assert_close(fast(images, STEPS), expected, rtol=0, atol=1e-4)
    frames = torch.stack([images, -images])
    torch.testing.assert_close(fast(frames), model(frames), rtol=0, atol=1e-4)

    assert not norms(fast)
    assert sum(isinstance(part, module._ScaleShift) for part in fast.modules()) == LEFT.get(name, 0)
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert not any(part.training for part in fast.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} of the caller's network has changed"
    assert all(parameter.requires_grad for parameter in model.parameters())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_exact_where_arithmetic_is(seed: int) -> None:
    model, images = dyadic(seed)
    expected = model(images, STEPS)
    for kind in ("float32", "bfloat16"):
        fast = to_inference(model, precision=kind)  # type: ignore[arg-type]
        assert torch.equal(fast(images, STEPS), expected), kind
        state, logits = None, []
        for _ in range(STEPS):
            step, state = fast(images, 1, state=state, return_state=True)
            logits.append(step)
        assert torch.equal(torch.cat(logits), expected), kind


@every_network
def test_bfloat16_rounds_no_more_than_autocast(name: str) -> None:
    # Deep untrained networks are chaotic: one spike that rounding flips changes most of what follows. How far rounding
    # leads them is compared with autocast, which rounds in more places: weights alike, and the output of every layer
    # before its normalisation and after. Means over 64 samples of chaos vary by a few percent.
    model, images = random(name, batch=64)
    expected, logits = model(images, STEPS), to_inference(model)(images, STEPS)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(images, STEPS).float()
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().mean() <= 1.15 * (autocast - expected).abs().mean()


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_agrees_on_a_trained_network(kind: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "byte_kernels", lambda: "native")  # without them int8 takes the way of other devices
    torch.manual_seed(0)
    prototypes = torch.randn(3, 2, 8, 8)
    neuron = LIF if kind == "int8" else LIFB
    model: models.SpikingNetwork = models.vgg(
        (4, "A", 6, "A"), num_classes=3, in_channels=2, image_size=8, neuron=neuron
    )
    labels = torch.arange(96) % 3
    with torch.enable_grad():
        optimizer = torch.optim.Adam(model.train().parameters(), lr=0.01)
        for _ in range(30):
            images = prototypes[labels] + 0.5 * torch.randn(96, 2, 8, 8)
            loss = nn.functional.cross_entropy(model(images, 2).mean(0), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    images = prototypes[labels] + 0.5 * torch.randn(96, 2, 8, 8)
    assert (model.eval()(images, 2).mean(0).argmax(-1) == labels).float().mean() > 0.9, "it has not learned"
    # Most margins are several times what rounding moves logits by: only samples near a boundary may change sides.
    found = agreement(model, to_inference(model, precision=kind), images, 2)
    assert min(found.predictions) >= 0.95, found


@every_network
def test_bfloat16_casts_weights_once(name: str) -> None:
    model, images = random(name)
    fast = to_inference(model)
    layers = [part for part in fast.modules() if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Linear)]
    *inner, last = layers
    assert {layer.weight.dtype for layer in inner} == {torch.bfloat16}
    assert last.weight.dtype == torch.float32
    for layer in inner:
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    _, state = fast(images, 1, return_state=True)
    assert {after.v.dtype for after in state} == {torch.float32}


@every_network
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_streaming_equals_one_call(name: str, kind: str) -> None:
    model, images = random(name)
    fast = to_inference(model, precision=kind)  # type: ignore[arg-type]
    expected = fast(images, STEPS)
    state, logits = None, []
    for _ in range(STEPS):
        step, state = fast(images, 1, state=state, return_state=True)
        logits.append(step)
    assert len(state) == sum(isinstance(part, LIF | LIFB) for part in model.modules())
    # A convolution may add in another order at another batch size, which bfloat16 mostly rounds away, but now and then
    # rounds to the neighbour: that may flip a spike.
    same = torch.isclose(torch.cat(logits), expected, rtol=0, atol=1e-4).float().mean()
    assert same == 1 if kind == "float32" else same > 0.9


@pytest.mark.parametrize("sequence", [False, True])
def test_large_batches_pass_in_parts(sequence: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are exact here, so that the parts give the same bits; a state goes around all at once."""
    model, images = dyadic(0)
    fast = to_inference(model)
    images = images.repeat(3, 1, 1, 1)[:13]
    x, steps = (torch.stack([images, images.flip(0)]), None) if sequence else (images, 2)
    whole_logits, state = fast(x, steps, return_state=True)
    passed: list[int] = []
    run = fast.network.run
    monkeypatch.setattr(fast.network, "run", lambda x, *rest: passed.append(x.shape[1]) or run(x, *rest))
    for size, expected in ((13, [13]), (12, [7, 6]), (4, [4, 3, 3, 3]), (1, [1] * 13)):
        monkeypatch.setattr(module, "evaluation_batch_size", lambda steps, image_size, size=size: size)
        passed.clear()
        assert torch.equal(fast(x, steps), whole_logits)
        assert passed == expected
        passed.clear()
        again, _ = fast(x, steps, return_state=True)
        assert passed == [13]
        assert torch.equal(again, whole_logits)
    passed.clear()
    fast(x, steps, state=state)
    assert passed == [13]
    passed.clear()
    handle = fast.network.readout.register_forward_hook(lambda *given: None)  # would see parts
    assert torch.equal(fast(x, steps), whole_logits)
    assert passed == [13]
    handle.remove()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, steps), whole_logits)
    program = torch.export.export(fast, (x, steps))
    assert torch.equal(program.module()(x, steps), whole_logits)
    assert fast(x[:, :0] if sequence else x[:0], steps).shape == (2, 0, 3)


@pytest.mark.parametrize("name", ["vgg", "sew-resnet18"])
def test_encoder_runs_once_on_a_constant_input(name: str) -> None:
    model, images = random(name)
    fast = to_inference(model)
    sizes: list[int] = []
    first = next(part for part in fast.modules() if isinstance(part, Prepacked | module._Cast))
    first.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    fast(images, STEPS)
    fast(images.expand(STEPS, *images.shape))
    assert sizes == [len(images), STEPS * len(images)]


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch 2.13 importing itself
def test_compiled_equals_the_network() -> None:
    model, images = random("vgg")
    fast = to_inference(model, precision="float32", implementation="compiled")
    assert fast.choice.implementation == "compiled"
    assert not any(isinstance(part, Prepacked) for part in fast.modules())
    for steps in (2, 3):
        torch.testing.assert_close(fast(images, steps), model(images, steps), rtol=0, atol=1e-4)
    state, logits = None, []
    for _ in range(3):
        step, state = fast(images, 1, state=state, return_state=True)
        logits.append(step)
    torch.testing.assert_close(torch.cat(logits), model(images, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(copy.deepcopy(fast)(images, 2), model(images, 2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("implementation", ["reference", "native"])
def test_neurons_run_as_asked(implementation: str) -> None:
    model, images = random("vgg")
    fast = to_inference(model, precision="float32", implementation=implementation)  # type: ignore[arg-type]
    assert {part.implementation for part in fast.modules() if isinstance(part, LIFB)} == {implementation}
    assert fast.choice.implementation == implementation
    torch.testing.assert_close(fast(images, STEPS), model(images, STEPS), rtol=0, atol=1e-4)


def test_auto_says_what_it_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = random("mlp")
    assert to_inference(model).choice == module.Choice("native", module.PACKED)
    assert "bfloat16, native" in repr(to_inference(model))

    def choose(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(module, "choose", choose)
    assert to_inference(model).choice == module.Choice("reference", "no compiler")
    with pytest.raises(RuntimeError, match="no compiler"):
        to_inference(model, implementation="compiled")


def test_without_packing_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_convolved_scan, "obstacle", lambda: "currents are to be rounded alike")
    model, images = random("vgg")
    precisions: tuple[module.Precision, ...] = ("float32", "bfloat16")
    packed = [to_inference(model, precision=kind)(images, STEPS) for kind in precisions]
    monkeypatch.setattr(module, "packs", lambda _: False)
    for kind, expected in zip(precisions, packed, strict=True):
        plain = to_inference(model, precision=kind)
        assert not any(isinstance(part, Prepacked) for part in plain.modules())
        torch.testing.assert_close(plain(images, STEPS), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        partial(nn.Conv2d, 4, 6, 3, stride=2, padding=1),
        partial(nn.Conv2d, 4, 6, (1, 3), padding=(0, 2), dilation=(1, 2), bias=False),
        partial(nn.Conv2d, 4, 8, 3, groups=4),
        partial(nn.Conv2d, 4, 6, 3, padding="same"),
        partial(nn.Conv2d, 4, 6, 3, padding=1, padding_mode="reflect"),
    ],
)
def test_convolutions_of_all_kinds(layer: Callable[[], nn.Conv2d]) -> None:
    torch.manual_seed(0)
    conv = layer()
    encoder = nn.Sequential(TimeFolded(conv), BatchNorm(conv.out_channels))
    body = Chain(Activation(LIF()), TimeFolded(nn.AdaptiveAvgPool2d(1)))
    model = random_statistics(models.Network(encoder, body, Readout(conv.out_channels, 3)).eval())
    for batch in (1, 5):  # the weights are packed for the first
        images = torch.randn(batch, 4, 9, 7)
        fast = to_inference(model, precision="float32")
        torch.testing.assert_close(fast(images, STEPS), model(images, STEPS), rtol=0, atol=1e-4)
        torch.testing.assert_close(fast(images[:, :, :7], 1), model(images[:, :, :7], 1), rtol=0, atol=1e-4)
        assert fast(images[:0], STEPS).shape == (STEPS, 0, 3)


def shared_layer() -> nn.Module:
    conv = TimeFolded(nn.Conv2d(4, 4, 3, padding=1))
    return Concat(Chain(nn.Sequential(conv, BatchNorm(4))), Chain(nn.Sequential(conv, BatchNorm(4))))


def shared_norm() -> nn.Module:
    norm = BatchNorm(4)
    return Concat(*(nn.Sequential(TimeFolded(nn.Conv2d(4, 4, 3, padding=1)), norm) for _ in range(2)))


def hooked_layer() -> nn.Module:
    conv = nn.Conv2d(4, 8, 3, padding=1)
    conv.register_forward_hook(lambda _, __, y: y.relu())
    return nn.Sequential(TimeFolded(conv), BatchNorm(8))


class Standardized(nn.Conv2d):
    """A convolution that is not what its weights say."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 1.0 * x.mean()


def linear_on_tokens() -> nn.Module:
    """As many features as channels, so that only the shape tells which axis is normalised."""
    tokens = TimeFolded(nn.Flatten(2), nn.Linear(16, 16, bias=False))
    lift = nn.Sequential(TimeFolded(nn.Conv2d(4, 16, 1)), BatchNorm(16))
    spread = TimeFolded(nn.Unflatten(2, (4, 4)), nn.Conv2d(16, 8, 1))
    return Chain(lift, nn.Sequential(tokens, BatchNorm(16)), spread)


BODIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "behind each other in a chain": (lambda: Chain(TimeFolded(nn.Conv2d(4, 8, 1)), BatchNorm(8)), 0),
    "two in a row": (lambda: Chain(*conv_norm(4, 8), BatchNorm(8)), 0),
    "pool, then convolution": (lambda: nn.Sequential(TimeFolded(nn.AvgPool2d(1), nn.Conv2d(4, 8, 1)), BatchNorm(8)), 0),
    "of proxies": (lambda: nn.Sequential(TimeFolded(nn.Conv2d(4, 8, 1)), ProxyNorm(8, separate=True)), 0),
    "parametrized": (
        lambda: nn.Sequential(TimeFolded(parametrizations.weight_norm(nn.Conv2d(4, 8, 1))), BatchNorm(8)),
        1,
    ),
    "pool between": (lambda: nn.Sequential(TimeFolded(nn.Conv2d(4, 8, 1), nn.MaxPool2d(3, 1, 1)), BatchNorm(8)), 1),
    "no layer": (lambda: Concat(BatchNorm(4), Residual(Chain(BatchNorm(4)), Chain())), 2),
    "layer used twice": (shared_layer, 2),
    "norm used twice": (shared_norm, 1),
    "hooked layer": (hooked_layer, 1),
    "layer of another class": (lambda: nn.Sequential(TimeFolded(Standardized(4, 8, 1)), BatchNorm(8)), 1),
    "linear layer on tokens": (linear_on_tokens, 1),
}


@pytest.mark.parametrize("where", BODIES)
def test_absorbs_what_it_may(where: str) -> None:
    torch.manual_seed(0)
    make, left = BODIES[where]
    body = Chain(Activation(LIF()), make(), Activation(LIF()), TimeFolded(nn.AdaptiveAvgPool2d(1)))
    model = random_statistics(models.Network(conv_norm(2, 4), body, Readout(8, 3)).eval())
    images = torch.randn(8, 2, 4, 4)
    fast = to_inference(model, precision="float32")
    assert not norms(fast)
    assert sum(isinstance(part, module._ScaleShift) for part in fast.modules()) == left
    expected = model(images, STEPS)
    assert len(expected[-1].unique(dim=0)) > 1, "the network is silent: this test would show nothing"
    torch.testing.assert_close(fast(images, STEPS), expected, rtol=0, atol=1e-4)
    assert agreement(model, to_inference(model), images, STEPS).difference < 1


def test_linear_behind_flatten_absorbs() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(TimeFolded(nn.Flatten(1), nn.Linear(12, 8)), BatchNorm(8))
    model = models.Network(encoder, Chain(Activation(LIF())), Readout(8, 3), frame_dims=(2, 4))
    random_statistics(model.eval())
    fast = to_inference(model, precision="float32")
    assert not any(isinstance(part, BatchNorm | module._ScaleShift) for part in fast.modules())
    images = torch.randn(8, 3, 2, 2)
    torch.testing.assert_close(fast(images, STEPS), model(images, STEPS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["converted", "converted-signed", "decoupled", "dense", "mlp-affine", "ann"])
def test_other_families(name: str) -> None:
    model, images = build(name)
    fast = to_inference(model, precision="float32")
    torch.testing.assert_close(fast(images, STEPS), model(images, STEPS), rtol=0, atol=1e-4)
    half = to_inference(model)
    if isinstance(model, ConvertedSNN):
        *_, last = (part for part in half.modules() if isinstance(part, nn.Linear))
        assert last.weight.dtype == torch.float32
    logits, state = half(images, 1, return_state=True)
    if name != "ann":
        half(images, 1, state=state)
    assert logits.dtype == torch.float32
    assert agreement(model, half, images, STEPS).difference < 0.5 * model(images, STEPS).abs().max()


def test_model_in_training_mode_or_double() -> None:
    model, images = random("vgg")
    expected = model(images, STEPS)
    torch.testing.assert_close(to_inference(model.train(), precision="float32")(images, STEPS), expected)
    assert model.training
    double = to_inference(copy.deepcopy(model).double(), precision="float32")
    torch.testing.assert_close(double(images.double(), STEPS), expected)
    assert double(images.double(), STEPS).dtype == torch.float32


def test_convolutions_that_kept_spikes_as_bits_are_plain() -> None:
    model, images = random("sew-resnet18")
    expected = model(images, STEPS)
    assert pack_spikes(model)
    fast = to_inference(model, precision="float32")
    assert not any(isinstance(part, module._ScaleShift) for part in fast.modules())
    torch.testing.assert_close(fast(images, STEPS), expected, rtol=0, atol=1e-4)
    assert any(isinstance(part, PackedConv2d) for part in model.modules()), "the caller's network has changed"


def test_compiled_networks_are_unwrapped() -> None:
    model, images = random("mlp")
    compiled = torch.compile(model)
    torch.testing.assert_close(to_inference(compiled, precision="float32")(images, STEPS), model(images, STEPS))


def test_copies_and_pickles_after_a_call() -> None:
    model, images = random("vgg")
    fast = to_inference(model)
    expected = fast(images, STEPS)
    assert torch.equal(copy.deepcopy(fast)(images, STEPS), expected)
    sent = pickle.dumps(fast)  # as to another process; nothing is read from a file
    assert torch.equal(pickle.loads(sent)(images, STEPS), expected)  # bytes made right here
    assert torch.equal(fast(images, STEPS), expected)


def test_gives_no_gradients() -> None:
    model, images = random("vgg")
    with torch.enable_grad():
        logits = to_inference(model)(images.clone().requires_grad_(), STEPS)
    assert not logits.requires_grad


def test_is_measured_like_a_network() -> None:
    model, images = random("vgg")
    fast = to_inference(model, precision="float32")
    labels = torch.arange(8) % 3
    assert accuracy_by_step(fast, [(images, labels)], STEPS) == accuracy_by_step(model, [(images, labels)], STEPS)
    answers = run_until_confident(fast, images, STEPS, threshold=0.5)
    assert torch.equal(answers.steps, run_until_confident(model, images, STEPS, threshold=0.5).steps)


class Fixed(nn.Module):
    """Logits that are what they are."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor, steps: int | None) -> Tensor:
        return self.logits


def test_agreement_by_hand() -> None:
    # Two steps, samples and classes. Means after 2: (1, 0) and (1, 1/2) of sample 0, (0, 1) and (2, 1) of sample 1.
    model = Fixed(torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]]))
    fast = Fixed(torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [4.0, 1.0]]]))
    found = agreement(model, fast, torch.zeros(2, 1), 2)
    assert found == Agreement(predictions=(1.0, 0.5), difference=4.0, largest=2.0, samples=2)
    assert str(found) == (
        "2 samples: same predictions 100 % at T=1, 50 % at T=2; logits differ by 4.0e+00 at most (largest 2)"
    )
    with pytest.raises(ValueError, match=r"fast gives logits \[1, 2, 2\], but model \[2, 2, 2\]"):
        agreement(model, Fixed(fast.logits[:1]), torch.zeros(2, 1), 2)


def test_agreement_puts_modes_back() -> None:
    model, images = random("vgg")
    agreement(model.train(), to_inference(model), images, 1)
    assert model.training


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


def test_errors() -> None:
    model, images = random("vgg")
    fast = to_inference(model)
    with pytest.raises(TypeError, match=r"model is a Linear, but inference knows .* convert an ANN first"):
        to_inference(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="already made for inference"):
        to_inference(fast)
    with pytest.raises(ValueError, match="precision is 'float16', but must be one of 'auto', 'int8',"):
        to_inference(model, precision="float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="implementation is 'fast'"):
        to_inference(model, implementation="fast")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match='implementation="triton" cannot run on cpu'):
        to_inference(model, implementation="triton")
    with pytest.raises(ValueError, match="Pass it: model"):
        fast(images)
    with pytest.raises(ValueError, match="needs at least one time step"):
        fast(images, 0)
    with pytest.raises(ValueError, match="8x8"):
        fast(images[:, :, :4], 1)
    with pytest.raises(ValueError, match="state holds 1 neuron states"):
        fast(images, 1, state=fast(images, 1, return_state=True)[1][:1])


def test_refuses_what_it_does_not_know() -> None:
    proxies = models.Network(conv_norm(2, 4), Chain(ProxyActivation(LIF())), Readout(64, 3))
    with analog(proxies), pytest.raises(ValueError, match="analog mode"):
        to_inference(proxies)
    assert isinstance(to_inference(proxies), InferenceNetwork)

    own = models.Network(conv_norm(2, 4), Chain(Activation(LIF()), Custom()), Readout(64, 3)).eval()
    with pytest.raises(TypeError, match=r"body.layers.1 is a Custom with parameters .* Pass precision=\"float32\""):
        to_inference(own)
    images = torch.randn(2, 2, 4, 4)
    torch.testing.assert_close(to_inference(own, precision="float32")(images, 2), own(images, 2))
