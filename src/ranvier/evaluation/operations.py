"""What a spiking network computes: spikes, accumulates and multiply-accumulates, layer by layer and step by step."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Group
from rich.table import Table
from torch import Tensor, fx, nn

from ranvier.atomic import write_json
from ranvier.checks import shape_of
from ranvier.conversion.binary_spikes import binary_spikes
from ranvier.conversion.connections import connections, reach
from ranvier.conversion.decouple import DecoupledSNN
from ranvier.conversion.draft import sizes
from ranvier.conversion.spiking import GraphSNN, hold
from ranvier.conversion.trace_network import trace_network, widened
from ranvier.conversion.vocabulary import (
    FUNCTIONS,
    LAYERS,
    MAX_POOLS,
    ChannelAffine,
    is_rearrangement,
    is_site,
    reshape_samples,
    sum_axes,
)
from ranvier.evaluation.mode import device_of
from ranvier.kernels.full_float32 import full_float32
from ranvier.models.network import SpikingNetwork
from ranvier.nn import IF, LIF, LIFB, PLIF, ConvertedIF, LIFPair, Neuron, fold_time, unfold_time
from ranvier.nn.structure import Activation
from ranvier.nn.time import steps_of


@dataclass(frozen=True)
class LayerOperations:
    """Operations of a layer with weights for one image, on average."""

    name: str
    accumulates: tuple[float, ...]
    """At each step: for each spike that arrives, one for each output that it reaches."""
    multiply_accumulates: tuple[float, ...]
    """At each step, where inputs are not spikes: one for each connection, whatever its input."""
    ann: float
    """Multiply-accumulates of the same layer in an ANN: one for each connection, once."""


@dataclass(frozen=True)
class NeuronOperations:
    """What the neurons of a layer do for one image, on average."""

    name: str
    neurons: int
    """Before decoupling."""
    spikes: tuple[float, ...]
    """At each step; a burst counts as one spike here."""
    bursts: tuple[float, ...]
    """At each step."""
    pairs: bool = False
    """Whether each is a burst neuron, or a pair already: two neurons after decoupling."""

    @property
    def firing_rate(self) -> tuple[float, ...]:
        """Spikes per neuron at each step; a burst counts as one."""
        return tuple(spikes / self.neurons for spikes in self.spikes)

    @property
    def updates(self) -> int:
        """Potentials that are updated at each step: after decoupling there are two for each burst neuron."""
        return 2 * self.neurons if self.pairs else self.neurons


@dataclass(frozen=True)
class Operations:
    """Operations of a network for one image, on average, by layer and step. `print` shows tables in rich."""

    layers: tuple[LayerOperations, ...]
    neurons: tuple[NeuronOperations, ...]
    samples: int
    whole_images: bool = False
    """Whether all images held nothing but whole numbers, so that they were counted as events."""

    @property
    def steps(self) -> int:
        """T."""
        return len(self.neurons[0].spikes)

    @property
    def accumulates(self) -> tuple[float, ...]:
        """Of all layers, at each step."""
        return _totals(layer.accumulates for layer in self.layers)

    @property
    def multiply_accumulates(self) -> tuple[float, ...]:
        """Of all layers, at each step."""
        return _totals(layer.multiply_accumulates for layer in self.layers)

    @property
    def spikes(self) -> tuple[float, ...]:
        """Of all neurons at each step after decoupling, which makes a burst two spikes."""
        return _totals([layer.spikes for layer in self.neurons] + [layer.bursts for layer in self.neurons])

    @property
    def updates(self) -> int:
        """Neurons after decoupling, each of which is updated once a step."""
        return sum(layer.updates for layer in self.neurons)

    @property
    def ann(self) -> float:
        """Multiply-accumulates of the ANN with the same layers, which runs once."""
        return sum(layer.ann for layer in self.layers)

    def __str__(self) -> str:
        return (
            f"{sum(self.accumulates):,.0f} accumulates and {sum(self.multiply_accumulates):,.0f} multiply-accumulates "
            f"for an image over {self.steps} steps; the ANN {self.ann:,.0f} multiply-accumulates (n = {self.samples})"
        )

    def __rich__(self) -> Group:
        """Tables for the terminal: operations and spikes over all steps."""
        over = f"for an image, over all {self.steps} steps (n = {self.samples})"
        table = Table(title=f"Operations {over}", min_width=72)
        table.add_column("layer", overflow="fold")
        for name in ("accumulates", "multiply-acc.", "ANN multiply-acc."):
            table.add_column(name, justify="right")
        for layer in self.layers:
            counts = (sum(layer.accumulates), sum(layer.multiply_accumulates), layer.ann)
            table.add_row(layer.name, *map(_rounded, counts))
        table.add_section()
        totals = (sum(self.accumulates), sum(self.multiply_accumulates), self.ann)
        table.add_row("all", *map(_rounded, totals))
        return Group(table, self._firing(over))

    def _firing(self, over: str) -> Table:
        table = Table(title=f"Spikes {over}", min_width=72)
        table.add_column("neurons of", overflow="fold")
        for name in ("neurons", "spikes", "of these bursts", "spikes/neuron/step"):
            table.add_column(name, justify="right")
        for layer in self.neurons:
            spikes, bursts = sum(layer.spikes), sum(layer.bursts)
            rate = f"{sum(layer.firing_rate) / self.steps:.3f}"
            table.add_row(layer.name, f"{layer.neurons:,}", _rounded(spikes), _rounded(bursts), rate)
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists: what was counted, and the totals."""
        firing = [{**asdict(layer), "firing_rate": layer.firing_rate} for layer in self.neurons]
        totals = {name: getattr(self, name) for name in ("accumulates", "multiply_accumulates", "spikes", "updates")}
        return {**asdict(self), "neurons": firing, "steps": self.steps, **totals, "ann": self.ann}

    def save(self, path: str | Path) -> None:
        """Write everything as json."""
        write_json(path, self.to_json())


