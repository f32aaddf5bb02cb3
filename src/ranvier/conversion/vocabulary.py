"""What a traced network is made of: few modules, few functions, and their form as json.

Every tensor in such a graph has the samples along its first axis, and no operation mixes samples, so that time can be
folded into that axis. All operations but the sites, max-pooling and shifts by a constant are linear.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ranvier.nn import QCFS


class Rectifier(nn.Module):
    """ReLU, with or without a ceiling: one use of an activation, where spiking neurons will stand.

        y = clamp(x, 0, ceiling)

    Args:
        ceiling: Largest value of y (6 for ReLU6), or None for no bound.

    Shape: any.

    >>> Rectifier(ceiling=1.0)(torch.tensor([-1.0, 0.5, 2.0])).tolist()
    [0.0, 0.5, 1.0]
    """

    def __init__(self, ceiling: float | None = None) -> None:
        super().__init__()
        if ceiling is not None and not ceiling > 0:
            raise ValueError(f"ceiling is {ceiling}, but must be greater than 0, or None for no bound.")
        self.ceiling = ceiling

    def forward(self, x: Tensor) -> Tensor:
        """Rectify `x`."""
        return x.clamp(0, self.ceiling)

    def extra_repr(self) -> str:
        """Settings, as printed."""
        return "" if self.ceiling is None else f"ceiling={self.ceiling}"


class ChannelAffine(nn.Module):
    """Scale and shift of each channel: a batch normalisation in evaluation that no layer before it can absorb.

        y[:, c] = scale[c] x[:, c] + shift[c]

    Args:
        num_channels: C.

    Shape: `[B, C, ...]`.

    >>> affine = ChannelAffine(2)
    >>> _ = affine.shift.copy_(torch.tensor([0.0, 3.0]))
    >>> affine(torch.ones(1, 2)).tolist()
    [[1.0, 4.0]]
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_channels), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(num_channels), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift `x`."""
        sizes = (-1,) + (1,) * (x.ndim - 2)
        return x * self.scale.view(sizes) + self.shift.view(sizes)

    def extra_repr(self) -> str:
        """Settings, as printed."""
        return str(len(self.scale))


SITES = (Rectifier, QCFS)
"""Activations, one module for each use: where neurons will stand."""

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
"""Layers with weights."""


def reshape_samples(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Bring each sample to the shape `sizes`: `y = x.reshape(B, *sizes)`.

    >>> reshape_samples(torch.zeros(5, 2, 3), [6]).shape
    torch.Size([5, 6])
    """
    return x.reshape(x.shape[0], *sizes)


def slice_axis(x: Tensor, axis: int, start: int | None, stop: int | None, step: int | None) -> Tensor:
    """Part of `x` along one axis that is not the first, as in `x[:, start:stop:step]`.

    >>> slice_axis(torch.arange(6).view(1, 6), 1, 0, None, 2).tolist()
    [[0, 2, 4]]
    """
    return x[(slice(None),) * axis + (slice(start, stop, step),)]


def sum_axes(x: Tensor, axes: Sequence[int], keepdim: bool) -> Tensor:
    """Sum over axes that are not the first."""
    return x.sum(list(axes), keepdim=keepdim)


def mean_axes(x: Tensor, axes: Sequence[int], keepdim: bool) -> Tensor:
    """Mean over axes that are not the first."""
    return x.mean(list(axes), keepdim=keepdim)


def max_pool_of_sums(x: Tensor, name: str, *args: Any, **kwargs: Any) -> Tensor:
    """The max-pooling `name` of `FUNCTIONS`. Over time it pools running sums: `ranvier.dynamics.max_pool_of_sums`."""
    return FUNCTIONS[name](x, *args, **kwargs)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "adaptive_avg_pool1d": F.adaptive_avg_pool1d,
    "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "adaptive_max_pool1d": F.adaptive_max_pool1d,
    "adaptive_max_pool2d": F.adaptive_max_pool2d,
    "add": operator.add,
    "avg_pool1d": F.avg_pool1d,
    "avg_pool2d": F.avg_pool2d,
    "cat": torch.cat,
    "channel_shuffle": F.channel_shuffle,
    "interpolate": F.interpolate,
    "max_pool1d": F.max_pool1d,
    "max_pool2d": F.max_pool2d,
    "max_pool_of_sums": max_pool_of_sums,
    "mean_axes": mean_axes,
    "mul": operator.mul,
    "pad": F.pad,
    "permute": torch.permute,
    "pixel_shuffle": F.pixel_shuffle,
    "pixel_unshuffle": F.pixel_unshuffle,
    "reshape_samples": reshape_samples,
    "slice_axis": slice_axis,
    "sum_axes": sum_axes,
}
"""Functions by name. `add` and `mul` take a number or constant as second argument, `add` also a second activation."""

MAX_POOLS = tuple(FUNCTIONS[name] for name in FUNCTIONS if "max_pool" in name)
"""The functions that are not linear."""

REARRANGEMENTS = (
    F.channel_shuffle,
    F.pad,
    F.pixel_shuffle,
    F.pixel_unshuffle,
    torch.permute,
    reshape_samples,
    slice_axis,
)
"""Functions each of whose results is a value that came, or 0. Padding with other constants has a keyword, `value`."""


def is_site(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether a node of `module` is an activation."""
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), SITES)


def makes_current(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether a node of `module` has weights for its input, a layer or a `ChannelAffine`."""
    weighted = (*LAYERS, ChannelAffine)
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), weighted)


