"""Convolutions of spikes on the matrix unit, against double precision and numbers that must come out unrounded."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as with_settings
from hypothesis import strategies as st
from torch import Tensor

from ranvier.kernels import native_convolution, native_tiles
from ranvier.kernels.native_convolution import forward, grad_spikes, grad_weight, pays

needs_unit = pytest.mark.skipif(native_convolution.obstacle() is not None, reason=str(native_convolution.obstacle()))
SIZES: dict[str, Any] = {
    "images": st.integers(1, 70),
    "channels": st.integers(1, 70),
    "out_channels": st.integers(1, 70),
    "size": st.tuples(st.integers(3, 9), st.integers(3, 9)),
    "kernel": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "padding": st.tuples(st.integers(0, 2), st.integers(0, 2)),
}
LAST_BITS = 2.0**-20
"""Of the sum of all absolute products, what sums in float32 may be off: sixteen units of the last place."""


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def differ(got: Tensor | None, exact: Tensor, size: Tensor) -> None:
    """Within rounding of sums in float32; `size` is the sum of absolute products."""
    assert got is not None
    assert got.shape == exact.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert ((got - exact).abs() <= LAST_BITS * size + 1e-30).all()


@needs_unit
@given(
    **SIZES,
    largest=st.integers(1, 255),
    seed=st.integers(0, 2**32),
)
@with_settings(max_examples=60, deadline=None)
def test_any_sizes_against_double_precision(
    images: int,
    channels: int,
    out_channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    largest: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    spikes = channels_last(torch.randint(largest + 1, (images, channels, *size), generator=generator).float())
    weight = channels_last(torch.randn(out_channels, channels, *kernel, generator=generator))
    x, w = spikes.double().requires_grad_(), weight.double().requires_grad_()
    bias = torch.randn(out_channels, generator=generator)
    exact = F.conv2d(x, w, None, stride, padding)
    grad = channels_last(torch.randn(exact.shape, generator=generator))
    exact.backward(grad.double())
    a, b = spikes.double().requires_grad_(), weight.double().abs().requires_grad_()
    sums = F.conv2d(a, b, None, stride, padding)
    sums.backward(grad.double().abs())
    assert x.grad is not None
    assert w.grad is not None
    assert a.grad is not None
    assert b.grad is not None
    differ(forward(spikes, weight, None, stride, padding), exact, sums)
    shift = bias.double().view(-1, 1, 1)
    differ(forward(spikes, weight, bias, stride, padding), exact + shift, sums + shift.abs())
    differ(grad_spikes(grad, spikes, weight, stride, padding), x.grad, a.grad)
    differ(grad_weight(grad, spikes, weight, stride, padding), w.grad, b.grad)


@needs_unit
@given(
    **SIZES,
    seed=st.integers(0, 2**32),
)
@with_settings(max_examples=60, deadline=None)
def test_bfloat16_of_any_value_against_double_precision(
    images: int,
    channels: int,
    out_channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    seed: int,
) -> None:
    """Weights are rounded, and what comes out but the gradient of the weights; nothing else is."""
    generator = torch.Generator().manual_seed(seed)
    given = channels_last(torch.randn(images, channels, *size, generator=generator).bfloat16())
    weight = channels_last(torch.randn(out_channels, channels, *kernel, generator=generator))
    bias = torch.randn(out_channels, generator=generator)
    x, w = given.double().requires_grad_(), weight.bfloat16().double().requires_grad_()
    exact = F.conv2d(x, w, bias.double(), stride, padding)
    grad = channels_last(torch.randn(exact.shape, generator=generator).bfloat16())
    exact.backward(grad.double())
    a, b = given.double().abs().requires_grad_(), weight.bfloat16().double().abs().requires_grad_()
    sums = F.conv2d(a, b, bias.double().abs(), stride, padding)
    sums.backward(grad.double().abs())
    assert x.grad is not None
    assert w.grad is not None
    assert a.grad is not None
    assert b.grad is not None
    half = 2.0**-8 / LAST_BITS  # a bfloat16 has 8 bits
    for found, wanted, size_of in (
        (forward(given, weight, bias, stride, padding), exact.detach(), sums.detach()),
        (grad_spikes(grad, given, weight, stride, padding), x.grad, a.grad),
    ):
        assert found is not None
        assert found.dtype == torch.bfloat16
        differ(found, wanted, size_of + half * wanted.abs())
    of_weight = grad_weight(grad, given, weight, stride, padding)
    assert of_weight is not None
    assert of_weight.dtype == torch.float32
    differ(of_weight, w.grad, b.grad)


@needs_unit
def test_all_digits_of_weights_and_gradients_count() -> None:
    """One spike: the output is a weight, and the gradient of a weight that of an output, to the last of 24 bits."""
    generator = torch.Generator().manual_seed(0)
    weight = channels_last(torch.randn(40, 36, 3, 3, generator=generator) * torch.logspace(-20, 20, 36).view(-1, 1, 1))
    spikes = channels_last(torch.zeros(33, 36, 3, 3))
    for image in range(33):
        spikes[image, image, 1, 1] = 1
    output = forward(spikes, weight, None, (1, 1), (1, 1))
    assert output is not None
    for image in range(33):
        assert torch.equal(output[image], weight[:, image].flip(1, 2))
    grad = channels_last(torch.randn(output.shape, generator=generator))
    found = grad_weight(grad, spikes, weight, (1, 1), (1, 1))
    assert found is not None
    for image in range(33):
        assert torch.equal(found[:, image], grad[image].flip(1, 2))


@needs_unit
def test_the_gradient_of_spikes_has_all_digits() -> None:
    """What is left out of a product of two float32 is less than what rounding changes."""
    generator = torch.Generator().manual_seed(1)
    weight = channels_last(torch.randn(32, 32, 1, 1, generator=generator))
    grad = channels_last(torch.zeros(32, 32, 2, 2))
    grad[:, 5] = torch.randn(32, 2, 2, generator=generator)
    found = grad_spikes(grad, torch.ones_like(grad), weight, (1, 1), (0, 0))
    exact = grad[:, 5].double().unsqueeze(1) * weight[5].double().view(1, -1, 1, 1)
    assert ((found - exact) / exact).abs().max() < 2**-22


@needs_unit
def test_many_images_are_taken_in_parts() -> None:
    generator = torch.Generator().manual_seed(3)
    spikes = channels_last(torch.randint(2, (90, 32, 32, 32), generator=generator).float())
    weight = channels_last(torch.randint(-9, 9, (32, 32, 3, 3), generator=generator).float())
    grad = channels_last(torch.randint(-9, 9, (90, 32, 32, 32), generator=generator).float())
    wanted = torch.ops.aten.convolution_backward(  # of whole numbers, which are not rounded
        grad, spikes, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, True, False)
    )
    settings = (1, 1), (1, 1)
    assert torch.equal(forward(spikes, weight, None, *settings), F.conv2d(spikes, weight, None, *settings))  # type: ignore[arg-type]
    assert torch.equal(grad_spikes(grad, spikes, weight, *settings), wanted[0])
    assert torch.equal(grad_weight(grad, spikes, weight, *settings), wanted[1])  # type: ignore[arg-type]


@needs_unit
@pytest.mark.parametrize("stray", [1 / 3, 257.0, 1 + 2**-8, float("inf"), float("nan")])
def test_what_is_not_made_of_spikes_is_told(stray: float) -> None:
    spikes, weight = channels_last(torch.ones(40, 32, 5, 5)), channels_last(torch.randn(32, 32, 3, 3))
    grad = channels_last(torch.randn(40, 32, 5, 5))
    assert forward(spikes, weight, None, (1, 1), (1, 1)) is not None
    spikes[39, 31, 4, 4] = stray
    assert forward(spikes, weight, None, (1, 1), (1, 1)) is None
    assert grad_weight(grad, spikes, weight, (1, 1), (1, 1)) is None


@needs_unit
def test_any_number_of_threads_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(2)
    spikes = channels_last(torch.randint(2, (96, 64, 7, 7), generator=generator).float())
    weight = channels_last(torch.randn(48, 64, 3, 3, generator=generator))
    grad = channels_last(torch.randn(96, 48, 7, 7, generator=generator))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(
                (
                    forward(spikes, weight, None, (1, 1), (1, 1)),
                    grad_spikes(grad, spikes, weight, (1, 1), (1, 1)),
                    grad_weight(grad, spikes, weight, (1, 1), (1, 1)),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))  # type: ignore[arg-type]


def test_small_and_narrow_layers_do_not_pay() -> None:
    def layer(images: int, channels: int, out_channels: int, kernel: int = 3, size: int = 4) -> bool:
        x, weight = torch.empty(images, channels, size, size), torch.empty(out_channels, channels, kernel, kernel)
        return pays(x, weight, (1, 1), (kernel, kernel))

    assert layer(32, 64, 64)
    assert layer(40, 64, 96)
    assert layer(56, 48, 120)
    assert not layer(48, 48, 48)
    assert not layer(8, 64, 64)  # a quarter of a block
    assert not layer(32, 16, 64)
    assert not layer(32, 64, 10)
    assert not layer(32, 64, 64, kernel=1)
    assert not layer(32, 64, 64, kernel=33)
    assert layer(32, 64, 64, size=64)
    assert not layer(32, 64, 64, size=100)  # would take 128 MB


def test_what_is_no_convolution_does_not_pay() -> None:
    x, weight = torch.empty(32, 64, 5, 6), torch.empty(64, 64, 3, 3)
    assert pays(x, weight, (1, 1), (0, 0))
    assert not pays(x[:, :32], weight, (1, 1), (0, 0))
    assert not pays(x[:0], weight, (1, 1), (1, 1))
    assert not pays(x[:, :, :0], weight, (1, 1), (1, 1))
    assert not pays(x[:, :, :2], weight, (1, 1), (0, 0))
    assert not pays(x, weight, (1, 0), (0, 0))
    assert not pays(x, weight, (1, 2**52), (0, 0))
    assert not pays(x, weight, (1, 1), (0, -1))


def test_what_keeps_the_unit_keeps_the_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_tiles, "obstacle", lambda: "no unit.")
    assert native_convolution.obstacle.__wrapped__() == "no unit."


def test_a_compiler_that_fails_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    def library(_: torch.dtype) -> None:
        raise RuntimeError("compiling them failed: no space")

    monkeypatch.setattr(native_tiles, "obstacle", lambda: None)
    monkeypatch.setattr(native_convolution, "_library", library)
    assert native_convolution.obstacle.__wrapped__() == "compiling them failed: no space."


@needs_unit
def test_others_may_use_the_unit_in_between() -> None:
    """It is told how its tiles look; libraries that believe they know it would compute something else, or end."""
    generator = torch.Generator().manual_seed(4)
    spikes = channels_last(torch.randint(2, (64, 64, 8, 8), generator=generator).float())
    weight = channels_last(torch.randn(64, 64, 3, 3, generator=generator))
    half, narrow = spikes.bfloat16(), weight.bfloat16()
    matrix = torch.randn(96, 200, generator=generator).bfloat16()

    def others() -> list[Tensor]:
        whole = torch.randint(-9, 9, (40, 64), generator=torch.Generator().manual_seed(5), dtype=torch.int8)
        return [F.conv2d(half, narrow, padding=1), matrix @ matrix.T, torch._int_mm(whole, whole.T.contiguous())]

    wanted, ours = others(), forward(spikes, weight, None, (1, 1), (1, 1))
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(others(), wanted, strict=True))
        assert torch.equal(forward(spikes, weight, None, (1, 1), (1, 1)), ours)  # type: ignore[arg-type]