@torch.no_grad()
@full_float32()  # the network is compared with its trace, and its spikes are to be those of float32
def count_operations(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], steps: int | None = None, *, batches: int | None = None
) -> Operations:
    """Count what a network computes, in one pass over data.

        accumulates[t] = sum over spikes at step t  outputs that the spike reaches

    Counted is the network as hardware runs it: normalisation folded, bursts decoupled (a burst is two spikes), what a
    spike is worth moved into the weights after it. At borders of an image a spike reaches fewer outputs. Sums, pooling
    and constant factors hand spikes on and cost nothing: a layer after pooling accumulates for every spike that was
    pooled, at its own weight. A layer whose input is not made of spikes, such as the first one on images, costs a
    multiply-accumulate for each connection, zeros too; on a constant image it runs once, at the first step. If all
    images hold nothing but whole numbers, such as counts of events, they are spikes: a value of n is n of them.

    The ANN has the same layers and runs once, on one frame. Padding is no connection, so that a 3x3 convolution of
    32x32 pixels has 4 % fewer than by the usual formula. A normalisation that no layer can absorb counts as a layer
    with one connection for each value. Additions of biases are not counted, nor what a readout that forgets does with
    its logits. A network in half precision is counted in float32, as `trace_network` writes it down.

    Args:
        model: A `Network` of `ranvier.models`, or what `convert` or `decouple` made. Not modified; evaluation mode is
            used, whatever its mode.
        loader: Batches of images and labels.
        steps: T; None for sequences, which bring their own.
        batches: How many batches to run; None for all.

    Raises:
        ConversionError: A part that cannot be traced, such as self-attention, or max-pooling of bursts that cannot be
            decoupled.
        TypeError: `model` is no network of `ranvier`.
        ValueError: The loader is empty, its images differ in shape or number of steps, or hold NaN or infinity.

    >>> from ranvier.models import mlp
    >>> operations = count_operations(mlp([64, 32, 10]), [(torch.rand(5, 64), torch.zeros(5))], steps=4)
    >>> operations.multiply_accumulates  # the first layer, once
    (2048.0, 0.0, 0.0, 0.0)
    >>> operations.accumulates == tuple(10 * spikes for spikes in operations.spikes)
    True
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if not isinstance(model, SpikingNetwork):
        raise TypeError(
            f"model is a {type(model).__name__}, but must be a Network of ranvier.models, or what convert or decouple "
            "of ranvier.conversion made."
        )
    device = device_of(model)
    counter: _Counter | None = None
    for images, _ in islice(loader, batches):
        x, num_steps = steps_of(widened(images).to(device), model.frame_dims, steps)
        if x.shape[1] == 0:
            continue
        if not bool(x.isfinite().all()):
            raise ValueError("the images hold NaN or infinity, to which neurons answer with silence. Mend the data.")
        if counter is None:
            counter = _Counter(model, x[0], num_steps)
        counter.count(x, num_steps)
    if counter is None:
        raise ValueError("the loader gave no samples, so there is nothing to count. Check the data set or its split.")
    return counter.result()


@dataclass
class _LayerTally:
    """A layer while it is counted."""

    reach: Tensor
    """For each place of an input channel how many outputs a spike there reaches, flattened."""
    connections: float
    """Of one image."""
    once: bool
    """Whether it runs at the first step only."""
    accumulates: Tensor
    """At each step, of all images, `[T]`."""
    analog: bool = False
    """Whether inputs were not made of spikes, for any of the images."""


@dataclass
class _NeuronTally:
    """Neurons of a layer while they are counted."""

    neurons: int
    pairs: bool
    spikes: list[Tensor] = field(default_factory=list)
    """Of each batch, at each step, `[T]`."""
    bursts: list[Tensor] = field(default_factory=list)


class _Counter(fx.Interpreter):
    """Runs a network as a graph, and follows its spikes through sums, pooling and rearrangements meanwhile.

    `events` holds, beside each value, how many spikes are summed up in it, bursts as two; None where a value is not
    made of spikes. So the network need not be decoupled, which would double its layers. Where nothing in a network
    tells channels apart, events of all channels are held as one.
    """

    def __init__(self, model: nn.Module, images: Tensor, steps: int) -> None:
        traced = trace_network(model, images)
        binary_spikes(traced)  # refuses what cannot be decoupled
        self.snn: GraphSNN = traced.to_snn()
        super().__init__(self.snn.network)
        self.steps = steps
        self.frame = images.shape[1:]
        self.samples = 0
        self.batch = 0
        self.whole = True
        self.layers: dict[str, _LayerTally] = {}
        self.neurons: dict[str, _NeuronTally] = {}
        self.events: dict[fx.Node, Tensor | None] = {}
        self.origins = _origins(self.snn.network) if isinstance(model, DecoupledSNN) else {}
        self.by_channel = _tells_channels_apart(traced.graph)
        self.strengths: dict[str, Tensor] = {}
        for node in traced.graph.graph.nodes:
            neuron = traced.neurons.get(str(node.target))
            if isinstance(neuron, LIFB):
                self.strengths[str(node.target)] = (neuron.strength - 1).view(-1, *(1,) * (len(sizes(node)) - 1))
                neuron.strength.fill_(2.0)  # has no influence on when it fires, and makes it send its events

    def count(self, x: Tensor, steps: int) -> None:
        """Add one batch, `[1, B, ...]` or `[T, B, ...]`."""
        if steps != self.steps or x.shape[2:] != self.frame:
            raise ValueError(
                f"images have shape {shape_of(x[0])} and {steps} steps, but those of the first batch had "
                f"{list(self.frame)} after the batch axis and {self.steps} steps. Count them apart."
            )
        self.batch = x.shape[1]
        self.samples += self.batch
        self.whole = self.whole and bool((x == x.round()).all())
        self.events.clear()
        self.run(fold_time(x), self.steps, self.batch, None)

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node, count what it costs, and note the events in its result."""
        result = super().run_node(n)
        events = None
        if n.op == "placeholder":
            if isinstance(result, Tensor) and self.whole:
                events = self._kept(result if bool((result >= 0).all()) else result.abs(), axis=1)
        elif n.op == "call_module":
            name = str(n.target)
            module = self.snn.network.get_submodule(name)
            if isinstance(module, Activation):
                assert isinstance(module.neuron, Neuron)
                result, events = self._fired(name, module.neuron, result)
            else:
                (source,) = n.all_input_nodes
                events = self._weighed(name, module, self.env[source], self.events[source])
        elif n.op == "call_function":
            events = self._followed(n, result)
        self.events[n] = events
        for source in self.user_to_last_uses.get(n, ()):  # as the interpreter does with values
            self.events.pop(source, None)
        return result

    def _kept(self, events: Tensor, axis: int = 2) -> Tensor:
        """Events of each channel, or of all together. Single precision counts exactly up to 2^24."""
        return events if self.by_channel else events.sum(axis, keepdim=True, dtype=torch.float32)

    def _fired(self, name: str, neuron: Neuron, sent: Tensor) -> tuple[Tensor, Tensor | None]:
        """What neurons transmit, and the events therein; counts them."""
        pairs = isinstance(neuron, LIFB | LIFPair)
        neurons = sent[0, 0].numel() // (1 + isinstance(neuron, LIFPair))
        tally = self.neurons.setdefault(name, _NeuronTally(neurons, pairs))
        events: Tensor | None
        if isinstance(neuron, LIFB):
            events = self._kept(sent)
            sent, bursts = self._strengthened(name, sent)
            spikes = _total(events) - bursts
        elif isinstance(neuron, LIFPair):
            events = self._kept(sent)
            spikes, bursts = map(_total, sent.chunk(2, 2))
        else:
            found = _events(neuron, sent)
            events = None if found is None else self._kept(found)
            spikes = _total((sent != 0).to(sent.dtype) * neuron.fires if events is None else events)
            bursts = torch.zeros_like(spikes)
        tally.spikes.append(spikes)
        tally.bursts.append(bursts)
        return sent, events

    def _strengthened(self, name: str, events: Tensor) -> tuple[Tensor, Tensor]:
        """What burst neurons with these events transmit, in place if these are needed no more; and bursts, `[T]`."""
        sent = torch.empty_like(events) if self.by_channel else events
        strength = self.strengths[name].to(events)
        bursts = []
        for step, value in zip(events, sent, strict=True):  # one by one, which stays in the cache
            second = (step - 1).relu_()  # of each pair
            bursts.append(_total(second.unsqueeze(0)))
            torch.sub(step, second, out=value).addcmul_(second, strength)  # rounds as the neuron does
        return sent, torch.cat(bursts)

    def _weighed(self, name: str, layer: nn.Module, x: Tensor, events: Tensor | None) -> Tensor | None:
        """Count what a layer costs. What comes out is made of spikes only where it does nothing but scale channels."""
        if isinstance(layer, ChannelAffine) and not layer.shift.any():
            return events
        if name not in self.layers:
            reached = reach(layer, x.shape[1:]).to(x.device)
            once = len(x) != self.steps * self.batch
            count = float(connections(layer, x.shape[1:]))
            self.layers[name] = _LayerTally(reached, count, once, reached.new_zeros(self.steps))
        tally = self.layers[name]
        tally.analog = tally.analog or events is None
        if events is None or tally.analog:
            return None
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            work = events.sum(1, dtype=torch.float32).flatten(1).double() @ tally.reach
        else:
            work = events.sum(tuple(range(1, events.ndim)), dtype=torch.float32).double() * tally.reach[0]
        if tally.once:
            tally.accumulates[0] += work.sum()
        else:
            tally.accumulates += work.view(self.steps, self.batch).sum(1)
        return None

    def _followed(self, n: fx.Node, result: Tensor) -> Tensor | None:
        """Events in the result of a function."""
        sources = [source for source in n.all_input_nodes if isinstance(self.env[source], Tensor)]
        first = self.events[sources[0]]
        if n.target is FUNCTIONS["mul"] and first is not None:
            return first.expand_as(result) if self.by_channel else first
        if first is None or any(self.events[source] is None for source in sources):
            return None
        if n.target is reshape_samples and not self.by_channel:
            return first.flatten(1)
        handing_on = _handing_on(n)
        if handing_on is None or (n.target in MAX_POOLS and bool((self.env[sources[0]] < 0).any())):
            return None
        if handing_on is n.target and all(self.events[source] is self.env[source] for source in sources):
            return result
        found: dict[fx.Node, Any] = {source: self.events[source] for source in sources}
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda node: found.get(node, self.env[node]))
        return handing_on(*args, **kwargs)

    def result(self) -> Operations:
        """Averages over samples; copies of a layer that decoupling made are one layer."""
        layers: dict[str, LayerOperations] = {}
        for name, tally in self.layers.items():
            runs = [1.0] * self.steps if not tally.once else [1.0] + [0.0] * (self.steps - 1)
            dense = tuple(run * tally.connections * tally.analog for run in runs)
            sparse = tuple((tally.accumulates / self.samples * (not tally.analog)).tolist())
            original = layers.get(self.origins.get(name, name))
            if original is None:
                layers[name] = LayerOperations(name, sparse, dense, tally.connections)
            else:
                both = (_totals([original.accumulates, sparse]), _totals([original.multiply_accumulates, dense]))
                layers[original.name] = LayerOperations(original.name, *both, original.ann)
        neurons = tuple(
            NeuronOperations(name, tally.neurons, self._mean(tally.spikes), self._mean(tally.bursts), tally.pairs)
            for name, tally in self.neurons.items()
        )
        return Operations(tuple(layers.values()), neurons, self.samples, self.whole)

    def _mean(self, counts: list[Tensor]) -> tuple[float, ...]:
        return tuple((torch.stack(counts).sum(0) / self.samples).tolist())


