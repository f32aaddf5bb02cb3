"""Convolutions that are faster on a CPU than those of torch, with unchanged results.

    y = conv(x, w) + b

**On a matrix unit** (AMX), which takes bfloat16 only. In bfloat16 the unit is what torch's convolutions run on, too,
but those take several times as long on small images, and most of all for the gradient of the weights. Each of the three
passes runs here where that was measured to be faster. Sums are taken in float32, and the gradient of weights in float32
is not rounded to bfloat16.

In float32, which stays float32, the input has to be spikes: products of spikes with float32 weights, and with float32
gradients, are exact in three parts of bfloat16 each: see `ranvier.kernels.native_convolution`. Sums are rounded in
float32, as in any convolution, and in another order. Whether values are spikes, or sums of few, is seen when they are
read; where they are not, and where it would not pay, the convolution is that of torch. Weights and gradients below
2^-100 lose digits, since the unit takes what is smaller than 2^-126 for zero; where they are infinite, or above
3.39e38, NaN comes out.

**On CPUs with AVX2** and without such a unit, in float32, training reads only what of the input is not zero, of spikes
a fifth or so, for the output and for the gradient of the weights: see `ranvier.kernels.native_event_convolution`. Where
more is not, they are those of torch. What is infinite or NaN in the weights, or in the gradient of the output, arrives
only where it meets what is not zero.

Under autocast backward reads the weights themselves, not a copy in bfloat16: they must not be written to before.
"""

# mypy: disable-error-code="no-untyped-def"
# The fakes repeat the schemas of their operators.

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ranvier.kernels import native_convolution, native_event_convolution
from ranvier.kernels.dispatch import is_transformed
from ranvier.kernels.fused_scan import is_traced

SAMPLE = 2**12
"""Values that tell, mostly, whether an input is of spikes, or mostly of zeros."""

FEW_PLACES = 64
"""Of an input of bfloat16, up to which its output comes sooner; of an output, up to which the gradient of x does."""

SOME_PLACES = 256
"""Of an output of bfloat16, up to which the gradient of the weights comes sooner."""

UNSAFE_PLACES = 16
"""Of an input of bfloat16, up to which torch (2.13) is not trusted with strides: of images of one place, with weights
of 3x3 and a stride of 2, the gradient of the weights is NaN, or any number, in most calls.
"""


def fits(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Sequence[int], groups: int) -> bool:
    """Whether these convolutions can run here on a tensor like this; nothing of its values or sizes.

    Args:
        x: Input, `[N, C, H, W]`, float32 or bfloat16.
        weight: `[O, C, kernel height, kernel width]`, of the dtype of x or, under autocast, what it would cast to that.
        bias: Of the dtype of the weight, or None.
        dilation: Of y and x; only 1.
        groups: Only 1.
    """
    if _is_watched(x, weight) or x.device.type != "cpu" or x.ndim != 4 or weight.device != x.device:
        return False
    casts = torch.is_autocast_enabled("cpu")
    if casts and (x.dtype != torch.bfloat16 or torch.get_autocast_dtype("cpu") != torch.bfloat16):
        return False
    same = weight.dtype == x.dtype or (casts and weight.dtype == torch.float32)
    if bias is not None and bias.dtype != weight.dtype:
        return False
    if x.dtype not in (torch.float32, torch.bfloat16) or not same or groups != 1 or tuple(dilation) != (1, 1):
        return False
    there = _unit_is_there() or (x.dtype == torch.float32 and _events_are_listed())
    return there and x.is_contiguous(memory_format=torch.channels_last)


