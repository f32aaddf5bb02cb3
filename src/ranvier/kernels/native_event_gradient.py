"""Gradients of the weights of convolutions whose input is mostly zero, on CPUs with AVX2, in float32.

Of spikes, most are zero. The gradient is a sum over those that are not, the events:

    w'[o, tap, c] = sum over events (place, c) of  x[place, c] y'[place - tap, o]

See `native_event_gradient.cpp`.
"""

import ctypes
import functools
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ranvier import provenance
from ranvier.kernels.native_convolution import output_size
from ranvier.kernels.native_library import definitions, load

SOURCE = Path(__file__).with_suffix(".cpp")

NEEDED = ("avx2", "fma")
"""Features of the processor: on others it would run, but nobody has measured whether it is faster."""

MOST_EVENTS = 0.5
"""Share of the input from which reading all of it is faster."""

MOST_EVENTS_STRIDED = 0.35
"""The same with a stride, where an event meets few weights."""

FEWEST_TAPS = 4
"""Weights of a channel from which it pays to list events: each is read for all of them at once."""

FEWEST_CHANNELS = 8
"""That come, and that go."""

MOST_STRIDE = 3
"""Lists are as many as its square."""


class _Work(ctypes.Structure):
    """What the functions are given: `Work` in the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input", "grad", "output", "scratch")),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("images", "height", "width", "channels", "out_height", "out_width", "out_channels"),
                *("kernel_height", "kernel_width", "stride_y", "stride_x", "padding_y", "padding_x", "threads"),
            )
        ),
        ("most", ctypes.c_float),
    )


def most_events(stride: Sequence[int]) -> float:
    """Share of the input that may be events."""
    return MOST_EVENTS if max(stride) == 1 else MOST_EVENTS_STRIDED


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


def grad_weight(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    most: float | None = None,
) -> Tensor | None:
    """Gradient of the weight; None where more than `most` of the input, a share, are events.

    All tensors are float32 and channels-last; `pays` says that it fits.

    Args:
        grad: Of the output, `[N, O, H', W']`.
        x: Input, `[N, C, H, W]`.
        weight: `[O, C, kernel height, kernel width]`, of which only the shape matters.
        stride: Of y and x.
        padding: Zeros on either side.
        most: By default where reading all of it is faster.
    """
    outs, ins, *kernel = weight.shape
    output = torch.empty_like(weight, memory_format=torch.channels_last)
    sizes = (len(x), *x.shape[2:], ins, *grad.shape[2:], outs, *kernel, *stride, *padding, torch.get_num_threads())
    most = most_events(stride) if most is None else most
    work = _Work(x.data_ptr(), grad.data_ptr(), output.data_ptr(), None, *sizes, most)
    library = _library()
    scratch = torch.empty(library.scratch_size(ctypes.byref(work)), dtype=torch.uint8, device="cpu")
    work.scratch = scratch.data_ptr()
    return output if library.grad_weight(ctypes.byref(work)) else None


@functools.cache
def obstacle() -> str | None:
    """What keeps this from running here; None if nothing does."""
    features = provenance.processor_features().split()
    missing = [feature for feature in NEEDED if feature not in features]
    if missing:
        return f"this processor lacks {', '.join(missing)}."
    if provenance.cpp_compiler() is None:
        return "it needs a C++ compiler and found none. Install one (Debian: apt-get install g++) or set CXX."
    try:
        _library()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"{error}."
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    library = load(SOURCE, definitions(torch.float32, 0, False))
    for function in (library.grad_weight, library.scratch_size):
        function.argtypes, function.restype = [ctypes.POINTER(_Work)], ctypes.c_int64
    return library
