"""One step of a network that is a graph over time already."""

import copy
from typing import Any

import torch
from torch import Tensor, fx

from ranvier.conversion.spiking import GraphSNN, hold, pool_sums
from ranvier.conversion.vocabulary import Rectifier, max_pool_of_sums
from ranvier.nn import LIFPair, Neuron, fold_time, unfold_time
from ranvier.nn.structure import Activation

_TIME = (fold_time, unfold_time, hold)


def one_step(snn: GraphSNN, images: Tensor) -> tuple[fx.GraphModule, dict[str, Neuron]]:
    """The graph on `[B, ...]` that `spiking` made `snn` from, and copies of its neurons by name.

    Args:
        snn: A converted or decoupled network.
        images: Examples `[B, ...]`, for the shapes of all values.
    """
    graph = fx.Graph()
    parts: dict[str, Any] = {}
    neurons: dict[str, Neuron] = {}
    new: dict[fx.Node, fx.Node] = {}
    for node in snn.network.graph.nodes:
        target = str(node.target)
        if node.op == "placeholder":
            if not new:  # the others are steps, batch and carry
                new[node] = graph.placeholder("images")
            continue
        if node.op == "call_function" and node.target in _TIME:
            new[node] = new[node.args[0]]
            continue
        if node.target is pool_sums:
            source, _, _, *settings = node.args
            new[node] = graph.call_function(max_pool_of_sums, (new[source], *settings), dict(node.kwargs))
            continue
        if node.op == "call_module":
            part = snn.network.get_submodule(target)
            if isinstance(part, Activation):
                assert isinstance(part.neuron, Neuron)
                neurons[target] = copy.deepcopy(part.neuron).eval().requires_grad_(False)
                parts[target] = Rectifier()
                new[node] = graph.call_module(target, (new[node.args[0]],))
                continue
            parts[target] = copy.deepcopy(part)
        elif node.op == "get_attr":
            parts[target] = snn.network.get_buffer(target).clone()
        new[node] = graph.node_copy(node, new.__getitem__)
    step = fx.GraphModule(parts, graph).eval().requires_grad_(False)
    _Shapes(step, neurons).run(images[:1])
    for node in step.graph.nodes:
        node.meta["place"] = node.name
    return step, neurons


class _Shapes(fx.Interpreter):
    """Notes the shape of one sample of what every node computes."""

    def __init__(self, step: fx.GraphModule, neurons: dict[str, Neuron]) -> None:
        super().__init__(step)
        self.neurons = neurons

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node; of neurons only the shape is right."""
        result = super().run_node(n)
        if n.op == "call_module" and isinstance(self.neurons.get(str(n.target)), LIFPair):
            result = torch.cat((result, result), 1)
        if isinstance(result, Tensor):
            n.meta["sizes"] = tuple(result.shape[1:])
        return result
