"""Networks as NIR files, which neuromorphic tools read; what NIR cannot say is told, and kept as metadata.

NIR's neurons, in steps of dt: tau dv/dt = v_leak - v + r x (LIF), dv/dt = r x (IF); a spike of 1 when v exceeds the
threshold, after which v is `v_reset`. So a LIF neuron of ours with tau steps has tau dt seconds and r = 1, and an IF
neuron has r = 1/dt.

A potential is a floating number, and `v >= theta` is `v > theta'` with theta' the largest number below theta. Strict
files have that as threshold, and so say that ties fire; others have theta itself, which is what people expect to read.
"""

import hashlib
import inspect
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ranvier import provenance
from ranvier.conversion import ConversionError
from ranvier.conversion.binary_spikes import binary_spikes
from ranvier.conversion.draft import sizes, usable_name
from ranvier.conversion.trace_network import TracedNetwork, trace_network
from ranvier.conversion.vocabulary import (
    FUNCTIONS,
    ChannelAffine,
    is_site,
    mean_axes,
    reshape_samples,
    slice_axis,
    sum_axes,
)
from ranvier.nn import IF, LIF, PLIF, AffineIF, ConvertedIF, LIFPair, Neuron

if TYPE_CHECKING:
    import nir

FORMAT = "ranvier_format"
"""Key of the graph's metadata with the number of this layout."""
NEWEST = 1
"""The newest layout that is known here."""
PAIR = "ranvier_first_of_pair"
"""Key of a node's metadata with the name of the neuron whose spikes reset this one, too."""
SEAL = b"\nranvier sha256 "
"""What the checksum behind the file begins with."""
TIES = "a tie with the threshold fires"


