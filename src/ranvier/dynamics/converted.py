"""The neuron of converted networks: integrate-and-fire that transmits its threshold, with calibrated corrections."""

from typing import NamedTuple

import torch
from torch import Tensor

from ranvier.checks import shape_of
from ranvier.dynamics.scan import check_scan, per_channel
from ranvier.dynamics.surrogate import Surrogate, spike


class ConvertedState(NamedTuple):
    """What a converted neuron remembers between calls."""

    v: Tensor
    """Potential `[B, C, ...]`."""
    emitted: Tensor
    """Spikes minus negative spikes so far, `[B, C, ...]`; only signed neurons look at it. Others keep an empty one."""
    step: int
    """Steps so far: which row of the bias comes next."""


def converted_step(
    x: Tensor,
    v: Tensor,
    emitted: Tensor,
    threshold: Tensor,
    bias: Tensor,
    signed: bool,
    binary: bool = False,
    surrogate: Surrogate | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of `converted_scan`: charge, compare, subtract the threshold for each spike."""
    h = v + (x - bias)
    s = (h >= threshold).to(h.dtype) if surrogate is None else spike((h - threshold) / threshold, surrogate)
    if signed:
        back = ((h < 0) & (emitted > 0)).to(h.dtype)
        s = s - (back if surrogate is None else back * spike(-h / threshold, surrogate))
        emitted = emitted + s.detach()
    y = threshold * s
    return s if binary else y, h - y.detach(), emitted


def converted_scan(
    current: Tensor,
    state: ConvertedState | None,
    threshold: Tensor,
    bias: Tensor,
    v_init: Tensor,
    signed: bool = False,
    binary: bool = False,
    surrogate: Surrogate | None = None,
) -> tuple[Tensor, ConvertedState]:
    """Integrate-and-fire neurons of a converted network over all time steps.

        h[t] = v[t-1] + current[t] - bias[t]                  charge
        s[t] = 1 if h[t] >= threshold else 0                  fire
               -1 if h[t] < 0 and sum(s[:t]) > 0              take a spike back (signed neurons only)
        y[t] = threshold s[t]                                 what is transmitted; s[t] where binary
        v[t] = h[t] - threshold s[t],    v[-1] = v_init       soft reset

    Nothing is lost at a reset, so that the sum of all y is the sum of the input up to what is left in the potential:

        sum y = sum (current - bias) + v_init - v[T].

    A spike carries the threshold, in the unit of the activation that it stands for; weights of an ANN are used as they
    are. (Multiplying the next weights by the threshold instead gives the same network with binary spikes.)

    Args:
        current: Input, `[T, B, C, ...]`.
        state: Carried from an earlier call, or None to start from `v_init`. Not modified.
        threshold: Greater than 0, `[C]` or `[1]`.
        bias: Subtracted from the current, `[T', C]` with a row for each step, or `[1, C]` or `[1, 1]`, the same at all.
        v_init: Initial potential, `[C]`, `[1]` or for each neuron `[C, ...]`.
        signed: Whether a neuron that has fired too often may take a spike back.
        binary: Whether a spike is sent as 1, for weights that were multiplied by the threshold.
        surrogate: Gradient of a spike in `h / threshold - 1`, for fine-tuning; the reset is not differentiated. None:
            no gradient passes through a spike.

    Returns:
        Transmitted values `[T, B, C, ...]`; the state after step T.

    Raises:
        TypeError: `state` is not what an earlier call returned.
        ValueError: `current` has no steps, more than `bias` has rows for, other channels than the neurons, or does not
            fit `state`.

    Source: Wu et al. 2024 (forward temporal bias correction), section 3, the sign of the bias as in its code; signed
    spikes: Wang et al. 2022, "Signed Neuron with Memory".

    >>> x = torch.full((4, 1, 1), 0.6)
    >>> converted_scan(x, None, torch.ones(1), torch.zeros(1, 1), torch.full((1,), 0.5))[0].flatten().tolist()
    [1.0, 0.0, 1.0, 0.0]
    """
    v, emitted, rows, state = begin(current, state, bias, v_init, signed)
    check_num_channels("threshold", threshold, current)
    threshold = per_channel(threshold, current[0])
    sent = []
    for x, b in zip(current.unbind(0), rows, strict=True):
        y, v, emitted = converted_step(x.to(v.dtype), v, emitted, threshold, b, signed, binary, surrogate)
        sent.append(y.to(current.dtype))
    return torch.stack(sent), ConvertedState(v, emitted, state.step + len(current))


def begin(
    current: Tensor, state: ConvertedState | None, bias: Tensor, v_init: Tensor, signed: bool
) -> tuple[Tensor, Tensor, list[Tensor], ConvertedState]:
    """Check a call, and give the potential, the counts, one row of bias per step, and the state it starts from."""
    rows = check_converted(current, state, bias, v_init, signed)
    first = current[0]
    dtype = torch.promote_types(current.dtype, torch.float32)
    if state is None:
        start = v_init if v_init.ndim > 1 else per_channel(v_init, first)
        v = torch.empty_like(first, dtype=dtype).copy_(start.expand(first.shape))
        emitted = torch.zeros_like(v) if signed else v.new_empty(0)
        state = ConvertedState(v, emitted, 0)
    shaped = rows.expand(len(current), -1).view(len(current), -1, *[1] * (first.ndim - 2)).to(dtype)
    return state.v, state.emitted, list(shaped.unbind(0)), state


def check_converted(
    current: Tensor, state: ConvertedState | None, bias: Tensor, v_init: Tensor, signed: bool
) -> Tensor:
    """Raise unless `current` fits the neurons and the state; else the biases of its steps, `[T, C]` or `[1, C]`."""
    check_scan(current, None)
    if current.ndim < 3:
        raise ValueError(f"current has shape {shape_of(current)}, but converted neurons need channels: [T, B, C, ...].")
    check_num_channels("bias", bias[0], current)
    check_num_channels("v_init", v_init, current)
    frame, begun = current.shape[1:], 0
    if state is None:
        if v_init.ndim > 1 and v_init.shape != frame[1:]:
            raise ValueError(
                f"current has shape {shape_of(current)}, but the initial potentials were calibrated for each neuron of "
                f"{shape_of(v_init)}. Use images of the size that calibration used, or another bias than potential."
            )
    elif not isinstance(state, ConvertedState):
        raise TypeError(
            f"state is a {type(state).__name__}, but must be the ConvertedState that an earlier call returned, or None."
        )
    elif state.v.shape != frame:
        raise ValueError(
            f"state.v has shape {shape_of(state.v)} but current is {shape_of(current)} ([T, B, ...]). "
            "Pass state=None at the start of a new batch, or keep the batch size while streaming."
        )
    elif signed and state.emitted.shape != frame:
        raise ValueError(
            f"state.emitted has shape {shape_of(state.emitted)} but current is {shape_of(current)}: signed neurons "
            "need their counts, and unsigned ones keep none. Pass the state that the same neurons returned."
        )
    elif state.step < 0:
        raise ValueError(f"state.step is {state.step}, but steps so far are at least 0. Pass the state that came back.")
    else:
        begun = state.step
    if len(bias) == 1:
        return bias
    end = begun + len(current)
    if end > len(bias):
        raise ValueError(
            f"step {end} was asked for, but the biases were calibrated for steps 1 to {len(bias)}. "
            f"Run at most {len(bias)} steps, or convert again with steps={end}."
        )
    return bias[begun:end]


def check_num_channels(name: str, parameter: Tensor, current: Tensor) -> None:
    """Raise unless `parameter` has one value for each channel of `current` `[T, B, C, ...]`, or one for all."""
    if len(parameter) not in (1, current.shape[2]):
        raise ValueError(
            f"current has shape {shape_of(current)}, but {name} is for {len(parameter)} channels, which need "
            f"[T, B, {len(parameter)}, ...]."
        )