def _total(events: Tensor) -> Tensor:
    """Events at each step, `[T]`. Single precision counts those of one sample exactly: they are fewer than 2^24."""
    return events.sum(tuple(range(2, events.ndim)), dtype=torch.float32).double().sum(1)


def _events(neuron: Neuron, sent: Tensor) -> Tensor | None:
    """Spikes among what neurons other than burst neurons transmit; None if that is something else."""
    if not neuron.fires:
        return None
    if isinstance(neuron, IF | LIF | PLIF):
        return sent
    if isinstance(neuron, ConvertedIF):
        return sent.sign().abs() if neuron.signed else sent if neuron.binary else sent.sign()
    fired = (sent != 0).to(sent.dtype)  # neurons of somebody's own may send anything
    return fired if bool((sent.abs() == fired).all()) else None


def _tells_channels_apart(graph: fx.GraphModule) -> bool:
    """Whether something in a traced network treats spikes of one channel unlike those of another, or mixes axes."""
    spikes: set[fx.Node] = set()
    for node in graph.graph.nodes:
        sources = [source for source in node.all_input_nodes if source in spikes]
        if node.op == "placeholder" or is_site(node, graph):
            spikes.add(node)
        elif node.op == "call_function" and sources:
            spikes.add(node)
            if node.target in (FUNCTIONS["add"], FUNCTIONS["mul"]):
                alike = all(sizes(source) == sizes(node) for source in sources)
            elif node.target in (FUNCTIONS["mean_axes"], FUNCTIONS["sum_axes"]):
                alike = 1 not in node.args[1]
            elif node.target is reshape_samples:
                alike = len(sizes(node)) == 1
            else:
                alike = node.target in _SUMMING
            if not alike:
                return True
    return False


