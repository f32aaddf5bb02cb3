"""The scans of IF, LIF, PLIF and LIFB as Triton kernels: all steps in one kernel forward and one backward.

Both kernels run one loop over time for a tile of neurons. What differs between neurons (charge, reset, surrogate) are
small device functions that they take as constants. The order of operations is that of `ranvier.dynamics`, and fused
multiply-adds are off, so that in float32 spikes and potentials are those of the reference on a CPU, bit for bit. (On a
GPU torch divides by a number as it multiplies with its inverse: with `tau` not a power of two the eager reference there
may differ in the last bit.) Gradients agree to rounding.

Forward reads the input once and writes the spikes once. Backward keeps nothing but the input (and the state that came
in): it recomputes the potentials and holds those of all steps in registers until the loop back has used them. That goes
up to `HELD_STEPS` steps. Longer runs are cut into segments of that many, forward and backward, which pass the potential
on through memory: the potentials between segments are recomputed first, which reads the input once more.

Elements of one step are visited in the order in which they lie in memory, contiguous or channels-last alike. Gradients
of learned tensors are summed in two stages of fixed order, without atomic operations, and so are deterministic.

The operators `ranvier::triton_scan` and `ranvier::triton_scan_backward` are opaque to torch.compile and torch.export,
which keep them whole. A program that was exported with them needs `import ranvier.kernels.triton_scan` where it is
loaded. Gradients of gradients are not defined. This is the file that imports Triton; it is imported where it is used.
"""

# mypy: disable-error-code="no-untyped-def"
# Device functions have no Python types.

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from ranvier import dynamics
from ranvier.dynamics import ATan, NeuronState, Rectangle, Sigmoid, Triangle
from ranvier.dynamics.scan import Step

HELD_STEPS = 32
"""Steps whose potentials backward holds in registers, and steps of one launch."""

REGISTERS = 64
"""Registers of a thread that the potentials of all steps may take: with more, too few threads fit to hide memory."""

WARPS = 4
"""Warps of a program, each of 32 threads."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Inputs that the kernels take. They compute in float32."""


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
def _tile(rows, columns, column_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
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
    offsets, mask, column = _tile(rows, columns, column_blocks, ROWS, COLUMNS)
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
    offsets, mask, column = _tile(rows, columns, column_blocks, ROWS, COLUMNS)
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


NEURONS: dict[Step, str] = {
    dynamics.if_step: "if",
    dynamics.lif_step: "lif",
    dynamics.plif_step: "plif",
    dynamics.lifb_step: "lifb",
}
"""Steps that have a kernel, by the name that the operators know them by."""

SURROGATES = {
    Triangle: ("triangle", "width"),
    ATan: ("atan", "alpha"),
    Sigmoid: ("sigmoid", "alpha"),
    Rectangle: ("rectangle", "width"),
}
"""Surrogates that have a device function: its name, and the attribute that is its number."""

RESETS = {"hard": (_hard_reset, _hard_reset_backward), "soft": (_soft_reset, _soft_reset_backward)}
DERIVATIVES = {"triangle": _triangle, "atan": _atan, "sigmoid": _sigmoid, "rectangle": _rectangle}


INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)
"""Whether Triton was imported with TRITON_INTERPRET=1, so that kernels run in Python, on a CPU too."""


