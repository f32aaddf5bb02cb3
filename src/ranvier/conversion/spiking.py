"""The spiking network of a traced ANN: the same layers, with a neuron in place of each activation."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, fx, nn

from ranvier.conversion.vocabulary import FUNCTIONS, MODULES, ModuleKind
from ranvier.dynamics import ConvertedState
from ranvier.nn import Carry, ConvertedIF, fold_time, repeat, unfold_time
from ranvier.nn.structure import Activation
from ranvier.nn.time import steps_of

if TYPE_CHECKING:
    from ranvier.conversion.account import Account


def hold(x: Tensor, steps: int, batch: int) -> Tensor:
    """Give `x` its time axis, `[T, B, ...]`: unfolded where it varies, else the same at every step, without copying."""
    return unfold_time(x, steps) if len(x) == steps * batch else repeat(x.unsqueeze(0), steps)


def _neuron_arguments(site: Activation) -> dict[str, Any]:
    neuron = site.neuron
    assert isinstance(neuron, ConvertedIF)
    per_neuron = neuron.v_init.ndim > 1
    return {
        "num_channels": len(neuron.threshold),
        "steps": len(neuron.bias),
        "shape": list(neuron.v_init.shape) if per_neuron else None,
        "signed": neuron.signed,
    }


SPIKING_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **FUNCTIONS,
    "hold": hold,
    "fold_time": fold_time,
    "unfold_time": unfold_time,
}
"""Functions of a spiking graph by name: those of the ANN's, and those that handle time."""

SPIKING_MODULES = {
    **MODULES,
    "Activation": ModuleKind(lambda **arguments: Activation(ConvertedIF(**arguments)), _neuron_arguments),
}
"""Modules of a spiking graph by class name."""


def spiking(ann: fx.GraphModule, channels: Mapping[str, int], *, signed: bool = False) -> fx.GraphModule:
    """The graph of a traced ANN with a neuron for each activation.

    Time is folded into the batch for all layers, which treat samples independently. What lies before the first neuron
    sees only the image, so that a constant image passes it once; its result is held over the steps where it enters a
    neuron, or where it joins what came from one.

    Args:
        ann: From `trace`. Its layers are copied.
        channels: Of each activation, by its name.
        signed: Whether neurons may take spikes back.

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
        elif target in channels and node.op == "call_module":
            source = node.args[0]
            parts[target] = Activation(ConvertedIF(channels[target], signed=signed))
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


class ConvertedSNN(nn.Module):
    """A spiking network made from an ANN.

    Called like any network of `ranvier.models`: constant images `[B, ...]` with `steps`, or a sequence `[T, B, ...]`,
    give logits `[T, B, K]`; the answer after t steps is the mean of the first t.

    Attributes:
        steps: T that it was calibrated for. It may run fewer, and more where no bias depends on the step.
        report: What was chosen, lost and spent, layer by layer.
        network: The graph, with `ConvertedIF` neurons in place of activations.
    """

    def __init__(self, network: fx.GraphModule, steps: int, frame_dims: int, report: "Account | None" = None) -> None:
        super().__init__()
        self.network = network
        self.steps = steps
        self.frame_dims = frame_dims
        self.report = report
        self.eval()

    @property
    def neurons(self) -> dict[str, ConvertedIF]:
        """Neurons by the name of the activation that they replace, in the order in which they run."""
        found: dict[str, ConvertedIF] = {}
        for node in self.network.graph.nodes:
            if node.op == "call_module":
                site = self.network.get_submodule(str(node.target))
                if isinstance(site, Activation) and isinstance(site.neuron, ConvertedIF):
                    found[str(node.target)] = site.neuron
        return found

    @overload
    def forward(
        self,
        images: Tensor,
        steps: int | None = ...,
        *,
        state: Iterable[ConvertedState] | None = ...,
        return_state: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        images: Tensor,
        steps: int | None = ...,
        *,
        state: Iterable[ConvertedState] | None = ...,
        return_state: Literal[True],
    ) -> tuple[Tensor, tuple[ConvertedState, ...]]: ...
    def forward(
        self,
        images: Tensor,
        steps: int | None = None,
        *,
        state: Iterable[ConvertedState] | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[ConvertedState, ...]]:
        """Logits at every time step.

        Args:
            images: A constant input `[B, ...]` as the ANN takes it, or a sequence `[T, B, ...]`.
            steps: T, for a constant input.
            state: Neuron states that an earlier call returned, to stream: T calls of one step give the logits of one
                call of T steps. None starts from the initial potentials.
            return_state: Whether to return the states for the next call.

        Returns:
            Logits `[T, B, K]`; with `return_state` also the state of every neuron, in the order in which they run.

        Raises:
            ValueError: Wrong rank, missing or zero steps, more steps than were calibrated where biases depend on them.
        """
        x, steps = steps_of(images, (self.frame_dims,), steps)
        carry = Carry(state) if return_state or state is not None else None
        logits = unfold_time(self.network(fold_time(x), steps, x.shape[1], carry), steps)
        return (logits, carry.finish()) if carry is not None and return_state else logits
