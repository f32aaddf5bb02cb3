"""Convolutions whose weights are brought once into the order that a kernel reads."""

from typing import Any

import torch
from torch import Tensor, nn

from ranvier.kernels import native_event_convolution
from ranvier.kernels.convolution import convolve, fits, passes_of, prefers_events
from ranvier.kernels.derived import Derived
from ranvier.kernels.native_convolution import Geometry
from ranvier.kernels.native_convolved_scan import Filters

MOST_SIZES = 4
"""Sizes of input for which weights are kept; with more of them they are forgotten, and packed again."""


def packs(dtype: torch.dtype) -> bool:
    """Whether this CPU, with this build of torch, has convolutions on packed weights of this type."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


class Prepacked(nn.Module):
    """A convolution on a CPU whose weights were brought once into the order that its kernel reads.

    Called directly, the kernel brings them into that order in every call. oneDNN has one for each size of images, and
    for few of them others than for many: weights in the order of another size take up to forty times as long (AVX2).
    So they are kept for the last sizes that came. On another device the layer itself runs, and
    spikes in float32 take the matrix unit, see `ranvier.kernels.convolution`, where there is one.

    With AVX2, an input in float32 that is mostly zero is read by `ranvier.kernels.native_event_convolution`, which
    passes over what is. The first input with anything in it decides that, once: the ways round differently, and an
    answer must not depend on what else is in its batch, nor on how many steps come at once.

    Attributes:
        reads_events: Whether it was decided so; None until then.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.reads_events: bool | None = None
        self._packed: dict[tuple[int, ...], Derived[Tensor]] = {}
        self._packed_for_events = Derived[Tensor]()
        self._filters = Derived[Filters]()

    def filters(self) -> Filters | None:
        """What the neurons behind it can be one kernel with; None where they cannot."""
        layer = self.layer
        if layer.weight.dtype != torch.bfloat16 or layer.groups != 1 or layer.weight.device.type != "cpu":
            return None
        learned = (layer.weight,) if layer.bias is None else (layer.weight, layer.bias)
        return self._filters(learned, lambda: Filters.of(layer.weight, layer.bias))

    @property
    def geometry(self) -> Geometry:
        """How it moves over an image."""
        layer = self.layer
        assert not isinstance(layer.padding, str)
        return Geometry(layer.stride, layer.padding, layer.dilation)

    @property
    def shape(self) -> torch.Size:
        """`[O, C, kernel height, kernel width]`."""
        return self.layer.weight.shape

    def _for(self, size: tuple[int, ...]) -> Derived[Tensor]:
        """Where the weights for inputs of this size are kept."""
        found = self._packed.get(size)
        if found is None:
            kept = self._packed if len(self._packed) < MOST_SIZES else {}
            found = Derived[Tensor]()
            self._packed = {**kept, size: found}
        return found

    def _from_spikes(self, x: Tensor) -> Tensor | None:
        """The output where a kernel for spikes, or for what is mostly zero, runs here and pays; else None."""
        layer = self.layer
        if self.reads_events is not False:
            x = x.contiguous(memory_format=torch.channels_last)
        if not fits(x, layer.weight, layer.bias, layer.dilation, layer.groups):
            return None
        where = list(layer.stride), [int(size) for size in layer.padding]
        if passes_of(x, layer.weight, layer.bias, *where, learned=False).output:
            return convolve(x, layer.weight, layer.bias, *where, learned=False)
        if self.reads_events is None:
            self.reads_events = prefers_events(x, layer.weight, *where)
        if not self.reads_events or not native_event_convolution.pays(x, layer.weight, *where):
            return None
        packed = self._packed_for_events((layer.weight,), lambda: native_event_convolution.pack(layer.weight))
        return native_event_convolution.forward(x, layer.weight, layer.bias, *where, most=1.0, packed=packed)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to `[N, O, H', W']`."""
        layer = self.layer
        x = x.to(layer.weight.dtype)
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() == 0 or not packs(layer.weight.dtype):
            y: Tensor = layer(x)
            return y
        if x.dtype == torch.float32:
            found = self._from_spikes(x)
            if found is not None:
                return found
        settings: Any = (layer.padding, layer.stride, layer.dilation, layer.groups)
        # How many images there are changes the order as well, but only where they are few; tried with 1 to 128.
        like = min(1 << (len(x) - 1).bit_length(), 8), *x.shape[1:]
        packed = self._for((*like, torch.get_num_threads()))
        weight = packed(
            (layer.weight,),
            lambda: torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
                layer.weight.to_mkldnn(), *settings, list(like)
            ),
        )
        return torch.ops.mkldnn._convolution_pointwise(x, weight, layer.bias, *settings, "none", [], "")
