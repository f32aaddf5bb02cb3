"""The spiking network of a traced ANN: the same layers, with a neuron in place of each activation."""

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from ranvier import dynamics
from ranvier.checks import check_number
from ranvier.conversion.neuron_card import neuron_from_card, neuron_to_card
from ranvier.conversion.vocabulary import FUNCTIONS, MODULES, ModuleKind, max_pool_of_sums
from ranvier.dynamics import SummedState
from ranvier.models.network import SpikingNetwork
from ranvier.nn import Carry, ConvertedIF, Neuron, fold_time, repeat, unfold_time
from ranvier.nn.structure import Activation

if TYPE_CHECKING:
    from ranvier.conversion.account import Account


def hold(x: Tensor, steps: int, batch: int) -> Tensor:
    """Give `x` its time axis, `[T, B, ...]`: unfolded where it varies, else the same at every step, without copying."""
    return unfold_time(x, steps) if len(x) == steps * batch else repeat(x.unsqueeze(0), steps)


def pool_sums(x: Tensor, steps: int, carry: Carry | None, name: str, *args: Any, **kwargs: Any) -> Tensor:
    """The max-pooling `name` of running sums, on time folded into the batch; its state crosses from call to call."""

    def pool(sums: Tensor) -> Tensor:
        return FUNCTIONS[name](sums, *args, **kwargs)

    def advance(state: SummedState | None) -> tuple[Tensor, SummedState]:
        return dynamics.max_pool_of_sums(unfold_time(x, steps), pool, state)

    return fold_time(advance(None)[0] if carry is None else carry.through(advance))


SPIKING_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **FUNCTIONS,
    "hold": hold,
    "pool_sums": pool_sums,
    "fold_time": fold_time,
    "unfold_time": unfold_time,
}
"""Functions of a spiking graph by name: those of the ANN's, and those that handle time."""

SPIKING_MODULES = {
    **MODULES,
    "Activation": ModuleKind(
        lambda **card: Activation(neuron_from_card(**card)), lambda site: neuron_to_card(site.neuron)
    ),
}
"""Modules of a spiking graph by class name."""


def spiking(ann: fx.GraphModule, neurons: Mapping[str, nn.Module]) -> fx.GraphModule:
    """The graph of a traced ANN with a neuron for each activation.

    Time is folded into the batch for all layers, which treat samples independently. What lies before the first neuron
    sees only the image, so that a constant image passes it once; its result is held over the steps where it enters a
    neuron, or where it joins what came from one.

    Args:
        ann: From `trace`. Its layers are copied.
        neurons: For each activation, by its name.

    Returns:
        A graph `(images [B or T B, ...], steps, batch, carry) -> logits [T B, K]`. A node that stands for one of the
        ANN has that one's name in `meta["ann"]`.
    """
    graph = fx.Graph()
    parts: dict[str, Any] = {}
    new: dict[fx.Node, fx.Node] = {}
    varying: set[fx.Node] = set()
    image, *others = (graph.placeholder(name) for name in ("images", "steps", "batch", "carry"))
    steps, batch, carry = others

    def held(source: fx.Node) -> fx.Node:
        return graph.call_function(hold, (new[source], steps, batch))

    for node in ann.graph.nodes:
        target = str(node.target)
        if node.op == "placeholder":
            new[node] = image
        elif target in neurons and node.op == "call_module":
            source = node.args[0]
            parts[target] = Activation(neurons[target])
            current = graph.call_function(unfold_time, (new[source], steps)) if source in varying else held(source)
            fired = graph.call_module(target, (current, carry))
            fired.meta["ann"] = node.name
            new[node] = graph.call_function(fold_time, (fired,))
            varying.add(node)
        else:
            varies = any(source in varying for source in node.all_input_nodes)
            arguments = {source: new[source] for source in node.all_input_nodes}
            for source in node.all_input_nodes:
                if varies and source not in varying and source.op != "get_attr":
                    arguments[source] = graph.call_function(fold_time, (held(source),))
            if node.target is max_pool_of_sums:
                new[node] = _pooled(graph, node, arguments[node.args[0]], (steps, carry) if varies else None)
            else:
                new[node] = graph.node_copy(node, arguments.__getitem__)
            if varies:
                varying.add(node)
            if node.op == "call_module":
                parts[target] = copy.deepcopy(ann.get_submodule(target))
            elif node.op == "get_attr":
                parts[target] = ann.get_buffer(target).clone()
        if new[node].target is not fold_time:
            new[node].meta["ann"] = node.name
    return fx.GraphModule(parts, graph, "ConvertedGraph")


