"""Spikes as bytes in a graph of layers and neurons: `ranvier.export.byte_spikes` for what `ranvier.conversion` makes.

A converted neuron sends its threshold. As a byte it sends 1, and the threshold moves into the weights that are rounded:

    W (threshold s) = (W diag(threshold)) s
"""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ranvier.conversion.spiking import GraphSNN
from ranvier.export.byte_spikes import SPIKING, ByteConv2d, BytePool2d, Bytes, Numbers, takes_bytes
from ranvier.export.lean_neurons import Lean, LeanConvertedIF
from ranvier.nn.hooks import is_hooked
from ranvier.nn.structure import Activation

POOLS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.max_pool2d: (nn.MaxPool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")),
    F.avg_pool2d: (
        nn.AvgPool2d,
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
}
"""Functions that take bytes: the modules that do the same, and their arguments after the input."""


def use_bytes_in_graph(snn: GraphSNN, numbers: torch.dtype = torch.bfloat16) -> int:
    """Let spikes run through a graph as bytes, and give the convolutions that they reach int8 weights, in place.

    Bytes come from `IF`, `LIF`, `PLIF` and converted neurons without negative spikes. They pass max-pooling and, as
    sums, average-pooling without padding. A convolution with zero padding turns them into currents again; whatever else
    they reach gets them as numbers.

    Args:
        snn: In float32, with lean neurons.
        numbers: Of currents, and where bytes become numbers: bfloat16 or float32.

    Returns:
        How many convolutions have int8 weights now.
    """
    graph = snn.network
    uses = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_module")
    sent: dict[fx.Node, Bytes] = {}
    given: dict[fx.Node, fx.Node] = {}
    for node in list(graph.graph.nodes):
        came = next((sent[source] for source in node.all_input_nodes if source in sent), None)
        if node.op == "call_module" and isinstance(site := graph.get_submodule(str(node.target)), Activation):
            leaves = _start(site) if uses[str(node.target)] == 1 else None
            if leaves is not None:
                sent.update(dict.fromkeys(node.users, leaves))  # `fold_time`, which follows every neuron of a graph
        elif came is not None:
            layer = _layer(graph, node, uses)
            if layer is None or not takes_bytes(layer, came):
                _give_numbers(graph, node, sent, given)
            elif isinstance(layer, nn.Conv2d):
                graph.set_submodule(str(node.target), ByteConv2d(layer, came))
            else:
                sent[node] = _pool(graph, node, layer).leaves(came)
    graph.graph.lint()
    graph.recompile()
    for part in graph.modules():
        if isinstance(part, ByteConv2d | Numbers):
            part.numbers = numbers
    return sum(isinstance(part, ByteConv2d) for part in graph.modules())


def _start(site: Activation) -> Bytes | None:
    """Have a neuron send bytes from now on, and what they stand for; None where it cannot."""
    neuron = site.neuron
    if is_hooked(site) or is_hooked(neuron):
        return None
    if type(neuron) in SPIKING:
        worth = None
    elif type(neuron) is LeanConvertedIF and not neuron.signed:
        worth = None if neuron.binary else neuron.threshold.detach().float().clone()
        neuron.binary = True
    else:
        return None
    assert isinstance(neuron, Lean)
    neuron.sends_bytes = True
    return Bytes(worth=worth)


def _layer(graph: fx.GraphModule, node: fx.Node, uses: Counter[str]) -> nn.Module | None:
    """The layer that a node runs, or what is the same as its function; None where bytes cannot pass it."""
    if node.op == "call_module":
        return graph.get_submodule(str(node.target)) if uses[str(node.target)] == 1 else None
    if node.op != "call_function" or node.target not in POOLS:
        return None
    pool, names = POOLS[node.target]
    return pool(**dict(zip(names, node.args[1:], strict=False)), **node.kwargs)


def _pool(graph: fx.GraphModule, node: fx.Node, layer: nn.Module) -> BytePool2d:
    """Have a node pool bytes."""
    assert isinstance(layer, nn.MaxPool2d | nn.AvgPool2d)
    pool = BytePool2d(layer)
    (source,) = node.all_input_nodes
    target = _added(graph, f"{node.name}_of_bytes", pool)
    node.op, node.target, node.args, node.kwargs = "call_module", target, (source,), {}
    return pool


def _give_numbers(
    graph: fx.GraphModule, node: fx.Node, sent: dict[fx.Node, Bytes], given: dict[fx.Node, fx.Node]
) -> None:
    """Let a node have ordinary numbers where it would get bytes."""
    for source in node.all_input_nodes:
        if source not in sent:
            continue
        if source not in given:
            target = _added(graph, f"{source.name}_numbers", Numbers(sent[source]))
            with graph.graph.inserting_after(source):
                given[source] = graph.graph.call_module(target, (source,))
        node.replace_input_with(source, given[source])


def _added(graph: fx.GraphModule, name: str, part: nn.Module) -> str:
    """The name under which a graph has a new part: this one, or the next that no layer of the network has."""
    while hasattr(graph, name):
        name += "_"
    graph.add_submodule(name, part)
    return name
