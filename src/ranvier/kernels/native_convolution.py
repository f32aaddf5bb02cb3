"""Convolutions on the matrix unit of x86 processors, AMX, and their gradients: of bfloat16, and of spikes in float32.

The unit multiplies bfloat16, 16 times as many a cycle as vectors multiply float32, and adds in float32. Spikes are
bfloat16 already, and float32 that they are multiplied with is the sum of three: see `native_convolution.cpp`.
"""

import ctypes
import functools
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ranvier.kernels import native_tiles
from ranvier.kernels.native_library import address, ask_for_huge_pages, load

SOURCE = Path(__file__).with_suffix(".cpp")

BLOCK = 32
"""Images, and channels, that are taken at once."""

FULL = 0.6
"""Part of all products in such blocks that must exist for the rest to be wasted."""

FEWEST_PRODUCTS = 256
"""Products in a sum from which it is worth laying out what they are made of: 3x3 weights of 32 channels have 288."""

MOST_HELD = 2**25
"""Numbers of bfloat16, 64 MB, that a block of images may take when it is laid out: more would be missed elsewhere."""

MOST_TAPS = 1024
"""Weights of a channel, `TAPS` in the source."""


class _Conv(ctypes.Structure):
    """What all functions are given: `Conv` in the source."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("images", "height", "width", "channels", "out_height", "out_width", "out_channels"),
            *("kernel_height", "kernel_width", "stride_y", "stride_x", "padding_y", "padding_x", "threads"),
        )
    )


def _conv(input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> _Conv:
    images, channels, *size = input.shape
    out_channels, _, *kernel = weight.shape
    out_size = output_size(size, kernel, stride, padding)
    numbers = (images, *size, channels, *out_size, out_channels, *kernel, *stride, *padding)
    return _Conv(*numbers, torch.get_num_threads())


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    """Height and width of what a convolution gives."""
    return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True))


class Geometry(NamedTuple):
    """How a convolution moves over an image, of y and x."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Height and width of what comes out."""
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, self.dilation, strict=True)]
        return output_size(size, reach, self.stride, self.padding)


def pays(input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether blocks are full enough, and sums long enough, to be faster than ordinary convolutions of float32.

    What no convolution can be made of does not pay: other channels, nothing to convolve, strides or padding that are
    none. Nor does a stride beyond the image.
    """
    outs, ins, *kernel = weight.shape
    if input.shape[1] != ins or min(stride) < 1 or min(padding) < 0 or not (input.numel() and weight.numel()):
        return False
    places = math.prod(output_size(input.shape[2:], kernel, stride, padding))
    padded = [n + 2 * p for n, p in zip(input.shape[2:], padding, strict=True)]
    if any(k > n or s > n for n, k, s in zip(padded, kernel, stride, strict=True)):
        return False
    taps = kernel[0] * kernel[1]
    full = math.prod(size / _filled(size) for size in (len(input), ins, outs)) >= FULL
    long = taps * ins >= FEWEST_PRODUCTS and taps <= MOST_TAPS
    held = BLOCK * max(3 * places * _filled(outs), math.prod(input.shape[2:]) * _filled(ins))
    return full and long and held <= MOST_HELD


def _filled(size: int) -> int:
    """`size` filled up to whole blocks."""
    return BLOCK * -(-size // BLOCK)


def forward(
    spikes: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor | None:
    """Output `[N, O, H', W']` of a convolution, of the dtype of its input; None where float32 are no spikes.

    All tensors of four dimensions here are channels-last.

    Args:
        spikes: `[N, C, H, W]`, bfloat16, or float32 that bfloat16 holds exactly.
        weight: `[O, C, kernel height, kernel width]`, float32. It is rounded where spikes are bfloat16.
        bias: `[O]`, float32, or None.
        stride: Of y and x.
        padding: Zeros on either side.
    """
    conv = _conv(spikes, weight, stride, padding)
    output = _new((conv.images, conv.out_channels, conv.out_height, conv.out_width), spikes.dtype)
    return output if _run("forward", conv, spikes, weight, bias, output) else None


def grad_spikes(grad: Tensor, spikes: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Gradient of the input, which may be any; arguments as above, and the gradient of the output, of its dtype."""
    output = _new(spikes.shape, spikes.dtype)
    _run("grad_spikes", _conv(spikes, weight, stride, padding), grad, weight, output)
    return output


def grad_weight(
    grad: Tensor, spikes: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor | None:
    """Gradient of the weight, float32; None where float32 are no spikes."""
    output = _new(weight.shape, torch.float32)
    return output if _run("grad_weight", _conv(spikes, weight, stride, padding), grad, spikes, output) else None


def _new(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    made = torch.empty(tuple(shape), dtype=dtype, device="cpu", memory_format=torch.channels_last)
    ask_for_huge_pages(made)
    return made


def _run(name: str, conv: _Conv, images: Tensor, *tensors: Tensor | None) -> bool:
    library = _library(images.dtype)
    numbers = getattr(library, f"scratch_{name}")(ctypes.byref(conv))
    scratch = torch.empty(numbers, dtype=torch.bfloat16, device="cpu")
    ask_for_huge_pages(scratch)
    return bool(getattr(library, name)(ctypes.byref(conv), *map(address, (images, *tensors)), address(scratch)))


@functools.cache
def obstacle() -> str | None:
    """What keeps the convolutions from running here; None if nothing does."""
    obstacle = native_tiles.obstacle()
    if obstacle is None:
        try:
            for dtype in (torch.float32, torch.bfloat16):
                _library(dtype)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            return f"{error}."
    return obstacle


@functools.cache
def _library(dtype: torch.dtype) -> Any:
    library = load(SOURCE, (f"-DBFLOAT16={int(dtype == torch.bfloat16)}",))
    for name, tensors in (("forward", 5), ("grad_spikes", 4), ("grad_weight", 4)):
        function, scratch = getattr(library, name), getattr(library, f"scratch_{name}")
        function.argtypes = [ctypes.POINTER(_Conv), *[ctypes.c_void_p] * tensors]
        scratch.argtypes = [ctypes.POINTER(_Conv)]
        function.restype = scratch.restype = ctypes.c_int64
    library.grad_spikes.restype = None
    return library
