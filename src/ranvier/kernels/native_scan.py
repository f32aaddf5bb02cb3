"""The scans of IF, LIF, PLIF and LIFB in C++, for CPUs.

The source, `native_scan.cpp`, is compiled for one kind of neuron, dtype and T. Sizes, strides and numbers are
arguments: another batch compiles nothing again.

A line of neurons goes through all steps while its potentials are in registers, and memory is read and written once:
forward reads the input and writes the spikes, backward reads the input and the gradient of the spikes and writes
that of the input.
"""

import ctypes
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ranvier import provenance
from ranvier.kernels.fused_scan import Job, Kind, Norm, View, dense, make_scan
from ranvier.kernels.native_library import (
    CHUNKS,
    LINE,
    PAST_CACHES,
    address,
    ask_for_huge_pages,
    by_column,
    definitions,
    load,
    threads_for,
)

SOURCE = Path(__file__).with_suffix(".cpp")

ROWS = 8
"""Rows of channels that a part of a normalised scan has at least, for each number of a channel that it adds up."""

MOST_PLANS = 64
"""Shapes that a prepared scan remembers; with more of them they are forgotten, and worked out again."""


class _Work(ctypes.Structure):
    """What both functions are given: `Work` in the source."""

    _fields_ = (
        ("current", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("gain", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("added", ctypes.c_void_p),
        ("steps", ctypes.c_int64),
        ("numel", ctypes.c_int64),
        ("apart", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("chunks", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("past_caches", ctypes.c_int64),
        ("leak", ctypes.c_float),
        ("v_threshold", ctypes.c_float),
        ("v_burst", ctypes.c_float),
        ("number", ctypes.c_float),
    )


def _work(job: Job, gain: Tensor | None) -> _Work:
    """What the functions are given; `gain` is that of each column, see `by_column`."""
    current, kind = job.current, job.kind
    steps, numel = len(current), current[0].numel()
    work = _Work(
        current.data_ptr(),
        address(job.state),
        address(gain),
        *(map(address, job.norm) if job.norm else (None, None, None)),
        None,
        steps,
        numel,
        current.stride(0),
        job.view.columns,
        job.view.inner,
        chunks_of(job.view, len(job.norm.scale)) if job.norm else CHUNKS,
        1,
        numel % LINE == 0 and steps * numel * current.element_size() >= PAST_CACHES,
        kind.charge[1] if job.rate is None else job.rate.item(),
        kind.v_threshold,
        kind.v_burst,
        kind.surrogate_number,
    )
    work.threads = threads_for(steps * numel)
    return work


def chunks_of(view: View, own: int) -> int:
    """Parts of a normalised scan: each has sums of all its channels, which should be small beside what it adds up.

    Args:
        view: A step in memory.
        own: S as in `Norm`, the sums of a channel.
    """
    return min(CHUNKS, max(1, view.rows // (ROWS * own)))


def forward(job: Job, spikes: Tensor, end: Tensor | None, added: Tensor | None = None) -> None:
    """Write the spikes and the potential after the last step: see `ranvier.kernels.fused_scan.Kernels`.

    A normalised scan writes the sum of spikes and `added`, where that is given; it lies in memory as the spikes do.
    """
    ask_for_huge_pages(spikes)
    gain = None if job.excess is None else by_column(job.excess, job.view.columns)
    sends_bytes = spikes.dtype == torch.uint8
    library = _library_of(job.kind, job.current.dtype, len(job.current), sends_bytes, _normed(job))
    work = _work(job, gain)
    work.added = address(added)
    library.forward(ctypes.byref(work), address(spikes), address(end))


def backward(
    job: Job,
    grad_spikes: Tensor | None,
    grad_end: Tensor | None,
    grad_current: Tensor,
    grad_state: Tensor | None,
    moments: Tensor | None = None,
) -> Tensor | None:
    """Write and return gradients: see `ranvier.kernels.fused_scan.Kernels`.

    Where neurons received what a normalisation made of `current`, the gradient is with respect to that, and `moments`,
    `[chunks_of(view, S), 2, S, C]` and zero, takes the sums of it and of its product with `current - mean`, S as in
    `Norm`.
    """
    learned = job.excess if job.rate is None else job.rate
    partial = None if learned is None else learned.new_zeros(CHUNKS, len(learned), dtype=torch.float64)
    ask_for_huge_pages(grad_current)
    library = _library_of(job.kind, job.current.dtype, len(job.current), normed=_normed(job))
    gain = None if job.excess is None else by_column(job.excess, job.view.columns)
    library.backward(
        ctypes.byref(_work(job, gain)),
        address(grad_spikes),
        0 if grad_spikes is None else grad_spikes.stride(0),
        address(grad_end),
        address(grad_current),
        address(grad_state),
        address(partial),
        address(moments),
    )
    return None if partial is None else partial.sum(0).float()


def statistics(job: Job, per_step: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of `current` over all else, `[1, C]` of float64, or at each step, `[T, C]`."""
    current, channels = job.current, job.view.columns
    own = len(current) if per_step else 1
    # Deviations from a value of the same channel are small beside a mean far from 0.
    first = current[:own].movedim(2, -1).reshape(own, -1, channels)[:, 0].float().contiguous()
    job = job._replace(norm=Norm(first, first, first))  # not read here: their number says what is summed
    moments = current.new_zeros(chunks_of(job.view, own), 2, own, channels, dtype=torch.float32)
    library = _library_of(job.kind, current.dtype, len(current), normed=_normed(job))
    library.statistics(ctypes.byref(_work(job, None)), address(first), address(moments))
    sums, squares = (moments.sum(0, dtype=torch.float64) * (own * channels / current.numel())).unbind(0)
    return first + sums, (squares - sums.square()).clamp_min(0)


def combine(job: Job, slope: Tensor, gradient: Tensor) -> None:
    """`gradient = gradient scale + current slope + shift`, in place; `slope` is `[S, C]` as the other two."""
    library = _library_of(job.kind, job.current.dtype, len(job.current), normed=_normed(job))
    library.combine(ctypes.byref(_work(job, None)), address(slope), address(gradient))


def _normed(job: Job) -> int:
    """What `NORMED` says in the source."""
    if job.norm is None:
        return 0
    return 1 if len(job.norm.scale) == 1 else 2


class PreparedScan:
    """The scan of one neuron without gradients, to be called often: what depends on sizes alone is worked out once.

    A call costs some 6 us beside the kernel, where that of a neuron in training costs 30.

    Args:
        kind: The neuron.
        sends_bytes: Whether spikes, 0 or 1, are uint8; not for burst neurons.
    """

    def __init__(self, kind: Kind, sends_bytes: bool = False) -> None:
        self.kind = kind
        self.sends_bytes = sends_bytes
        self._plans: dict[tuple[Any, ...], _Plan] = {}

    def __call__(
        self,
        current: Tensor,
        v: Tensor | None,
        rate: Tensor | None = None,
        excess: Tensor | None = None,
        *,
        return_end: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Spikes `[T, B, ...]` and the potential after the last step, float32, or None; arguments as in `Job`.

        Where nobody wants the potential it is not written: two thirds of what a single step writes in bfloat16.
        """
        plan = self._plans.get((current.shape, current.stride(), current.dtype))
        if plan is None or (v is not None and v.stride() != plan.end_strides):
            return self._first(current, v, rate, excess)
        spikes = current.new_empty_strided(current.shape, plan.strides, dtype=plan.dtype)
        end = None
        if return_end:
            end = current.new_empty_strided(plan.end_shape, plan.end_strides, dtype=torch.float32)
        work = _Work.from_buffer_copy(plan.work)  # another thread may be about to run the same
        work.current, work.state = current.data_ptr(), None if v is None else v.data_ptr()
        work.threads = threads_for(work.steps * work.numel)
        if rate is not None:
            work.leak = rate.item()
        gain = None if excess is None else by_column(excess, plan.columns)
        ask_for_huge_pages(spikes)
        work.gain = address(gain)
        plan.run(ctypes.byref(work), spikes.data_ptr(), address(end))
        return spikes, end

    def _first(
        self, current: Tensor, v: Tensor | None, rate: Tensor | None, excess: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        spikes, after = make_scan(current, v, rate, excess, "native", self.kind, self.sends_bytes)
        end = after.v
        if current.numel() > 0 and dense(current) is current:
            view = View.of(current, excess is not None)
            work = _work(Job(self.kind, view, current, None, rate, excess), None)
            run = _library_of(self.kind, current.dtype, len(current), self.sends_bytes).forward
            key = (current.shape, current.stride(), current.dtype)
            if len(self._plans) >= MOST_PLANS:
                self._plans = {}
            self._plans[key] = _Plan(work, run, view.columns, spikes.stride(), spikes.dtype, end.shape, end.stride())
        return spikes, end

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedScan, (self.kind, self.sends_bytes)


class _Plan(NamedTuple):
    work: _Work
    run: Callable[..., None]
    columns: int
    strides: tuple[int, ...]
    dtype: torch.dtype
    end_shape: torch.Size
    end_strides: tuple[int, ...]


def obstacle() -> str | None:
    """What keeps the kernels from being compiled here, with the remedy; None if nothing does."""
    if sys.platform == "win32":
        return 'they are made for g++ and clang++, which Windows lacks. Use implementation="compiled".'
    if provenance.cpp_compiler() is None:
        return "they need a C++ compiler and found none. Install one (Debian: apt-get install g++) or set CXX."
    try:
        load(SOURCE, _definitions(Kind("if", "hard", True, "triangle", 0.5, 0.5, 0.0, 1.0), torch.float32, 1))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f'{error}. Use implementation="compiled".'
    return None


@functools.cache
def _library_of(kind: Kind, dtype: torch.dtype, steps: int, sends_bytes: bool = False, normed: int = 0) -> ctypes.CDLL:
    library = load(SOURCE, _definitions(kind, dtype, steps, sends_bytes, normed))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.forward.argtypes = [ctypes.POINTER(_Work), pointer, pointer]
    library.backward.argtypes = [ctypes.POINTER(_Work), pointer, integer, *[pointer] * 5]
    library.forward.restype = library.backward.restype = None
    if normed:
        library.statistics.argtypes = library.combine.argtypes = [ctypes.POINTER(_Work), pointer, pointer]
        library.statistics.restype = library.combine.restype = None
    return library


def _definitions(
    kind: Kind, dtype: torch.dtype, steps: int, sends_bytes: bool = False, normed: int = 0
) -> tuple[str, ...]:
    return definitions(
        dtype,
        steps,
        sends_bytes,
        CHARGE=("sum", "product", "quotient").index(kind.charge[0]),
        SOFT=int(kind.reset == "soft"),
        DETACH=int(kind.detach_reset),
        SURROGATE=("triangle", "atan", "sigmoid", "rectangle").index(kind.surrogate),
        LEARNS={"plif": 1, "lifb": 2}.get(kind.neuron, 0),
        NORMED=normed,
    )