def _handing_on(n: fx.Node) -> Callable[..., Tensor] | None:
    """The function for events that belongs to a node's for values; None where spikes do not pass."""
    target: Any = n.target
    if target is FUNCTIONS["add"]:
        constant = any(not isinstance(argument, fx.Node) for argument in n.args)
        return None if constant else target
    if target is F.interpolate:
        mode = n.args[3] if len(n.args) > 3 else n.kwargs.get("mode", "nearest")
        return target if str(mode).startswith("nearest") else None
    if target in _UNCHANGED or is_rearrangement(n):
        return target
    return _SUMMING.get(target)


_UNCHANGED = (fold_time, unfold_time, hold, FUNCTIONS["cat"], FUNCTIONS["sum_axes"], *MAX_POOLS)


def _summing_pool1d(
    x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, *_: Any, **__: Any
) -> Tensor:
    """`avg_pool1d` without the division."""
    kernel, stride, padding = ((0, *_single(size)) for size in (kernel_size, stride or kernel_size, padding))
    wide = F.avg_pool2d(x.unsqueeze(2), (1, kernel[1]), (1, stride[1]), padding, ceil_mode, divisor_override=1)
    return wide.squeeze(2)


def _summing_pool2d(
    x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, *_: Any, **__: Any
) -> Tensor:
    """`avg_pool2d` without the division."""
    return F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode, divisor_override=1)


