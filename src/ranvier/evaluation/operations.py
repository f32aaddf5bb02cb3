"""What a spiking network computes: spikes, accumulates and multiply-accumulates, layer by layer and step by step."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, fx, nn

from ranvier.atomic import write_json
from ranvier.conversion.binary_spikes import binary_spikes
from ranvier.conversion.draft import sizes
from ranvier.conversion.spiking import GraphSNN, hold
from ranvier.conversion.trace_network import TracedNetwork, trace_network
from ranvier.conversion.vocabulary import FUNCTIONS, LAYERS, MAX_POOLS, is_rearrangement
from ranvier.nn import LIFPair, fold_time, unfold_time
from ranvier.nn.structure import Activation
from ranvier.nn.time import steps_of


@dataclass(frozen=True)
class LayerOperations:
    """Operations of a layer with weights for one image, on average."""

    name: str
    accumulates: tuple[float, ...]
    """At each step: for each spike that arrives, one for each output that it reaches."""
    multiply_accumulates: tuple[float, ...]
    """At each step, where inputs are not spikes."""
    ann: float
    """Multiply-accumulates of the same layer in an ANN."""


@dataclass(frozen=True)
class NeuronOperations:
    """What the neurons of a layer do for one image, on average."""

    name: str
    neurons: int
    """After decoupling: two for each burst neuron."""
    spikes: tuple[float, ...]
    """At each step; a burst counts as one spike here."""
    bursts: tuple[float, ...]
    """At each step."""

    @property
    def firing_rate(self) -> tuple[float, ...]:
        """Spikes per neuron at each step; of pairs those of the first."""
        own = self.neurons // 2 if any(self.bursts) else self.neurons
        return tuple(spikes / own for spikes in self.spikes)


@dataclass(frozen=True)
class Operations:
    """Operations of a network for one image, by layer and step."""

    layers: tuple[LayerOperations, ...]
    neurons: tuple[NeuronOperations, ...]
    samples: int

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
        """Events after decoupling, of all neurons at each step: spikes and bursts."""
        return _totals([layer.spikes for layer in self.neurons] + [layer.bursts for layer in self.neurons])

    @property
    def updates(self) -> int:
        """Neurons, each of which is updated once a step."""
        return sum(layer.neurons for layer in self.neurons)

    @property
    def ann(self) -> float:
        """Multiply-accumulates of the ANN with the same layers."""
        return sum(layer.ann for layer in self.layers)

    def __rich__(self) -> Table:
        """Table for the terminal: operations over all steps."""
        table = Table(title=f"Operations for an image, T={self.steps} (n = {self.samples})", min_width=72)
        table.add_column("layer", overflow="fold")
        for name in ("accumulates", "multiply-acc.", "ANN multiply-acc."):
            table.add_column(name, justify="right")
        for layer in self.layers:
            counts = (sum(layer.accumulates), sum(layer.multiply_accumulates), layer.ann)
            table.add_row(layer.name, *(f"{count:,.0f}" for count in counts))
        table.add_section()
        totals = (sum(self.accumulates), sum(self.multiply_accumulates), self.ann)
        table.add_row("all", *(f"{count:,.0f}" for count in totals))
        return table

    def save(self, path: str | Path) -> None:
        """Write everything as json."""
        write_json(path, asdict(self))


@torch.no_grad()
def count_operations(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], steps: int | None = None, *, batches: int | None = None
) -> Operations:
    """Count what a network computes, in one pass over data.

    Counted is the network as hardware runs it: normalisation folded, bursts decoupled (a burst is two events), spikes
    of 1. A spike costs one accumulate for each output that it reaches; at borders of an image those are fewer. Sums and
    average pooling hand spikes on, and cost nothing: a layer after pooling accumulates for every spike that was pooled.
    A layer whose input is not made of spikes, such as the first one on images, costs multiply-accumulates; on a
    constant image it runs once, at the first step. Images whose values are whole numbers, such as event counts, are
    events. Additions of biases are not counted.

    Args:
        model: A `Network` of `ranvier.models`, or what `convert` or `decouple` made.
        loader: Batches of images and labels.
        steps: T; None for sequences, which bring their own.
        batches: How many batches to run; None for all.

    Raises:
        ConversionError: A part that cannot be traced, such as self-attention, or max-pooling of bursts.
        ValueError: The loader is empty.
    """
    counter: _Counter | None = None
    samples = 0
    for number, (images, _) in enumerate(loader):
        if number == batches:
            break
        if counter is None:
            counter = _Counter.of(model, images if steps is not None else images[0])
        counter.count(images, steps)
        samples += images.shape[0] if steps is not None else images.shape[1]
    if counter is None:
        raise ValueError("the loader gave no samples, so there is nothing to count. Check the data set or its split.")
    return counter.result(samples)


class _Counter(fx.Interpreter):
    """Runs the graph of a network and counts meanwhile.

    `unit` of a value is what one event is worth in it: 1 for spikes and their sums, 1/4 after 2 x 2 average pooling;
    None for values that are not made of events.
    """

    def __init__(self, snn: GraphSNN, traced: TracedNetwork, ann: dict[str, float]) -> None:
        super().__init__(snn.network)
        self.snn = snn
        self.sizes = {node.name: node.meta.get("sizes") for node in traced.graph.graph.nodes}
        self.ann = ann
        self.units: dict[fx.Node, float | None] = {}
        self.accumulates: dict[str, Tensor] = {}
        self.multiplies: dict[str, Tensor] = {}
        self.fired: dict[str, tuple[int, Tensor, Tensor]] = {}
        self.reach: dict[tuple[str, torch.Size], Tensor] = {}
        self.steps = 0
        self.batch = 0
        self.whole = False

    @classmethod
    def of(cls, model: nn.Module, images: Tensor) -> "_Counter":
        traced = trace_network(model, images)
        ann = {}
        for node in traced.graph.graph.nodes:
            if node.op == "call_module":
                layer = traced.graph.get_submodule(str(node.target))
                if isinstance(layer, LAYERS):
                    sample = torch.empty(1, *sizes(node.all_input_nodes[0]), device=layer.weight.device)
                    ann[str(node.target)] = float(_reach(layer, sample.shape).sum())
        split = binary_spikes(traced)
        return cls(split.to_snn(), split, ann)

    def count(self, images: Tensor, steps: int | None) -> None:
        """Add one batch."""
        device = next(self.snn.parameters()).device
        x, self.steps = steps_of(images.to(device), self.snn.frame_dims, steps)
        self.batch = x.shape[1]
        self.whole = bool((x == x.round()).all())
        self.units.clear()
        self.run(fold_time(x), self.steps, self.batch, None)

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node, count what it costs, and note what an event is worth in its result."""
        result = super().run_node(n)
        self.units[n] = self._counted(n, result)
        return result

    def _counted(self, n: fx.Node, result: Any) -> float | None:
        if n.op == "placeholder":
            return 1.0 if self.whole else None
        if n.op == "call_module":
            module = self.snn.network.get_submodule(str(n.target))
            if isinstance(module, Activation):
                self._spikes(str(n.target), module.neuron, result)
                return 1.0
            if isinstance(module, LAYERS):
                (source,) = n.all_input_nodes
                self._layer(str(n.target), module, self.env[source], self.units[source])
            return None
        if n.op != "call_function":
            return None
        units = [self.units[source] for source in n.all_input_nodes if isinstance(self.env.get(source), Tensor)]
        return _unit(n, units, result, self.env)

    def _spikes(self, name: str, neuron: nn.Module, sent: Tensor) -> None:
        first, second = sent.chunk(2, 2) if isinstance(neuron, LIFPair) else (sent, sent[:, :, :0])
        axes = tuple(range(1, sent.ndim))
        spikes, bursts = ((part != 0).double().sum(axes) for part in (first, second))
        if name in self.fired:
            _, earlier_spikes, earlier_bursts = self.fired[name]
            spikes, bursts = spikes + earlier_spikes, bursts + earlier_bursts
        self.fired[name] = (sent[0, 0].numel(), spikes, bursts)

    def _layer(self, name: str, layer: nn.Module, x: Tensor, unit: float | None) -> None:
        key = (name, x.shape[1:])
        if key not in self.reach:
            self.reach[key] = _reach(layer, (1, *x.shape[1:])).to(x.device)
        reach = self.reach[key]
        if unit is None:
            work = reach.sum().expand(len(x))
        else:
            work = ((x / unit).abs().round().double() * reach).flatten(1).sum(1)
        varies = len(x) == self.steps * self.batch
        at_step = work.new_zeros(self.steps)
        if varies:
            at_step += work.view(self.steps, self.batch).sum(1)
        else:
            at_step[0] += work.sum()  # computed once
        kind = self.multiplies if unit is None else self.accumulates
        kind[name] = kind.get(name, torch.zeros_like(at_step)) + at_step

    def result(self, samples: int) -> Operations:
        """Averages over samples; copies of a layer after decoupling are one layer."""
        none = torch.zeros(self.steps, dtype=torch.float64)
        layers = []
        for name, ann in self.ann.items():
            parts = [part for part in {**self.accumulates, **self.multiplies} if _original(part, self.ann) == name]
            sums = [
                torch.stack([kind.get(part, none).cpu() for part in parts] or [none]).sum(0) / samples
                for kind in (self.accumulates, self.multiplies)
            ]
            layers.append(LayerOperations(name, tuple(sums[0].tolist()), tuple(sums[1].tolist()), ann))
        neurons = tuple(
            NeuronOperations(name, count, tuple((spikes / samples).tolist()), tuple((bursts / samples).tolist()))
            for name, (count, spikes, bursts) in self.fired.items()
        )
        return Operations(tuple(layers), neurons, samples)


