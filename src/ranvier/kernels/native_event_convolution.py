"""Convolutions whose input is mostly zero, and the gradient of their weights, on CPUs with AVX2, in float32.

Of spikes, most are zero. Both are sums over those that are not, the events:

    y[place, o]   = sum over taps and events (place + tap, c) of  w[o, tap, c] x[place + tap, c]
    w'[o, tap, c] = sum over events (place, c) of  x[place, c] y'[place - tap, o]

See `native_event_convolution.cpp`.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ranvier.kernels.native_convolution import output_size
from ranvier.kernels.native_library import address, ask_for_huge_pages, definitions, load, obstacle_of

SOURCE = Path(__file__).with_suffix(".cpp")

NEEDED = ("avx2", "fma")
"""Features of the processor: on others it would run, but nobody has measured whether it is faster."""

MOST_BACKWARD, MOST_BACKWARD_STRIDED = 0.5, 0.35
"""Share of the input from which the gradient of the weights comes sooner if all of it is read; with a stride an event
meets fewer of them.
"""

LINE, BLOCK = 8, 4
"""Filters of a line, lines whose outputs are summed at once; with AVX-512 there are 16 in a line."""

CHANNELS = 64
"""That are listed together; half of them with AVX-512."""

READ_ALL, START, EVENT, LINE_OF_EVENT = 0.6, 36.0, 1.9, 0.75
"""Cycles (Zen, AVX2) of a value and a line of filters where all is read, and from events: to begin with a row of
weights at a place, for an event, and for each line of weights that it meets.
"""

FEWEST_TAPS = 4
"""Weights of a channel from which it pays to list events: each is read for all of them at once."""

FEWEST_CHANNELS = 8
"""That come, and that go."""

MOST_STRIDE = 3
"""Lists are as many as its square."""


class _Work(ctypes.Structure):
    """What the functions are given: `Work` in the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input", "output", "weight", "bias", "packed", "scratch")),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("images", "height", "width", "channels", "out_height", "out_width", "out_channels"),
                *("kernel_height", "kernel_width", "stride_y", "stride_x", "padding_y", "padding_x", "threads"),
            )
        ),
        ("most", ctypes.c_float),
    )


def most_forward(weight: Tensor) -> float:
    """Share of the input that may be events, for the output."""
    outs, ins, _, width = weight.shape
    values = min(ins, CHANNELS) * width
    lines = -(-outs // LINE)
    blocks = -(-lines // BLOCK)
    gained = READ_ALL * values * outs / LINE - START * blocks
    return max(0.0, gained / (values * (EVENT * blocks + LINE_OF_EVENT * lines)))


def most_backward(stride: Sequence[int]) -> float:
    """Share of the input that may be events, for the gradient of the weights."""
    return MOST_BACKWARD if max(stride) == 1 else MOST_BACKWARD_STRIDED


def pays(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether it may be faster than to read everything, if few enough values are events.

    What no convolution can be made of does not pay.
    """
    outs, ins, *kernel = weight.shape
    if x.shape[1] != ins or min(stride) < 1 or min(padding) < 0 or not (x.numel() and weight.numel()):
        return False
    if min(output_size(x.shape[2:], kernel, stride, padding)) < 1 or max(stride) > MOST_STRIDE:
        return False
    return math.prod(kernel) >= FEWEST_TAPS and min(ins, outs) >= FEWEST_CHANNELS


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    most: float | None = None,
    packed: Tensor | None = None,
) -> Tensor | None:
    """Output `[N, O, H', W']` of a convolution; None where more than `most` of its input, a share, are events.

    All tensors are float32, those of four dimensions channels-last; `pays` says that they fit.

    Args:
        x: Input, `[N, C, H, W]`.
        weight: `[O, C, kernel height, kernel width]`.
        bias: `[O]`, or None.
        stride: Of y and x.
        padding: Zeros on either side.
        most: By default where reading all of it is faster.
        packed: The weight by `pack`; by default it is packed here.
    """
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding)
    shape = len(x), len(weight), *size
    output = torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
    ask_for_huge_pages(output)
    most = most_forward(weight) if most is None else most
    return output if _run("forward", x, output, weight, bias, stride, padding, most, packed) else None


def pack(weight: Tensor) -> Tensor:
    """A weight in the order in which `forward` reads it, whatever it moves over."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    outs, ins, *kernel = weight.shape
    work = _Work(weight=weight.data_ptr(), images=1, height=1, width=1, channels=ins, threads=torch.get_num_threads())
    work.out_height, work.out_width, work.out_channels, work.kernel_height, work.kernel_width = 1, 1, outs, *kernel
    packed = torch.zeros(_library().packed_size(ctypes.byref(work)), dtype=torch.float32, device="cpu")
    work.packed = packed.data_ptr()
    _library().pack(ctypes.byref(work))
    return packed


def grad_weight(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    most: float | None = None,
) -> Tensor | None:
    """Gradient of the weight, of which only the shape matters; None where more than `most` of the input are events.

    Arguments as of `forward`, and `grad`, of the output.
    """
    output = torch.empty_like(weight, memory_format=torch.channels_last)
    most = most_backward(stride) if most is None else most
    return output if _run("grad_weight", x, grad, output, None, stride, padding, most) else None


def _run(
    name: str,
    x: Tensor,
    output: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    most: float,
    packed: Tensor | None = None,
) -> bool:
    sizes = len(x), *x.shape[2:], x.shape[1], *output.shape[2:], output.shape[1], *weight.shape[2:]
    tensors = map(address, (x, output, weight, bias, packed))
    work = _Work(*tensors, None, *sizes, *stride, *padding, torch.get_num_threads(), most)
    library = _library()
    size = getattr(library, f"scratch_{name}")(ctypes.byref(work))
    scratch = torch.empty(size, dtype=torch.uint8, device="cpu")
    work.scratch = scratch.data_ptr()
    return bool(getattr(library, name)(ctypes.byref(work)))


@functools.cache
def obstacle() -> str | None:
    """What keeps this from running here; None if nothing does."""
    return obstacle_of(NEEDED, _library)


@functools.cache
def _library() -> ctypes.CDLL:
    library = load(SOURCE, definitions(torch.float32, 0, False))
    for name in ("forward", "grad_weight", "scratch_forward", "scratch_grad_weight", "pack", "packed_size"):
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.POINTER(_Work)], ctypes.c_int64
    return library
