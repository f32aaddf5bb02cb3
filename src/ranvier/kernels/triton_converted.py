"""The scan of converted neurons as a Triton kernel, for GPUs: forward only, see `ranvier.kernels.converted`."""

# mypy: disable-error-code="no-untyped-def"
# Device functions have no Python types.

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from ranvier.dynamics import ConvertedState
from ranvier.kernels.converted import Converted
from ranvier.kernels.fused_scan import View, dense, laid_out_as, outputs
from ranvier.kernels.triton_scan import HELD_STEPS, WARPS, Tile, on_device_of, tile_of_program


@triton.jit
@no_type_check
def _kernel(
    current,  # [STEPS, rows, columns], `apart` elements from step to step
    v,  # [rows, columns], or None: it starts at `v_init`
    emitted,  # [rows, columns], or None
    threshold,  # [channels]
    bias,  # [channels], `bias_apart` elements from step to step
    v_init,  # [channels], or None
    sent,  # as current
    v_end,  # [rows, columns]
    emitted_end,  # [rows, columns], or None
    apart,
    bias_apart,
    numel,
    rows,
    columns,
    column_blocks,
    inner,  # neighbours in memory that share a channel
    STEPS: tl.constexpr,
    SIGNED: tl.constexpr,
    BINARY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    offsets, mask, column = tile_of_program(rows, columns, column_blocks, ROWS, COLUMNS)
    apart = tl.cast(apart, tl.int64)
    numel = tl.cast(numel, tl.int64)
    channel, there = column // inner, column < columns  # [1, COLUMNS]
    limit = tl.load(threshold + channel, mask=there, other=1.0)
    if v is not None:
        potential = tl.load(v + offsets, mask=mask, other=0.0)
    else:
        potential = tl.zeros([ROWS, COLUMNS], tl.float32) + tl.load(v_init + channel, mask=there, other=0.0)
    count = tl.zeros([ROWS, COLUMNS], tl.float32)
    if emitted is not None:
        count = tl.load(emitted + offsets, mask=mask, other=0.0)
    xs = ()  # read ahead, as in triton_scan
    for t in tl.static_range(STEPS):
        xs = xs + (tl.load(current + t * apart + offsets, mask=mask, other=0.0),)  # noqa: RUF005
    for t in tl.static_range(STEPS):
        h = potential + (xs[t].to(tl.float32) - tl.load(bias + t * bias_apart + channel, mask=there, other=0.0))
        fired = (h >= limit).to(tl.float32)
        if SIGNED:
            fired -= ((h < 0) & (count > 0)).to(tl.float32)
            count += fired
        y = limit * fired
        potential = h - y
        if BINARY:
            y = fired
        tl.store(sent + t * numel + offsets, y.to(sent.dtype.element_ty), mask=mask)
    tl.store(v_end + offsets, potential, mask=mask)
    if emitted_end is not None:
        tl.store(emitted_end + offsets, count, mask=mask)


def run(current: Tensor, state: ConvertedState | None, neurons: Converted) -> tuple[Tensor, ConvertedState]:
    """`ranvier.dynamics.converted_scan` where `check_converted` let the input pass and `unfit` names no obstacle."""
    current = dense(current)
    begun = 0 if state is None else state.step
    sent, v = outputs(current)
    if v.numel() == 0:
        return sent, ConvertedState(v, v if neurons.signed else v.new_empty(0), begun + len(current))
    view, channels = View.of(current, True), current.shape[2]
    threshold = neurons.threshold.float().expand(channels).contiguous()
    bias = neurons.bias.float().expand(-1, channels).contiguous()
    bias = bias if len(bias) == 1 else bias[begun : begun + len(current)]
    v_init = before = counts = None
    if state is not None:
        before = laid_out_as(v, state.v)
        counts = laid_out_as(v, state.emitted) if neurons.signed else None
    elif neurons.v_init.ndim > 1:
        before = torch.empty_like(v).copy_(neurons.v_init.expand(v.shape))
    else:
        v_init = neurons.v_init.float().expand(channels).contiguous()
    emitted = None
    for first in range(0, len(current), HELD_STEPS):
        part = current[first : first + HELD_STEPS]
        v, emitted = torch.empty_like(v), torch.empty_like(v) if neurons.signed else None
        tile = Tile.of(view, len(part))
        with on_device_of(part):
            _kernel[(tile.programs,)](
                part,
                before,
                counts,
                threshold,
                bias if len(bias) == 1 else bias[first:],
                v_init,
                sent[first : first + HELD_STEPS],
                v,
                emitted,
                part.stride(0),
                0 if len(bias) == 1 else channels,
                v.numel(),
                view.rows,
                view.columns,
                tile.column_blocks,
                view.inner,
                len(part),
                neurons.signed,
                neurons.binary,
                tile.rows,
                tile.columns,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
        before, counts = v, emitted
    return sent, ConvertedState(v, v.new_empty(0) if emitted is None else emitted, begun + len(current))
