"""`ranvier.export.convolved_neurons` for what `ranvier.conversion` makes: a graph of layers, neurons and sums."""

import operator
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ranvier.conversion.spiking import GraphSNN
from ranvier.export.convolved_neurons import ConvolvedNeurons, can_be_one, current_of
from ranvier.nn import Carry, unfold_time
from ranvier.nn.hooks import is_hooked
from ranvier.nn.structure import Activation


def use_convolved_scans_in_graph(snn: GraphSNN) -> None:
    """Let neurons of a graph and the convolution that they alone read be one kernel, in place.

        s = neuron(conv(x)),        s = neuron(conv(x) + shortcut)

    Layers keep their places and names: the activation is given the convolution, and runs it. Where one is hooked, and
    where a compiler or gradients watch, they run one after the other, see `ranvier.export.convolved_chain`. It takes a
    matrix unit (AMX); elsewhere nothing changes.

    Args:
        snn: Made ready otherwise, with lean neurons.
    """
    graph = snn.network
    uses = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_module")
    for node in list(graph.graph.nodes):
        found = _found(graph, node, uses)
        if found is None:
            continue
        site: Any = graph.get_submodule(str(node.target))
        graph.set_submodule(str(node.target), ConvolvedActivation(site.neuron))
        with graph.graph.inserting_before(node):
            conv = graph.graph.get_attr(str(found.conv.target))
        current, carry = node.args
        node.args = (conv, *found.conv.args, current.args[1], carry, found.joined)
        for gone in (current, *found.sums, found.conv):
            graph.graph.erase_node(gone)
    graph.graph.lint()
    graph.recompile()


class _Found(NamedTuple):
    """A convolution before neurons, and what stands between."""

    conv: fx.Node
    sums: tuple[fx.Node, ...] = ()
    joined: fx.Node | None = None


def _found(graph: fx.GraphModule, node: fx.Node, uses: Counter[str]) -> _Found | None:
    """The convolution that may become one with the neurons of a node; None where there is none, or these are none."""

    def part(each: Any) -> Any:
        """The module of a node that nothing else uses, and nobody watches."""
        if not isinstance(each, fx.Node) or each.op != "call_module" or uses[str(each.target)] != 1:
            return None
        module = graph.get_submodule(str(each.target))
        return None if is_hooked(module) else module

    def is_convolution(each: Any) -> bool:
        return can_be_one(part(each), site.neuron) and len(each.users) == 1

    site = part(node)
    if type(site) is not Activation:
        return None
    current: Any = node.args[0]
    if current.target is not unfold_time or len(current.users) != 1:  # the same current at every step
        return None
    source = current.args[0]
    if is_convolution(source):
        return _Found(source)
    if source.target is not operator.add or len(source.users) != 1:
        return None
    for conv, joined in (source.args, source.args[::-1]):
        # Constants have no time; and what is added to itself stands in both places.
        if is_convolution(conv) and isinstance(joined, fx.Node) and joined.op != "get_attr" and joined is not conv:
            return _Found(conv, (source,), joined)
    return None


class ConvolvedActivation(Activation):
    """Neurons of a graph that run the convolution before them, too."""

    _known: ConvolvedNeurons | None = None

    def forward(  # type: ignore[override]
        self, conv: nn.Module, x: Tensor, steps: int, carry: Carry | None = None, joined: Tensor | None = None
    ) -> Tensor:
        """Map `[T B, C, H, W]` to spikes `[T, B, O, H', W']`; neurons get `joined`, `[T B, O, H', W']`, besides."""
        x, joined = unfold_time(x, steps), None if joined is None else unfold_time(joined, steps)
        both = None if torch.compiler.is_compiling() else self._both(conv)
        filters = None if both is None else both.filters_for(x)
        if both is None or filters is None:
            return super().forward(current_of(conv, x, joined), carry)
        return both.run(x, filters, carry, joined=joined)

    def _both(self, conv: nn.Module) -> ConvolvedNeurons | None:
        known = self._known
        if known is None or known.conv is not conv or known.neuron is not self.neuron:
            fits = can_be_one(conv, self.neuron)  # either may have been replaced
            known = self._known = ConvolvedNeurons(conv, self.neuron) if fits else None
        return known

    def __getstate__(self) -> dict[str, Any]:
        """Without what a copy finds again."""
        return {name: value for name, value in vars(self).items() if name != "_known"}
