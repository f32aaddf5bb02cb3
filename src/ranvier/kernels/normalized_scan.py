"""Batch normalisation and neuron as one operator, for training on a CPU.

    y = weight (x - mean) / sqrt(variance + eps) + bias,   spikes = scan(y)

with mean and variance of each channel over all steps, or of each step apart. What a shortcut adds to the spikes can be
added as they are written.

The normalised input is never written: a pass over x takes the statistics, and the scan normalises each line of neurons
as it reads it. Backward keeps x alone. The scan writes the gradient with respect to y and adds up what the statistics
need of it; one more pass makes it that of x,

    dx = scale (dy - mean(dy) - x^ mean(dy x^)),   x^ = (x - mean) / sqrt(variance + eps),   scale = weight / sqrt(...)

These are six reads and three writes of the size of x; normalisation and scan apart take nine and four. Sums are in
float32 within parts of some rows and in float64 over them, in a fixed order; y is not rounded to the type of x. So
results agree with the two layers apart to rounding, and not bit for bit.

Channels lie side by side in memory (channels-last, or `[T, B, C]`), and there is a multiple of 16 of them.
"""

# mypy: disable-error-code="no-untyped-def"
# The fakes repeat the schemas of their operators.

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ranvier.dynamics.scan import Step
from ranvier.kernels.dispatch import Implementation, choose_scan, run_size
from ranvier.kernels.fused_scan import KIND, Job, Kind, Norm, View, dense, is_traced, laid_out_as, outputs, unfit
from ranvier.kernels.native_library import LINE


def fits(
    x: Tensor, weight: Tensor, bias: Tensor, step: Step, params: Any, *learned: Tensor, implementation: Implementation
) -> bool:
    """Whether one operator can do what a normalisation in training and a neuron do.

    Arguments are those of `normalized_scan`, and the `implementation` of the neuron: `auto` or `native` can.
    """
    if implementation not in ("auto", "native") or x.device.type != "cpu" or x.ndim < 3 or x.shape[2] % LINE:
        return False
    if weight.dtype != torch.float32 or bias.dtype != torch.float32 or weight.device != x.device:
        return False
    if x.stride(2) != 1 or any(size == 0 for size in x.shape):
        return False

    def why_not(backend: Any) -> str | None:
        return unfit(backend, step, x, None, params, learned)

    if why_not("native") is not None or (Kind.of(step, params).neuron == "lifb" and len(learned[0]) != x.shape[2]):
        return False
    return choose_scan(implementation, x.device, run_size(x), why_not).implementation == "native"


def normalized_scan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    per_step: bool,
    step: Step,
    params: Any,
    *learned: Tensor,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes of neurons, from rest, that receive `x` normalised.

    Args:
        x: `[T, B, C, ...]`, of which `fits` says that it fits.
        weight: Scale of each channel, `[C]`.
        bias: Shift of each channel, `[C]`.
        eps: Added to the variance.
        per_step: Statistics over B and positions, of each step, and not over T, B and positions.
        step: `if_step`, `lif_step`, `plif_step` or `lifb_step`.
        params: Parameters of `step`.
        learned: Tensors of the neuron that train.
        added: To the spikes, shape and dtype of `x`, or None.

    Returns:
        Spikes or the sum, shape and dtype of `x`; mean and variance (over N, not N - 1) of each channel, `[S, C]`,
        S = T if `per_step` and else 1, without gradient.
    """
    kind = Kind.of(step, params)
    rate = torch.sigmoid(learned[0]).float().reshape(1) if kind.neuron == "plif" else None
    excess = (learned[0] - 1).float() if kind.neuron == "lifb" else None
    if is_traced(x, weight, bias, added, rate, excess):
        spikes, numbers = _operator(x, weight, bias, added, rate, excess, eps, per_step, *kind)
    else:
        spikes, numbers = _NormalizedScan.apply(x, weight, bias, added, rate, excess, eps, per_step, kind)
    return spikes, numbers[2], numbers[4]


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    added: Tensor | None,
    rate: Tensor | None,
    excess: Tensor | None,
    eps: float,
    per_step: bool,
    kind: Kind,
) -> tuple[Tensor, Tensor]:
    """Spikes, and five numbers of each channel, `[5, S, C]`: scale, shift, mean, 1 / deviation, variance."""
    from ranvier.kernels import native_scan

    x = _laid_out(x)
    job = Job(kind, View.of(x, by_channel=True), x, None, rate, excess)
    mean, variance = native_scan.statistics(job, per_step)
    per_deviation = (variance + eps).rsqrt()
    scale = weight * per_deviation
    numbers = torch.stack([scale, bias - mean * scale, mean, per_deviation, variance]).float()
    spikes, _ = outputs(x)
    added = None if added is None else laid_out_as(spikes, added)
    native_scan.forward(job._replace(norm=Norm(*numbers[:3])), spikes, None, added)
    return spikes, numbers


def _backward(
    grad: Tensor, x: Tensor, numbers: Tensor, rate: Tensor | None, excess: Tensor | None, kind: Kind
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight, bias, and the learned tensor of the neuron or None."""
    from ranvier.kernels import native_scan

    x = _laid_out(x)
    scale, shift, mean, per_deviation, _ = numbers
    view = View.of(x, by_channel=True)
    job = Job(kind, view, x, None, rate, excess, Norm(scale, shift, mean))
    grad_x, end = outputs(x)
    moments = scale.new_zeros(native_scan.chunks_of(view, len(scale)), 2, *scale.shape)
    grad_learned = native_scan.backward(job, laid_out_as(end, grad), None, grad_x, None, moments)
    grad_bias, product = moments.sum(0, dtype=torch.float64)
    grad_weight = product * per_deviation
    share = scale.numel() / x.numel()
    slope = -scale * per_deviation * grad_weight * share
    offset = -scale * grad_bias * share - slope * mean
    native_scan.combine(job._replace(norm=Norm(scale, offset.float(), mean)), slope.float(), grad_x)
    return grad_x, grad_weight.sum(0).float(), grad_bias.sum(0).float(), grad_learned


