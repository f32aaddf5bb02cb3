"""Translations of activations, layers with weights, normalisation and pooling."""

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from ranvier.conversion.draft import Draft, Handler, called, sizes, with_sizes
from ranvier.conversion.fold_batchnorm import scale_and_shift
from ranvier.conversion.vocabulary import FUNCTIONS, ChannelAffine, Rectifier
from ranvier.nn import QCFS


def require_constants(draft: Draft, *factors: Any) -> None:
    """Raise if one of `factors`, by which data is multiplied, depends on the images itself."""
    if any(isinstance(factor, fx.Node) for factor in factors):
        raise draft.call.refuse(
            "multiplies two values that both depend on the images, which is not linear",
            "Only constants may be factors: leave out attention and gates such as squeeze-and-excitation.",
        )


def _rectify(draft: Draft, input: fx.Node, inplace: bool = False) -> fx.Node:
    return draft.module("relu", Rectifier(), input)


def _rectify6(draft: Draft, input: fx.Node, inplace: bool = False) -> fx.Node:
    return draft.module("relu", Rectifier(ceiling=6.0), input)


def _clamp(draft: Draft, input: fx.Node, min: Any = None, max: Any = None) -> fx.Node:
    bounds = [float(bound) if isinstance(bound, Tensor) and bound.ndim == 0 else bound for bound in (min, max)]
    match bounds:
        case [0, None]:
            return draft.module("relu", Rectifier(), input)
        case [0, int(ceiling) | float(ceiling)] if ceiling > 0:
            return draft.module("relu", Rectifier(float(ceiling)), input)
    raise draft.call.refuse(f"from {min} to {max} is no activation of spiking neurons", "Clamp from 0, as ReLU does.")


def _hardtanh(
    draft: Draft, input: fx.Node, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> fx.Node:
    return _clamp(draft, input, min_val, max_val)


def _quantise(draft: Draft, module: QCFS, input: fx.Node) -> fx.Node:
    return draft.module("qcfs", copy.deepcopy(module), input)


def _convolution(kind: type[nn.Conv1d] | type[nn.Conv2d]) -> Handler:
    def convolve(
        draft: Draft,
        input: fx.Node,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> fx.Node:
        require_constants(draft, weight, bias)
        outputs, inputs, *kernel = weight.shape
        around = 0 if isinstance(padding, str) else padding
        with torch.device("meta"):
            layer = kind(inputs * groups, outputs, tuple(kernel), stride, around, dilation, groups)  # type: ignore[arg-type]
        if padding == "same":
            input = _padded_same(draft, input, layer)
        return draft.module("conv", _with_weights(layer, weight, bias), input)

    return convolve


def _padded_same(draft: Draft, input: fx.Node, layer: nn.Conv1d | nn.Conv2d) -> fx.Node:
    """Padding that keeps the size: in the layer, or before it where the two sides differ."""
    totals = [dilation * (kernel - 1) for dilation, kernel in zip(layer.dilation, layer.kernel_size, strict=True)]
    if all(total % 2 == 0 for total in totals):
        layer.padding = tuple(total // 2 for total in totals)
        return input
    sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    channels, *rest = sizes(input)
    wider = tuple(size + total for size, total in zip(rest, totals, strict=True))
    return with_sizes(draft.function("pad", input, sides, "constant"), (channels, *wider))


def _linear(draft: Draft, input: fx.Node, weight: Tensor, bias: Tensor | None = None) -> fx.Node:
    require_constants(draft, weight, bias)
    if weight.ndim != 2:
        raise draft.call.refuse(f"has a weight of shape {list(weight.shape)}", "Use a matrix, as nn.Linear does.")
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    return draft.module("linear", _with_weights(layer, weight, bias), input)


def _matmul(draft: Draft, input: fx.Node | Tensor, other: fx.Node | Tensor) -> fx.Node:
    require_constants(draft, other if isinstance(input, fx.Node) else None)
    if not isinstance(input, fx.Node) or not isinstance(other, Tensor):
        raise draft.call.refuse("multiplies by a constant from the left", "Use nn.Linear, or x @ constant.")
    return _linear(draft, input, other if other.ndim < 2 else other.mT)


def _addmm(draft: Draft, input: Any, mat1: fx.Node | Tensor, mat2: fx.Node | Tensor) -> fx.Node:
    require_constants(draft, input, mat2)
    if not isinstance(mat1, fx.Node) or not isinstance(mat2, Tensor) or input.ndim != 1:
        raise draft.call.refuse("is called in a form that is no linear layer", "Use nn.Linear, or x @ constant + bias.")
    return _linear(draft, mat1, mat2.mT, input)


def _with_weights(layer: nn.Conv1d | nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer that was built without memory, on the meta device, with its own copy of the weights."""
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return layer


def _batch_norm(
    draft: Draft,
    input: fx.Node,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> fx.Node:
    require_constants(draft, running_mean, running_var, weight, bias)
    if training or running_mean is None or running_var is None:
        raise draft.call.refuse(
            "takes its statistics from the batch, so that samples depend on one another",
            "Train with running statistics: track_running_stats=True, which is the default.",
        )
    affine = ChannelAffine(len(running_mean)).to(running_mean)
    scale, shift = scale_and_shift(running_mean, running_var, weight, bias, eps)
    affine.scale.copy_(scale)
    affine.shift.copy_(shift)
    return draft.module("norm", affine, input)


def _pooling(name: str) -> Handler:
    def pool(draft: Draft, input: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        return draft.function(name, input, *args, **kwargs)

    return pool


def _max_pooling(name: str) -> Handler:
    def pool(draft: Draft, input: fx.Node, *args: Any, return_indices: bool = False, **kwargs: Any) -> fx.Node:
        return draft.function(name, input, *args, **kwargs)

    return pool


def _drop(draft: Draft, input: fx.Node, p: float = 0.5, training: bool = True, inplace: bool = False) -> fx.Node:
    if training:
        raise draft.call.refuse(
            "is on in evaluation, too", "Use nn.Dropout, or pass training=self.training, which eval() turns off."
        )
    return input


LAYER_HANDLERS: dict[str, Handler] = {
    "relu": _rectify,
    "relu6": _rectify6,
    "hardtanh": _hardtanh,
    "quantise": _quantise,
    "conv1d": _convolution(nn.Conv1d),
    "conv2d": _convolution(nn.Conv2d),
    "linear": _linear,
    "addmm": _addmm,
    "batch_norm": _batch_norm,
    **called(_clamp, "clamp", "clip", "clamp_min"),
    **called(_matmul, "matmul", "mm"),
    **called(_drop, "dropout", "dropout1d", "dropout2d", "dropout3d"),
    **called(_drop, "alpha_dropout", "feature_dropout", "feature_alpha_dropout"),
    **{name: _pooling(name) for name in FUNCTIONS if "avg_pool" in name},
    **{name: _max_pooling(name) for name in FUNCTIONS if "max_pool" in name},
}
