"""Convolutions, and gradients of their weights, that read only what is not zero, against double precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranvier import provenance
from ranvier.kernels import native_event_convolution
from ranvier.kernels.native_event_convolution import (
    BLOCK,
    FEWEST_CHANNELS,
    FEWEST_TAPS,
    LINE,
    MOST_BACKWARD,
    MOST_BACKWARD_STRIDED,
    MOST_STRIDE,
    forward,
    grad_weight,
    most_forward,
    obstacle,
    pack,
    pays,
)

needs_avx2 = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))
LAST_BITS = 2.0**-20
"""Of the sum of all absolute products, what sums in float32 may be off: sixteen units of the last place."""


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def exactly(grad: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    rest = [0], list(stride), list(padding), [1, 1], False, [0, 0], 1, [False, True, False]
    found: Tensor = torch.ops.aten.convolution_backward(grad.double(), x.double(), weight.double(), *rest)[1]
    return found


def tensors(
    images: int,
    channels: int,
    outs: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    share: float,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the output, an input of which `share` is not zero, and weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, channels, *size, generator=generator)
    x = channels_last(x * (torch.rand(x.shape, generator=generator) < share))
    weight = channels_last(torch.randn(outs, channels, *kernel, generator=generator))
    y = torch.conv2d(x, weight, None, stride, padding)
    return channels_last(torch.randn(y.shape, generator=generator)), x, weight


def differ(got: Tensor | None, exact: Tensor, sizes: Tensor) -> None:
    """Within rounding of sums in float32."""
    assert got is not None
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert got.shape == exact.shape
    assert ((got - exact).abs() <= LAST_BITS * sizes + 1e-30).all()


def both_are_right(given: tuple[Tensor, Tensor, Tensor], *where: tuple[int, int]) -> None:
    grad, x, weight = given
    sizes = exactly(grad.abs(), x.abs(), weight, *where)
    differ(grad_weight(grad, x, weight, *where, most=1.0), exactly(grad, x, weight, *where), sizes)
    bias = grad[0, :, 0, 0].contiguous()
    for shift in (None, bias):
        numbers = x.double(), weight.double(), None if shift is None else shift.double()
        sizes = torch.conv2d(*(None if one is None else one.abs() for one in numbers), *where)  # type: ignore[arg-type]
        differ(forward(x, weight, shift, *where, most=1.0), torch.conv2d(*numbers, *where), sizes)


@needs_avx2
@given(
    images=st.integers(1, 40),
    channels=st.integers(1, 30),
    outs=st.integers(1, 40),
    size=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=PAIR,
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    share=st.sampled_from([0.0, 0.02, 0.2, 0.6, 1.0]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_any_sizes(
    images: int,
    channels: int,
    outs: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    share: float,
    seed: int,
) -> None:
    if any(n + 2 * p < k for n, p, k in zip(size, padding, kernel, strict=True)):
        return
    given = tensors(images, channels, outs, size, kernel, stride, padding, share, seed)
    both_are_right(given, stride, padding)


@needs_avx2
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize("size", [(40, 40), (100, 9), (5, 700), (33, 64)])
def test_images_in_several_segments(size: tuple[int, int], stride: tuple[int, int]) -> None:
    """Larger than the part of the gradient that a cache holds, in rows or in columns."""
    given = tensors(3, 10, 20, size, (3, 3), stride, (1, 1), 0.2)
    both_are_right(given, stride, (1, 1))


@needs_avx2
def test_inputs_in_several_parts() -> None:
    """More values than are listed at once, and a last part that is smaller."""
    given = tensors(70, 40, 9, (8, 9), (3, 3), (1, 1), (1, 1), 0.2)
    assert given[1].numel() > 2**17
    both_are_right(given, (1, 1), (1, 1))


@needs_avx2
def test_by_hand() -> None:
    """One spike in the middle meets each weight at one place; a sum of spikes counts as often."""
    x, grad = torch.zeros(1, 1, 3, 3), torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    x[0, 0, 1, 1] = 2
    found = grad_weight(channels_last(grad), channels_last(x), torch.zeros(1, 1, 3, 3), (1, 1), (1, 1))
    assert found is not None
    assert found.flatten().tolist() == [2 * value for value in (9, 8, 7, 6, 5, 4, 3, 2, 1)]


@needs_avx2
def test_any_number_of_threads_gives_the_same_bits() -> None:
    given, before = tensors(40, 24, 24, (9, 9), (3, 3), (1, 1), (1, 1), 0.2), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append((grad_weight(*given, (1, 1), (1, 1)), forward(*given[1:], None, (1, 1), (1, 1), most=1.0)))
    finally:
        torch.set_num_threads(before)
    for pair in found:
        assert all(torch.equal(one, other) for one, other in zip(pair, found[0], strict=True))  # type: ignore[arg-type]


@needs_avx2
@pytest.mark.parametrize(("channels", "outs", "kernel"), [(8, 8, (3, 3)), (30, 33, (1, 5)), (130, 64, (4, 2))])
def test_packed_weights_give_the_same_bits_for_any_size(channels: int, outs: int, kernel: tuple[int, int]) -> None:
    weight = tensors(3, channels, outs, (6, 6), kernel, (1, 1), (1, 1), 0.2)[2]
    packed = pack(weight)
    assert torch.equal(pack(weight.contiguous()), packed)  # in any order
    for size in ((6, 6), (20, 5)):
        x = tensors(3, channels, outs, size, kernel, (1, 1), (1, 1), 0.2)[1]
        found = forward(x, weight, None, (1, 1), (1, 1), most=1.0, packed=packed)
        wanted = forward(x, weight, None, (1, 1), (1, 1), most=1.0)
        assert found is not None
        assert torch.equal(found, wanted)  # type: ignore[arg-type]


@needs_avx2
@pytest.mark.parametrize(("stride", "most"), [((1, 1), MOST_BACKWARD), ((2, 2), MOST_BACKWARD_STRIDED)])
def test_dense_inputs_are_left_to_others(stride: tuple[int, int], most: float) -> None:
    for share, listed in ((most + 0.1, False), (most - 0.1, True)):
        given = tensors(8, 16, 16, (8, 8), (3, 3), stride, (1, 1), share)
        assert (grad_weight(*given, stride, (1, 1)) is not None) is listed


@needs_avx2
@pytest.mark.parametrize("outs", [16, 32, 64])
def test_outputs_of_dense_inputs_are_left_to_others(outs: int) -> None:
    most = most_forward(torch.zeros(outs, 32, 3, 3))
    for share, listed in ((most + 0.08, False), (most - 0.08, True)):
        given = tensors(8, 32, outs, (8, 8), (3, 3), (1, 1), (1, 1), share)
        assert (forward(*given[1:], None, (1, 1), (1, 1)) is not None) is listed


def test_few_filters_and_few_channels_leave_less_to_gain() -> None:
    def most(outs: int, ins: int = 64) -> float:
        return most_forward(torch.zeros(outs, ins, 3, 3))

    wide = BLOCK * LINE
    assert most(wide) == pytest.approx(most(2 * wide)) == pytest.approx(most(5 * wide, ins=256))
    assert 0.4 < most(wide) < 0.5
    assert 0 < most(LINE // 2) < most(LINE) < most(2 * LINE) < most(3 * LINE) < most(wide)
    assert most(wide + LINE) < most(wide)  # a block of one line
    assert 0 < most(wide, ins=8) < most(wide, ins=16) < most(wide, ins=32) < most(wide)
    assert most(1, ins=8) == 0


@needs_avx2
def test_nan_arrives() -> None:
    for place in (0, 1):
        given = tensors(2, 8, 8, (4, 4), (3, 3), (1, 1), (1, 1), 0.3)
        given[place][given[place] != 0] = float("nan")
        found = grad_weight(*given, (1, 1), (1, 1))
        assert found is not None
        assert found.isnan().any()
    given = tensors(2, 8, 8, (4, 4), (3, 3), (1, 1), (1, 1), 0.3)
    given[1][given[1] != 0] = float("nan")
    spread = forward(*given[1:], None, (1, 1), (1, 1), most=1.0)
    assert spread is not None
    assert spread.isnan().any()


def test_what_pays() -> None:
    x, weight = torch.zeros(2, FEWEST_CHANNELS, 6, 6), torch.zeros(FEWEST_CHANNELS, FEWEST_CHANNELS, 3, 3)
    one = (1, 1)
    assert pays(x, weight, one, one)
    assert not pays(x[:0], weight, one, one)
    assert not pays(x[:, 1:], weight, one, one)
    assert not pays(x[:, 1:], weight[:, 1:], one, one)
    assert not pays(x, weight[1:], one, one)
    assert not pays(x, weight[:, :, : FEWEST_TAPS - 1, :1], one, one)
    assert not pays(x, weight, (MOST_STRIDE + 1, 1), one)
    assert not pays(x, weight, (0, 1), one)
    assert not pays(x, weight, one, (-1, 0))
    assert not pays(x[:, :, :2], weight, one, (0, 0))


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    unwrapped = obstacle.__wrapped__
    monkeypatch.setattr(provenance, "processor_features", lambda: "x86_64 avx2")
    assert unwrapped() == "this processor lacks fma."
    monkeypatch.setattr(provenance, "processor_features", lambda: "x86_64 avx2 fma")
    monkeypatch.setattr(provenance, "cpp_compiler", lambda: None)
    assert "C++ compiler" in unwrapped()
    monkeypatch.undo()

    def fail() -> None:
        raise RuntimeError("compiling them failed: no space")

    monkeypatch.setattr(provenance, "processor_features", lambda: "x86_64 avx2 fma")
    monkeypatch.setattr(provenance, "cpp_compiler", lambda: "g++")
    monkeypatch.setattr(native_event_convolution, "_library", fail)
    assert unwrapped() == "compiling them failed: no space."
