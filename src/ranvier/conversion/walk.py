"""An ANN and its spiking network run side by side, layer by layer."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from ranvier.conversion.spiking import ConvertedSNN
from ranvier.conversion.vocabulary import LAYERS
from ranvier.nn import ConvertedIF, unfold_time
from ranvier.nn.structure import Activation

Visit = Callable[[str, ConvertedIF, Tensor, Tensor], Tensor]
"""`visit(name, neuron, current [T, B, ...], activation [B, ...]) -> transmitted [T, B, ...]`."""

VisitLayer = Callable[[str, nn.Module, Tensor, Tensor], None]
"""`visit(name, layer, input [T B, ...], output of the ANN [B, ...])`, called before the layer runs."""


def fire(name: str, neuron: ConvertedIF, current: Tensor, activation: Tensor) -> Tensor:
    """The visit that changes nothing."""
    del name, activation
    sent: Tensor = neuron(current)
    return sent


def walk(
    ann: fx.GraphModule,
    snn: ConvertedSNN,
    images: Tensor,
    steps: int,
    visit: Visit = fire,
    visit_layer: VisitLayer | None = None,
) -> tuple[Tensor, Tensor]:
    """Run both networks on one batch, and let `visit` run each neuron.

    Each layer of either is computed once. When a neuron's turn comes, all layers before it have run with what was
    changed in them, so that a change takes effect at once on everything after it: a calibration of all layers costs one
    pass. Values are dropped after their last use, so that memory holds the currents of one layer and what shortcuts
    keep.

    Args:
        ann: From `trace`.
        snn: From `spiking`, of that very graph.
        images: One batch `[B, ...]`.
        steps: T.
        visit: Called for every neuron in order, with the current that reaches it and the activation of the ANN that it
            stands for; returns what the neuron transmits.
        visit_layer: Called for every layer with weights that spikes reach, with its input in the spiking network and
            its output in the ANN.

    Returns:
        Logits of the ANN `[B, K]` and of the spiking network `[T, B, K]`.
    """
    twins = {node.name: node for node in ann.graph.nodes}
    of_ann: dict[fx.Node, Any] = {}
    of_snn: dict[fx.Node, Any] = {}
    inputs = iter((images, steps, len(images), None))
    varying: set[fx.Node] = set()
    dead_in_ann, dead_in_snn = _last_uses(ann.graph), _last_uses(snn.network.graph)
    for node in snn.network.graph.nodes:
        twin = twins.get(node.meta.get("ann", ""))
        if twin is not None and twin not in of_ann and node.op != "output":
            of_ann[twin] = images if twin.op == "placeholder" else _call(ann, twin, of_ann)
        if node.op == "placeholder":
            of_snn[node] = next(inputs)
        elif node.op == "output":
            assert twin is not None
            return of_ann[twin.all_input_nodes[0]], unfold_time(of_snn[node.all_input_nodes[0]], steps)
        else:
            name = str(node.target)
            module = snn.network.get_submodule(name) if node.op == "call_module" else None
            if isinstance(module, Activation) and isinstance(module.neuron, ConvertedIF):
                assert twin is not None
                of_snn[node] = visit(name, module.neuron, of_snn[node.all_input_nodes[0]], of_ann[twin])
                varying.add(node)
            else:
                if not varying.isdisjoint(node.all_input_nodes):
                    varying.add(node)
                if visit_layer is not None and node in varying and isinstance(module, LAYERS):
                    assert twin is not None
                    visit_layer(name, module, of_snn[node.all_input_nodes[0]], of_ann[twin])
                of_snn[node] = _call(snn.network, node, of_snn)
        for dead in dead_in_snn[node]:
            del of_snn[dead]
        if twin is not None:
            for dead in dead_in_ann[twin]:
                of_ann.pop(dead, None)
    raise AssertionError("a graph ends with its output")


def _call(root: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Value of one node of the vocabulary."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "get_attr":
        return root.get_buffer(str(node.target))
    function = root.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    assert callable(function)
    return function(*args, **kwargs)


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that nobody needs after it."""
    leave: dict[fx.Node, list[fx.Node]] = {node: [] for node in graph.nodes}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for source in (node, *node.all_input_nodes):
            if source not in seen:
                seen.add(source)
                leave[node].append(source)
    return leave