def _laid_out(x: Tensor) -> Tensor:
    """`x`, or a copy of it, each step of it dense and with its channels side by side."""
    if x.stride(2) == 1 and dense(x) is x:
        return x
    return x.movedim(2, -1).contiguous().movedim(-1, 2)


class _NormalizedScan(torch.autograd.Function):
    """The operators below without what makes them operators, which costs 50 us a call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        output = _forward(x, weight, bias, *others)
        _setup_context(ctx, (x, weight, bias, *others), output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, other: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, grad, other)


# The operators. Their schemas hold tensors and plain values only.


@torch.library.custom_op(
    "ranvier::normalized_scan",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor weight, Tensor bias, Tensor? added, Tensor? rate, Tensor? excess, float eps, "
        f"bool per_step, {KIND}) -> (Tensor, Tensor)"
    ),
)
def _operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    added: Tensor | None,
    rate: Tensor | None,
    excess: Tensor | None,
    eps: float,
    per_step: bool,
    *kind: Any,
) -> tuple[Tensor, Tensor]:
    return _forward(x, weight, bias, added, rate, excess, eps, per_step, Kind(*kind))


@_operator.register_fake
def _(x, weight, _bias, _added, _rate, _excess, _eps, per_step, *_kind):
    return outputs(_laid_out(x))[0], weight.new_empty(5, len(x) if per_step else 1, len(weight))


@torch.library.custom_op(
    "ranvier::normalized_scan_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor x, Tensor numbers, Tensor? rate, Tensor? excess, "
        f"{KIND}) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _backward_operator(
    grad: Tensor,
    x: Tensor,
    numbers: Tensor,
    rate: Tensor | None,
    excess: Tensor | None,
    *kind: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the learned tensor; of the last an empty one where there is none."""
    grad_x, grad_weight, grad_bias, found = _backward(grad, x, numbers, rate, excess, Kind(*kind))
    return grad_x, grad_weight, grad_bias, numbers.new_empty(0) if found is None else found


@_backward_operator.register_fake
def _(grad, x, numbers, rate, excess, *_kind):
    learned = excess if rate is None else rate
    channels = numbers.new_empty(numbers.shape[2])
    nothing = numbers.new_empty(0) if learned is None else torch.empty_like(learned)
    return outputs(_laid_out(x))[0], channels, torch.empty_like(channels), nothing


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, _, added, rate, excess, _, _, *kind = inputs
    numbers = output[1]
    ctx.save_for_backward(x, numbers, rate, excess)
    ctx.kind = kind[0] if isinstance(kind[0], Kind) else Kind(*kind)
    ctx.count = len(inputs)
    ctx.adds = added is not None
    ctx.mark_non_differentiable(numbers)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * ctx.count
    x, numbers, rate, excess = ctx.saved_tensors
    if is_traced(x, grad) or not torch._C._has_storage(grad):
        grad_x, grad_weight, grad_bias, found = _backward_operator(grad, x, numbers, rate, excess, *ctx.kind)
    else:
        grad_x, grad_weight, grad_bias, found = _backward(grad, x, numbers, rate, excess, ctx.kind)
    learned = (None if rate is None else found, None if excess is None else found)
    return grad_x, grad_weight, grad_bias, grad if ctx.adds else None, *learned, *[None] * (ctx.count - 6)


_operator.register_autograd(_differentiate, setup_context=_setup_context)