def promises(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether it would pay, and the first values could be spikes, or mostly zeros: spares others a look at all of them.

    What no convolution can be made of promises nothing, so that torch says what is wrong with it.
    """
    return any(passes_of(x, weight, bias, stride, padding, learned=True))


class Passes(NamedTuple):
    """What a kernel of ours computes, of the three passes of a convolution."""

    output: bool
    of_x: bool
    of_weight: bool


def passes_of(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], *, learned: bool
) -> Passes:
    """Which passes run here, on an input of which `fits` says that it fits; arguments as of `promises`.

    Outputs are found from events where something is `learned` alone: how many there are differs from step to step, and
    what a network answers must not depend on how many steps come at once. See `prefers_events` for a network that
    chooses once.
    """
    none = Passes(False, False, False)
    if bias is not None and (bias.dtype != weight.dtype or bias.device != x.device or bias.shape != weight.shape[:1]):
        return none
    if not _unit_is_there():
        if not learned or x.dtype != torch.float32 or not native_event_convolution.pays(x, weight, stride, padding):
            return none
        share = _share_of_events(x)
        output = share <= native_event_convolution.most_forward(weight)
        return Passes(output, False, share <= native_event_convolution.most_backward(stride))
    if not native_convolution.pays(x, weight, stride, padding):
        return none
    if x.dtype == torch.float32:
        few = x[0].permute(1, 2, 0).flatten()[:SAMPLE]
        return Passes(True, True, True) if torch.equal(few.bfloat16().float(), few) else none
    places = math.prod(native_convolution.output_size(x.shape[2:], weight.shape[2:], stride, padding))
    return Passes(math.prod(x.shape[2:]) <= FEW_PLACES, places <= FEW_PLACES, places <= SOME_PLACES)


def prefers_events(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool | None:
    """Whether the output would come sooner from events, of an input like this; None if all are zero that are looked at.

    For who keeps the answer: the two ways round differently.

    Args:
        x: An input of which `fits` says that it fits.
        weight: `[O, C, kernel height, kernel width]`.
        stride: Of y and x.
        padding: Zeros on either side, of y and x.
    """
    if _unit_is_there() or x.dtype != torch.float32 or not native_event_convolution.pays(x, weight, stride, padding):
        return False
    share = _share_of_events(x)
    return share <= native_event_convolution.most_forward(weight) if share else None


def _share_of_events(x: Tensor) -> float:
    """Of values here and there, what is not zero."""
    values = x.permute(0, 2, 3, 1).flatten()
    few = values[:: values.numel() // SAMPLE | 1]  # odd, so that it is not always the same channel
    return int(few.count_nonzero()) / few.numel()


def explain_convolutions() -> str:
    """Say what runs convolutions on this machine's CPU, and why."""
    obstacle = native_convolution.obstacle()
    if obstacle is None:
        return "matrix unit (AMX): spikes in float32, and small images in bfloat16"
    lists = native_event_convolution.obstacle()
    how = ", but in float32 training and prepared networks read spikes alone" if lists is None else f"; {lists}"
    return f"those of torch{how} ({obstacle})"


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Convolution of an input in bfloat16, or of one in float32 that may be spikes.

    Args:
        x: `[N, C, H, W]`, of which `fits` says that it fits.
        weight: `[O, C, kernel height, kernel width]`, in bfloat16 or float32.
        bias: `[O]`, of the dtype of the weight, or None.
        stride: Of y and x.
        padding: Zeros on either side, of y and x.

    Returns:
        `[N, O, H', W']`, channels-last, of the dtype of x.
    """
    stride, padding = list(stride), list(padding)
    if not is_traced(x, weight, bias):
        if not promises(x, weight, bias, stride, padding):
            return _convolve_plainly(x, weight, bias, stride, padding)
        learned = any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias))
        if torch.is_grad_enabled() and learned:
            output: Tensor = _Convolution.apply(x, weight, bias, stride, padding, True)
            return output
    return convolve(x, weight, bias, stride, padding, learned=torch.is_grad_enabled())


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], *, learned: bool
) -> Tensor:
    """What `convolution` gives, for who has the gradients from `differentiate` if there is something to be learned."""
    if is_traced(x, weight, bias):
        output: Tensor = _operator(x, weight, bias, stride, padding, learned)
        return output
    return _convolve(x, weight, bias, stride, padding, learned)


def differentiate(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, the weight and the bias, each if it is `needed`."""
    if is_transformed():  # by who saw no more than the backward pass
        return _differentiate_plainly(grad, x, weight, stride, padding, needed)
    if is_traced(grad, x, weight) or not torch._C._has_storage(grad):
        found = _backward_operator(grad, x, weight, stride, padding, list(needed))
        return tuple(one if need else None for one, need in zip(found, needed, strict=True))  # type: ignore[return-value]
    return _differentiate(grad, x, weight, stride, padding, needed)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], learned: bool
) -> Tensor:
    if passes_of(x, weight, bias, stride, padding, learned=learned).output:
        numbers = _laid_out(x), _laid_out(weight).float(), None if bias is None else _in_line(bias).float()
        find = native_convolution.forward if _unit_is_there() else native_event_convolution.forward
        output = find(*numbers, stride, padding)
        if output is not None:
            return output
    return _laid_out(_convolve_plainly(x, weight, bias, stride, padding))


