"""A traced network in which neurons send nothing but spikes: what a spike is worth moves into the weights after it.

What a neuron transmits, and every sum, average or rearrangement of it, is written as

    value = sum_k worth_k x_k

with spike trains x_k and constants worth_k, one per channel. Linear layers absorb the constants,
W value = sum_k (W diag(worth_k)) x_k, so that each part gets a copy of the layer for itself.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ranvier.conversion.draft import free_path, sizes
from ranvier.conversion.recording import ConversionError
from ranvier.conversion.vocabulary import (
    FUNCTIONS,
    LAYERS,
    MAX_POOLS,
    ChannelAffine,
    is_rearrangement,
    is_site,
    slice_axis,
)


@dataclass(frozen=True)
class Part:
    """One summand: a node of the graph, and what its values are worth, broadcastable to a sample; None for 1."""

    node: fx.Node
    worth: Tensor | None = None


@dataclass(frozen=True)
class Weighted:
    """A sum of parts. `nested`: spikes worth 1, then bursts that are among them; nothing was scaled, or added."""

    parts: tuple[Part, ...]
    nested: bool = False


Emission = Sequence[Tensor | None]
"""What the spikes of a neuron are worth, `[C]`; of a pair first those of the first neurons. None for 1."""


def weigh_spikes(graph: fx.GraphModule, emissions: Mapping[str, Emission]) -> fx.GraphModule:
    """Move what spikes are worth into the layers after the neurons.

    Args:
        graph: One step of a network, from `trace_network`. Not modified.
        emissions: By name of a `Rectifier`: one entry for a neuron whose spikes are worth that much, two for a pair,
            whose output has twice the channels. Neurons without an entry send spikes worth 1.

    Returns:
        The same network for neurons that send 0 and 1, with as many copies of each layer as its input has parts; they
        are named after it, `body.3`, `body.3_1`. Only where a value meets something that is not linear, or a constant,
        is it summed up first.

    Raises:
        ConversionError: Max-pooling of what cannot be pooled part by part.
    """
    return _Rewriting(graph, emissions).run()


class _Rewriting:
    def __init__(self, source: fx.GraphModule, emissions: Mapping[str, Emission]) -> None:
        self.source = source
        self.emissions = emissions
        self.graph = fx.Graph()
        self.parts: dict[str, nn.Module | Tensor] = {}
        self.values: dict[fx.Node, Weighted] = {}
        self.sums: dict[fx.Node, fx.Node] = {}
        self.one = next(source.parameters(), torch.ones(())).new_ones(())
        # Names of the old graph stay free for the same things in the new one.
        self.taken = {str(node.target) for node in source.graph.nodes if node.op in ("call_module", "get_attr")}
        self.node: fx.Node

    def run(self) -> fx.GraphModule:
        for node in self.source.graph.nodes:
            self.node = node
            value = self._rewritten(node)
            if value is not None:
                self.values[node] = value
        module = fx.GraphModule(self.parts, self.graph).eval().requires_grad_(False)
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
        return module

    def _rewritten(self, node: fx.Node) -> Weighted | None:
        if node.op == "placeholder":
            return Weighted((Part(self._placed(self.graph.placeholder(str(node.target)))),))
        if node.op == "get_attr":
            self.parts[str(node.target)] = self._constant(node).clone()
            return Weighted((Part(self._placed(self.graph.create_node("get_attr", str(node.target)))),))
        if node.op == "output":
            self.graph.output(self._sum(node.all_input_nodes[0]))
            return None
        if is_site(node, self.source):
            return self._spikes(node)
        if node.op == "call_module":
            layer = self.source.get_submodule(str(node.target))
            return self._layer(node, layer) if isinstance(layer, LAYERS) else self._affine(node, layer)
        handler = _HANDLERS.get(node.target)
        if handler is None and is_rearrangement(node):
            handler = _Rewriting._moved
        value = handler(self, node) if handler is not None else None
        return value or self._plain(node)

    # What neurons send

    def _spikes(self, node: fx.Node) -> Weighted:
        name = str(node.target)
        self.parts[name] = copy.deepcopy(self.source.get_submodule(name))
        sent = self._placed(self.graph.call_module(name, (self._sum(node.all_input_nodes[0]),)))
        emission = self.emissions.get(name, (None,))
        shape = (-1,) + (1,) * (len(sizes(node)) - 1)
        worths = [None if worth is None else worth.detach().view(shape) for worth in emission]
        if len(worths) == 1:
            return Weighted((Part(sent, worths[0]),))
        channels = sizes(node)[0]
        sent.meta["sizes"] = (len(worths) * channels, *sizes(node)[1:])
        slices = [
            self._placed(self.graph.call_function(slice_axis, (sent, 1, k * channels, (k + 1) * channels, 1)))
            for k in range(len(worths))
        ]
        return Weighted(tuple(map(Part, slices, worths)), nested=True)

    # What layers do with them

    def _layer(self, node: fx.Node, layer: nn.Module) -> Weighted:
        assert isinstance(layer, LAYERS)
        summands: list[fx.Node] = []
        axis = len(sizes(node.all_input_nodes[0])) - 1 if isinstance(layer, nn.Linear) else 0
        for part in self._with_worth_along(node.all_input_nodes[0], axis):
            own = copy.deepcopy(layer)
            if part.worth is not None:
                own.weight = nn.Parameter(_weighted(layer, part.worth.flatten()), requires_grad=False)
            if summands:
                own.bias = None  # it enters once
            path = str(node.target) if not summands else free_path(str(node.target), self.taken | set(self.parts))
            self.parts[path] = own
            summands.append(self._placed(self.graph.call_module(path, (part.node,))))
        return Weighted((Part(self._added(summands)),))

    def _affine(self, node: fx.Node, affine: nn.Module) -> Weighted:
        assert isinstance(affine, ChannelAffine)
        source = node.all_input_nodes[0]
        scale = affine.scale.view(-1, *(1,) * (len(sizes(node)) - 1))
        if not affine.shift.any():
            return Weighted(tuple(Part(part.node, _times(part.worth, scale)) for part in self.values[source].parts))
        self.parts[str(node.target)] = copy.deepcopy(affine)
        return Weighted((Part(self._placed(self.graph.call_module(str(node.target), (self._sum(source),)))),))

    # What functions do with them

    def _plain(self, node: fx.Node) -> Weighted:
        """The node on values that are summed up first."""
        arguments = {source: self._sum(source) for source in node.all_input_nodes}
        return Weighted((Part(self._placed(self.graph.node_copy(node, arguments.__getitem__))),))

    def _each(self, node: fx.Node, value: Weighted, worths: Sequence[Tensor | None], nested: bool = False) -> Weighted:
        """The node on each part, whose worth becomes one of `worths`."""
        copies = [self._placed(self.graph.node_copy(node, _always(part.node))) for part in value.parts]
        return Weighted(tuple(map(Part, copies, worths)), nested)

    def _moved(self, node: fx.Node) -> Weighted:
        """Values that only move: what they are worth moves with them."""
        value = self.values[node.all_input_nodes[0]]
        sample = sizes(node.all_input_nodes[0])

        def moved(worth: Tensor | None) -> Tensor | None:
            if worth is None or (node.target is F.pad and _constant_where_padded(worth, node.args[1])):
                return worth  # zeros are worth as little times anything
            full = worth.expand(1, *sample)

            def constant(_: fx.Node) -> Any:
                return full

            args, kwargs = fx.map_arg((node.args, node.kwargs), constant)
            result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
            return _narrowed(result[0])

        return self._each(node, value, [moved(part.worth) for part in value.parts], value.nested)

    def _pooled(self, node: fx.Node) -> Weighted | None:
        """Averages over positions, at all of which a channel's values are worth the same."""
        value = self.values[node.all_input_nodes[0]]
        if any(part.worth is not None and part.worth.numel() != part.worth.shape[0] for part in value.parts):
            return None
        return self._each(node, value, [part.worth for part in value.parts])

    def _reduced(self, node: fx.Node) -> Weighted | None:
        """Sums and means over axes along which a value's worth does not change."""
        value = self.values[node.all_input_nodes[0]]
        source, axes, keepdim = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(axes, list | tuple)
        dims = [int(axis) % (len(sizes(source)) + 1) - 1 for axis in axes]  # type: ignore[arg-type]
        if any(part.worth is not None and part.worth.shape[dim] != 1 for part in value.parts for dim in dims):
            return None
        worths = []
        for part in value.parts:
            worth = part.worth
            if worth is not None and not keepdim:
                worth = worth.squeeze(dims)
            worths.append(worth)
        return self._each(node, value, worths)

    def _joined(self, node: fx.Node) -> Weighted:
        """Concatenation: first parts side by side, then second parts, with zeros for values that have none."""
        joined, axis = node.args
        assert isinstance(joined, list | tuple)
        assert isinstance(axis, int)
        sources = [source for source in joined if isinstance(source, fx.Node)]
        values = [self.values[source] for source in sources]
        ranks = zip_longest(*(value.parts for value in values))
        nested = all(value.nested or (len(value.parts) == 1 and value.parts[0].worth is None) for value in values)
        return Weighted(tuple(self._beside(sources, parts, axis) for parts in ranks), nested)

    def _beside(self, sources: Sequence[fx.Node], parts: Sequence[Part | None], axis: int) -> Part:
        """Parts of `sources` side by side; zeros, worth 0, in the place of None."""
        present = [part for part in parts if part is not None]
        worth = None
        if len(present) < len(parts) or any(part.worth is not None for part in present):
            worths = [self._worth(part).expand(sizes(source)) for part, source in zip(parts, sources, strict=True)]
            worth = _narrowed(torch.cat(worths, axis - 1))
        if len(present) == len(parts):
            return Part(
                self._placed(self.graph.call_function(torch.cat, ([part.node for part in present], axis))), worth
            )
        widths = [sizes(source)[axis - 1] for source in sources]
        behind = [0, 0] * (len(sizes(sources[0])) - axis)
        wide = [
            self._placed(
                self.graph.call_function(F.pad, (part.node, [*behind, sum(widths[:place]), sum(widths[place + 1 :])]))
            )
            for place, part in enumerate(parts)
            if part is not None
        ]
        return Part(self._added(wide), worth)

    def _worth(self, part: Part | None) -> Tensor:
        if part is None:
            return self.one * 0
        return self.one if part.worth is None else part.worth

    def _plus(self, node: fx.Node) -> Weighted | None:
        if len(node.all_input_nodes) < 2 and any(not isinstance(argument, fx.Node) for argument in node.args):
            return None  # a number
        sources = [argument for argument in node.args if isinstance(argument, fx.Node)]
        if any(source.op == "get_attr" for source in sources):
            return None
        if sizes(sources[0]) != sizes(sources[1]):
            return None
        parts = [part for source in sources for part in self.values[source].parts]
        plain = [part.node for part in parts if part.worth is None]
        weighted = [part for part in parts if part.worth is not None]
        return Weighted((*((Part(self._added(plain)),) if plain else ()), *weighted))

    def _scaled(self, node: fx.Node) -> Weighted | None:
        source, factor = node.args
        assert isinstance(source, fx.Node)
        if sizes(node) != sizes(source):
            return None  # the constant repeats values
        constant = self._constant(factor) if isinstance(factor, fx.Node) else self.one * float(factor)  # type: ignore[arg-type]
        worth = constant[(None,) * (1 + len(sizes(node)) - constant.ndim)][0]  # with the axes that broadcasting adds
        return Weighted(tuple(Part(part.node, _times(part.worth, worth)) for part in self.values[source].parts))

    def _maximum(self, node: fx.Node) -> Weighted | None:
        """Max-pooling of spikes; of bursts part by part, where a burst is worth no less than a spike."""
        value = self.values[node.all_input_nodes[0]]
        worths = [part.worth for part in value.parts]
        given = [worth for worth in worths if worth is not None]
        alike = all(worth.numel() == worth.shape[0] for worth in given)
        lowest = min((float(worth.min()) for worth in given), default=1.0)
        if alike and lowest >= 0 and (value.nested or len(worths) == 1):
            return self._each(node, value, worths, value.nested)
        if len(worths) == 1:
            return None
        if not value.nested:
            why = "takes the maximum of what bursts were combined to, which is not the combination of their maxima"
        elif lowest < 0:
            why = f"takes the maximum of bursts of strength {1 + lowest:.3g}, less than a spike's 1"
        else:
            why = "takes the maximum over bursts of different strengths"
        raise ConversionError(
            f"{node.meta['place']}: {node.name} {why}: max-pooling does not commute with decoupling there. Use average "
            "pooling, or keep burst strengths at or above 1 and pool right after the neuron."
        )

    # Sums

    def _with_worth_along(self, source: fx.Node, axis: int) -> Sequence[Part]:
        """The parts if what they are worth depends on nothing but `axis`, else their sum as one."""
        parts = self.values[source].parts
        if any(part.worth is not None and part.worth.numel() != part.worth.shape[axis] for part in parts):
            return (Part(self._sum(source)),)
        return parts

    def _sum(self, source: fx.Node) -> fx.Node:
        """One node for the value of `source`, the same for all who ask."""
        if source not in self.sums:
            self.sums[source] = self._added([self._product(part, source) for part in self.values[source].parts], source)
        return self.sums[source]

    def _product(self, part: Part, of: fx.Node) -> fx.Node:
        if part.worth is None:
            return part.node
        path = free_path("worth", self.taken | set(self.parts))
        self.parts[path] = part.worth.unsqueeze(0).clone()
        constant = self._placed(self.graph.create_node("get_attr", path), of)
        return self._placed(self.graph.call_function(FUNCTIONS["mul"], (part.node, constant)), of)

    def _added(self, nodes: Sequence[fx.Node], of: fx.Node | None = None) -> fx.Node:
        total, *others = nodes
        for other in others:
            total = self._placed(self.graph.call_function(FUNCTIONS["add"], (total, other)), of)
        return total

    def _constant(self, node: fx.Node) -> Tensor:
        return self.source.get_buffer(str(node.target))

    def _placed(self, node: fx.Node, of: fx.Node | None = None) -> fx.Node:
        """The node with what is known of the old one that it comes from: by default the present one."""
        node.meta = dict((self.node if of is None else of).meta)
        return node


