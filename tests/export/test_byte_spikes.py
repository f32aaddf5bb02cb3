import copy
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ranvier import models
from ranvier.export import agreement, byte_spikes, inference, to_inference
from ranvier.export.byte_spikes import (
    ByteConv2d,
    BytePool2d,
    Bytes,
    Numbers,
    byte_kernels,
    use_bytes,
)
from ranvier.export.lean_neurons import Lean, make_lean
from ranvier.kernels import native_byte_convolution, native_convolved_scan, precision
from ranvier.nn import IF, LIF, LIFB, PLIF, BatchNorm, Neuron, Readout, TimeFolded
from ranvier.nn.structure import Activation, Chain, Concat, Residual, conv_norm

STEPS = 3

LAYERS: dict[str, Callable[[], nn.Conv2d]] = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "padded": lambda: nn.Conv2d(4, 6, 3, padding=(1, 2)),
    "strided": lambda: nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=1),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "pointwise, no bias": lambda: nn.Conv2d(4, 6, 1, bias=False),
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True, params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def numbers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Of currents, as on processors with and without instructions for bfloat16.

    Where there are no kernels, to_inference refuses; the same whole numbers then take the way of other devices.
    """
    dtype: torch.dtype = request.param
    if dtype == torch.float32 and native_convolved_scan.obstacle() is None:
        pytest.skip("what has a matrix unit has instructions for bfloat16")
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: dtype == torch.bfloat16)
    monkeypatch.setattr(inference, "byte_kernels", lambda: "native")
    return dtype


def use_kernels(kernels: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolve with these, or skip where this processor has none of them."""
    if kernels == "onednn" and byte_kernels() != "onednn":
        pytest.skip("needs a CPU with AVX-512 and a torch with oneDNN; other cases run elsewhere")
    if kernels == "native" and native_byte_convolution.obstacle() is not None:
        pytest.skip(str(native_byte_convolution.obstacle()))
    monkeypatch.setattr(byte_spikes, "byte_kernels", lambda: kernels)


def bytes_of(*shape: int, below: int = 9) -> Tensor:
    return torch.randint(0, below, shape, dtype=torch.uint8)


def kinds(network: nn.Module, *wanted: type[nn.Module]) -> list[str]:
    return [type(part).__name__ for part in network.modules() if isinstance(part, wanted)]


def network(*body: nn.Module, channels: int = 8) -> models.Network:
    """An encoder of `channels`, a body that keeps the image size, a readout."""
    after = [TimeFolded(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))]
    return models.Network(conv_norm(3, channels), Chain(*body, *after), Readout(channels, 5)).eval()


def make_all_lean(model: nn.Module) -> None:
    for part in model.modules():
        if isinstance(part, Neuron):
            make_lean(part, is_native=False)


def lively(model: models.SpikingNetwork, shape: tuple[int, ...]) -> models.SpikingNetwork:
    """With running averages of its own currents, so that every layer fires."""
    for part in model.modules():
        if isinstance(part, BatchNorm):
            part.momentum = 1.0
            part.bias.fill_(0.3)
    model.train()(torch.randn(8, *shape), 2)
    return model.eval()


# -------------------------------------------------------------------------------------------- the layers by themselves


def test_rounding_by_hand() -> None:
    layer = nn.Conv2d(2, 1, 1)
    layer.weight.copy_(torch.tensor([2.54, -0.99]).view(1, 2, 1, 1))
    layer.bias.fill_(0.5)
    found = ByteConv2d(layer)
    assert found.weight.flatten().tolist() == [127, -50]  # -0.99 / 0.02 = -49.5: ties to even
    assert found.scale.item() == pytest.approx(0.02)
    x = torch.tensor([3, 2], dtype=torch.uint8).view(1, 2, 1, 1)
    assert found(x).item() == pytest.approx(3 * 2.54 - 2 * 1.0 + 0.5, rel=2**-8)  # output rounded to 8 bits
    assert ByteConv2d(layer, Bytes(divisor=4))(x).item() == pytest.approx((3 * 2.54 - 2 * 1.0) / 4 + 0.5, rel=2**-8)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kernels", ["onednn", "native", None])