def _convolve_plainly(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The convolution of torch, with weights cast as autocast does, which need not be there any more."""
    dtype = torch.float32 if _is_unsafe(x, stride) else x.dtype
    if bias is not None and bias.dtype == weight.dtype:
        bias = bias.to(dtype)
    if dtype == x.dtype:
        return torch.conv2d(x, weight.to(dtype), bias, stride, padding)
    with torch.autocast("cpu", enabled=False):
        return torch.conv2d(x.to(dtype), weight.to(dtype), bias, stride, padding).to(x.dtype)


def _is_unsafe(x: Tensor, stride: Sequence[int]) -> bool:
    return x.dtype == torch.bfloat16 and max(stride) > 1 and math.prod(x.shape[2:]) <= UNSAFE_PLACES


def _differentiate(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    ours = passes_of(x, weight, None, stride, padding, learned=True)
    if not ((needed[0] and ours.of_x) or (needed[1] and ours.of_weight)):
        return _differentiate_plainly(grad, x, weight, stride, padding, needed)
    tensors = _laid_out(grad), _laid_out(x), _laid_out(weight).float()
    grad_x = grad_weight = None
    if needed[1] and ours.of_weight:
        find = native_convolution.grad_weight if _unit_is_there() else native_event_convolution.grad_weight
        grad_weight = find(*tensors, stride, padding)
        if grad_weight is None:  # float32, and no spikes, or too many of them
            return _differentiate_plainly(grad, x, weight, stride, padding, needed)
    if needed[0] and ours.of_x:
        grad_x = native_convolution.grad_spikes(*tensors, stride, padding)
    left = [needed[0] and grad_x is None, needed[1] and grad_weight is None, False]
    left[2] = needed[2] and left[1]  # torch finds that of the bias together with that of the weight, or else slowly
    others = _differentiate_plainly(grad, x, weight, stride, padding, left) if any(left) else (None, None, None)
    grad_bias = others[2] if left[2] or not needed[2] else grad.sum((0, 2, 3), dtype=torch.float32).to(weight.dtype)
    grad_weight = others[1] if grad_weight is None else grad_weight.to(weight.dtype)
    return others[0] if grad_x is None else grad_x, grad_weight, grad_bias


def _differentiate_plainly(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    plain = [1, 1], False, [0, 0], 1, list(needed)
    dtype = torch.float32 if _is_unsafe(x, stride) else x.dtype
    tensors = grad.to(dtype), x.to(dtype), weight.to(dtype)
    found = torch.ops.aten.convolution_backward(*tensors, [len(weight)], stride, padding, *plain)
    dtypes = x.dtype, weight.dtype, weight.dtype
    grad_x, grad_weight, grad_bias = (
        one.to(dtype) if need else None for one, dtype, need in zip(found, dtypes, needed, strict=True)
    )
    return grad_x, grad_weight, grad_bias


def _is_watched(*tensors: Tensor) -> bool:
    """Whether something looks on that knows torch's convolutions, such as what counts operations; not torch.compile."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return is_transformed() or is_traced(*tensors)


def _laid_out(tensor: Tensor) -> Tensor:
    return tensor.resolve_neg().contiguous(memory_format=torch.channels_last)


def _in_line(bias: Tensor) -> Tensor:
    return bias.resolve_neg().contiguous()


def _unit_is_there() -> bool:
    return native_convolution.obstacle() is None


def _events_are_listed() -> bool:
    return native_event_convolution.obstacle() is None


# What torch.compiler.assume_constant_result sets, see `ranvier.kernels.dispatch`: the tracer cannot read /proc.
_unit_is_there._dynamo_marked_constant = True  # type: ignore[attr-defined]
_events_are_listed._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Convolution(torch.autograd.Function):
    """The operators below without what makes them operators, which costs 50 us a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _convolve(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _from_context(ctx, grad)


# The operators. Their schemas hold tensors and plain values only.


@torch.library.custom_op(
    "ranvier::convolution",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, bool learned) -> Tensor",
)
def _operator(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], learned: bool
) -> Tensor:
    return _convolve(x, weight, bias, stride, padding, learned)


@_operator.register_fake
def _(x, weight, _bias, stride, padding, _learned):
    size = native_convolution.output_size(x.shape[2:], weight.shape[2:], stride, padding)
    return _laid_out(x.new_empty(x.shape[0], weight.shape[0], *size))


@torch.library.custom_op(
    "ranvier::convolution_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor x, Tensor weight, SymInt[] stride, SymInt[] padding, bool[] needed) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)
def _backward_operator(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, the weight and the bias; an empty one for what is not needed."""
    grads = _differentiate(grad, x, weight, stride, padding, needed)
    grad_x, grad_weight = (
        like.new_empty(0) if one is None else _laid_out(one) for one, like in zip(grads, (x, weight), strict=False)
    )
    return grad_x, grad_weight, weight.new_empty(0) if grads[2] is None else grads[2]


@_backward_operator.register_fake
def _(_grad, x, weight, _stride, _padding, needed):
    grad_x, grad_weight = (
        _laid_out(torch.empty_like(tensor)) if need else tensor.new_empty(0)
        for tensor, need in zip((x, weight), needed[:2], strict=True)
    )
    return grad_x, grad_weight, weight.new_empty(weight.shape[0] if needed[2] else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.settings, _ = inputs
    ctx.save_for_backward(x, weight)


def _from_context(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Gradients of gradients are wanted where this is recorded: those of torch have them.
    find = _differentiate_plainly if torch.is_grad_enabled() else differentiate
    (x, weight), (stride, padding) = ctx.saved_tensors, ctx.settings
    return *find(grad, x, weight, stride, padding, ctx.needs_input_grad[:3]), None, None, None


_operator.register_autograd(_from_context, setup_context=_setup_context)
