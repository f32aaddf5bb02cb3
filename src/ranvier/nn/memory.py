"""Training with less memory: what a network keeps for backward, in its convolutions and between its layers.

A convolution keeps its input for the gradient of its weights. Where that input is spikes, a bit each says all of it, a
sixteenth of bfloat16; where it is a sum of spikes, as in residual networks that add them, two, four or eight bits do.
What a neuron is given follows from the input of the normalisation before it, and need not be kept (`recompute`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ranvier.kernels.convolution import convolve, differentiate, fits
from ranvier.nn.hooks import is_hooked
from ranvier.nn.neurons import IF, LIF, PLIF
from ranvier.nn.structure import Activation, Chain, Concat, Residual
from ranvier.nn.time import TimeFolded

BYTE = 255
"""Largest count that is kept."""

WORDS = {16: torch.int16, 32: torch.int32, 64: torch.int64}
"""Integers by their number of bits."""

_KEEP_COUNTS = (nn.Identity, nn.MaxPool2d)
"""Layers that hand counts on as counts."""


class PackedConv2d(nn.Conv2d):
    """A convolution of spikes, or of sums of spikes, that keeps them as bits.

    Parameters, output and gradients are those of an `nn.Conv2d` in its place, a `TimeFolded`, bit for bit.
    `pack_spikes` puts it there.

    Attributes:
        largest: Its input holds whole numbers 0 .. `largest`, at most 255; 1 for spikes.
    """

    largest: int

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():
            if fits(input, weight, bias, self.dilation, self.groups):
                padding = [int(size) for size in self.padding]
                return convolve(input, weight, bias, list(self.stride), padding, learned=False)
            return super()._conv_forward(input, weight, bias)
        if torch.is_autocast_enabled(input.device.type):  # what autocast does to a convolution
            dtype = torch.get_autocast_dtype(input.device.type)
            input = input.to(dtype)
            if not fits(input, weight, bias, self.dilation, self.groups):
                weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        output: Tensor = _PackedConvolution.apply(
            input, weight, bias, self.largest, self.stride, self.padding, self.dilation, self.groups
        )
        return output


class _PackedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spikes: Tensor, weight: Tensor, bias: Tensor | None, largest: int, *settings: Any) -> Tensor:
        ctx.save_for_backward(weight, pack(spikes, largest))
        ctx.largest, ctx.dtype, ctx.settings = largest, spikes.dtype, settings
        ctx.bias_sizes = None if bias is None else [len(bias)]
        ctx.channels_last = spikes.is_contiguous(memory_format=torch.channels_last)
        stride, padding, dilation, groups = settings
        ctx.fits = fits(spikes, weight, bias, dilation, groups)
        if ctx.fits:
            return convolve(spikes, weight, bias, list(stride), list(padding), learned=True)
        return torch.conv2d(spikes, weight, bias, *settings)

    @staticmethod
    @once_differentiable  # what is unpacked has no history: no gradient of gradients
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, packed = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        spikes = unpack(packed, weight.shape[1] * groups, ctx.largest, ctx.dtype)
        if not ctx.channels_last:
            spikes = spikes.contiguous()  # sums are taken in another order on other memory
        needed = [*ctx.needs_input_grad[:2], ctx.bias_sizes is not None]
        if ctx.fits:
            return *differentiate(grad, spikes, weight, list(stride), list(padding), needed), *[None] * 5
        grads = torch.ops.aten.convolution_backward(
            grad, spikes, weight, ctx.bias_sizes, stride, padding, dilation, False, [0, 0], groups, needed
        )
        return *grads, *[None] * 5


def bits_of(largest: int) -> int:
    """How many bits a whole number 0 .. `largest` is kept in: 1, 2, 4 or 8."""
    return next(bits for bits in (1, 2, 4, 8) if largest < 1 << bits)


def pack(spikes: Tensor, largest: int) -> Tensor:
    """Keep whole numbers 0 .. `largest` in few bits.

    Args:
        spikes: `[N, C, H, W]`.
        largest: 1 .. 255.

    Returns:
        uint8, `[N, H, W, ceil(C / n)]`: a byte holds n = 8, 4, 2 or 1 channels, the first of them in its lowest bits.

    >>> pack(torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 0, 1]).view(1, 9, 1, 1), largest=1).flatten().tolist()
    [5, 1]
    >>> pack(torch.tensor([3.0, 0, 1, 2, 2]).view(1, 5, 1, 1), largest=3).flatten().tolist()
    [147, 2]
    """
    bits = bits_of(largest)
    together = 8 // bits
    last = spikes.permute(0, 2, 3, 1)
    spare = -last.shape[-1] % together
    counts = (nn.functional.pad(last, (0, spare)) if spare else last).to(torch.uint8)
    if together == 1:
        return counts
    # As one word, the first channel in its lowest byte, all of them are moved together by one multiplication: channel i
    # goes to place i of the highest byte, which no other product reaches.
    width = 8 * together
    gather = sum(1 << width - 8 - (8 - bits) * channel for channel in range(together))
    words = counts.flatten().view(WORDS[width]) * gather
    return (
        words.view(torch.uint8)[together - 1 :: together].clone().view(*counts.shape[:-1], counts.shape[-1] // together)
    )


def unpack(packed: Tensor, channels: int, largest: int, dtype: torch.dtype) -> Tensor:
    """What `pack` was given, `[N, channels, H, W]` of `dtype`, in channels-last memory.

    >>> unpack(torch.tensor([5, 1], dtype=torch.uint8).view(1, 1, 1, 2), 9, 1, torch.float32).flatten().tolist()
    [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    """
    bits = bits_of(largest)
    if bits == 8:
        return packed.to(dtype).permute(0, 3, 1, 2)
    byte = torch.arange(256, dtype=torch.uint8, device=packed.device).unsqueeze(-1)
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    meaning = ((byte >> places) & (1 << bits) - 1).to(dtype)
    counts = nn.functional.embedding(packed.int(), meaning).flatten(-2)
    return counts[..., :channels].contiguous().permute(0, 3, 1, 2)


def pack_spikes(network: nn.Module) -> list[str]:
    """Let the convolutions of a network keep their spikes packed, in place.

    Found are convolutions on the output of IF, LIF and PLIF neurons, on sums of such outputs, and on max-pooled ones.
    What follows other neurons, average pooling or normalisation is analog, and stays as it was.

    Args:
        network: Built from the blocks of `ranvier.nn.structure`. Parameters and their names stay what they are.

    Returns:
        Names of the convolutions that keep bits.

    >>> from ranvier.models import sew_resnet18
    >>> len(pack_spikes(sew_resnet18()))  # all but the first
    19
    """
    uses: dict[int, list[int | None]] = {}
    _walk_outermost(network, uses)
    names = []
    for name, module in network.named_modules():
        largest = [one for one in uses.get(id(module), [None]) if one is not None]
        if not isinstance(module, nn.Conv2d) or len(largest) < len(uses.get(id(module), [None])):
            continue  # analog at one of its places at least
        plain = type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        if plain and max(largest) <= BYTE and not is_hooked(module):
            module.__class__ = PackedConv2d
            module.largest = max(largest)  # type: ignore[assignment]  # it is one now
            names.append(name)
    return names


def keep_plainly(network: nn.Module) -> None:
    """Undo `pack_spikes` and `recompute_norms`, in place."""
    for module in network.modules():
        if type(module) is PackedConv2d:
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
            del module.largest
        elif isinstance(module, Chain):
            module.recompute = False


def recompute_norms(network: nn.Module) -> int:
    """Let a network keep the input of each normalisation, and not what the neuron behind it is given, in place.

    Backward normalises again. Outputs, gradients and running averages stay the same, bit for bit; without effect while
    the network is compiled.

    Args:
        network: Built from the blocks of `ranvier.nn.structure`.

    Returns:
        Number of chains of layers in which it is so.

    >>> from ranvier.models import sew_resnet18
    >>> recompute_norms(sew_resnet18()) > 0
    True
    """
    chains = [module for module in network.modules() if isinstance(module, Chain)]
    for chain in chains:
        chain.recompute = True
    return len(chains)


def _walk_outermost(module: nn.Module, uses: dict[int, list[int | None]]) -> None:
    """Note for every convolution what it is given: of what stands outside of chains nothing is known."""
    if isinstance(module, Chain):
        _walk(module, None, uses)
        return
    if isinstance(module, nn.Conv2d):
        uses.setdefault(id(module), []).append(None)
    for child in module.children():
        _walk_outermost(child, uses)


def _walk(module: nn.Module, largest: int | None, uses: dict[int, list[int | None]]) -> int | None:
    """Largest whole number that `module` sends if it is sent `largest` at most; None is analog."""
    if is_hooked(module):
        largest = None
    sent = _walk_inside(module, largest, uses)
    return None if is_hooked(module) else sent


def _walk_inside(module: nn.Module, largest: int | None, uses: dict[int, list[int | None]]) -> int | None:
    if isinstance(module, nn.Conv2d):
        uses.setdefault(id(module), []).append(largest)
        return None
    if type(module) is Activation:
        return 1 if type(module.neuron) in (IF, LIF, PLIF) and not is_hooked(module.neuron) else None
    if type(module) in (Chain, nn.Sequential, TimeFolded):
        layers = module.layers if isinstance(module, Chain) else module
        for layer in layers._modules.values():  # those that are there twice, too
            assert layer is not None
            largest = _walk(layer, largest, uses)
        return largest
    if type(module) is Residual:
        ways = _walk(module.branch, largest, uses), _walk(module.shortcut, largest, uses)
        return None if None in ways else sum(ways)  # type: ignore[arg-type]
    if type(module) is Concat:
        sides = [_walk(branch, largest, uses) for branch in module.branches]
        return None if None in sides else max(sides)  # type: ignore[type-var]
    if type(module) in _KEEP_COUNTS:
        return largest
    for child in module.children():
        _walk_outermost(child, uses)
    return None