def unfit(step: Step, current: Tensor, state: NeuronState | None, params: Any, learned: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot run this neuron on this input, and what to do; None if they can.

    Args:
        step: Step function; those of IF, LIF, PLIF and LIFB have kernels.
        current: Input, `[T, B, ...]`.
        state: Carried from an earlier call, or None.
        params: Parameters of `step`.
        learned: Tensors that train.
    """
    if step not in NEURONS:
        return (
            f"the Triton scan has kernels for IF, LIF, PLIF and LIFB, not for {step.__name__}. "
            'Use implementation="compiled", which writes Triton kernels for any step function.'
        )
    for name, tensor in [("current", current), *([] if state is None else [("state.v", state.v)]), *_named(learned)]:
        if tensor.dtype not in DTYPES:
            return (
                f"{name} has dtype {tensor.dtype}, but the Triton scan takes float32, bfloat16 and float16. "
                'Use implementation="compiled", or convert it.'
            )
    if type(params.surrogate) not in SURROGATES:
        return (
            f"the Triton scan does not know the surrogate {type(params.surrogate).__name__}, only "
            f'{", ".join(surrogate.__name__ for surrogate in SURROGATES)}. Use implementation="compiled".'
        )
    if NEURONS[step] == "plif" and learned[0].numel() != 1:
        return (
            f"decay has shape {list(learned[0].shape)}, but the Triton scan takes one for the layer. "
            'Use implementation="compiled".'
        )
    return None


def _named(learned: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((f"learned tensor {number}", tensor) for number, tensor in enumerate(learned, 1))


def triton_scan(
    step: Step, current: Tensor, state: NeuronState | None, params: Any, *learned: Tensor
) -> tuple[Tensor, NeuronState]:
    """`ranvier.dynamics.scan` for a step and an input that `unfit` has nothing against.

    Args:
        step: `if_step`, `lif_step`, `plif_step` or `lifb_step`.
        current: Input, `[T, B, ...]`. Copied if the elements of a step are not dense in memory.
        state: Carried from an earlier call, or None for rest.
        params: Parameters of `step`.
        learned: Tensors that train.

    Returns:
        Spikes `[T, B, ...]`, dtype of `current`, each step in memory as that of `current`; the state after step T.

    Raises:
        ValueError: `current` is not `[T, B, C, ...]` with a burst strength for each channel.
    """
    neuron = NEURONS[step]
    rate = excess = None
    if neuron == "plif":
        rate = torch.sigmoid(learned[0]).float().reshape(1)
    if neuron == "lifb":
        if current.ndim < 3 or current.shape[2] != len(learned[0]):
            return dynamics.lifb_scan(current, state, params, learned[0])  # raises, and says what is wrong
        excess = (learned[0] - 1).float()
    surrogate, number = SURROGATES[type(params.surrogate)]
    spikes, end = _scan_operator(
        current,
        None if state is None else state.v.float(),
        rate,
        excess,
        neuron,
        params.reset,
        params.detach_reset,
        surrogate,
        float(getattr(params.surrogate, number)),
        float(params.v_threshold),
        float(params.v_burst) if neuron == "lifb" else 0.0,
        float(params.tau) if neuron in ("lif", "lifb") else 1.0,
    )
    return spikes, NeuronState(end)


# The operators. Their schemas hold tensors and plain values only; device functions are looked up inside.


@torch.library.custom_op("ranvier::triton_scan", mutates_args=())
def _scan_operator(
    current: Tensor,
    state: Tensor | None,
    rate: Tensor | None,
    excess: Tensor | None,
    neuron: str,
    reset: str,
    detach_reset: bool,
    surrogate: str,
    surrogate_number: float,
    v_threshold: float,
    v_burst: float,
    tau: float,
) -> tuple[Tensor, Tensor]:
    current = _dense(current)
    spikes, end = _outputs(current)
    if end.numel() == 0:
        return spikes, end
    constants = _Constants.of(neuron, tau, reset, v_threshold, v_burst)
    view = _View.of(current, excess is not None)
    v = None if state is None else _laid_out_as(end, state)
    for first in range(0, len(current), HELD_STEPS):
        held = slice(first, first + HELD_STEPS)
        after = end if held.stop >= len(current) else torch.empty_like(end)
        _run_forward(view, constants, current[held], v, rate, excess, spikes[held], after)
        v = after
    return spikes, end


@_scan_operator.register_fake
def _(current, state, rate, excess, *_numbers):
    return _outputs(_dense(current))


@torch.library.custom_op("ranvier::triton_scan_backward", mutates_args=())
def _scan_backward_operator(
    grad_spikes: Tensor | None,
    grad_end: Tensor | None,
    current: Tensor,
    state: Tensor | None,
    rate: Tensor | None,
    excess: Tensor | None,
    neuron: str,
    reset: str,
    detach_reset: bool,
    surrogate: str,
    surrogate_number: float,
    v_threshold: float,
    v_burst: float,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of current, state and the learned tensor; of the last two empty ones where there is none."""
    current = _dense(current)
    grad_current, end = _outputs(current)
    learned = excess if rate is None else rate
    if end.numel() == 0:
        return (
            grad_current,
            torch.empty_like(end) if state is not None else end.new_empty(0),
            end.new_empty(0) if learned is None else torch.zeros_like(learned),
        )
    constants = _Constants.of(neuron, tau, reset, v_threshold, v_burst)
    view = _View.of(current, excess is not None)
    grad_spikes = None if grad_spikes is None else _laid_out_as(end, grad_spikes)
    to_v = None if grad_end is None else _laid_out_as(end, grad_end)
    starts = [None if state is None else _laid_out_as(end, state)]
    for first in range(0, len(current) - HELD_STEPS, HELD_STEPS):
        part, after = current[first : first + HELD_STEPS], torch.empty_like(end)
        _run_forward(view, constants, part, starts[-1], rate, excess, None, after)
        starts.append(after)
    sums = []
    for number in reversed(range(len(starts))):
        held = slice(number * HELD_STEPS, (number + 1) * HELD_STEPS)
        part, sent = current[held], None if grad_spikes is None else grad_spikes[held]
        tile = view.tile(len(part), 1 if learned is None else 2)
        partial = None if learned is None else end.new_empty(tile.num_partial(rate is not None))
        before = torch.empty_like(end) if number > 0 or state is not None else None
        with _on(current):
            _backward_kernel[(tile.programs,)](
                part,
                starts[number],
                rate,
                excess,
                sent,
                to_v,
                grad_current[held],
                before,
                partial,
                part.stride(0),
                0 if sent is None else sent.stride(0),
                end.numel(),
                view.rows,
                view.columns,
                tile.column_blocks,
                view.inner,
                len(part),
                constants.charge,
                constants.charge_backward,
                constants.reset,
                constants.reset_backward,
                detach_reset,
                DERIVATIVES[surrogate],
                surrogate_number,
                constants.leak,
                v_threshold,
                v_burst,
                tile.rows,
                tile.columns,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
        to_v = before
        sums.append(partial)
    return (
        grad_current,
        end.new_empty(0) if state is None or to_v is None else to_v,
        end.new_empty(0) if learned is None else _added_up(sums, view, learned, rate is None),
    )


@_scan_backward_operator.register_fake
def _(grad_spikes, grad_end, current, state, rate, excess, *_numbers):
    grad_current, end = _outputs(_dense(current))
    learned = excess if rate is None else rate
    return (
        grad_current,
        end.new_empty(0) if state is None else end,
        end.new_empty(0) if learned is None else torch.empty_like(learned),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.numbers = inputs[4:]
    ctx.set_materialize_grads(False)  # the state's is mostly absent, and zeros would be read


def _backward(ctx: Any, grad_spikes: Tensor | None, grad_end: Tensor | None) -> tuple[Any, ...]:
    current, state, rate, excess = ctx.saved_tensors
    grad_current = grad_state = grad_learned = None
    if grad_spikes is not None or grad_end is not None:
        grad_current, grad_state, grad_learned = _scan_backward_operator(
            grad_spikes, grad_end, current, state, rate, excess, *ctx.numbers
        )
    return (
        grad_current,
        None if state is None else grad_state,
        None if rate is None else grad_learned,
        None if excess is None else grad_learned,
        *[None] * len(ctx.numbers),
    )


_scan_operator.register_autograd(_backward, setup_context=_setup_context)


# What kernels are launched with.


class _Constants(NamedTuple):
    """What both kernels are compiled for."""

    charge: Any
    charge_backward: Any
    leak: float
    reset: Any
    reset_backward: Any
    v_threshold: float
    v_burst: float

    @classmethod
    def of(cls, neuron: str, tau: float, reset: str, v_threshold: float, v_burst: float) -> "_Constants":
        numbers = *RESETS[reset], v_threshold, v_burst
        if neuron == "if":
            return cls(_sum, _sum_backward, 1.0, *numbers)
        if neuron == "plif" or math.frexp(tau)[0] == 0.5:  # a power of two: the product has the bits of the quotient
            return cls(_leak_by_product, _leak_by_product_backward, 1 / tau, *numbers)
        return cls(_leak_by_quotient, _leak_by_quotient_backward, tau, *numbers)


class _Tile(NamedTuple):
    """The part of a step in memory that one program works on, and how many programs there are."""

    rows: int
    columns: int
    row_blocks: int
    column_blocks: int
    all_columns: int

    @property
    def programs(self) -> int:
        return self.row_blocks * self.column_blocks

    def num_partial(self, one_sum: bool) -> int:
        """Partial sums that all programs write: one each, or one for each column."""
        return self.programs if one_sum else self.row_blocks * self.all_columns


class _View(NamedTuple):
    """A step in memory as `[rows, columns]`: where channels matter, one column lies in one channel."""

    rows: int
    columns: int
    inner: int
    """Neighbouring columns of one channel."""

    @classmethod
    def of(cls, current: Tensor, by_channel: bool) -> "_View":
        numel = current[0].numel()
        if not by_channel or current.shape[2] == 1:
            return cls(1, numel, numel)
        inner = current.stride(2)
        columns = current.shape[2] * inner
        return cls(numel // columns, columns, inner)

    def tile(self, steps: int, held: int = 1) -> _Tile:
        """Tiles for kernels whose threads hold `held` numbers of each step for each element."""
        steps = triton.next_power_of_2(steps)
        size = 32 * WARPS * max(1, min(8, REGISTERS // (held * steps)))  # 8: 16 bytes of bfloat16 in one read
        # Some rows, so that partial sums are few; not so many that the runs of neighbours in memory become short.
        rows = max(min(8, size // 32), size // triton.next_power_of_2(self.columns))
        rows = min(triton.next_power_of_2(self.rows), rows)
        columns = size // rows
        return _Tile(rows, columns, triton.cdiv(self.rows, rows), triton.cdiv(self.columns, columns), self.columns)


def _run_forward(
    view: _View,
    constants: _Constants,
    current: Tensor,
    state: Tensor | None,
    rate: Tensor | None,
    excess: Tensor | None,
    spikes: Tensor | None,
    end: Tensor,
) -> None:
    """Launch the forward kernel for one segment; without `spikes` for the potential alone."""
    tile = view.tile(len(current))
    with _on(current):
        _forward_kernel[(tile.programs,)](
            current,
            state,
            rate,
            excess,
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
            constants.v_threshold,
            constants.v_burst,
            tile.rows,
            tile.columns,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def _added_up(sums: list[Any], view: _View, learned: Tensor, by_channel: bool) -> Tensor:
    """Partial sums of all launches and programs, added in one order whatever the run."""
    if not by_channel:
        return torch.cat(sums).sum().view(1)
    return torch.cat(sums).view(-1, view.columns).sum(0).view(len(learned), -1).sum(1)


def _dense(current: Tensor) -> Tensor:
    """`current`, or a contiguous copy where the elements of a step are not dense in memory; steps may lie anywhere."""
    expected = 1
    axes = [axis for axis in range(1, current.ndim) if current.shape[axis] != 1]
    for axis in sorted(axes, key=current.stride):
        if current.stride(axis) != expected:
            return current.contiguous()
        expected *= current.shape[axis]
    return current


def _outputs(current: Tensor) -> tuple[Tensor, Tensor]:
    """New memory for all steps and for one, in float32: each step as in `current`, where steps may lie apart."""
    shape, step = current.shape[1:], current.stride()[1:]
    all_steps = current.new_empty_strided(current.shape, (math.prod(shape), *step))
    return all_steps, current.new_empty_strided(shape, step, dtype=torch.float32)


def _laid_out_as(step: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, one step or all, or a copy whose steps lie in memory as `step` does."""
    theirs = zip(tensor.stride()[-step.ndim :], step.stride(), step.shape, strict=True)
    if all(there == here or size == 1 for there, here, size in theirs):
        return tensor
    strides = step.stride() if tensor.ndim == step.ndim else (step.numel(), *step.stride())
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def _on(tensor: Tensor) -> AbstractContextManager[None]:
    """Kernels start on the present device: make that the one of `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