def test_convolutions_of_all_kinds(
    name: str, kernels: str | None, numbers: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernels(kernels, monkeypatch)
    layer = LAYERS[name]()
    found = ByteConv2d(layer, Bytes(most=8))
    found.numbers = numbers
    steps = found.scale.view(-1, 1, 1, 1)
    rounded = copy.deepcopy(layer)
    rounded.weight.copy_(found.weight * steps)
    assert ((rounded.weight - layer.weight).abs() <= 0.501 * steps).all()
    for batch, spread in ((3, True), (1, False), (0, False)):
        x = bytes_of(batch, 4, 9, 7)
        x = x.contiguous(memory_format=torch.channels_last) if spread else x
        got, expected = found(x), rounded(x.float())
        assert got.dtype == numbers
        torch.testing.assert_close(got.float(), expected, rtol=2**-8 if numbers == torch.bfloat16 else 1e-6, atol=1e-5)


def test_weights_that_are_all_zero() -> None:
    layer = nn.Conv2d(2, 3, 1)
    layer.weight[1] = 0
    got = ByteConv2d(layer)(bytes_of(2, 2, 3, 3))
    assert torch.equal(got[:, 1], layer.bias[1].to(torch.bfloat16).expand(2, 3, 3))


PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(3, 20), st.integers(3, 20)),
    window=PAIR,
    stride=st.none() | PAIR,
    seed=st.integers(0, 99),
)
def test_sums_are_averages_times_the_window(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int] | None, seed: int
) -> None:
    torch.manual_seed(seed)
    pool, x = nn.AvgPool2d(window, stride), bytes_of(2, 3, *size)
    expected = (pool(x.double()) * window[0] * window[1]).round()
    assert torch.equal(BytePool2d(pool)(x).double(), expected)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(5, 20), st.integers(5, 20)),
    window=st.integers(2, 3),
    stride=st.none() | PAIR,
    padding=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    channels_last=st.booleans(),
)
def test_the_largest_of_each_window(
    size: tuple[int, int],
    window: int,
    stride: tuple[int, int] | None,
    padding: tuple[int, int],
    dilation: tuple[int, int],
    channels_last: bool,
) -> None:
    torch.manual_seed(0)
    pool, x = nn.MaxPool2d(window, stride, padding, dilation), bytes_of(2, 3, *size)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    assert torch.equal(BytePool2d(pool)(x).double(), pool(x.double()))


def test_images_smaller_than_the_window() -> None:
    with pytest.raises(ValueError, match=r"\[3, 3\] pixels.* smaller than the 4x4 window"):
        BytePool2d(nn.AvgPool2d(4))(bytes_of(1, 2, 3, 3))


def test_numbers() -> None:
    assert torch.equal(
        Numbers(Bytes(divisor=4))(torch.tensor([0, 3], dtype=torch.uint8)),
        torch.tensor([0, 0.75], dtype=torch.bfloat16),
    )


# ---------------------------------------------------------------------------------------------------- where bytes run


@pytest.mark.parametrize("neuron", [IF, LIF, PLIF])
def test_sew_resnet_sums_bytes(neuron: Callable[[int], nn.Module]) -> None:
    fast = to_inference(models.sew_resnet18(3, 2, neuron=neuron), precision="int8")
    # All but the one that sees the image: 16 in blocks, 3 on shortcuts. The pooling at the end gets numbers.
    assert kinds(fast, ByteConv2d, Numbers) == ["ByteConv2d"] * 19 + ["Numbers"]
    assert sum(part.sends_bytes for part in fast.modules() if isinstance(part, Lean)) == 20


def test_vgg_pools_sums() -> None:
    model = models.vgg((4, "A", 6, "A", "A", 8), num_classes=3, in_channels=1, image_size=8)
    fast = to_inference(model, precision="int8")
    assert kinds(fast, ByteConv2d, BytePool2d, Numbers) == [
        *("BytePool2d", "ByteConv2d", "BytePool2d", "BytePool2d", "ByteConv2d", "Numbers")
    ]
    model = models.vgg((4, "A", "A", "A", "A", 8), num_classes=3, in_channels=1, image_size=16)
    # The fourth pooling would give sums of up to 256: it gets numbers, and so does the convolution behind it.
    with pytest.raises(ValueError, match="no convolution gets"):
        to_inference(model, precision="int8")
    make_all_lean(model)
    assert use_bytes(model) == 0
    assert kinds(model, ByteConv2d, BytePool2d, Numbers) == ["BytePool2d"] * 3 + ["Numbers", "Numbers"]


def test_resnet19_adds_currents() -> None:
    fast = to_inference(models.resnet19(3, 2), precision="int8")
    assert len(kinds(fast, ByteConv2d)) == 18


