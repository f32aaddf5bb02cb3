"""The scans of IF, LIF, PLIF and LIFB as Triton kernels, for GPUs.

Both kernels run one loop over time for a tile of neurons. What differs between neurons (charge, reset, surrogate) are
small device functions that they take as constants. Fused multiply-adds are off. (On a GPU torch divides by a number as
it multiplies with its inverse: with `tau` not a power of two the eager reference there may differ in the last bit.)

Backward recomputes the potentials and holds those of all steps in registers until the loop back has used them. That
goes up to `HELD_STEPS` steps. Longer runs are cut into segments of that many, forward and backward, which pass the
potential on through memory: the potentials between segments are recomputed first, which reads the input once more.

Gradients of learned tensors are summed in two stages of fixed order, without atomic operations. This is the file that
imports Triton; `ranvier.kernels.fused_scan`, which has the operators, imports it where it is used.
"""

# mypy: disable-error-code="no-untyped-def"
# Device functions have no Python types.

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from ranvier.kernels.fused_scan import Job, Kind, View

HELD_STEPS = 32
"""Steps whose potentials backward holds in registers, and steps of one launch."""

REGISTERS = 64
"""Registers of a thread that the potentials of all steps may take: with more, too few threads fit to hide memory."""

WARPS = 4
"""Warps of a program, each of 32 threads."""


# Device functions: charge, and what its gradient gives to the input and to the potential of the step before.


@triton.jit
def _sum(x, v, rate):
    return v + x


@triton.jit
def _sum_backward(g, rate):
    return g, g


@triton.jit
def _leak_by_product(x, v, rate):
    return v + (x - v) * rate


@triton.jit
def _leak_by_product_backward(g, rate):
    to_x = g * rate
    return to_x, g - to_x


@triton.jit
def _leak_by_quotient(x, v, tau):
    return v + tl.math.div_rn(x - v, tau)


@triton.jit
def _leak_by_quotient_backward(g, tau):
    to_x = tl.math.div_rn(g, tau)
    return to_x, g - to_x


# Reset, and what its gradient gives to the potential and to the spike.


@triton.jit
def _hard_reset(h, s, v_threshold):
    return h * (1 - s)


@triton.jit
def _hard_reset_backward(g, h, s, v_threshold):
    return g * (1 - s), -g * h


@triton.jit
def _soft_reset(h, s, v_threshold):
    return h - v_threshold * s


@triton.jit
def _soft_reset_backward(g, h, s, v_threshold):
    return g, -v_threshold * g


# Derivatives of the surrogates of `ranvier.dynamics.surrogate`; their one number comes as a constant.


