"""The scan of converted neurons in C++, for CPUs: forward only, which is all that calibration and inference need.

The source, `native_converted.cpp`, is compiled for signed and binary neurons or not, dtype and T. Thresholds, biases
and initial potentials reach it as tables: a number for each channel of contiguous images, where a line of neurons lies
in one, or for each neuron of a channels-last pixel.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ranvier.dynamics import ConvertedState
from ranvier.kernels.converted import Converted
from ranvier.kernels.derived import Derived
from ranvier.kernels.fused_scan import View, all_steps, dense, laid_out_as, outputs
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

MOST_PLANS = 64
"""Sizes of input that `PreparedConverted` remembers; with more of them they are forgotten, and worked out again."""


def run(
    current: Tensor, state: ConvertedState | None, neurons: Converted, sends_bytes: bool = False
) -> tuple[Tensor, ConvertedState]:
    """`ranvier.dynamics.converted_scan` where `check_converted` let the input pass and `unfit` names no obstacle."""
    current = dense(current)
    return _Plan.of(current, neurons, sends_bytes).run(current, state)


class PreparedConverted:
    """The scan of one layer of neurons, to be called often: tables and sizes are worked out once.

    They are worked out again after a tensor of the neurons was replaced or written to: see `ranvier.kernels.derived`.

    Args:
        sends_bytes: Whether spikes, of binary neurons without sign, are uint8.
    """

    def __init__(self, sends_bytes: bool = False) -> None:
        self.sends_bytes = sends_bytes
        self._plans = Derived[dict[tuple[Any, ...], _Plan]]()

    def __call__(
        self, current: Tensor, state: ConvertedState | None, neurons: Converted, *, return_state: bool = True
    ) -> tuple[Tensor, ConvertedState | None]:
        """What `run` gives; without the state, which then is not written, if it is not to be returned."""
        plans = self._plans(neurons[:3], dict, *neurons[3:])
        current = dense(current)
        key = current.shape, current.stride(), current.dtype
        plan = plans.get(key)
        if plan is None:
            if len(plans) >= MOST_PLANS:
                plans.clear()
            plan = plans[key] = _Plan.of(current, neurons, self.sends_bytes)
        return plan.run(current, state) if return_state else (plan.sent(current, state), None)


class _Work(ctypes.Structure):
    """What the function is given: `Work` in the source."""

    _fields_ = (
        ("current", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("emitted", ctypes.c_void_p),
        ("threshold", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("v_init", ctypes.c_void_p),
        ("steps", ctypes.c_int64),
        ("numel", ctypes.c_int64),
        ("apart", ctypes.c_int64),
        ("bias_apart", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("chunks", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("past_caches", ctypes.c_int64),
    )


class _Plan(NamedTuple):
    """All that does not change from call to call on inputs of one size."""

    work: _Work
    library: ctypes.CDLL | None
    neurons: Converted
    sends_bytes: bool
    tables: tuple[Tensor | None, ...]
    """What `work` points to."""
    start: Tensor | None
    """Initial potential of every neuron of a batch, where each has its own."""

    @classmethod
    def of(cls, current: Tensor, neurons: Converted, sends_bytes: bool) -> _Plan:
        steps, numel = len(current), current[0].numel()
        if numel == 0:
            return cls(_Work(), None, neurons, sends_bytes, (), None)
        library = _library_of(neurons.signed, neurons.binary, current.dtype, steps, sends_bytes)
        each = neurons.v_init.ndim > 1
        alike = all(tensor.shape[-1] == 1 for tensor in (neurons.threshold, neurons.bias)) and (
            each or len(neurons.v_init) == 1
        )
        view, channels = View.of(current, True), current.shape[2]
        by_line = not alike and view.inner % LINE == 0

        def table(values: Tensor) -> Tensor:
            if by_line:
                return values.float().expand(*values.shape[:-1], channels).contiguous()
            return by_column(values.float(), 1 if alike else view.columns)

        threshold, bias = table(neurons.threshold), table(neurons.bias)
        v_init = None if each else table(neurons.v_init)
        start = None
        if each:
            start = current.new_empty_strided(current.shape[1:], current.stride()[1:], dtype=torch.float32)
            start.copy_(neurons.v_init.expand(start.shape))
        work = _Work(
            threshold=address(threshold),
            v_init=address(v_init),
            steps=steps,
            numel=numel,
            apart=current.stride(0),
            bias_apart=0 if len(bias) == 1 else bias.stride(0),
            columns=1 if alike else view.columns,
            inner=view.inner if by_line else 0,
            chunks=CHUNKS,
            past_caches=not sends_bytes and numel % LINE == 0 and steps * numel * current.element_size() >= PAST_CACHES,
        )
        return cls(work, library, neurons, sends_bytes, (threshold, bias, v_init), start)

    def run(self, current: Tensor, state: ConvertedState | None) -> tuple[Tensor, ConvertedState]:
        """All steps of `current`, of the size that this was made for."""
        sent, v = outputs(current, torch.uint8 if self.sends_bytes else None)
        emitted = torch.empty_like(v) if self.neurons.signed else v.new_empty(0)
        self._fill(current, state, sent, v, emitted)
        return sent, ConvertedState(v, emitted, (0 if state is None else state.step) + len(current))

    def sent(self, current: Tensor, state: ConvertedState | None) -> Tensor:
        """What `run` sends, without the state, which is two thirds of what a single step writes in bfloat16."""
        sent = all_steps(current, torch.uint8 if self.sends_bytes else None)
        self._fill(current, state, sent, None, None)
        return sent

    def _fill(
        self, current: Tensor, state: ConvertedState | None, sent: Tensor, v: Tensor | None, emitted: Tensor | None
    ) -> None:
        if self.library is None:
            return
        ask_for_huge_pages(sent)
        work = _Work.from_buffer_copy(self.work)  # another thread may be about to run the same
        before, counts, begun = self.start, None, 0
        if state is not None:
            before, begun = laid_out_as(sent[0], state.v), state.step
            counts = laid_out_as(sent[0], state.emitted) if self.neurons.signed else None
        work.current, work.v, work.emitted = current.data_ptr(), address(before), address(counts)
        work.bias = self.tables[1].data_ptr() + 4 * work.bias_apart * begun  # type: ignore[union-attr]
        work.threads = threads_for(work.steps * work.numel)
        self.library.run(ctypes.byref(work), sent.data_ptr(), address(v), address(emitted))


@functools.cache
def _library_of(signed: bool, binary: bool, dtype: torch.dtype, steps: int, sends_bytes: bool) -> ctypes.CDLL:
    library = load(SOURCE, definitions(dtype, steps, sends_bytes, SIGNED=int(signed), BINARY=int(binary)))
    library.run.argtypes = [ctypes.POINTER(_Work), *[ctypes.c_void_p] * 3]
    library.run.restype = None
    return library