def _single(size: Any) -> tuple[int]:
    return (size,) if isinstance(size, int) else tuple(size)


def _summing_adaptive(pool: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`adaptive_avg_pool` without the division: windows differ in size, and overlap, where sizes do not divide."""

    def sums(input: Tensor, output_size: Any) -> Tensor:
        pooled = pool(input, output_size)
        for axis in range(2, input.ndim):
            n, m = input.shape[axis], pooled.shape[axis]
            widths = input.new_tensor([-(-(i + 1) * n // m) - i * n // m for i in range(m)])
            pooled = pooled * widths.view(-1, *(1,) * (input.ndim - axis - 1))
        return pooled.round()

    return sums


_SUMMING: dict[Any, Callable[..., Tensor]] = {
    F.avg_pool1d: _summing_pool1d,
    F.avg_pool2d: _summing_pool2d,
    F.adaptive_avg_pool1d: _summing_adaptive(F.adaptive_avg_pool1d),
    F.adaptive_avg_pool2d: _summing_adaptive(F.adaptive_avg_pool2d),
    FUNCTIONS["mean_axes"]: sum_axes,
}
"""Averages as the sums of events that they are."""


def _origins(graph: fx.GraphModule) -> dict[str, str]:
    """Of the layers of a decoupled network those that are copies, and what they are copies of.

    `weigh_spikes` adds the results of copies to that of the original in order, names them after it, `body.3_1`, and
    leaves the bias to it.
    """
    found = {}
    for node in graph.graph.nodes:
        if node.op != "call_module" or not isinstance(layer := graph.get_submodule(str(node.target)), LAYERS):
            continue
        for user in node.users:
            if layer.bias is None and user.target is FUNCTIONS["add"] and user.args[1] is node:
                first = user.args[0]
                while first.target is FUNCTIONS["add"]:
                    first = first.args[0]
                if str(node.target).startswith(f"{first.target}_"):
                    found[str(node.target)] = str(first.target)
    return found


def _totals(rows: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(map(math.fsum, zip(*rows, strict=True)))


def _rounded(count: float) -> str:
    return f"{count:,.0f}"