def test_a_concatenation_of_bytes_is_one_of_bytes() -> None:
    halves = [Chain(conv_norm(8, 4), Activation(LIF(4))) for _ in range(2)]
    model = network(Activation(LIF(8)), Concat(*halves), conv_norm(8, 8), Activation(LIF(8)))
    fast = to_inference(model, precision="int8")
    assert kinds(fast, ByteConv2d, Numbers) == ["ByteConv2d"] * 3 + ["Numbers"]
    # With one branch of currents, all become numbers, and what follows is a convolution of bfloat16.
    mixed = network(Activation(LIF(8)), Concat(halves[0], conv_norm(8, 4)), conv_norm(8, 8), Activation(LIF(8)))
    assert kinds(to_inference(mixed, precision="int8"), ByteConv2d, Numbers) == ["ByteConv2d", "Numbers"] * 1 + [
        "ByteConv2d",
        "Numbers",
    ]


def test_sums_that_no_byte_holds_are_numbers() -> None:
    many: list[nn.Module] = [Activation(LIF(8))]
    for _ in range(7):  # 1, 2, 4 ... 64; the next would be 128
        many.append(Residual(Chain(), Chain()))
    model = network(*many, conv_norm(8, 8), Activation(LIF(8)))
    with pytest.raises(ValueError, match="no convolution gets the spikes"):
        to_inference(model, precision="int8")
    fewer = network(*many[:-1], conv_norm(8, 8), Activation(LIF(8)))
    fast = to_inference(fewer, precision="int8")
    assert len(kinds(fast, ByteConv2d)) == 1
    images = torch.randn(2, 3, 4, 4)
    sent: list[Tensor] = []
    next(part for part in fast.modules() if isinstance(part, ByteConv2d)).register_forward_pre_hook(
        lambda _, inputs: sent.append(inputs[0])
    )
    model = lively(fewer, (3, 4, 4))
    fast.network.body.layers[0].neuron.register_forward_hook(lambda _, __, spikes: torch.ones_like(spikes))  # type: ignore[index, union-attr, operator]
    fast(images, 1)
    assert sent[0].dtype == torch.uint8
    assert (sent[0] == 64).all()