def _pooled(graph: fx.Graph, node: fx.Node, source: fx.Node, time: tuple[fx.Node, fx.Node] | None) -> fx.Node:
    """The node `max_pool_of_sums` of `source`: over time, or of values that are the same at every step."""
    _, name, *settings = node.args
    if time is None:
        return graph.call_function(FUNCTIONS[str(name)], (source, *settings), dict(node.kwargs))
    return graph.call_function(pool_sums, (source, *time, name, *settings), dict(node.kwargs))


class GraphSNN(SpikingNetwork):
    """A spiking network as a graph of layers, neurons and sums.

    Args:
        network: From `spiking`.
        frame_dims: Ranks that one step of input may have; `(4,)` for `[B, C, H, W]`.
        image_size: Height and width that images must have, or None where it is not known.
        readout_decay: How much of what the readout said is left a step later, see `ranvier.dynamics.leaky_mean`; 1 for
            logits as they come.

    Raises:
        ValueError: `readout_decay` is not between 0 and 1.
    """

    def __init__(
        self,
        network: fx.GraphModule,
        frame_dims: tuple[int, ...],
        image_size: int | tuple[int, int] | None = None,
        *,
        readout_decay: float = 1.0,
    ) -> None:
        super().__init__(frame_dims, image_size)
        self.network = network
        self.readout_decay = readout_decay
        self.eval()

    @property
    def readout_decay(self) -> float:
        """How much of what the readout said is left a step later."""
        return self._readout_decay

    @readout_decay.setter
    def readout_decay(self, decay: float) -> None:
        check_number("readout_decay", decay)
        if not 0 <= decay <= 1:
            raise ValueError(f"readout_decay is {decay}, but must lie between 0 and 1, which is none.")
        self._readout_decay = float(decay)

    @property
    def sites(self) -> dict[str, Neuron]:
        """Neurons by name, in the order in which they run."""
        found: dict[str, Neuron] = {}
        for node in self.network.graph.nodes:
            if node.op == "call_module":
                site = self.network.get_submodule(str(node.target))
                if isinstance(site, Activation) and isinstance(site.neuron, Neuron):
                    found[str(node.target)] = site.neuron
        return found

    def run(self, x: Tensor, steps: int, carry: Carry | None) -> Tensor:
        """The graph, with time folded into the batch."""
        logits = unfold_time(self.network(fold_time(x), steps, x.shape[1], carry), steps)
        if self.readout_decay == 1:
            return logits
        if carry is None:
            return dynamics.leaky_mean(logits, self.readout_decay)[0]
        return carry.through(lambda state: dynamics.leaky_mean(logits, self.readout_decay, state))


class ConvertedSNN(GraphSNN):
    """A spiking network made from an ANN.

    Called like any network of `ranvier.models`: constant images `[B, ...]` with `steps`, or a sequence `[T, B, ...]`,
    give logits `[T, B, K]`; the answer after t steps is the mean of the first t.

    Attributes:
        steps: T that it was calibrated for. It may run fewer, and more where no bias depends on the step; more gain
            little where the readout forgets, whose decay was chosen for T: set `readout_decay` to 1 then.
        report: What was chosen, lost and spent, layer by layer.
        network: The graph, with `ConvertedIF` neurons in place of activations.
    """

    def __init__(
        self,
        network: fx.GraphModule,
        steps: int,
        frame_dims: int,
        report: "Account | None" = None,
        image_size: int | tuple[int, int] | None = None,
        *,
        readout_decay: float = 1.0,
    ) -> None:
        super().__init__(network, (frame_dims,), image_size, readout_decay=readout_decay)
        self.steps = steps
        self.report = report

    @property
    def neurons(self) -> dict[str, ConvertedIF]:
        """Neurons by the name of the activation that they replace, in the order in which they run."""
        return {name: neuron for name, neuron in self.sites.items() if isinstance(neuron, ConvertedIF)}
