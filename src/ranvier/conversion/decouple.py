"""From burst neurons to plain spiking ones, without loss."""

from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, fx, nn

from ranvier.conversion.binary_spikes import binary_spikes
from ranvier.conversion.connections import connections
from ranvier.conversion.draft import sizes
from ranvier.conversion.spiking import GraphSNN, spiking
from ranvier.conversion.trace_network import TracedNetwork, trace_network, usual_steps, widened
from ranvier.conversion.vocabulary import LAYERS, is_site
from ranvier.kernels.full_float32 import full_float32
from ranvier.models import SpikingNetwork
from ranvier.nn import LIFB, LIFPair, Neuron
from ranvier.nn.time import steps_of


@dataclass(frozen=True)
class Size:
    """What a network needs on a device with a neuron for each value and a synapse for each connection."""

    neurons: int
    synapses: int
    """Connections: for each output of a layer with weights its inputs; padding is none, as in `count_operations`."""
    weights: int
    """Weights that are stored; a convolution uses each at many places."""


@dataclass(frozen=True)
class Decoupling:
    """What decoupling did to the size of a network, and, if images were given, to its events.

    `rich.print` shows a table.
    """

    before: Size
    after: Size
    layers: tuple[str, ...]
    """Burst layers, by name."""
    events_before: float | None = None
    """Spikes of an image, a burst counted as one; None if no images were given."""
    events_after: float | None = None
    """Spikes of an image afterwards: one more for every burst."""
    steps: int | None = None
    """Steps of those images."""

    def __str__(self) -> str:
        sizes = [
            f"{name} {getattr(self.before, name):,} -> {getattr(self.after, name):,}"
            for name in ("neurons", "synapses", "weights")
        ]
        if self.events_before is not None and self.events_after is not None:
            sizes.append(f"spikes per image {self.events_before:,.0f} -> {self.events_after:,.0f} (T={self.steps})")
        return f"{len(self.layers)} burst layers decoupled: {', '.join(sizes)}"

    def __rich__(self) -> Table:
        """Table for the terminal."""
        table = Table(title=f"Decoupling of {len(self.layers)} burst layers", min_width=60)
        for column in ("", "before", "after", "ratio"):
            table.add_column(column, justify="right" if column else "left")
        for name in ("neurons", "synapses", "weights"):
            table.add_row(name, *_compared(getattr(self.before, name), getattr(self.after, name)))
        if self.events_before is not None and self.events_after is not None:
            events = _compared(round(self.events_before), round(self.events_after))
            table.add_row(f"spikes per image, T={self.steps}", *events)
        return table


class DecoupledSNN(GraphSNN):
    """A network without burst neurons that gives the outputs of the one that it was made from.

    Attributes:
        network: The graph, with `LIFPair` neurons in the place of burst neurons.
        report: Its size before and after.
    """

    def __init__(
        self,
        network: fx.GraphModule,
        frame_dims: tuple[int, ...],
        report: Decoupling,
        image_size: int | tuple[int, int] | None = None,
        *,
        readout_decay: float = 1.0,
    ) -> None:
        super().__init__(network, frame_dims, image_size, readout_decay=readout_decay)
        self.report = report


