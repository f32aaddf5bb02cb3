"""The normalised graph while it is written, call by call."""

import keyword
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from ranvier.conversion.recording import Call, ConversionError
from ranvier.conversion.vocabulary import FUNCTIONS

Handler = Callable[..., fx.Node | list[fx.Node]]
"""Translates calls of a torch function: takes the draft, then the arguments as torch does, but nodes in place of data.

Returns the node of the result, or a list of nodes where the function returns several tensors.
"""


class Draft:
    """A graph of the vocabulary with its modules and constants, and the call that is being translated.

    Parts are named for where they come from: a layer of torch or ranvier by its path, `layer1.0.relu`, a function by
    the path of the module that calls it and its kind, `layer1.0` + `relu`; later uses are numbered, `layer1.0.relu_1`.
    Names that a graph cannot have get `node_` before them: see `usable_name`.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.parts: dict[str, nn.Module | Tensor] = {}
        self.call: Call

    def function(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Call a function of the vocabulary."""
        return self._placed(self.graph.call_function(FUNCTIONS[name], args, kwargs))

    def module(self, kind: str, module: nn.Module, x: fx.Node) -> fx.Node:
        """Call a module, which is to be used nowhere else."""
        path = self._path(kind)
        self.parts[path] = module.requires_grad_(False)
        return self._placed(self.graph.call_module(path, (x,)))

    def constant(self, tensor: Tensor) -> fx.Node | float:
        """A constant as an argument: a number, or a buffer of the graph."""
        if tensor.ndim == 0:
            return float(tensor)
        path = self._path("constant")
        self.parts[path] = tensor.detach().clone(memory_format=torch.contiguous_format)
        return self._placed(self.graph.create_node("get_attr", path))

    def _placed(self, node: fx.Node) -> fx.Node:
        node.meta["place"] = self.call.place
        return node

    def _path(self, kind: str) -> str:
        """A path that no other part has, and with no part above or below it."""
        place = self.call.place
        path = place.path if place.is_layer else f"{place.path}.{kind}".lstrip(".")
        path = ".".join(map(usable_name, path.split(".")))
        if any(path.startswith(f"{other}.") for other in self.parts):
            path = path.replace(".", "_")
        return free_path(path, self.parts)


def usable_name(name: str) -> str:
    """`name`, or `node_name` where a part of a graph cannot be called so: a word of Python, or what every graph has.

    >>> [usable_name(name) for name in ("class", "graph", "conv1", "0")]
    ['node_class', 'node_graph', 'conv1', '0']
    """
    return f"node_{name}" if keyword.iskeyword(name) or hasattr(_empty_graph(), name) else name


@cache
def _empty_graph() -> fx.GraphModule:
    return fx.GraphModule(nn.Module(), fx.Graph())


def free_path(path: str, taken: Collection[str]) -> str:
    """`path`, or the first of `path_1`, `path_2`, ... that is not among the paths `taken`, nor above one of them."""
    candidate, count = path, 0
    while any(f"{other}.".startswith(f"{candidate}.") for other in taken):
        count += 1
        candidate = f"{path}_{count}"
    return candidate


def called(handler: Handler, *names: str) -> dict[str, Handler]:
    """A handler for functions that torch has under several names."""
    return dict.fromkeys(names, handler)


def sizes(node: fx.Node) -> tuple[int, ...]:
    """Shape of one sample of what a node computes."""
    return node.meta["sizes"]


def with_sizes(node: fx.Node, sizes: tuple[int, ...]) -> fx.Node:
    """Note the shape of one sample of what `node` computes."""
    node.meta["sizes"] = sizes
    return node


def sample_axis(draft: Draft, x: fx.Node, axis: int, added: int = 0) -> int:
    """An axis of `x`, counted from the front and not that of the samples; of the result, if that has `added` more."""
    axis %= len(sizes(x)) + 1 + added
    if axis == 0:
        raise mixes_samples(draft.call)
    return axis


def mixes_samples(call: Call) -> ConversionError:
    """The error for a call whose result does not have the samples, each for itself, along the first axis."""
    shapes = ", ".join(str(list(value.shape)) for value in call.results)
    return call.refuse(
        f"does not keep samples apart (result of shape {shapes} for {call.num_samples} samples)",
        "Leave the first axis to the samples in every operation and write no fixed batch size: x.flatten(1), "
        "x.mean((2, 3)), x.reshape(x.shape[0], ...).",
    )
