"""Convolutions of bytes with weights of 8 bits: whole numbers, so every one must come out exactly."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranvier import provenance
from ranvier.kernels import native_byte_convolution
from ranvier.kernels.native_byte_convolution import LARGEST_BYTE, MOST_RUNS, ByteFilters, convolve, fits, obstacle
from ranvier.kernels.native_convolution import Geometry

needs_avx2 = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
ONE = Geometry((1, 1), (1, 1), (1, 1))
SMALL = st.tuples(st.integers(1, 3), st.integers(1, 3))


def bytes_of(*shape: int, most: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(most + 1, shape, dtype=torch.uint8, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def weights_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def exactly(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    y: Tensor = F.conv2d(x.double(), weight.double(), None, *map(tuple, geometry))  # type: ignore[arg-type]
    return y


def plain(weight: Tensor, geometry: Geometry = ONE, most: int = LARGEST_BYTE) -> ByteFilters:
    return ByteFilters.of(weight, torch.ones(len(weight)), None, geometry, most)


@needs_avx2
@given(
    images=st.integers(1, 9),
    channels=st.integers(1, 40),
    outs=st.integers(1, 40),
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    kernel=SMALL,
    stride=SMALL,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=SMALL,
    most=st.integers(1, LARGEST_BYTE),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_any_sizes_exactly(
    images: int,
    channels: int,
    outs: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    most: int,
    threads: int,
    seed: int,
) -> None:
    geometry = Geometry(stride, padding, dilation)
    x, weight = bytes_of(images, channels, *size, most=most, seed=seed), weights_of(outs, channels, *kernel, seed=seed)
    filters = plain(weight, geometry, most)
    if min(geometry.output_size(size, kernel)) < 1:
        with pytest.raises(ValueError, match="room for a kernel"):
            convolve(x, filters)
        return
    before, alone = torch.get_num_threads(), native_byte_convolution.ALONE
    torch.set_num_threads(threads)
    native_byte_convolution.ALONE = 0  # so that little work is shared, too
    try:
        got = convolve(x, filters)
    finally:
        torch.set_num_threads(before)
        native_byte_convolution.ALONE = alone
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got.double(), exactly(x, weight, geometry))


@needs_avx2
@pytest.mark.parametrize("most", [1, 2, 3, 64, LARGEST_BYTE])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_16_bits_never_overflow(most: int, sign: int) -> None:
    """All bytes and all weights as large as they can be, in sums that are many times what 16 bits hold."""
    x = torch.full((1, 512, 5, 5), most, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    weight = torch.full((17, 512, 3, 3), 127 * sign, dtype=torch.int8)
    assert torch.equal(convolve(x, plain(weight, most=most)).double(), exactly(x, weight, ONE))


@needs_avx2
def test_scale_and_bias_by_hand() -> None:
    weight = torch.tensor([[3, -2], [0, 127]], dtype=torch.int8).view(2, 2, 1, 1)
    x = torch.tensor([4, 5], dtype=torch.uint8).view(1, 2, 1, 1)
    geometry = Geometry((1, 1), (0, 0), (1, 1))
    filters = ByteFilters.of(weight, torch.tensor([0.5, 2.0]), torch.tensor([1.0, -3.0]), geometry)
    assert convolve(x, filters).flatten().tolist() == [0.5 * (12 - 10) + 1.0, 2.0 * 635 - 3.0]


@needs_avx2
@pytest.mark.parametrize("images", [1, 2, 5])
def test_threads_share_an_image_or_take_one_each(images: int) -> None:
    """Large enough to be shared, by as many threads as there are and by more."""
    x, weight = bytes_of(images, 64, 32, 32, most=1), weights_of(48, 64, 3, 3)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(convolve(x, plain(weight)).double(), exactly(x, weight, ONE))
    finally:
        torch.set_num_threads(before)


@needs_avx2
def test_takes_images_that_are_not_channels_last() -> None:
    x, weight = bytes_of(2, 8, 6, 5, most=1), weights_of(4, 8, 3, 3)
    assert torch.equal(convolve(x.contiguous(), plain(weight)), convolve(x, plain(weight)))


@needs_avx2
def test_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 7, 6, 6\], but must have 8 channels"):
        convolve(bytes_of(1, 7, 6, 6, most=1), plain(weights_of(4, 8, 3, 3)))


def test_what_fits() -> None:
    assert fits((4, 8, 3, 3), ONE, groups=1)
    assert not fits((4, 8, 3, 3), ONE, groups=2)
    assert not fits((0, 8, 3, 3), ONE, groups=1)
    assert not fits((4, 8, 3, 3), Geometry((1, 1), (-1, 0), (1, 1)), groups=1)
    assert fits((4, 8, MOST_RUNS, 3), ONE, groups=1)
    assert not fits((4, 8, MOST_RUNS + 1, 1), ONE, groups=1)
    assert not fits((4, 8, MOST_RUNS // 2, 3), Geometry((1, 1), (1, 1), (1, 2)), groups=1)  # a run for each weight


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    unwrapped = obstacle.__wrapped__
    monkeypatch.setattr(provenance, "processor_features", lambda: "x86_64 sse avx")
    assert unwrapped() == "this processor lacks avx2."
    monkeypatch.setattr(provenance, "processor_features", lambda: "x86_64 avx avx2")
    monkeypatch.setattr(native_byte_convolution.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(provenance, "cpp_compiler", lambda: None)
    assert "C++ compiler" in unwrapped()
    monkeypatch.setattr(native_byte_convolution.platform, "machine", lambda: "aarch64")
    assert unwrapped() == "this processor lacks avx2."
