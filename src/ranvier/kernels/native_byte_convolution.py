"""Convolutions of bytes with int8 weights on processors with AVX2, without gradients.

    y[o] = scale[o] (Q[o] x) + b[o],    with Q x in whole numbers

oneDNN has such kernels for AVX-512; on less it takes forty times as long. See `native_byte_convolution.cpp`.
"""

import ctypes
import functools
import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ranvier.kernels.native_convolution import Geometry
from ranvier.kernels.native_library import address, ask_for_huge_pages, load, obstacle_of

SOURCE = Path(__file__).with_suffix(".cpp")

BLOCK = 16
"""Channels that are summed at once, `OUT` in the source."""

QUAD = 4
"""Bytes that are read at once."""

MOST_RUNS = 1024
"""Most rows of weights of a channel, of single weights where they are dilated; `RUNS` in the source."""

LARGEST_BYTE = 127
"""Two products of such a byte and such a weight fit 16 bits."""

ALONE = 2**21
"""Products below which a second thread costs more than it saves."""


class ByteFilters(NamedTuple):
    """The weights of a convolution in the order in which they are read, and what is applied to its sums."""

    weights: Tensor
    """int8, `[block of O, run, quad, 16 of O, 4 of C]`."""
    scale: Tensor
    """Float32, of whole blocks of O."""
    bias: Tensor
    """The same."""
    shape: tuple[int, ...]
    """`[O, C, kernel height, kernel width]`."""
    geometry: Geometry
    most: int
    """No byte that comes is larger: the smaller, the more products are added in 16 bits."""

    @classmethod
    def of(
        cls, weight: Tensor, scale: Tensor, bias: Tensor | None, geometry: Geometry, most: int = LARGEST_BYTE
    ) -> "ByteFilters":
        """Filters of weights `[O, C, kernel height, kernel width]`, int8, with a scale `[O]`."""
        outs, ins, height, width = weight.shape
        rows = weight.detach().permute(0, 2, 3, 1)
        # A row of weights meets bytes that lie side by side, unless they are dilated.
        runs = rows.reshape(outs, height, -1) if geometry.dilation[1] == 1 else rows.reshape(outs, height * width, ins)
        runs = torch.nn.functional.pad(runs, (0, -runs.shape[2] % QUAD, 0, 0, 0, -outs % BLOCK))
        split = runs.reshape(-1, BLOCK, runs.shape[1], runs.shape[2] // QUAD, QUAD)
        bias = torch.zeros_like(scale) if bias is None else bias
        weights = split.permute(0, 2, 3, 1, 4).contiguous()
        return cls(weights, _whole_blocks(scale), _whole_blocks(bias), weight.shape, geometry, most)


def _whole_blocks(numbers: Tensor) -> Tensor:
    """A number of each channel, and zeros up to whole blocks."""
    return torch.nn.functional.pad(numbers.detach().float(), (0, -len(numbers) % BLOCK)).contiguous()


def fits(shape: Sequence[int], geometry: Geometry, groups: int) -> bool:
    """Whether the kernel computes a convolution of weights `[O, C, kernel height, kernel width]`."""
    runs = shape[2] if geometry.dilation[1] == 1 else shape[2] * shape[3]
    numbers = (*shape, *geometry.stride, *geometry.dilation)
    return groups == 1 and min(numbers) >= 1 and min(geometry.padding) >= 0 and runs <= MOST_RUNS


class _Work(ctypes.Structure):
    """What the function is given: `Work` in the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input", "weights", "scale", "bias", "output", "scratch")),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("images", "height", "width", "channels", "out_height", "out_width", "out_channels"),
                *("kernel_height", "kernel_width", "stride_y", "stride_x", "padding_y", "padding_x"),
                *("dilation_y", "dilation_x", "threads", "most"),
            )
        ),
    )


def convolve(x: Tensor, filters: ByteFilters) -> Tensor:
    """Output `[N, O, H', W']`, float32 and channels-last, of bytes `[N, C, H, W]`.

    Args:
        x: uint8, none larger than the filters say. It is copied where it is not channels-last.
        filters: `fits` says that they may be used.

    Raises:
        ValueError: Other channels than the filters have, or an image that is smaller than the kernel.
    """
    products = len(x) * math.prod(x.shape[2:]) * math.prod(filters.shape)  # at a stride of 1
    threads = torch.get_num_threads() if products >= ALONE else 1
    plan = _plan(x.shape, filters.shape, filters.geometry, filters.most, threads)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty(plan.shape, memory_format=torch.channels_last)
    ask_for_huge_pages(y)
    scratch = torch.empty(plan.scratch_size, dtype=torch.uint8)
    work = _Work.from_buffer_copy(plan.work)  # another thread may be about to run it
    work.input, work.output, work.scratch = x.data_ptr(), y.data_ptr(), scratch.data_ptr()
    work.weights, work.scale, work.bias = map(address, filters[:3])
    plan.run(ctypes.byref(work))
    return y


class _Plan(NamedTuple):
    """All that does not change from call to call on inputs of one size."""

    work: _Work
    run: Callable[..., None]
    scratch_size: int
    shape: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def _plan(x: torch.Size, shape: Sequence[int], geometry: Geometry, most: int, threads: int) -> _Plan:
    images, channels, *size = x
    outs, ins, *kernel = shape
    out_size = geometry.output_size(size, kernel)
    if channels != ins or min(out_size) < 1:
        raise ValueError(
            f"the input is {list(x)}, but must have {ins} channels, and with padding of {list(geometry.padding)} room "
            f"for a kernel of {kernel[0]}x{kernel[1]}."
        )
    sizes = (images, *size, channels, *out_size, outs, *kernel)
    moves = (number for pair in geometry for number in pair)
    work = _Work(None, None, None, None, None, None, *sizes, *moves, threads, most)
    library = _library()
    scratch_size = threads * library.scratch_size(ctypes.byref(work))
    return _Plan(work, library.run, scratch_size, (images, outs, *out_size))


@functools.cache
def obstacle() -> str | None:
    """What keeps the kernel from running here; None if nothing does."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "this processor lacks avx2."
    return obstacle_of(("avx2",), _library)


@functools.cache
def _library() -> ctypes.CDLL:
    library = load(SOURCE, ())
    library.run.argtypes = library.scratch_size.argtypes = [ctypes.POINTER(_Work)]
    library.run.restype, library.scratch_size.restype = None, ctypes.c_int64
    return library
