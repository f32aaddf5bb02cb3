"""Spikes as bytes and weights as int8, for networks that only run.

A spike is 0 or 1, and what networks make of spikes before the next convolution, sums and poolings, are small whole
numbers. As bytes they are exact, take half the memory of bfloat16, and multiply with int8 weights at twice the rate.
Only the weights are rounded:

    scale[o] = max |W[o]| / 127,    Q[o] = round(W[o] / scale[o])        o: output channel
    y[o]     = scale[o] (Q[o] x) + b[o],    with Q x in whole numbers

Convolutions are those of oneDNN on processors with AVX-512, and `ranvier.kernels.native_byte_convolution` on those with
AVX2.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ranvier.export.lean_neurons import Lean, LeanIF, LeanLIF, LeanPLIF
from ranvier.kernels import native_byte_convolution
from ranvier.kernels.derived import Derived
from ranvier.kernels.native_byte_convolution import LARGEST_BYTE, ByteFilters
from ranvier.kernels.native_convolution import Geometry
from ranvier.kernels.native_convolved_scan import Filters
from ranvier.models import Network
from ranvier.nn import TimeFolded
from ranvier.nn.hooks import is_hooked
from ranvier.nn.structure import Activation, Block, Chain, Concat, Residual

LARGEST_WEIGHT = 127
SPIKING = (LeanIF, LeanLIF, LeanPLIF)
"""Neurons whose output is 0 or 1."""
CONTAINERS = (Chain, Residual, Concat, TimeFolded, nn.Sequential)
"""What only hands on to what it contains."""
KEEPING = (nn.Flatten, nn.Identity, nn.Dropout)
"""Layers that give bytes for bytes, in evaluation."""


class Bytes(NamedTuple):
    """What the bytes at one place of a network stand for: the number times `worth` over `divisor`."""

    divisor: int = 1
    most: int = 1
    """None is above that."""
    worth: Tensor | None = None
    """Of each channel, `[C]` or `[1]`; None for 1."""


SPIKES = Bytes()
"""0 and 1, as they are."""


def use_bytes(network: Network, numbers: torch.dtype = torch.bfloat16) -> int:
    """Let spikes run through a network as bytes, and give the convolutions that they reach int8 weights, in place.

    Bytes come from `IF`, `LIF` and `PLIF`. They pass max-pooling, flattening, sums with others (SEW) and, as sums
    whose divisor the next layer takes over, average-pooling without padding. A convolution with zero padding turns them
    into currents again; whatever else they reach gets them as numbers. The encoder, which sees images, and the readout
    keep their weights.

    Args:
        network: In float32, with lean neurons and its normalisation absorbed.
        numbers: Of currents, and where bytes become numbers: bfloat16 or float32.

    Returns:
        How many convolutions have int8 weights now.

    Raises:
        ValueError: The network uses a layer or a neuron at two places.
    """
    uses = Counter(id(part) for _, part in network.body.named_modules(remove_duplicate=False))
    shared = next((name for name, part in network.body.named_modules() if uses[id(part)] > 1), None)
    if shared is not None:
        raise ValueError(
            f"body.{shared} is used at two places, but int8 needs to know what each layer gets. "
            'Use precision="auto", or give each place a layer of its own.'
        )
    network.body, leaves = _through_block(network.body, None)
    network.body = _as_numbers(network.body, leaves)
    for part in network.modules():
        if isinstance(part, ByteConv2d | Numbers):
            part.numbers = numbers
    return sum(isinstance(part, ByteConv2d) for part in network.modules())


class ByteConv2d(nn.Module):
    """A convolution of bytes with int8 weights: whole numbers inside, currents out.

    On other devices, and where it is compiled, the same whole numbers are convolved in float32.

    Args:
        layer: In float32, padded with zeros.
        came: What its input stands for.

    Attributes:
        numbers: Type of the currents.
    """

    numbers = torch.bfloat16
    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    zero_points: Tensor

    def __init__(self, layer: nn.Conv2d, came: Bytes = SPIKES) -> None:
        super().__init__()
        assert not isinstance(layer.padding, str)
        self.settings = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
        weight = layer.weight.detach().float()
        if came.worth is not None:
            worth = came.worth.expand(layer.in_channels).view(layer.groups, 1, -1, 1, 1)
            weight = (weight.unflatten(0, (layer.groups, -1)) * worth).flatten(0, 1)
        scale = weight.abs().amax((1, 2, 3)).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST_WEIGHT
        rounded = (weight / scale.view(-1, 1, 1, 1)).round().to(torch.int8)
        self.register_buffer("weight", rounded.contiguous(memory_format=torch.channels_last))
        self.register_buffer("scale", scale / came.divisor)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())
        self.register_buffer("zero_points", torch.zeros(len(weight), dtype=torch.int32))
        self.most = came.most
        self._packed = Derived[Tensor]()
        self._byte_filters = Derived[ByteFilters]()
        self._filters = Derived[Filters]()

    def filters(self) -> Filters | None:
        """What the neurons behind it can be one kernel with; None where they cannot."""
        if self.settings[3] != 1 or self.weight.dtype != torch.int8 or self.weight.device.type != "cpu":
            return None
        tensors = (self.weight, self.scale) if self.bias is None else (self.weight, self.scale, self.bias)
        return self._filters(tensors, lambda: Filters.of(self.weight, self.bias, self.scale))

    @property
    def geometry(self) -> Geometry:
        """How it moves over an image."""
        return Geometry(*map(tuple, self.settings[:3]))

    @property
    def shape(self) -> torch.Size:
        """`[O, C, kernel height, kernel width]`."""
        return self.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """Map bytes `[N, C, H, W]` to currents."""
        stride, padding, dilation, groups = self.settings
        scale, bias = self.scale.float(), None if self.bias is None else self.bias.float()  # the network may be cast
        alone = torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() == 0
        kernels = None if alone else byte_kernels()
        if kernels == "native" and native_byte_convolution.fits(self.shape, self.geometry, groups):
            tensors = (self.weight, self.scale) if self.bias is None else (self.weight, self.scale, self.bias)
            filters = self._byte_filters(
                tensors, lambda: ByteFilters.of(self.weight, scale, bias, self.geometry, self.most)
            )
            return native_byte_convolution.convolve(x, filters).to(self.numbers)
        if kernels != "onednn":
            y = nn.functional.conv2d(x.float(), self.weight.float(), None, stride, padding, dilation, groups)
            y = y * scale.view(-1, 1, 1) + (0 if bias is None else bias.view(-1, 1, 1))
            return y.to(self.numbers)
        packed = self._packed(
            (self.weight, self.scale),
            lambda: torch.ops.onednn.qconv_prepack(self.weight, scale, 1.0, 0, *self.settings, None),
        )
        found: Tensor = torch.ops.onednn.qconv_pointwise(
            *(x, 1.0, 0, packed, scale, self.zero_points, bias, *self.settings),
            *(1.0, 0, self.numbers, "none", [None], ""),
        )
        return found

    def extra_repr(self) -> str:
        """Sizes, as printed."""
        outputs, inputs, *kernel = self.weight.shape
        stride, padding, dilation, groups = self.settings
        return f"{inputs * groups}, {outputs}, {kernel}, {stride=}, {padding=}, {dilation=}, {groups=}"


class BytePool2d(nn.Module):
    """Pooling of bytes to bytes: the largest of each window, or their sum, the average times the size of the window.

    Shifted images are added or compared: what torch does on bytes is slow, and fails on images of 128 pixels and more.
    """

    def __init__(self, pool: nn.MaxPool2d | nn.AvgPool2d) -> None:
        super().__init__()
        self.sums = isinstance(pool, nn.AvgPool2d)
        self.window, self.stride, self.padding = map(_pair, (pool.kernel_size, pool.stride, pool.padding))
        self.dilation = _pair(1 if isinstance(pool, nn.AvgPool2d) else pool.dilation)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to what the windows give."""
        (rows, columns), (down, right) = self.window, self.stride
        if self.padding != (0, 0):
            x = nn.functional.pad(x, (self.padding[1],) * 2 + (self.padding[0],) * 2)  # 0 is never the larger
        reach = [(count - 1) * apart for count, apart in zip(self.window, self.dilation, strict=True)]
        height, width = x.shape[2] - reach[0], x.shape[3] - reach[1]
        if height < 1 or width < 1:
            raise ValueError(
                f"an image of {list(x.shape[2:])} pixels, padding included, is smaller than the {rows}x{columns} "
                "window that pools it. Pass larger images."
            )
        found: Tensor | None = None
        for row in range(0, reach[0] + 1, self.dilation[0]):
            for column in range(0, reach[1] + 1, self.dilation[1]):
                part = x[:, :, row : row + height : down, column : column + width : right]
                if found is None:
                    found = part.clone()
                elif self.sums:
                    found += part
                else:
                    torch.maximum(found, part, out=found)
        assert found is not None
        return found

    def leaves(self, came: Bytes) -> Bytes:
        """What leaves it where `came` comes."""
        size = math.prod(self.window) if self.sums else 1
        return came._replace(divisor=came.divisor * size, most=came.most * size)

    def extra_repr(self) -> str:
        """Settings, as printed."""
        settings = ("sums", "window", "stride", "padding", "dilation")
        return ", ".join(f"{name}={getattr(self, name)}" for name in settings)


