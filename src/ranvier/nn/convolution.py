"""Layers without memory, of which convolutions run faster where the processor allows it."""

from torch import Tensor, nn

from ranvier.kernels.convolution import convolution, fits
from ranvier.nn.hooks import is_hooked


def run_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`, of an ordinary layer on `[T * B, ...]`.

    A 2-D convolution in bfloat16, or in float32 whose input is spikes or mostly zero, gives what it would give
    otherwise, but for the order of its sums: see `ranvier.kernels.convolution`.
    """
    conv = layer if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not is_hooked(layer) else None
    if conv is not None and all(isinstance(each, tuple) for each in (conv.stride, conv.padding, conv.dilation)):
        stride, padding, dilation = conv.stride, conv.padding, conv.dilation
        if fits(x, conv.weight, conv.bias, dilation, conv.groups):
            return convolution(x, conv.weight, conv.bias, stride, padding)  # type: ignore[arg-type]
    y: Tensor = layer(x)
    return y