@triton.jit
def _triangle(u, WIDTH: tl.constexpr):
    # As torch's clamp, and unlike a plain maximum, this lets NaN through: training stops at it.
    return tl.maximum(1 / WIDTH - tl.abs(u) * (1 / (WIDTH * WIDTH)), 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _atan(u, ALPHA: tl.constexpr):
    x = 1.5707963267948966 * ALPHA * u
    return ALPHA / 2 / (1 + x * x)


@triton.jit
def _sigmoid(u, ALPHA: tl.constexpr):
    # sigmoid(x) sigmoid(-x), written so that the exponential cannot overflow.
    e = tl.exp(-tl.abs(ALPHA * u))
    return ALPHA * e / ((1 + e) * (1 + e))


@triton.jit
def _rectangle(u, WIDTH: tl.constexpr):
    return (tl.abs(u) < WIDTH).to(tl.float32) * (1 / (2 * WIDTH))


@triton.jit
def tile_of_program(rows, columns, column_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets, mask and columns of the tile of this program: `[ROWS, COLUMNS]` of `[rows, columns]` in memory."""
    program = tl.program_id(0)  # divided in 32 bits, where that is cheap, then widened: offsets may pass 2^31
    row = (program // column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % column_blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row * columns + column, (row < rows) & (column < columns), column


@triton.jit
@no_type_check
def _forward_kernel(
    current,  # [STEPS, rows, columns], `apart` elements from step to step
    state,  # [rows, columns] or None
    rate,  # [1], learned, or None
    excess,  # [channels], burst strength - 1, or None
    spikes,  # as current, or None
    end,  # [rows, columns]
    apart,
    numel,
    rows,
    columns,
    column_blocks,
    inner,  # neighbours in memory that share a channel
    STEPS: tl.constexpr,
    CHARGE: tl.constexpr,
    RESET: tl.constexpr,
    LEAK: tl.constexpr,
    V_THRESHOLD: tl.constexpr,
    V_BURST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    offsets, mask, column = tile_of_program(rows, columns, column_blocks, ROWS, COLUMNS)
    apart = tl.cast(apart, tl.int64)
    numel = tl.cast(numel, tl.int64)
    leak = LEAK
    if rate is not None:
        leak = tl.load(rate)
    if excess is not None:
        gain = tl.load(excess + column // inner, mask=column < columns, other=0.0)  # [1, COLUMNS]
    v = tl.zeros([ROWS, COLUMNS], tl.float32)
    if state is not None:
        v = tl.load(state + offsets, mask=mask, other=0.0)
    xs = ()  # read ahead: the compiler cannot know that no store below writes what a later load reads
    for t in tl.static_range(STEPS):
        xs = xs + (tl.load(current + t * apart + offsets, mask=mask, other=0.0),)  # noqa: RUF005
    for t in tl.static_range(STEPS):
        h = CHARGE(xs[t].to(tl.float32), v, leak)
        fired = (h - V_THRESHOLD >= 0).to(tl.float32)
        v = RESET(h, fired, V_THRESHOLD)
        if spikes is not None:
            s = fired
            if excess is not None:
                s = fired + gain * (h - V_BURST >= 0).to(tl.float32)
            tl.store(spikes + t * numel + offsets, s.to(spikes.dtype.element_ty), mask=mask)
    tl.store(end + offsets, v, mask=mask)


@triton.jit
@no_type_check
def _backward_kernel(
    current,  # [STEPS, rows, columns], `apart` elements from step to step
    state,  # [rows, columns] or None
    rate,  # [1], learned, or None
    excess,  # [channels], burst strength - 1, or None
    grad_spikes,  # as current, `grad_apart` elements from step to step, or None
    grad_end,  # [rows, columns] or None
    grad_current,  # as current
    grad_state,  # [rows, columns] or None
    partial,  # sums over this tile: [programs] for the rate, [row blocks, columns] for the excess, or None
    apart,
    grad_apart,
    numel,
    rows,
    columns,
    column_blocks,
    inner,
    STEPS: tl.constexpr,
    CHARGE: tl.constexpr,
    CHARGE_BACKWARD: tl.constexpr,
    RESET: tl.constexpr,
    RESET_BACKWARD: tl.constexpr,
    DETACH: tl.constexpr,
    SURROGATE: tl.constexpr,
    SURROGATE_NUMBER: tl.constexpr,
    LEAK: tl.constexpr,
    V_THRESHOLD: tl.constexpr,
    V_BURST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    offsets, mask, column = tile_of_program(rows, columns, column_blocks, ROWS, COLUMNS)
    apart = tl.cast(apart, tl.int64)
    grad_apart = tl.cast(grad_apart, tl.int64)
    numel = tl.cast(numel, tl.int64)
    leak = LEAK
    if rate is not None:
        leak = tl.load(rate)
    if excess is not None:
        gain = tl.load(excess + column // inner, mask=column < columns, other=0.0)  # [1, COLUMNS]
    v = tl.zeros([ROWS, COLUMNS], tl.float32)
    if state is not None:
        v = tl.load(state + offsets, mask=mask, other=0.0)
    hs = ()
    drives = ()
    for t in tl.static_range(STEPS):
        x = tl.load(current + t * apart + offsets, mask=mask, other=0.0).to(tl.float32)
        h = CHARGE(x, v, leak)
        hs = hs + (h,)  # noqa: RUF005
        if rate is not None:
            drives = drives + (x - v,)  # noqa: RUF005
        v = RESET(h, (h - V_THRESHOLD >= 0).to(tl.float32), V_THRESHOLD)
    to_v = tl.zeros([ROWS, COLUMNS], tl.float32)
    if grad_end is not None:
        to_v = tl.load(grad_end + offsets, mask=mask, other=0.0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)  # of the learned tensor, over steps
    for back in tl.static_range(STEPS):
        h = hs[STEPS - 1 - back]
        u = h - V_THRESHOLD
        g = tl.zeros([ROWS, COLUMNS], tl.float32)
        if grad_spikes is not None:
            g = tl.load(grad_spikes + (STEPS - 1 - back) * grad_apart + offsets, mask=mask, other=0.0).to(tl.float32)
        to_h, to_fired = RESET_BACKWARD(to_v, h, (u >= 0).to(tl.float32), V_THRESHOLD)
        if DETACH:
            to_h += g * SURROGATE(u, SURROGATE_NUMBER)
        else:
            to_h += (g + to_fired) * SURROGATE(u, SURROGATE_NUMBER)
        if excess is not None:
            above = h - V_BURST
            to_h += g * gain * SURROGATE(above, SURROGATE_NUMBER)
            total += g * (above >= 0).to(tl.float32)
        if rate is not None:
            total += to_h * drives[STEPS - 1 - back]
        to_x, to_v = CHARGE_BACKWARD(to_h, leak)
        there = grad_current + (STEPS - 1 - back) * numel + offsets
        tl.store(there, to_x.to(grad_current.dtype.element_ty), mask=mask)
    if grad_state is not None:
        tl.store(grad_state + offsets, to_v, mask=mask)
    if rate is not None:
        tl.store(partial + tl.program_id(0), tl.sum(total))
    if excess is not None:
        row_block = (tl.program_id(0) // column_blocks).to(tl.int64)
        tl.store(partial + row_block * columns + column, tl.sum(total, axis=0)[None, :], mask=column < columns)


RESETS = {"hard": (_hard_reset, _hard_reset_backward), "soft": (_soft_reset, _soft_reset_backward)}
DERIVATIVES = {"triangle": _triangle, "atan": _atan, "sigmoid": _sigmoid, "rectangle": _rectangle}


INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)
"""Whether Triton was imported with TRITON_INTERPRET=1, so that kernels run in Python, on a CPU too."""


def forward(job: Job, spikes: Tensor, end: Tensor) -> None:
    """Write the spikes and the potential after the last step: see `ranvier.kernels.fused_scan.Kernels`."""
    v = job.state
    for first in range(0, len(job.current), HELD_STEPS):
        held = slice(first, first + HELD_STEPS)
        after = end if held.stop >= len(job.current) else torch.empty_like(end)
        _run_forward(job, held, v, spikes[held], after)
        v = after


def backward(
    job: Job, grad_spikes: Tensor | None, grad_end: Tensor | None, grad_current: Tensor, grad_state: Tensor | None
) -> Tensor | None:
    """Write and return gradients: see `ranvier.kernels.fused_scan.Kernels`."""
    view, constants = job.view, _Constants.of(job.kind)
    learned = job.excess if job.rate is None else job.rate
    like_end = torch.empty_like(grad_current[0], dtype=torch.float32)
    starts = [job.state]
    for first in range(0, len(job.current) - HELD_STEPS, HELD_STEPS):
        after = torch.empty_like(like_end)
        _run_forward(job, slice(first, first + HELD_STEPS), starts[-1], None, after)
        starts.append(after)
    to_v = grad_end
    sums = []
    for number in reversed(range(len(starts))):
        held = slice(number * HELD_STEPS, (number + 1) * HELD_STEPS)
        part, sent = job.current[held], None if grad_spikes is None else grad_spikes[held]
        tile = Tile.of(view, len(part), 1 if learned is None else 2)
        partial = None if learned is None else like_end.new_empty(tile.num_partial(job.rate is not None))
        before = torch.empty_like(like_end) if number > 0 else grad_state
        with on_device_of(part):
            _backward_kernel[(tile.programs,)](
                part,
                starts[number],
                job.rate,
                job.excess,
                sent,
                to_v,
                grad_current[held],
                before,
                partial,
                part.stride(0),
                0 if sent is None else sent.stride(0),
                like_end.numel(),
                view.rows,
                view.columns,
                tile.column_blocks,
                view.inner,
                len(part),
                constants.charge,
                constants.charge_backward,
                constants.reset,
                constants.reset_backward,
                job.kind.detach_reset,
                DERIVATIVES[job.kind.surrogate],
                job.kind.surrogate_number,
                constants.leak,
                job.kind.v_threshold,
                job.kind.v_burst,
                tile.rows,
                tile.columns,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
        to_v = before
        sums.append(partial)
    return None if learned is None else _added_up(sums, view, learned, job.rate is None)


# What kernels are launched with.


CHARGES = {
    "sum": (_sum, _sum_backward),
    "product": (_leak_by_product, _leak_by_product_backward),
    "quotient": (_leak_by_quotient, _leak_by_quotient_backward),
}


class _Constants(NamedTuple):
    """What both kernels are compiled for."""

    charge: Any
    charge_backward: Any
    leak: float
    reset: Any
    reset_backward: Any

    @classmethod
    def of(cls, kind: Kind) -> "_Constants":
        charge, number = kind.charge
        return cls(*CHARGES[charge], number, *RESETS[kind.reset])


class Tile(NamedTuple):
    """The part of a step in memory that one program works on, and how many programs there are."""

    rows: int
    columns: int
    row_blocks: int
    column_blocks: int
    all_columns: int

    @classmethod
    def of(cls, view: View, steps: int, held: int = 1) -> "Tile":
        """Tiles for kernels whose threads hold `held` numbers of each step for each element."""
        steps = triton.next_power_of_2(steps)
        size = 32 * WARPS * max(1, min(8, REGISTERS // (held * steps)))  # 8: 16 bytes of bfloat16 in one read
        # Some rows, so that partial sums are few; not so many that the runs of neighbours in memory become short.
        rows = max(min(8, size // 32), size // triton.next_power_of_2(view.columns))
        rows = min(triton.next_power_of_2(view.rows), rows)
        columns = size // rows
        return cls(rows, columns, triton.cdiv(view.rows, rows), triton.cdiv(view.columns, columns), view.columns)

    @property
    def programs(self) -> int:
        """How many there are."""
        return self.row_blocks * self.column_blocks

    def num_partial(self, one_sum: bool) -> int:
        """Partial sums that all programs write: one each, or one for each column."""
        return self.programs if one_sum else self.row_blocks * self.all_columns


def _run_forward(job: Job, held: slice, state: Tensor | None, spikes: Tensor | None, end: Tensor) -> None:
    """Launch the forward kernel for the steps `held`; without `spikes` for the potential alone."""
    view, constants, current = job.view, _Constants.of(job.kind), job.current[held]
    tile = Tile.of(view, len(current))
    with on_device_of(current):
        _forward_kernel[(tile.programs,)](
            current,
            state,
            job.rate,
            job.excess,
            spikes,
            end,
            current.stride(0),
            end.numel(),
            view.rows,
            view.columns,
            tile.column_blocks,
            view.inner,
            len(current),
            constants.charge,
            constants.reset,
            constants.leak,
            job.kind.v_threshold,
            job.kind.v_burst,
            tile.rows,
            tile.columns,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def _added_up(sums: list[Any], view: View, learned: Tensor, by_channel: bool) -> Tensor:
    """Partial sums of all launches and programs, added in one order whatever the run."""
    if not by_channel:
        return torch.cat(sums).sum().view(1)
    return torch.cat(sums).view(-1, view.columns).sum(0).view(len(learned), -1).sum(1)


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Kernels start on the present device: make that the one of `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
