"""NIR files as spiking networks: those that were written here, and those of others."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ranvier.conversion.draft import free_path
from ranvier.conversion.spiking import GraphSNN, spiking
from ranvier.conversion.vocabulary import FUNCTIONS, Rectifier, reshape_samples, slice_axis
from ranvier.export.nir_write import FORMAT, PAIR, import_nir
from ranvier.nn import IF, LIF, AffineIF, ConvertedIF, LIFPair, Neuron


def from_nir(path: str | Path, *, dt: float | None = None, use_metadata: bool = True) -> GraphSNN:
    """Read a NIR file as a spiking network.

    Files of ours give the network that was written, decoupled, with the same neurons. In files of others, neurons
    become `ranvier.nn.AffineIF`: forward Euler in steps of dt,

        LIF  v += (dt / tau) (v_leak - v + r x),    IF  v += dt r x,    a spike where v > v_threshold, then v = v_reset,

    and those without spikes, LI and I, send their potential. What several edges bring to a node adds up.

    Args:
        path: The file.
        dt: Seconds of a step; None for what the file says, which files of others do not.
        use_metadata: Whether to read what NIR itself cannot say. False gives the network that other tools see.

    Returns:
        A network called like any of `ranvier.models`, with logits `[T, B, K]`.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: The package nir is missing.
        ValueError: The file is no NIR graph, is recurrent or nested, has a node that is not known here (it is named),
            several inputs or outputs, or no dt.
    """
    nir = import_nir()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Pass a .nir file.")
    try:
        graph = nir.read(path)
    except Exception as error:  # whatever HDF5 and nir make of a broken file
        raise ValueError(
            f"{path} could not be read as a NIR graph ({type(error).__name__}: {error}). It may be truncated or of "
            "another kind: write it again."
        ) from error
    if not isinstance(graph, nir.NIRGraph):
        raise ValueError(f"{path} holds a single {type(graph).__name__}, but a graph with Input and Output is needed.")
    return _Reader(graph, str(path), dt, use_metadata).run()


class _Reader:
    def __init__(self, graph: Any, source: str, dt: float | None, use_metadata: bool) -> None:
        self.nir = import_nir()
        self.source = source
        self.metadata = _plain(graph.metadata)
        self.use_metadata = use_metadata and FORMAT in self.metadata
        if dt is None and "dt" in self.metadata:
            dt = float(self.metadata["dt"])
        if dt is not None and not dt > 0:
            raise ValueError(f"dt is {dt}, but a step takes more than 0 seconds.")
        self.dt = dt
        self.nodes: dict[str, Any] = dict(graph.nodes)
        self.inputs: dict[str, list[str]] = {name: [] for name in self.nodes}
        for begin, end in graph.edges:
            self.inputs[end].append(begin)
        self.graph = fx.Graph()
        self.parts: dict[str, nn.Module | Tensor] = {}
        self.neurons: dict[str, Neuron] = {}
        self.values: dict[str, fx.Node] = {}

    def run(self) -> GraphSNN:
        first, last = self._only("Input"), self._only("Output")
        for name in self._ordered():
            if name not in self.values:  # the second of a pair came with the first
                self.values[name] = self._value(name)
        self.graph.output(self.values[last])
        module = fx.GraphModule(self.parts, self.graph).eval().requires_grad_(False)
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
        neurons = {name: neuron for name, neuron in self.neurons.items() if name in dict(module.named_modules())}
        if not neurons:
            raise ValueError(f"{self.source} has no neurons that reach its output, so it is no spiking network.")
        (shape,) = self.nodes[first].input_type.values()
        dims = tuple(int(rank) for rank in self.metadata.get("frame_dims", (len(shape) + 1,)))
        return GraphSNN(spiking(module, neurons), dims)

    def _only(self, kind: str) -> str:
        found = [name for name, node in self.nodes.items() if type(node).__name__ == kind]
        if len(found) != 1:
            raise ValueError(f"{self.source} has {len(found)} nodes of kind {kind}, but must have one.")
        return found[0]

    def _ordered(self) -> list[str]:
        """Names so that each comes after its inputs."""
        order: list[str] = []
        waiting = dict.fromkeys(self.nodes)
        while waiting:
            ready = [name for name in waiting if all(source not in waiting for source in self.inputs[name])]
            if not ready:
                loop = ", ".join(list(waiting)[:5])
                raise ValueError(
                    f"{self.source} is recurrent: {loop} depend on one another. Networks without feedback can be read."
                )
            order += ready
            for name in ready:
                del waiting[name]
        return order

    def _input(self, name: str) -> fx.Node:
        """The sum of what edges bring."""
        sources = self.inputs[name]
        if not sources:
            raise ValueError(f"{self.source}: node {name} has no input.")
        total, *others = (self.values[source] for source in sources)
        for other in others:
            total = self.graph.call_function(FUNCTIONS["add"], (total, other))
        return total

    def _value(self, name: str) -> fx.Node:
        node = self.nodes[name]
        kind = type(node).__name__
        if kind == "Input":
            return self.graph.placeholder("images")
        if kind == "Output":
            return self._input(name)
        if kind in ("IF", "LIF", "LI", "I"):
            return self._neuron(name, node, kind)
        if kind in ("Affine", "Linear", "Conv1d", "Conv2d"):
            return self._call(name, _layer(node, kind))
        if kind in ("AvgPool2d", "SumPool2d"):
            kernel, stride, padding = (_numbers(getattr(node, key)) for key in ("kernel_size", "stride", "padding"))
            plain = (self._input(name), kernel, stride, padding)
            summed = (*plain, False, True, 1)  # a divisor of 1
            return self.graph.call_function(FUNCTIONS["avg_pool2d"], summed if kind == "SumPool2d" else plain)
        if kind == "Scale":
            path = self._path(f"{name}_scale")
            self.parts[path] = torch.from_numpy(np.array(node.scale)).unsqueeze(0)
            constant = self.graph.create_node("get_attr", path)
            return self.graph.call_function(FUNCTIONS["mul"], (self._input(name), constant))
        if kind == "Flatten":
            return self.graph.call_function(reshape_samples, (self._input(name), self._flat(name, node)))
        if kind == "NIRGraph":
            raise ValueError(f"{self.source}: node {name} is a graph inside the graph. Write it without nesting.")
        raise ValueError(
            f"{self.source}: node {name} is a {kind}, which is not known here. Known are Input, Output, IF, LIF, LI, "
            "I, Affine, Linear, Conv1d, Conv2d, AvgPool2d, SumPool2d, Scale and Flatten."
        )

    def _call(self, name: str, module: nn.Module) -> fx.Node:
        path = self._path(name)
        self.parts[path] = module
        return self.graph.call_module(path, (self._input(name),))

    def _path(self, name: str) -> str:
        path = name.replace(".", "_")
        if hasattr(fx.GraphModule, path) or not path[:1].isalnum():
            path = f"node_{path}"
        return free_path(path, self.parts)

    def _flat(self, name: str, node: Any) -> list[int]:
        """Sizes of a flattened sample. Some writers count the batch as first dimension: then a layer after it tells."""
        shape = _numbers(node.input_type["input"])
        total = int(np.prod(shape))
        wanted = [
            int(after.weight.shape[-1])
            for end, after in self.nodes.items()
            if name in self.inputs[end] and type(after).__name__ in ("Affine", "Linear")
        ]
        if node.start_dim == 0 or total in wanted:
            return [total]
        return _numbers(node.output_type["output"])

    # Neurons

    def _neuron(self, name: str, node: Any, kind: str) -> fx.Node:
        told = _plain(node.metadata) if self.use_metadata else {}
        second = self._second_of(name) if self.use_metadata else None
        neuron = self._ours(name, node, told, second) if "ranvier_neuron" in told else None
        if neuron is None:
            second = None
            neuron = self._foreign(name, node, kind, told)
        path = self._path(name)
        self.parts[path] = Rectifier()
        self.neurons[path] = neuron
        value = self.graph.call_module(path, (self._input(name),))
        if second is None:
            return value
        channels = len(node.v_threshold)
        self.values[second] = self.graph.call_function(slice_axis, (value, 1, channels, 2 * channels, None))
        return self.graph.call_function(slice_axis, (value, 1, 0, channels, None))

    def _second_of(self, name: str) -> str | None:
        """The neuron that the spikes of `name` reset."""
        for other, node in self.nodes.items():
            if _plain(getattr(node, "metadata", {})).get(PAIR) == name:
                return other
        return None

    def _ours(self, name: str, node: Any, told: Mapping[str, Any], second: str | None) -> Neuron | None:
        """The neuron that was written, or None if the file was changed so that it is that no more."""
        kind = told["ranvier_neuron"]
        if kind == "ConvertedIF":
            return _converted(node, told)
        if len(np.unique(node.v_threshold)) > 1 or kind not in ("IF", "LIF", "PLIF"):
            return None
        threshold = float(node.v_threshold.flat[0])
        reset = told.get("ranvier_reset", "hard")
        if kind == "IF":
            return IF(v_threshold=threshold, reset=reset)
        tau = told["ranvier_tau_steps"]
        if second is not None:
            return LIFPair(tau=tau, v_threshold=threshold, reset=reset)
        return LIF(tau=tau, v_threshold=threshold, reset=reset)

    def _foreign(self, name: str, node: Any, kind: str, told: Mapping[str, Any]) -> Neuron:
        if self.dt is None:
            raise ValueError(f"{self.source} does not say how long a step is. Pass dt, in seconds: dt=1e-3.")
        dt = self.dt
        fires = kind in ("IF", "LIF")
        r = _tensor(node.r)
        if kind in ("LIF", "LI"):
            tau = _tensor(node.tau)
            if bool((tau < dt).any()):
                raise ValueError(
                    f"{self.source}: node {name} has a time constant of {float(tau.min()):.3g} s, below dt = {dt:.3g} "
                    "s, so that a step would overshoot. Pass a smaller dt."
                )
            decay, drive, gain = 1 - dt / tau, _tensor(node.v_leak) * dt / tau, r * dt / tau
        else:
            decay, drive, gain = torch.ones_like(r), torch.zeros_like(r), r * dt
        return AffineIF(
            decay,
            drive,
            gain,
            _tensor(node.v_threshold) if fires else None,
            _tensor(node.v_reset) if fires else None,
            ties_fire=bool(told.get("ranvier_ties_fire", False)),
            reset=told.get("ranvier_reset", "hard"),
            fires=fires,
        )


def _converted(node: Any, told: Mapping[str, Any]) -> ConvertedIF:
    bias, v_init = _tensor(told["ranvier_bias"]), _tensor(told["ranvier_v_init"])
    threshold = _tensor(node.v_threshold)
    neuron = ConvertedIF(
        len(threshold),
        steps=len(bias),
        shape=v_init.shape if v_init.ndim > 1 else None,
        signed=bool(told["ranvier_signed"]),
        binary=True,
    )
    threshold = threshold.reshape(len(threshold), -1)[:, 0]
    neuron.load_state_dict({"threshold": threshold, "bias": bias, "v_init": v_init}, assign=True)
    return neuron


def _layer(node: Any, kind: str) -> nn.Module:
    """A layer with the weights of a node."""
    weight = _tensor(node.weight)
    bias = None if kind == "Linear" else _tensor(node.bias)
    module: nn.Module
    if kind in ("Affine", "Linear"):
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    else:
        padding = node.padding.decode() if isinstance(node.padding, bytes) else node.padding
        build: Any = nn.Conv1d if kind == "Conv1d" else nn.Conv2d
        groups = int(node.groups)
        module = build(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            stride=_numbers(node.stride),
            padding=padding if isinstance(padding, str) else _numbers(padding),
            dilation=_numbers(node.dilation),
            groups=groups,
            device="meta",
        )
    state = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False)


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))


def _numbers(value: Any) -> list[int]:
    return [int(number) for number in np.atleast_1d(np.asarray(value)).tolist()]


def _plain(metadata: Mapping[str, Any] | Any) -> dict[str, Any]:
    """Metadata as HDF5 returns them, with texts and numbers of Python."""
    if not isinstance(metadata, Mapping):
        return {}
    return {name: _python(value) for name, value in metadata.items()}


def _python(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    return value
