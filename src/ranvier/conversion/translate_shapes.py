"""Translations of what moves values without changing them: reshaping, permuting, joining, cutting, padding, resizing.

Shapes were recorded, so that no handler needs to work out what -1, a chunk or a squeeze comes to.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ranvier.conversion.draft import Draft, Handler, called, mixes_samples, sample_axis, sizes, with_sizes


def _same(draft: Draft, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    return x


def _reshape(draft: Draft, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    return _reshaped(draft, x, draft.call.results[0].shape[1:])


def _reshaped(draft: Draft, x: fx.Node, new_sizes: Sequence[int]) -> fx.Node:
    if sizes(x) == tuple(new_sizes):
        return x
    return with_sizes(draft.function("reshape_samples", x, list(new_sizes)), tuple(new_sizes))


def _expand(draft: Draft, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    if draft.call.results[0].shape[1:] != sizes(x):
        raise draft.call.refuse("repeats values", "Let arithmetic broadcast, or use torch.cat.")
    return x


def _permute(draft: Draft, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    # An empty tensor with another length along each axis shows where each goes.
    probe = torch.empty(list(range(len(sizes(x)) + 1)), device="meta")
    axes = list(draft.call.function(probe, *args, **kwargs).shape)
    if axes[0] != 0:
        raise mixes_samples(draft.call)
    return draft.function("permute", x, axes)


def _concatenate(draft: Draft, tensors: Sequence[fx.Node | Tensor], dim: int = 0) -> fx.Node:
    nodes = _all_data(draft, tensors)
    return draft.function("cat", nodes, sample_axis(draft, nodes[0], dim))


def _stack(draft: Draft, tensors: Sequence[fx.Node | Tensor], dim: int = 0) -> fx.Node:
    nodes = _all_data(draft, tensors)
    axis = sample_axis(draft, nodes[0], dim, added=1)
    new_sizes = list(sizes(nodes[0]))
    new_sizes.insert(axis - 1, 1)
    return draft.function("cat", [_reshaped(draft, node, new_sizes) for node in nodes], axis)


def _all_data(draft: Draft, tensors: Sequence[fx.Node | Tensor]) -> list[fx.Node]:
    nodes = [tensor for tensor in tensors if isinstance(tensor, fx.Node)]
    if len(nodes) < len(tensors):
        raise draft.call.refuse(
            "joins data with a constant", "To add zeros, for example to channels, use torch.nn.functional.pad."
        )
    return nodes


def _split(draft: Draft, x: fx.Node, *args: Any, dim: int | None = None, **kwargs: Any) -> list[fx.Node]:
    if dim is None:
        dim = args[1] if len(args) > 1 else 0
    axis = sample_axis(draft, x, dim)
    pieces, start = [], 0
    for result in draft.call.results:
        stop = start + result.shape[axis]
        pieces.append(draft.function("slice_axis", x, axis, start, stop, 1))
        start = stop
    return pieces


def _unbind(draft: Draft, x: fx.Node, dim: int = 0) -> list[fx.Node]:
    axis = sample_axis(draft, x, dim)
    return [_select(draft, x, axis, index) for index in range(sizes(x)[axis - 1])]


def _select(draft: Draft, x: fx.Node, dim: int, index: int) -> fx.Node:
    axis = sample_axis(draft, x, dim)
    rest = list(sizes(x))
    index %= rest.pop(axis - 1)
    return _reshaped(draft, _sliced(draft, x, axis, slice(index, index + 1)), rest)


def _narrow(draft: Draft, x: fx.Node, dim: int, start: int, length: int) -> fx.Node:
    return _sliced(draft, x, sample_axis(draft, x, dim), slice(start, start + length))


def _sliced(draft: Draft, x: fx.Node, axis: int, part: slice) -> fx.Node:
    """`x[..., part, ...]` at an axis, written with a start and an end."""
    new_sizes = list(sizes(x))
    start, stop, step = part.indices(new_sizes[axis - 1])
    if (start, stop, step) == (0, new_sizes[axis - 1], 1):
        return x
    new_sizes[axis - 1] = len(range(start, stop, step))
    return with_sizes(draft.function("slice_axis", x, axis, start, stop, step), tuple(new_sizes))


def _index(draft: Draft, x: fx.Node, key: Any) -> fx.Node:
    """Slices axis by axis; single indices as slices of one; then the recorded shape settles which axes go or come."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if not all(item is None or item is ... or type(item) in (int, slice) for item in keys):
        raise draft.call.refuse("picks by a list or tensor of indices", "Use slices and single indices.")
    if ... in keys:
        place = keys.index(...)
        num_axes = len(sizes(x)) + 1
        keys[place : place + 1] = [slice(None)] * (
            num_axes - sum(item is not None and item is not ... for item in keys)
        )
    samples, *keys = keys
    if samples not in (slice(None), slice(0, None), slice(None, None, 1), slice(0, None, 1)):
        raise mixes_samples(draft.call)
    for axis, item in enumerate((item for item in keys if item is not None), start=1):
        if isinstance(item, int):
            index = item % sizes(x)[axis - 1]
            item = slice(index, index + 1)
        x = _sliced(draft, x, axis, item)
    return _reshape(draft, x)


def _pad(
    draft: Draft, input: fx.Node, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> fx.Node:
    return draft.function("pad", input, list(pad), mode, **({"value": value} if value else {}))


def _as_it_is(name: str) -> Handler:
    def call(draft: Draft, input: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        return draft.function(name, input, *args, **kwargs)

    return call


SHAPE_HANDLERS: dict[str, Handler] = {
    "pad": _pad,
    "stack": _stack,
    "unbind": _unbind,
    "select": _select,
    "narrow": _narrow,
    "__getitem__": _index,
    **called(_reshape, "reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"),
    **called(_permute, "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "mT", "T", "t"),
    **called(_concatenate, "cat", "concat", "concatenate"),
    **called(_split, "chunk", "split", "split_with_sizes", "tensor_split"),
    **called(_expand, "expand", "expand_as"),
    **{name: _as_it_is(name) for name in ("interpolate", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle")},
    **called(_same, "contiguous", "detach", "clone", "alias", "data"),
    # The identity where they are translated at all, since a change of data type is refused before.
    **called(_same, "to", "type_as", "cpu", "cuda", "float", "double", "half", "bfloat16", "long", "int"),
}