def _original(part: str, names: dict[str, float]) -> str:
    """The layer that a layer of the decoupled network is a copy of: `body.3_1` of `body.3`."""
    if part in names:
        return part
    return part.rpartition("_")[0]


def _unit(n: fx.Node, units: list[float | None], result: Any, env: dict[fx.Node, Any]) -> float | None:
    """What an event is worth after a function."""
    if not units or any(unit is None for unit in units):
        return None
    unit = units[0]
    assert unit is not None
    target = n.target
    if target in (fold_time, unfold_time, hold) or target in MAX_POOLS or is_rearrangement(n):
        return unit
    if target in (FUNCTIONS["add"], FUNCTIONS["cat"]):
        return unit if len(set(units)) == 1 and not _adds_constant(n) else None
    if target is FUNCTIONS["mul"] and isinstance(n.args[1], int | float):
        return unit * abs(float(n.args[1])) or None
    source = env[n.all_input_nodes[0]]
    if target in (F.avg_pool1d, F.avg_pool2d):
        divisor = n.args[6] if len(n.args) > 6 else n.kwargs.get("divisor_override")
        if divisor is not None:
            return unit / float(divisor)  # type: ignore[arg-type]
        kernel = n.args[1] if len(n.args) > 1 else n.kwargs["kernel_size"]
        dims = source.ndim - 2
        window = kernel**dims if isinstance(kernel, int) else int(torch.tensor(kernel).prod())
        return unit / window
    if target in (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, FUNCTIONS["mean_axes"]):
        values, means = source[0].numel(), result[0].numel()
        return unit * means / values if values % means == 0 else None
    return unit if target is FUNCTIONS["sum_axes"] else None


def _adds_constant(n: fx.Node) -> bool:
    return any(not isinstance(argument, fx.Node) or argument.op == "get_attr" for argument in n.args[:2]) and (
        n.target is FUNCTIONS["add"]
    )


def _reach(layer: nn.Module, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """For each input of a layer how many outputs it reaches, `[1, C, ...]`."""
    assert isinstance(layer, LAYERS)
    device = layer.weight.device
    if isinstance(layer, nn.Linear):
        return torch.full(tuple(shape), float(layer.out_features), dtype=torch.float64, device=device)
    ones = torch.ones_like(layer.weight, dtype=torch.float64)
    settings: dict[str, Any] = {
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
    }
    convolve = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
    with torch.enable_grad():
        x = torch.zeros(tuple(shape), dtype=torch.float64, device=device, requires_grad=True)
        (reach,) = torch.autograd.grad(convolve(x, ones, **settings).sum(), x)
    return reach


def _totals(rows: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(map(sum, zip(*rows, strict=True)))