def is_rearrangement(node: fx.Node) -> bool:
    """Whether a node only moves values: an activation before it could as well come after it."""
    return node.op == "call_function" and node.target in REARRANGEMENTS and "value" not in node.kwargs


class ModuleKind(NamedTuple):
    """How a module is written and built again: `build(**arguments(module))` has the shapes of `module`."""

    build: Callable[..., nn.Module]
    arguments: Callable[[Any], dict[str, Any]]


def _convolution_arguments(layer: nn.Conv1d | nn.Conv2d) -> dict[str, Any]:
    return {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": layer.kernel_size,
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
        "bias": layer.bias is not None,
    }


def _linear_arguments(layer: nn.Linear) -> dict[str, Any]:
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
    }


MODULES: dict[str, ModuleKind] = {
    "ChannelAffine": ModuleKind(ChannelAffine, lambda module: {"num_channels": len(module.scale)}),
    "Conv1d": ModuleKind(nn.Conv1d, _convolution_arguments),
    "Conv2d": ModuleKind(nn.Conv2d, _convolution_arguments),
    "Linear": ModuleKind(nn.Linear, _linear_arguments),
    "QCFS": ModuleKind(QCFS, lambda module: {"levels": module.levels}),
    "Rectifier": ModuleKind(Rectifier, lambda module: {"ceiling": module.ceiling}),
}
"""Modules by class name."""


def to_json(
    module: fx.GraphModule,
    modules: Mapping[str, ModuleKind] = MODULES,
    functions: Mapping[str, Callable[..., Any]] = FUNCTIONS,
) -> dict[str, Any]:
    """Structure of a traced network, without its tensors: `state_dict()` holds those.

    Args:
        module: Made of nothing but `modules`, `functions`, constants, one input and one output.
        modules: Module classes by name; one that is not here cannot be written.
        functions: Functions by name, likewise.

    Returns:
        In json's own types, `nodes` in order (name, op, target, args, kwargs; a reference to a node is
        `{"node": name}`), `modules` (class and constructor arguments by path) and `constants` (shapes by path).

    Raises:
        ValueError: A node or module that is not in the vocabulary.
    """
    names = {function: name for name, function in functions.items()}
    content: dict[str, Any] = {"nodes": [], "modules": {}, "constants": {}}
    for node in module.graph.nodes:
        target = str(node.target)
        if node.op == "call_module":
            content["modules"][target] = _module_to_json(target, module.get_submodule(target), modules)
        elif node.op == "call_function":
            if node.target not in names:
                raise ValueError(f"node {node.name} calls {node.target}, which is not one of {', '.join(functions)}.")
            target = names[node.target]
        elif node.op == "get_attr":
            content["constants"][target] = list(module.get_buffer(target).shape)
        elif node.op not in ("placeholder", "output"):
            raise ValueError(f"node {node.name} is a {node.op}, which a traced network does not have.")
        content["nodes"].append(
            {
                "name": node.name,
                "op": node.op,
                "target": target,
                "args": _to_plain(node.args),
                "kwargs": _to_plain(node.kwargs),
            }
        )
    return content


def from_json(
    content: Mapping[str, Any],
    modules: Mapping[str, ModuleKind] = MODULES,
    functions: Mapping[str, Callable[..., Any]] = FUNCTIONS,
) -> fx.GraphModule:
    """Build what `to_json` wrote; its tensors are to be loaded: `load_state_dict(...)`.

    Raises:
        ValueError: The content names a module, function or kind of node that is not known here.
    """
    parts: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):  # initial weights are overwritten: do not use up the caller's randomness
        for path, entry in content["modules"].items():
            kind = _known(modules, entry["class"], f"module {path} is a")
            parts[path] = kind.build(**entry["arguments"])
    for path, sizes in content["constants"].items():
        parts[path] = torch.zeros(sizes)
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in content["nodes"]:
        name, op, target = entry["name"], entry["op"], entry["target"]
        if op == "call_function":
            target = _known(functions, target, f"node {name} calls")
        elif op not in ("placeholder", "call_module", "get_attr", "output"):
            raise ValueError(f"node {name} is a {op}: the file was written by another version of ranvier.")
        args = tuple(_from_plain(entry["args"], nodes))
        nodes[name] = graph.create_node(op, target, args, _from_plain(entry["kwargs"], nodes), name=name)
    return fx.GraphModule(parts, graph).requires_grad_(False)


def _module_to_json(path: str, module: nn.Module, modules: Mapping[str, ModuleKind]) -> dict[str, Any]:
    name = type(module).__name__
    if name not in modules:
        raise ValueError(f"module {path} is a {name}, which is not one of {', '.join(modules)}.")
    return {"class": name, "arguments": _to_plain(modules[name].arguments(module))}


def _known(entries: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in entries:
        raise ValueError(
            f"{what} {name!r}, which is not one of {', '.join(entries)}. "
            "The file was written by another version of ranvier: load it with that one."
        )
    return entries[name]


def _to_plain(value: Any) -> Any:
    """Arguments of a node in json's types."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple | list):
        return [_to_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"an argument is {value!r}, a {type(value).__name__}, which json cannot say.")


def _from_plain(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """Inverse of `_to_plain`, where `{"node": name}` stands for a node; keyword arguments never have that one key."""
    if isinstance(value, list):
        return [_from_plain(item, nodes) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"node"}:
            return nodes[value["node"]]
        return {key: _from_plain(item, nodes) for key, item in value.items()}
    return value