@full_float32()
@torch.inference_mode(False)
@torch.no_grad()
def decouple(
    model: nn.Module, images: Tensor | None = None, *, steps: int | None = None, free_running: bool = False
) -> DecoupledSNN:
    """Replace every burst neuron by a pair of LIF neurons on one current; the next weights take the burst strengths.

        s = f + (strength - 1) b,    W s = W f + (W diag(strength - 1)) b

    with f the spikes of a LIF neuron, and b those of one of twice the threshold that the first one's spikes reset, too.
    Spikes are the same bit for bit, and outputs but for the order of additions. A converted neuron sends 1 where it
    sent its threshold, which the next weights take; the other neurons stay as they are. Normalisation is folded into
    the layers.

    In float32 another order may carry a current across a threshold that it is within rounding of, after which the
    spikes of that image differ (found: one such current in 10^8 of a ResNet-20). In float64, as in
    `decouple(model.double())`, practically none does.

    Args:
        model: A `Network` of `ranvier.models`, or a graph: what `convert`, `decouple` or `from_nir` made, of which
            `images` are needed. Not modified; evaluation mode is used, whatever its mode. One in half precision gives
            a network in float32.
        images: A batch `[B, ...]`, or a sequence `[T, B, ...]`, to count spikes on; also decides the size of images for
            which neurons are counted, which is 32 x 32 where None is given and the network takes any.
        steps: T to count spikes over; None for the length of a sequence, or that which the network was converted for,
            else 4.
        free_running: Let the second neuron reset at its own spikes alone, as two unconnected neurons would. This is
            *not* the same network for two steps or more: it is there for comparison.

    Returns:
        A network called like `model`, with `.report`.

    Raises:
        ConversionError: The network has no neurons, self-attention, or max-pooling of bursts where their strength is
            below 1, where they differ, or where they were scaled or added to others.
        TypeError: `model` is no network of `ranvier`, or `images` is no floating tensor.
        ValueError: `images` are not such as the model takes, or it takes no images that can be made up.

    Source: Shen et al. 2025 (LIFB), section on decoupling. Differs from it in: the second neuron is reset by the
    first. Without that the two drift apart from the second step on.

    >>> from ranvier.models import mlp
    >>> model = mlp([64, 32, 10], neuron=LIFB)
    >>> pair = decouple(model)
    >>> x = torch.rand(5, 64)
    >>> torch.allclose(pair(x, steps=4), model(x, steps=4), atol=1e-5)
    True
    >>> pair.report.before.neurons, pair.report.after.neurons
    (32, 64)
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    x = frame = None
    if images is not None and isinstance(model, SpikingNetwork):
        constant = isinstance(images, Tensor) and images.ndim in model.frame_dims
        steps = usual_steps(model) if steps is None and constant else steps
        x, steps = steps_of(images, model.frame_dims, steps)
        x, frame = widened(x), x[0]
    traced = trace_network(model, frame)
    bursts = tuple(name for name, neuron in traced.neurons.items() if isinstance(neuron, LIFB))
    after = binary_spikes(traced, free_running=free_running)
    counts: dict[str, Any] = {}
    if x is not None:
        # Of coupled pairs the first neurons fire as burst neurons do, of which those of strength 0 show no burst.
        pairs = binary_spikes(traced)
        counts = {
            "events_before": _events(pairs.to_snn(), x, steps, bursts=False),
            "events_after": _events(after.to_snn(), x, steps),
            "steps": steps,
        }
    report = Decoupling(size_of(traced), size_of(after), bursts, **counts)
    graph = spiking(after.graph, after.neurons)
    return DecoupledSNN(graph, traced.frame_dims, report, traced.image_size, readout_decay=traced.readout_decay)


def size_of(traced: TracedNetwork) -> Size:
    """Neurons, synapses and weights of a traced network."""
    neurons = synapses = weights = 0
    for node in traced.graph.graph.nodes:
        if is_site(node, traced.graph):
            neurons += torch.Size(sizes(node)).numel()
        elif node.op == "call_module":
            layer = traced.graph.get_submodule(str(node.target))
            if isinstance(layer, LAYERS):
                weights += layer.weight.numel()
                synapses += connections(layer, sizes(node.all_input_nodes[0]))
    return Size(neurons, synapses, weights)


def _events(snn: GraphSNN, x: Tensor, steps: int | None, *, bursts: bool = True) -> float:
    """Spikes of an image of `[1, B, ...]` or `[T, B, ...]` over all; `bursts`: also those of pairs' second neurons."""
    counts: list[Tensor] = []

    def count(neuron: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(neuron, LIFPair) and not bursts:
            output = output.chunk(2, 2)[0]
        assert isinstance(neuron, Neuron)
        counts.append((output != 0).sum() * neuron.fires)

    handles = [neuron.register_forward_hook(count) for neuron in snn.sites.values()]
    try:
        snn(x if len(x) == steps else x[0], steps)
    finally:
        for handle in handles:
            handle.remove()
    return int(torch.stack(counts).sum()) / x.shape[1]


def _compared(before: int, after: int) -> tuple[str, str, str]:
    return f"{before:,}", f"{after:,}", f"{after / max(before, 1):.2f}"
