"""Neurons and the convolution before them in one kernel, on the matrix unit of x86 processors, without gradients.

    s = neuron(conv(x) + b)

Neurons are those of `ranvier.kernels.native_scan`, or of converted networks, `ranvier.kernels.native_converted`.
Currents are never written: 32 places and 32 channels of them become spikes, step after step, before the next are
summed. They stay float32, where a convolution of bfloat16 would round them. See `native_convolved_scan.cpp`.
"""

import ctypes
import functools
import math
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ranvier.dynamics import ConvertedState
from ranvier.kernels import native_tiles
from ranvier.kernels.converted import Converted
from ranvier.kernels.derived import Derived
from ranvier.kernels.fused_scan import Kind
from ranvier.kernels.native_convolution import BLOCK, FULL, MOST_TAPS, Geometry
from ranvier.kernels.native_library import address, ask_for_huge_pages, definitions, load

SOURCE = Path(__file__).with_suffix(".cpp")

MOST_HELD = 2**24
"""Bytes that a step of an image may take when it is laid out."""

ALONE = 2**22
"""Products below which a second thread costs more than it saves."""

MOST_PLANS = 64
"""Shapes that are remembered; with more of them they are forgotten, and worked out again."""


class Filters(NamedTuple):
    """The weights of a convolution in the order in which they are read, and what is applied to its sums."""

    weights: Tensor
    """Bytes of `[block of O, tap, block of C, 2, 16, 16 of O, 4 bytes of C]`."""
    bias: Tensor
    """Float32, of whole blocks of O."""
    scale: Tensor | None
    """The same, for sums of bytes."""
    shape: tuple[int, ...]
    """`[O, C, kernel height, kernel width]`."""
    like: Tensor
    """Empty currents, `[1, 0, O, 1, 1]`, which say what neurons will get."""

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> "Filters":
        """Filters of weights `[O, C, kernel height, kernel width]`, bfloat16, or int8 with a scale `[O]`."""
        outs, ins, height, width = weight.shape
        together = 4 // weight.element_size()
        more_outs, more_ins = -outs % BLOCK, -ins % (16 * together)
        filled = torch.nn.functional.pad(weight.detach(), (0, 0, 0, 0, 0, more_ins, 0, more_outs))
        split = filled.reshape((outs + more_outs) // BLOCK, 2, 16, -1, 16, together, height * width)
        weights = split.permute(0, 6, 3, 1, 4, 2, 5).contiguous()
        if bias is None:
            bias = torch.zeros(outs, dtype=torch.float32, device="cpu")
        bias, scale = _whole_blocks(bias, outs), None if scale is None else _whole_blocks(scale, outs)
        like = torch.empty(1, 0, outs, 1, 1, dtype=torch.bfloat16, device="cpu")
        return cls(weights, bias, scale, weight.shape, like)


def _whole_blocks(numbers: Tensor, channels: int) -> Tensor:
    """A number of each channel, `[..., C]` or `[..., 1]`, and zeros up to whole blocks."""
    numbers = numbers.detach().float().expand(*numbers.shape[:-1], channels)
    return torch.nn.functional.pad(numbers, (0, -channels % BLOCK)).contiguous()


def pays(image: Sequence[int], shape: Sequence[int], geometry: Geometry) -> bool:
    """Whether this is faster than the convolution and the neurons one after the other.

    Neither the number of steps nor that of images matters: where it runs currents are not rounded, and answers must not
    depend on what is streamed or on how much comes at once. What no convolution can be made of does not pay.

    Args:
        image: `[C, H, W]` of what comes.
        shape: Of the weights, `[O, C, kernel height, kernel width]`.
        geometry: Of the convolution.
    """
    outs, ins, *kernel = shape
    channels, *size = image
    if channels != ins or min(*size, outs, ins, *kernel, *geometry.stride, *geometry.dilation) < 1:
        return False
    if min(geometry.padding) < 0 or math.prod(kernel) > MOST_TAPS or min(geometry.output_size(size, kernel)) < 1:
        return False
    full = math.prod(count / (BLOCK * -(-count // BLOCK)) for count in (ins, outs))
    padded = math.prod(n + 2 * p for n, p in zip(size, geometry.padding, strict=True))
    return full >= FULL and 2 * BLOCK * -(-ins // BLOCK) * padded * kernel[1] <= MOST_HELD


class _Work(ctypes.Structure):
    """What the function is given: `Work` in the source."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("input", "added", "joined", "weights", "scale", "bias", "gain", "threshold", "shift", "start"),
                *("state", "emitted", "end", "emitted_end", "spikes", "scratch"),
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("steps", "images", "height", "width", "channels", "out_height", "out_width", "out_channels"),
                *("kernel_height", "kernel_width", "stride_y", "stride_x", "padding_y", "padding_x"),
                *("dilation_y", "dilation_x", "threads", "shift_apart"),
            )
        ),
        *((name, ctypes.c_float) for name in ("leak", "v_threshold", "v_burst")),
    )


class _Prepared:
    """Neurons of one kind behind one convolution, without gradients, to be called often.

    Args:
        numbers: What the source is compiled with, by name.
        geometry: Of the convolution.
        sends_bytes: Whether spikes, 0 or 1, are uint8.
    """

    def __init__(self, numbers: dict[str, int], geometry: Geometry, sends_bytes: bool) -> None:
        self.numbers = tuple(numbers.items())
        self.geometry = geometry
        self.sends_bytes = sends_bytes
        self._plans: dict[tuple[Any, ...], _Plan] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Of the spikes."""
        return torch.uint8 if self.sends_bytes else torch.bfloat16

    def shape(self, x: Tensor, filters: Filters) -> torch.Size:
        """`[T, B, O, H', W']` of the spikes."""
        return self._plan(x, filters).shape

    def _run(
        self, x: Tensor, filters: Filters, given: dict[str, Tensor | None], settings: dict[str, int | float]
    ) -> Tensor:
        """Spikes `[T, B, O, H', W']`.

        Args:
            x: `[T, B, C, H, W]`.
            filters: Of the convolution.
            given: Fields of the work that are tensors, with channels side by side where they are images.
            settings: Other fields, which differ from call to call.
        """
        plan = self._plan(x, filters)
        spikes = torch.empty_strided(plan.shape, plan.strides, dtype=self.dtype, device="cpu")
        ask_for_huge_pages(spikes)
        # What the kernel is given is held here until it has run. Another thread may be about to run it, hence the copy.
        work = _Work.from_buffer_copy(plan.work)
        work.threads = threads = torch.get_num_threads() if plan.products >= ALONE else 1
        scratch = torch.empty(threads * plan.scratch_size, dtype=torch.uint8, device="cpu")
        x = _laid_out(x, plan.strides_in)
        work.input, work.spikes, work.scratch = x.data_ptr(), spikes.data_ptr(), scratch.data_ptr()
        work.weights, work.bias, work.scale = map(address, filters[:3])
        for name, tensor in given.items():
            setattr(work, name, address(tensor))
        for name, number in settings.items():
            setattr(work, name, number)
        plan.run(ctypes.byref(work))
        return spikes

    def _end(self, plan: "_Plan") -> Tensor:
        """What neurons remember after the last step, to be written."""
        return torch.empty_strided(plan.shape[1:], plan.strides[1:], dtype=torch.float32, device="cpu")

    def _plan(self, x: Tensor, filters: Filters) -> "_Plan":
        key = x.shape, x.dtype, filters.shape
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans = {}
            plan = self._plans[key] = self._new_plan(x, filters)
        return plan

    def _new_plan(self, x: Tensor, filters: Filters) -> "_Plan":
        outs, ins, *kernel = filters.shape
        size = self.geometry.output_size(x.shape[3:], kernel)
        shape = torch.Size((*x.shape[:2], outs, *size))
        work = _Work(
            steps=len(x),
            images=x.shape[1],
            height=x.shape[3],
            width=x.shape[4],
            channels=ins,
            out_height=size[0],
            out_width=size[1],
            out_channels=outs,
            kernel_height=kernel[0],
            kernel_width=kernel[1],
        )
        for name, numbers in self.geometry._asdict().items():
            for axis, number in zip("yx", numbers, strict=True):
                setattr(work, f"{name}_{axis}", number)
        products = shape.numel() * ins * kernel[0] * kernel[1]
        library = _library_of(self.numbers, x.dtype, self.sends_bytes)
        scratch_size = library.scratch_size(ctypes.byref(work))
        return _Plan(work, library.run, scratch_size, shape, _strides(shape), _strides(x.shape), products)


class PreparedConvolvedScan(_Prepared):
    """The scan of one neuron behind one convolution, without gradients, to be called often.

    Args:
        kind: The neuron.
        geometry: Of the convolution.
        sends_bytes: Whether spikes, 0 or 1, are uint8; not for burst neurons.
    """

    def __init__(self, kind: Kind, geometry: Geometry, sends_bytes: bool = False) -> None:
        super().__init__(_numbers_of(kind), geometry, sends_bytes)
        self.kind = kind

    def __call__(
        self,
        x: Tensor,
        filters: Filters,
        v: Tensor | None = None,
        rate: Tensor | None = None,
        excess: Tensor | None = None,
        added: Tensor | None = None,
        joined: Tensor | None = None,
        *,
        return_end: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Spikes `[T, B, O, H', W']` and the potential after the last step, float32, or None.

        Args:
            x: `[T, B, C, H, W]`, bfloat16 or, for filters with a scale, uint8; copied where it is not channels-last.
                `pays` says that it fits.
            filters: Of the convolution.
            v: Potential that comes in, `[B, O, H', W']` float32, or None for rest.
            rate: Leak that was learned, `[1]` float32, or None.
            excess: What a burst sends beyond a spike, `[O]` float32, or None.
            added: Sent beside the spikes, of their shape and dtype, or None.
            joined: What the neurons get besides, of the shape of the spikes, bfloat16, or None.
            return_end: Whether the potential is written.

        """
        plan, kind = self._plan(x, filters), self.kind
        end = self._end(plan) if return_end else None
        given = {
            "added": None if added is None else _laid_out(added, plan.strides),
            "joined": None if joined is None else _laid_out(joined, plan.strides),
            "state": None if v is None else _laid_out(v, plan.strides[1:]),
            "gain": None if excess is None else _whole_blocks(excess, len(excess)),
            "end": end,
        }
        leak = kind.charge[1] if rate is None else rate.item()
        settings = {"leak": leak, "v_threshold": kind.v_threshold, "v_burst": kind.v_burst}
        return self._run(x, filters, given, settings), end

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedConvolvedScan, (self.kind, self.geometry, self.sends_bytes)


class PreparedConvolvedConverted(_Prepared):
    """The scan of converted neurons behind one convolution, without gradients, to be called often.

    Args:
        signed: Whether a neuron that fired too often takes a spike back.
        binary: Whether a spike is sent as 1, not as the threshold.
        geometry: Of the convolution.
        sends_bytes: Whether spikes, of binary neurons without sign, are uint8.
    """

    def __init__(self, signed: bool, binary: bool, geometry: Geometry, sends_bytes: bool = False) -> None:
        numbers = {"CONVERTED": 1, "SIGNED": int(signed), "BINARY": int(binary)}
        super().__init__({"CHARGE": 0, "SOFT": 0, "BURSTS": 0} | numbers, geometry, sends_bytes)
        self.signed = signed
        self.binary = binary
        self._tables = Derived[tuple[Tensor, Tensor, Tensor | None]]()

    def __call__(
        self,
        x: Tensor,
        filters: Filters,
        state: ConvertedState | None,
        neurons: Converted,
        joined: Tensor | None = None,
        *,
        return_state: bool = True,
    ) -> tuple[Tensor, ConvertedState | None]:
        """What neurons send, `[T, B, O, H', W']`, and their state or None.

        Args:
            x: As of `PreparedConvolvedScan`, and so are `filters` and `joined`.
            filters: Of the convolution.
            state: What comes in, or None to start; `check_converted` let it pass.
            neurons: Signed and binary as these.
            joined: What the neurons get besides.
            return_state: Whether the state is written.
        """
        plan, begun, outs = self._plan(x, filters), 0 if state is None else state.step, filters.shape[0]
        threshold, shift, start = self._tables(neurons[:3], lambda: _tables_of(neurons, outs), outs)
        before, counts = None, None
        if state is not None:
            before = _laid_out(state.v, plan.strides[1:])
            counts = _laid_out(state.emitted, plan.strides[1:]) if self.signed else None
        elif start is None:
            before = _laid_out(neurons.v_init.float().expand(plan.shape[1:]), plan.strides[1:])
        end = self._end(plan) if return_state else None
        emitted = self._end(plan) if return_state and self.signed else None
        given = {
            "joined": None if joined is None else _laid_out(joined, plan.strides),
            "threshold": threshold,
            "shift": shift if len(shift) == 1 else shift[begun:],
            "start": start,
            "state": before,
            "emitted": counts,
            "end": end,
            "emitted_end": emitted,
        }
        sent = self._run(x, filters, given, {"shift_apart": 0 if len(shift) == 1 else shift.stride(0)})
        if end is None:
            return sent, None
        return sent, ConvertedState(end, end.new_empty(0) if emitted is None else emitted, begun + len(x))

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedConvolvedConverted, (self.signed, self.binary, self.geometry, self.sends_bytes)


def _tables_of(neurons: Converted, channels: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Thresholds, biases of all steps and, where it is that of channels, the initial potential, in whole blocks."""
    start = _whole_blocks(neurons.v_init, channels) if neurons.v_init.ndim == 1 else None
    return _whole_blocks(neurons.threshold, channels), _whole_blocks(neurons.bias, channels), start


class _Plan(NamedTuple):
    """All that does not change from call to call on inputs of one size."""

    work: _Work
    run: Callable[..., None]
    scratch_size: int
    """Bytes that a thread needs for itself."""
    shape: torch.Size
    strides: tuple[int, ...]
    strides_in: tuple[int, ...]
    products: int


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of images `[T, B, C, H, W]` whose channels lie side by side."""
    _, images, channels, height, width = shape
    image = channels * height * width
    return images * image, image, 1, width * channels, channels


def _laid_out(images: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Images `[..., C, H, W]` with these strides, whose channels lie side by side; copied where they do not."""
    if images.stride() == strides:
        return images
    return images.movedim(-3, -1).contiguous()


@functools.cache
def obstacle() -> str | None:
    """What keeps the kernel from running here; None if nothing does."""
    obstacle = native_tiles.obstacle()
    if obstacle is None:
        try:
            kind = Kind("if", "hard", True, "triangle", 0.5, 0.5, 0.0, 1.0)
            load(SOURCE, _definitions(tuple(_numbers_of(kind).items()), torch.bfloat16, False))
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            return f"{error}."
    return obstacle


@functools.cache
def _library_of(numbers: tuple[tuple[str, int], ...], dtype: torch.dtype, sends_bytes: bool) -> ctypes.CDLL:
    library = load(SOURCE, _definitions(numbers, dtype, sends_bytes))
    library.run.argtypes = library.scratch_size.argtypes = [ctypes.POINTER(_Work)]
    library.run.restype, library.scratch_size.restype = None, ctypes.c_int64
    return library


def _definitions(numbers: tuple[tuple[str, int], ...], dtype: torch.dtype, sends_bytes: bool) -> tuple[str, ...]:
    return definitions(torch.bfloat16, 0, sends_bytes, **dict(numbers), TAKES_BYTES=int(dtype == torch.uint8))


def _numbers_of(kind: Kind) -> dict[str, int]:
    return {
        "CHARGE": ("sum", "product", "quotient").index(kind.charge[0]),
        "SOFT": int(kind.reset == "soft"),
        "BURSTS": int(kind.neuron == "lifb"),
        **dict.fromkeys(("CONVERTED", "SIGNED", "BINARY"), 0),
    }