class Numbers(nn.Module):
    """Bytes as numbers of the type `numbers`."""

    numbers = torch.bfloat16
    worth: Tensor | None

    def __init__(self, came: Bytes) -> None:
        super().__init__()
        self.divisor = came.divisor
        self.register_buffer("worth", came.worth)

    def forward(self, x: Tensor) -> Tensor:
        """Map bytes `[N, C, ...]` to what they stand for."""
        y = x.to(self.numbers)
        if self.worth is not None:
            y = y * self.worth.to(self.numbers).view(-1, *(1,) * (x.ndim - 2))
        return y if self.divisor == 1 else y / self.divisor


@functools.cache
def byte_kernels() -> Literal["onednn", "native"] | None:
    """Whose convolutions of bytes with int8 weights are fast on this CPU and with this torch; None without any."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qconv_pointwise")
    if known and torch.ops.mkldnn._is_mkldnn_bf16_supported():  # AVX-512: on less, it takes forty times as long
        return "onednn"
    return "native" if native_byte_convolution.obstacle() is None else None


def _through(parts: Iterable[nn.Module], came: Bytes | None) -> tuple[list[nn.Module], Bytes | None]:
    """Layers one after the other, ready for what comes to each; and what leaves the last (None: ordinary numbers)."""
    ready: list[nn.Module] = []
    for part in parts:
        if came is not None and not takes_bytes(part, came):
            ready.append(Numbers(came))
            came = None
        part, came = _ready(part, came)
        ready.append(part)
    return ready, came


def takes_bytes(part: nn.Module, came: Bytes) -> bool:
    """Whether bytes may reach a layer, or what is in it, as they are."""
    if is_hooked(part):
        return False
    if type(part) is nn.Conv2d:
        return part.padding_mode == "zeros" and not isinstance(part.padding, str)
    if type(part) is nn.AvgPool2d:
        plain = _pair(part.padding) == (0, 0) and not part.ceil_mode and part.divisor_override is None
        return plain and came.most * math.prod(_pair(part.kernel_size)) <= LARGEST_BYTE
    if type(part) is nn.MaxPool2d:
        return not part.return_indices and not part.ceil_mode
    return type(part) in (*CONTAINERS, *KEEPING)


def _ready(part: nn.Module, came: Bytes | None) -> tuple[nn.Module, Bytes | None]:
    """One part for what comes to it, and what leaves it."""
    if type(part) is Activation:
        neuron = part.neuron
        if type(neuron) not in SPIKING or is_hooked(part) or is_hooked(neuron):
            return part, None
        assert isinstance(neuron, Lean)
        neuron.sends_bytes = True
        return part, SPIKES
    if is_hooked(part):
        return part, None
    if isinstance(part, Residual | Concat) and type(part) in CONTAINERS:
        return part, _meet(part, came)
    if type(part) in CONTAINERS:
        inside: Any = part.layers if isinstance(part, Chain) else part
        ready, leaves = _through(inside, came)
        del inside[:]
        inside.extend(ready)
        return part, leaves
    if came is None:
        return part, None
    if isinstance(part, nn.Conv2d):
        return ByteConv2d(part, came), None
    if isinstance(part, nn.MaxPool2d | nn.AvgPool2d):
        pool = BytePool2d(part)
        return pool, pool.leaves(came)
    return part, came


def _meet(part: Residual | Concat, came: Bytes | None) -> Bytes | None:
    """Branches, each ready for what comes, and what leaves their sum or their concatenation."""
    branches = list(part.branches) if isinstance(part, Concat) else [part.branch, part.shortcut]
    prepared = [_through_block(branch, came) for branch in branches]
    leaving = [leaves for _, leaves in prepared if leaves is not None]
    most = [leaves.most for leaves in leaving]
    together = max(most, default=0) if isinstance(part, Concat) else sum(most)
    alike = len(leaving) == len(branches) and len({leaves.divisor for leaves in leaving}) == 1
    met = Bytes(leaving[0].divisor, together) if alike and together <= LARGEST_BYTE else None
    blocks = [block if met else _as_numbers(block, leaves) for block, leaves in prepared]
    if isinstance(part, Concat):
        part.branches = nn.ModuleList(blocks)
    else:
        part.branch, part.shortcut = blocks
    return met


def _through_block(block: nn.Module, came: Bytes | None) -> tuple[Block, Bytes | None]:
    ready, leaves = _through([block], came)
    only = ready[0]
    return only if len(ready) == 1 and isinstance(only, Block) else Chain(*ready), leaves


def _as_numbers(block: Block, leaves: Bytes | None) -> Block:
    """The block, with ordinary numbers as its output."""
    if leaves is None:
        return block
    if type(block) is not Chain or is_hooked(block):
        return Chain(block, Numbers(leaves))
    block.layers.append(Numbers(leaves))  # so that paths stay as they were
    return block


def _pair(size: int | tuple[int, ...]) -> tuple[int, int]:
    first, second = (size, size) if isinstance(size, int) else size
    return first, second