class Halve(nn.Module):
    """A layer that int8 does not know; on bytes it would be wrong."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x // 2 - 1 if x.dtype == torch.uint8 else x / 2


@pytest.mark.parametrize(
    "stranger",
    [
        TimeFolded(Halve()),
        TimeFolded(nn.AvgPool2d(3, 1, padding=1)),
        TimeFolded(nn.AvgPool2d(1, divisor_override=2)),
        TimeFolded(nn.AvgPool2d(2, 1, ceil_mode=True)),
        TimeFolded(nn.MaxPool2d(2, 1, ceil_mode=True)),
        TimeFolded(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")),
        TimeFolded(nn.Upsample(scale_factor=1)),
        BatchNorm(8),
    ],
    ids=["own", "padded pool", "divided pool", "ceiled sum", "ceiled max", "circular", "resized", "normalised"],
)
def test_strangers_get_numbers(stranger: nn.Module) -> None:
    model = lively(
        network(Activation(LIF(8)), stranger, conv_norm(8, 8), Activation(LIF(8)), conv_norm(8, 8)), (3, 6, 6)
    )
    fast = to_inference(model, precision="int8")
    assert len(kinds(fast, ByteConv2d)) == 1  # the one behind the second neuron
    plain = to_inference(model)
    found = (fast(torch.randn(16, 3, 6, 6), STEPS), plain(torch.randn(16, 3, 6, 6), STEPS))
    assert all(logits.dtype == torch.float32 for logits in found)
    images = torch.randn(64, 3, 6, 6)
    assert agreement(plain, fast, images, STEPS).predictions[-1] > 0.8


def test_hooks_see_numbers(numbers: torch.dtype) -> None:
    model = network(Activation(LIF(8)), conv_norm(8, 8), Activation(LIF(8)), conv_norm(8, 8))
    seen: list[torch.dtype] = []
    neuron = model.body.layers[0].neuron  # type: ignore[index, union-attr]
    neuron.register_forward_hook(lambda _, __, spikes: seen.append(spikes.dtype))  # type: ignore[union-attr, operator]
    fast = to_inference(model, precision="int8")
    assert len(kinds(fast, ByteConv2d)) == 1
    fast(torch.randn(1, 3, 4, 4), 2)
    assert seen == [numbers]


@pytest.mark.parametrize("hooked", ["sequence", "folded", "convolution"])
def test_hooks_on_layers_see_numbers(hooked: str) -> None:
    model = network(Activation(LIF(8)), conv_norm(8, 8), Activation(LIF(8)), conv_norm(8, 8))
    sequence: Any = model.body.layers[1]  # type: ignore[index, union-attr]
    part = {"sequence": sequence, "folded": sequence[0], "convolution": sequence[0][0]}[hooked]
    seen: list[torch.dtype] = []
    part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    fast = to_inference(model, precision="int8")
    assert len(kinds(fast, ByteConv2d)) == 1
    fast(torch.randn(1, 3, 4, 4), 2)
    assert seen[0].is_floating_point


def test_hooks_on_blocks_see_numbers(numbers: torch.dtype) -> None:
    block = Chain(conv_norm(8, 8), Activation(LIF(8)))
    model = network(Activation(LIF(8)), block, conv_norm(8, 8), Activation(LIF(8)), conv_norm(8, 8))
    seen: list[torch.dtype] = []
    block.register_forward_hook(lambda _, __, spikes: seen.append(spikes.dtype))
    to_inference(model, precision="int8")(torch.randn(1, 3, 4, 4), 2)
    assert seen == [numbers]


def test_paths_are_those_of_the_network() -> None:
    model = models.sew_resnet18(3, 2)
    paths = {name for name, part in model.named_modules() if isinstance(part, Neuron)}
    fast = to_inference(model, precision="int8").network
    assert {name for name, part in fast.named_modules() if isinstance(part, Neuron)} == paths
    assert "19 convolutions of int8" in repr(to_inference(model, precision="int8"))


# ------------------------------------------------------------------------------------------------------ whole networks


def whole(model: models.SpikingNetwork, seed: int) -> models.SpikingNetwork:
    """Weights that int8 holds exactly, -1/2, 0 and 1/2, at most eight to a neuron: bfloat16 holds their sums.

    Those of linear layers, which stay as they are, are rounded to sixteenths.
    """
    torch.manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.copy_(torch.randint(-1, 2, layer.weight.shape) / 2)
            kept = torch.rand(len(layer.weight), layer.weight[0].numel()).argsort(1) < 8
            layer.weight.mul_(kept.view_as(layer.weight))
        if isinstance(layer, nn.Linear):  # sixteenths: sums are exact, in whichever order a processor takes them
            for parameter in layer.parameters():
                parameter.copy_((16 * parameter).round() / 16)
    for part in model.modules():
        if isinstance(part, BatchNorm):
            part.eps = 0.0
            part.bias.fill_(0.25)
    return model


def branches(join: Callable[..., nn.Module], first: nn.Module, second: nn.Module) -> models.Network:
    """Pooled in two ways, then joined."""
    width = 8 if join is Residual else 16
    middle = join(Chain(first), Chain(second))
    return models.Network(
        conv_norm(1, 8),
        Chain(
            *(Activation(LIF(8)), middle, conv_norm(width, 8), Activation(LIF(8)), conv_norm(8, 8), Activation(LIF(8))),
            TimeFolded(nn.AdaptiveAvgPool2d(1), nn.Flatten(1)),
        ),
        Readout(8, 3),
    )


WHOLE: dict[str, Callable[[], models.SpikingNetwork]] = {
    "sew": lambda: models.sew_resnet18(3, 1),
    "resnet19": lambda: models.resnet19(3, 1),
    "vgg": lambda: models.vgg((4, "A", "A", 6, "A", 6), num_classes=3, in_channels=1, image_size=8),
    "sums that differ": lambda: branches(Residual, TimeFolded(nn.AvgPool2d(2)), TimeFolded(nn.MaxPool2d(2))),
    "side by side": lambda: branches(Concat, TimeFolded(nn.AvgPool2d(2)), TimeFolded(nn.AvgPool2d((2, 1), 2))),
    "alike": lambda: branches(Residual, TimeFolded(nn.AvgPool2d((1, 2), 2)), TimeFolded(nn.AvgPool2d((2, 1), 2))),
}


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(sorted(WHOLE)))
def test_exact_where_weights_are(seed: int, name: str) -> None:
    torch.manual_seed(seed)
    model = whole(WHOLE[name]().eval(), seed)
    images = torch.randint(-4, 5, (4, 1, 8, 8)) / 2
    expected = to_inference(model)(images, STEPS)  # rounds the same sums of currents
    found = to_inference(model, precision="int8")
    assert torch.equal(found(images, STEPS), expected)
    state, logits = None, []
    for _ in range(STEPS):
        step, state = found(images, 1, state=state, return_state=True)
        logits.append(step)
    assert torch.equal(torch.cat(logits), found(images, STEPS))


def test_copies_pickles_and_loaded_weights() -> None:
    model = lively(models.vgg((8, 8), num_classes=3, in_channels=1, image_size=6), (1, 6, 6))
    fast, images = to_inference(model, precision="int8"), torch.randn(4, 1, 6, 6)
    expected = fast(images, 2)
    assert torch.equal(copy.deepcopy(fast)(images, 2), expected)
    buffer = io.BytesIO()
    torch.save(fast.state_dict(), buffer)
    buffer.seek(0)
    other = to_inference(
        lively(models.vgg((8, 8), num_classes=3, in_channels=1, image_size=6), (1, 6, 6)), precision="int8"
    )
    assert not torch.equal(other(images, 2), expected)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(images, 2), expected)  # packed anew


def test_threads_share_a_fresh_network() -> None:
    model = lively(models.vgg((8, 8), num_classes=3, in_channels=1, image_size=6), (1, 6, 6))
    images = torch.randn(4, 1, 6, 6)
    for kind in ("int8", "bfloat16"):
        expected = to_inference(model, precision=kind)(images, 2)  # type: ignore[arg-type]
        for _ in range(10):
            fast = to_inference(model, precision=kind)  # type: ignore[arg-type]
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(lambda _, run=fast: run(images, 2), range(4)))
            assert all(torch.equal(logits, expected) for logits in found)


def test_made_in_inference_mode_and_cast(numbers: torch.dtype) -> None:
    model = lively(models.vgg((8, 8), num_classes=3, in_channels=1, image_size=6), (1, 6, 6))
    images = torch.randn(4, 1, 6, 6)
    expected = to_inference(model, precision="int8")(images, 2)
    with torch.inference_mode():
        fast = to_inference(model, precision="int8")
        assert torch.equal(fast(images, 2), expected)
    assert torch.equal(fast(images, 2), expected)
    assert not fast.train().training
    assert fast.to(numbers)(images, 2).shape == expected.shape


def test_compiles_as_one_graph() -> None:
    model = lively(models.vgg((8, "A", 8), num_classes=3, in_channels=1, image_size=6), (1, 6, 6))
    fast, images = to_inference(model, precision="int8"), torch.randn(4, 1, 6, 6)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, 2), fast(images, 2), rtol=0, atol=0.05)


def test_weights_take_a_quarter() -> None:
    model = models.sew_resnet18()
    sizes = {
        kind: sum(
            tensor.numel() * tensor.element_size()
            for tensor in to_inference(model, precision=kind).state_dict().values()  # type: ignore[arg-type]
        )
        for kind in ("int8", "float32")
    }
    assert sizes["int8"] < 0.27 * sizes["float32"]


# ------------------------------------------------------------------------------------------------------------- refusals


def test_refuses_a_processor_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "byte_kernels", lambda: None)
    monkeypatch.setattr(native_byte_convolution, "obstacle", lambda: "this processor lacks avx2.")
    with pytest.raises(RuntimeError, match=r"needs a CPU with AVX-512 .* lacks avx2. Pass precision=\"auto\""):
        to_inference(models.sew_resnet18(3, 1), precision="int8")


def test_refusals() -> None:
    with pytest.raises(ValueError, match="has no effect"):
        to_inference(models.vgg((4, 4), num_classes=3, in_channels=1, image_size=4, neuron=LIFB), precision="int8")
    with pytest.raises(ValueError, match="has no effect"):
        to_inference(models.mlp([4, 4, 2]), precision="int8")
    with pytest.raises(ValueError, match="layer by layer"):
        to_inference(
            models.vgg((4, 4), num_classes=3, in_channels=1, image_size=4), precision="int8", implementation="compiled"
        )
    shared = conv_norm(8, 8)
    with pytest.raises(ValueError, match=r"layers\.1.* is used at two places"):
        to_inference(network(Activation(LIF(8)), shared, Activation(LIF(8)), shared), precision="int8")
