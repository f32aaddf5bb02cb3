"""Batch normalisation in evaluation is a scale and shift of each channel, which the layer before it can absorb."""

import torch
from torch import Tensor, fx, nn

from ranvier.conversion.draft import sizes
from ranvier.conversion.vocabulary import LAYERS, ChannelAffine


def scale_and_shift(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Batch normalisation with running statistics as a scale and shift of each channel.

        weight (x - mean) / sqrt(variance + eps) + bias = scale x + shift
        scale = weight / sqrt(variance + eps),    shift = bias - mean scale

    Args:
        mean: Running mean, `[C]`.
        variance: Running variance, `[C]`.
        weight: `[C]`, or None for 1.
        bias: `[C]`, or None for 0.
        eps: Added to the variance.

    Returns:
        Scale and shift, `[C]` each, in the data type of `mean`; computed in float64.
    """
    scale = (variance.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    return scale.to(mean.dtype), shift.to(mean.dtype)


def absorb(layer: nn.Conv1d | nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor) -> None:
    """Change a layer so that it scales and shifts its output channels.

        scale (W x + b) + shift = (scale W) x + (scale b + shift)

    Output channels are the first axis of the weight, in grouped convolutions, too. Computed in float64.

    Args:
        layer: Its weight and bias are replaced; it has a bias afterwards.
        scale: `[C_out]`.
        shift: `[C_out]`.
    """
    weight = layer.weight.double() * scale.double().view(-1, *(1,) * (layer.weight.ndim - 1))
    bias = shift.double() if layer.bias is None else layer.bias.double() * scale.double() + shift.double()
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)


@torch.no_grad()
def fold_batchnorm(module: fx.GraphModule) -> None:
    """Let convolutions and linear layers absorb the `ChannelAffine` that follows them.

    One stays where it follows no layer, or where something else uses the output of the layer, too.

    Args:
        module: From `translate`; changed in place.
    """
    for node in list(module.graph.nodes):
        affine = _module_of(node, module)
        if not isinstance(affine, ChannelAffine):
            continue
        (source,) = node.all_input_nodes
        layer = _module_of(source, module)
        if isinstance(layer, LAYERS) and len(source.users) == 1 and _channels_first(source, layer):
            absorb(layer, affine.scale, affine.shift)
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    module.recompile()


def _module_of(node: fx.Node, module: fx.GraphModule) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _channels_first(node: fx.Node, layer: nn.Module) -> bool:
    """Whether the layer's outputs are the channels, axis 1: those of a linear layer on `[B, N, K]` are not."""
    return not isinstance(layer, nn.Linear) or len(sizes(node)) == 1