_HANDLERS: dict[Any, Callable[[_Rewriting, fx.Node], Weighted | None]] = {
    FUNCTIONS["add"]: _Rewriting._plus,
    FUNCTIONS["mul"]: _Rewriting._scaled,
    FUNCTIONS["cat"]: _Rewriting._joined,
    FUNCTIONS["mean_axes"]: _Rewriting._reduced,
    FUNCTIONS["sum_axes"]: _Rewriting._reduced,
    **{FUNCTIONS[name]: _Rewriting._pooled for name in FUNCTIONS if "avg_pool" in name or name == "interpolate"},
    **dict.fromkeys(MAX_POOLS, _Rewriting._maximum),
}


def _weighted(layer: nn.Module, worth: Tensor) -> Tensor:
    """`W diag(worth)`: the weights of a layer times what its inputs are worth, `[C_in]` or `[1]`."""
    assert isinstance(layer, LAYERS)
    weight = layer.weight.double()
    if isinstance(layer, nn.Linear):
        return (weight * worth.double()).to(layer.weight.dtype)
    # Of a grouped convolution the outputs of group g see the inputs of group g, in order.
    per_group = worth.double().expand(layer.in_channels).view(layer.groups, 1, -1)
    grouped = per_group.expand(-1, layer.out_channels // layer.groups, -1).reshape(weight.shape[:2])
    return (weight * grouped.view(*weight.shape[:2], *(1,) * (weight.ndim - 2))).to(layer.weight.dtype)


def _always(node: fx.Node) -> Callable[[fx.Node], fx.Node]:
    return lambda _: node


def _times(worth: Tensor | None, factor: Tensor) -> Tensor:
    return factor.clone() if worth is None else worth * factor


def _constant_where_padded(worth: Tensor, padding: Any) -> bool:
    """Whether what values are worth does not change along the last axes, which `torch.nn.functional.pad` lengthens."""
    return all(size == 1 for size in worth.shape[worth.ndim - len(padding) // 2 :])


def _narrowed(worth: Tensor) -> Tensor:
    """The same values with size 1 along each axis on which they do not depend."""
    for axis in range(worth.ndim):
        first = worth.narrow(axis, 0, 1)
        if bool((worth == first).all()):
            worth = first
    return worth