@dataclass
class Written:
    """A NIR graph, and what it does not say."""

    nodes: dict[str, Any] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)
    unsaid: dict[str, list[str]] = field(default_factory=dict)
    """Names of neurons by what NIR cannot say of them."""
    neurons: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Nodes of each layer of neurons of the traced network, by its name: two of a pair."""


def import_nir() -> Any:
    """The module nir, or an error with the line that installs it."""
    try:
        import nir
    except ImportError as error:
        raise ImportError("NIR files need the package nir: pip install 'ranvier[export]'.") from error
    if "type_check" not in inspect.signature(nir.read).parameters:
        raise ImportError(f"nir is version {nir.version}, but 1.0.7 or newer is needed: pip install -U nir.")
    return nir


def translated(
    model: nn.Module, images: Tensor | None, dt: float, strict: bool
) -> tuple[TracedNetwork, Written, "nir.NIRGraph"]:
    """A network, decoupled and with normalisation folded, as a NIR graph; see `to_nir`."""
    nir = import_nir()
    if not 0 < dt < math.inf:
        raise ValueError(f"dt is {dt}, but a step takes more than 0 seconds, and no infinite time.")
    traced = binary_spikes(trace_network(model, images))
    written = _Writer(traced, float(dt), strict).run()
    if traced.readout_decay != 1:
        written.unsaid["leaky mean of the logits"] = ["output"]
    if strict and written.unsaid:
        raise ValueError(
            "NIR cannot say everything about this network: "
            + "; ".join(f"{what} ({cut(names)})" for what, names in written.unsaid.items())
            + ". Write it with strict=False, which keeps it as metadata that ranvier reads and others ignore, or train "
            "with hard reset and without bursts; a conversion with leaky=False has no leaky mean."
        )
    metadata = {
        FORMAT: NEWEST,
        "dt": float(dt),
        "dtype": str(precision_of(traced)).removeprefix("torch."),
        "frame_dims": list(traced.frame_dims),
        "readout_decay": float(traced.readout_decay),
        "written_by": f"ranvier {provenance.versions()['ranvier']}",
    }
    return traced, written, nir.NIRGraph(nodes=written.nodes, edges=written.edges, metadata=metadata)


def content_of(graph: "nir.NIRGraph") -> bytes:
    """The file of a graph, with its seal. In memory, since HDF5 has errors of its own for full disks."""
    buffer = io.BytesIO()
    import_nir().write(buffer, graph)
    return buffer.getvalue() + seal_of(buffer.getvalue())


def seal_of(content: bytes | memoryview) -> bytes:
    """A checksum behind the end of an HDF5 file, where no reader looks.

    A damaged file is told by it before HDF5 sees it, which may hang, ask for any amount of memory, or read other
    numbers. A tool that changes the file cuts it off.
    """
    return SEAL + hashlib.sha256(content).hexdigest().encode() + b"\n"


def precision_of(traced: TracedNetwork) -> torch.dtype:
    """What potentials are kept in: float64 in a network of that, else float32."""
    parts = (traced.graph, *traced.neurons.values())
    double = any(tensor.dtype == torch.float64 for part in parts for tensor in part.state_dict().values())
    return torch.float64 if double else torch.float32


def node_name(name: str) -> str:
    """A name as other tools take it: an identifier that is no word of Python and no attribute of a module of torch."""
    name = usable_name(re.sub(r"\W", "_", name, flags=re.ASCII))
    return name if name[:1].isalpha() else f"node_{name}"


class _Writer:
    """Translates the nodes of a traced network in order; each becomes the names of NIR nodes whose outputs add up."""

    def __init__(self, traced: TracedNetwork, dt: float, strict: bool) -> None:
        self.nir = import_nir()
        self.traced = traced
        self.dt = dt
        self.strict = strict
        self.dtype = np.dtype("float64" if precision_of(traced) == torch.float64 else "float32")
        self.out = Written()
        self.names: dict[fx.Node, tuple[str, ...]] = {}
        self.halves: dict[fx.Node, tuple[str, str]] = {}

    def run(self) -> Written:
        for node in self.traced.graph.graph.nodes:
            if node.op == "placeholder":
                self.input(node)
            elif node.op == "output":
                source = node.all_input_nodes[0]
                output = self.nir.Output(output_type={"output": np.array(sizes(source))})
                self.add("output", output, self.names[source])
            elif node.op == "get_attr":
                continue
            elif is_site(node, self.traced.graph):
                self.neuron(node)
            elif node.op == "call_module":
                self.layer(node, self.traced.graph.get_submodule(str(node.target)))
            else:
                self.function(node)
        return self.out

    def input(self, node: fx.Node) -> None:
        """The images, as a vector where they are flattened anyway: readers disagree about flattening."""
        shape = sizes(node)
        flat = all(user.target is reshape_samples and sizes(user) == (math.prod(shape),) for user in node.users)
        shape = (math.prod(shape),) if flat and math.prod(shape) == shape[0] else shape
        name = self.add("input", self.nir.Input(input_type={"input": np.array(shape)}), ())
        self.names[node] = (name,)
        if shape != sizes(node):
            self.names |= dict.fromkeys(node.users, (name,))

    def add(self, name: str, node: "nir.NIRNode", sources: tuple[str, ...]) -> str:
        """A node with the sum of `sources` as input, under `name` or, if that is taken, a numbered one."""
        free = name = node_name(name)
        count = 0
        while free in self.out.nodes:
            count += 1
            free = f"{name}_{count}"
        self.out.nodes[free] = node
        self.out.edges += [(source, free) for source in sources]
        return free

    def chain(self, node: fx.Node, name: str, part: "nir.NIRNode") -> None:
        """`part` on what `node` has for input."""
        self.names[node] = (self.add(name, part, self.names[node.all_input_nodes[0]]),)

    def refuse(self, node: fx.Node, why: str, remedy: str) -> ConversionError:
        return ConversionError(f"{node.meta['place']}: {node.name} {why}. {remedy}")

    # Neurons

    def neuron(self, node: fx.Node) -> None:
        name = str(node.target)
        neuron = self.traced.neurons[name]
        if isinstance(neuron, LIFPair):
            self.pair(node, name, neuron)
            return
        self.chain(node, name, self.plain(name, neuron, sizes(node)))
        self.out.neurons[name] = self.names[node]

    def plain(self, name: str, neuron: Neuron, shape: tuple[int, ...]) -> "nir.NIRNode":
        """One neuron layer of `shape`."""
        if isinstance(neuron, ConvertedIF):
            return self.converted(name, neuron, shape)
        if isinstance(neuron, AffineIF):
            return self.affine(name, neuron, shape)
        if not isinstance(neuron, IF | LIF | PLIF):
            raise ConversionError(
                f"{name}: a {type(neuron).__name__} has no counterpart in NIR. Neurons that can be written are IF, "
                "LIF, PLIF, LIFB and those of converted networks."
            )
        own = neuron.params
        metadata: dict[str, Any] = {"ranvier_neuron": type(neuron).__name__, "ranvier_v_threshold": own.v_threshold}
        fired = self.fired(name, np.full(shape, own.v_threshold, self.dtype), True, own.reset, metadata)
        if isinstance(neuron, IF):
            return self.nir.IF(r=np.full(shape, 1 / self.dt), **fired)
        if isinstance(neuron, PLIF):
            metadata["ranvier_decay"] = float(neuron.decay)
            tau = neuron.tau
        else:
            tau = metadata["ranvier_tau_steps"] = float(neuron.params.tau)
        return self.nir.LIF(
            tau=np.full(shape, tau * self.dt), r=np.ones(shape), v_leak=np.zeros(shape, self.dtype), **fired
        )

    def fired(
        self,
        name: str,
        threshold: np.ndarray,
        ties_fire: bool,
        reset: str,
        metadata: dict[str, Any],
        v_reset: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """What happens at the threshold, in NIR's words; the rest as metadata.

        Thresholds have the precision of the potentials that are compared with them; tau and r have double precision,
        so that `tau / dt` is the number of steps that it was.
        """
        if ties_fire and self.strict:
            threshold = np.nextafter(threshold, threshold.dtype.type(-np.inf))
        elif ties_fire:
            metadata["ranvier_ties_fire"] = True
            self.unsaid(TIES, name)
        if reset == "soft":
            metadata["ranvier_reset"] = "soft"
            self.unsaid("soft reset", name)
        v_reset = np.zeros_like(threshold) if v_reset is None else v_reset
        return {"v_threshold": threshold, "v_reset": v_reset, "metadata": metadata}

    def pair(self, node: fx.Node, name: str, neuron: LIFPair) -> None:
        """Two LIF nodes on one input; the second's coupling is metadata."""
        channels, *rest = sizes(node)
        shape = (channels // 2, *rest)
        own = neuron.params
        sources = self.names[node.all_input_nodes[0]]
        lower = LIF(tau=own.tau, v_threshold=own.v_threshold, reset=own.reset)
        upper = LIF(tau=own.tau, v_threshold=own.v_burst, reset=own.reset)
        first = self.add(name, self.plain(name, lower, shape), sources)
        burst = f"{name}_burst"
        second = self.plain(burst, upper, shape)
        if own.coupled:
            second.metadata[PAIR] = first
            self.unsaid("reset by another neuron's spike", burst)
        self.halves[node] = (first, self.add(burst, second, sources))
        self.out.neurons[name] = self.halves[node]

    def converted(self, name: str, neuron: ConvertedIF, shape: tuple[int, ...]) -> "nir.NIRNode":
        """An IF neuron with what calibration found."""
        metadata: dict[str, Any] = {
            "ranvier_neuron": "ConvertedIF",
            "ranvier_signed": neuron.signed,
            "ranvier_v_init": array_of(neuron.v_init),
            "ranvier_bias": array_of(neuron.bias),
        }
        per_channel = array_of(neuron.threshold).reshape(-1, *(1,) * (len(shape) - 1))
        fired = self.fired(name, np.broadcast_to(per_channel, shape).copy(), True, "soft", metadata)
        if neuron.signed:
            self.unsaid("spikes that are taken back", name)
        if bool((neuron.v_init != 0).any()):
            self.unsaid("initial potential", name)
        if bool((neuron.bias != 0).any()):
            self.unsaid("bias of each step", name)
        return self.nir.IF(r=np.full(shape, 1 / self.dt), **fired)

    def affine(self, name: str, neuron: AffineIF, shape: tuple[int, ...]) -> "nir.NIRNode":
        """What was read from NIR goes back as it came."""

        def full(value: Tensor) -> np.ndarray:
            return np.broadcast_to(array_of(value), shape).copy()

        own = neuron.params
        kind = ("L" if own.leaky else "") + "I" + ("F" if own.fires else "")
        given: dict[str, Any] = {"r": full(neuron.r.double() if own.leaky else neuron.r.double() / self.dt)}
        if own.leaky:
            given |= {"tau": full(neuron.tau.double() * self.dt), "v_leak": full(neuron.v_leak)}
        if own.fires:
            given |= self.fired(name, full(neuron.v_threshold), own.ties_fire, own.reset, {}, full(neuron.v_reset))
        return getattr(self.nir, kind)(**given)

    def unsaid(self, what: str, name: str) -> None:
        self.out.unsaid.setdefault(what, []).append(name)

    # Layers

    def layer(self, node: fx.Node, layer: nn.Module) -> None:
        source = node.all_input_nodes[0]
        shape = sizes(source)
        name = str(node.target)
        if isinstance(layer, nn.Linear):
            if len(shape) != 1:
                raise self.refuse(
                    node,
                    f"maps the last axis of {list(shape)}",
                    "NIR has linear layers on vectors only: flatten first.",
                )
            self.chain(node, name, self.dense(layer.weight, layer.bias))
        elif isinstance(layer, nn.Conv1d | nn.Conv2d):
            self.chain(node, name, self.convolution(node, layer, shape))
        elif isinstance(layer, ChannelAffine):
            self.chain(node, name, self.per_channel(node, layer, shape))
        else:
            raise self.refuse(node, f"is a {type(layer).__name__}, which NIR cannot say", "Leave it out.")

    def dense(self, weight: Tensor, bias: Tensor | None) -> "nir.NIRNode":
        array = array_of(weight)
        if bias is None:
            return self.nir.Linear(weight=array)
        return self.nir.Affine(weight=array, bias=array_of(bias))

    def convolution(self, node: fx.Node, layer: nn.Conv1d | nn.Conv2d, shape: tuple[int, ...]) -> "nir.NIRNode":
        kernel = layer.kernel_size
        if len(set(kernel)) > 1:
            raise self.refuse(
                node, f"has a kernel of {list(kernel)}", "NIR's readers take square kernels: pad the kernel with zeros."
            )
        weight = array_of(_without_groups(layer))
        bias = np.zeros(layer.out_channels, weight.dtype) if layer.bias is None else array_of(layer.bias)
        padding = layer.padding  # "same" and "valid" are NIR's words, too
        if isinstance(layer, nn.Conv1d):
            return self.nir.Conv1d(
                input_shape=shape[1],
                weight=weight,
                stride=layer.stride[0],
                padding=padding if isinstance(padding, str) else padding[0],
                dilation=layer.dilation[0],
                groups=1,
                bias=bias,
            )
        return self.nir.Conv2d(
            input_shape=tuple(shape[1:]),
            weight=weight,
            stride=tuple(layer.stride),
            padding=padding if isinstance(padding, str) else tuple(padding),
            dilation=tuple(layer.dilation),
            groups=1,
            bias=bias,
        )

    def per_channel(self, node: fx.Node, affine: ChannelAffine, shape: tuple[int, ...]) -> "nir.NIRNode":
        """A scale and shift of each channel as a layer whose weights are on the diagonal."""
        weight, shift = torch.diag(affine.scale).cpu(), affine.shift.cpu()
        if len(shape) == 1:
            return self.dense(weight, shift)
        kind: Any = (nn.Conv1d, nn.Conv2d)[len(shape) - 2]
        conv = nn.utils.skip_init(kind, shape[0], shape[0], 1)  # whose first weights would use up randomness
        conv.weight.data = weight.view(*weight.shape, *(1,) * (len(shape) - 1))
        conv.bias.data = shift
        return self.convolution(node, conv, shape)

    # Functions

    def function(self, node: fx.Node) -> None:
        source = node.all_input_nodes[0]
        if node.target is slice_axis and source in self.halves:
            first, second = self.halves[source]
            self.names[node] = (first if node.args[2] == 0 else second,)
        elif node.target is FUNCTIONS["add"]:
            self.sum(node)
        elif node.target is FUNCTIONS["mul"]:
            self.scale(node)
        elif node.target is reshape_samples:
            self.reshape(node, source)
        elif node.target in (F.avg_pool2d, F.adaptive_avg_pool2d, mean_axes, sum_axes):
            self.pool(node, source)
        else:
            name = next((name for name, function in FUNCTIONS.items() if function is node.target), node.name)
            remedy = {
                "max_pool2d": "Train with average pooling: max-pooling of spikes needs a unit that NIR has not.",
                "adaptive_max_pool2d": "Train with average pooling.",
                "max_pool_of_sums": "Train with average pooling.",
                "cat": "Add instead of concatenating, as residual networks do.",
            }.get(name, "Convertible are convolutions, linear layers, average pooling, sums, factors and flattening.")
            raise self.refuse(node, f"({name}) cannot be said in NIR", remedy)

    def sum(self, node: fx.Node) -> None:
        """Edges add up where they meet, so that a sum is the union of its summands."""
        summands = [argument for argument in node.args if isinstance(argument, fx.Node)]
        if len(summands) != len(node.args) or any(summand.op == "get_attr" for summand in summands):
            raise self.refuse(node, "adds a constant", "Put it into the bias of a layer.")
        if any(sizes(summand) != sizes(node) for summand in summands):
            raise self.refuse(node, "adds values of different shapes", "Bring them to one shape.")
        names: list[str] = []
        for summand in summands:
            for name in self.names[summand]:
                if name in names:  # an edge counts once
                    ones = np.ones(sizes(node), dtype=np.float32)
                    name = self.add(f"{name}_again", self.nir.Scale(scale=ones), (name,))
                names.append(name)
        self.names[node] = tuple(names)

    def scale(self, node: fx.Node) -> None:
        source, factor = node.args
        assert isinstance(source, fx.Node)
        if isinstance(factor, fx.Node):
            if factor.op != "get_attr":
                raise self.refuse(node, "multiplies two values of the data", "Use layers with fixed weights.")
            tensor = self.traced.graph.get_buffer(str(factor.target))
            tensor = tensor[0] if tensor.ndim == len(sizes(node)) + 1 else tensor
        else:
            tensor = torch.tensor(float(factor), dtype=precision_of(self.traced))  # type: ignore[arg-type]
        if sizes(node) != sizes(source):
            raise self.refuse(node, f"repeats {list(sizes(source))} to {list(sizes(node))}", "Give it its full shape.")
        self.chain(node, node.name, self.nir.Scale(scale=array_of(tensor.expand(sizes(node)))))

    def reshape(self, node: fx.Node, source: fx.Node) -> None:
        if node in self.names:  # the input came as a vector
            return
        if sizes(node) == sizes(source):
            self.names[node] = self.names[source]
        elif len(sizes(node)) == 1:
            flatten = self.nir.Flatten(input_type={"input": np.array(sizes(source))}, start_dim=0, end_dim=-1)
            self.chain(node, node.name, flatten)
        else:
            raise self.refuse(node, f"reshapes to {list(sizes(node))}", "NIR can only flatten to a vector.")

    def pool(self, node: fx.Node, source: fx.Node) -> None:
        """Averages and sums over windows, whatever way they were written."""
        before, after = sizes(source), sizes(node)
        if len(before) != 3:
            raise self.refuse(node, f"pools {list(before)}", "NIR pools images [C, H, W].")
        if node.target is F.avg_pool2d:
            kernel, stride, padding = _pooling(node)
        else:
            if node.target in (mean_axes, sum_axes):
                axes = {axis % 4 for axis in node.args[1]}  # type: ignore[operator, union-attr]
                if axes != {2, 3}:
                    raise self.refuse(node, f"pools over axes {sorted(axes)}", "NIR pools over height and width.")
            out = (after[1], after[2]) if len(after) == 3 else (1, 1)
            if before[1] % out[0] or before[2] % out[1]:
                raise self.refuse(
                    node, f"averages {list(before)} to {list(out)}, windows of unequal size", "Use sizes that divide."
                )
            kernel = stride = (before[1] // out[0], before[2] // out[1])
            padding = (0, 0)
        build = self.nir.SumPool2d if node.target is sum_axes else self.nir.AvgPool2d
        pool = build(kernel_size=np.array(kernel), stride=np.array(stride), padding=np.array(padding))
        pool.input_type = {"input": np.array(before)}
        self.chain(node, node.name, pool)
        if len(after) == 1:
            inner = self.names[node]
            flatten = self.nir.Flatten(input_type={"input": np.array((after[0], 1, 1))}, start_dim=0, end_dim=-1)
            self.names[node] = (self.add(f"{node.name}_flatten", flatten, inner),)


def cut(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def array_of(tensor: Tensor) -> np.ndarray:
    """A tensor as an array of its own memory: float64 if it is that, else float32."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to("cpu", dtype, copy=True).contiguous().numpy()


def _pooling(node: fx.Node) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    padding = _two(given.get("padding", 0))
    plain = not given.get("ceil_mode") and given.get("divisor_override") is None
    if not plain or (any(padding) and given.get("count_include_pad", True) is not True):
        raise ConversionError(
            f"{node.meta['place']}: {node.name} rounds sizes up, leaves padding out of the mean or has a divisor of "
            "its own, which NIR cannot say. Use plain average pooling."
        )
    kernel = _two(given["kernel_size"])
    return kernel, _two(given.get("stride") or kernel), padding


def _two(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _without_groups(layer: nn.Conv1d | nn.Conv2d) -> Tensor:
    """The weight of the same convolution without groups, zero between them: readers of NIR disagree about groups."""
    weight = layer.weight.detach()
    if layer.groups == 1:
        return weight
    full = weight.new_zeros(layer.out_channels, layer.in_channels, *weight.shape[2:])
    outputs, inputs = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    for group in range(layer.groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        full[rows, group * inputs : (group + 1) * inputs] = weight[rows]
    return full


def count_neurons(written: Written) -> int:
    """Neurons of a NIR graph."""
    return sum(math.prod(node.v_threshold.shape) for node in written.nodes.values() if hasattr(node, "v_threshold"))
