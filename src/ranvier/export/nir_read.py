"""NIR files as spiking networks: those that were written here, and those of others."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ranvier.conversion.draft import free_path, sizes, with_sizes
from ranvier.conversion.spiking import GraphSNN, spiking
from ranvier.conversion.vocabulary import FUNCTIONS, Rectifier, slice_axis
from ranvier.export.nir_write import FORMAT, NEWEST, PAIR, SEAL, import_nir, node_name, seal_of
from ranvier.nn import IF, LIF, PLIF, AffineIF, ConvertedIF, LIFPair, Neuron

NEURONS = ("IF", "LIF", "LI", "I")
LAYERS = ("Affine", "Linear", "Conv1d", "Conv2d")
KNOWN = ("Input", "Output", *NEURONS, *LAYERS, "AvgPool2d", "SumPool2d", "Scale", "Flatten")
CLOSE = 1e-6
"""Relative difference up to which a number is the one that was written: some tools keep float32 only (6e-8)."""


def from_nir(
    path: str | Path, *, dt: float | None = None, use_metadata: bool = True, dtype: torch.dtype | None = None
) -> GraphSNN:
    """Read a NIR file as a spiking network.

    Files of ours give the network that was written, decoupled, with the same neurons. In files of others, neurons
    become `ranvier.nn.AffineIF`: forward Euler in steps of dt,

        LIF  v += (dt / tau) (v_leak - v + r x),    IF  v += dt r x,    a spike where v > v_threshold, then v = v_reset,

    starting from rest (v_leak, or v_reset without leak); those without spikes, LI and I, send their potential. What
    several edges bring to a node adds up. A neuron that another tool changed in a file of ours is read as any other.

    Args:
        path: The file.
        dt: Seconds of a step; None for what the file says, which files of others do not.
        use_metadata: Whether to read what NIR itself cannot say. False gives the network that other tools see.
        dtype: Of weights and potentials; None for that of the network that was written, and float32 for files of
            others.

    Returns:
        A network called like any of `ranvier.models`, with logits `[T, B, K]`.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: The package nir is missing.
        ValueError: The file is damaged or no NIR graph, is recurrent or nested, has a node that is not known here or
            does not fit its input (it is named), several inputs or outputs, or no dt.

    >>> import tempfile
    >>> from ranvier.export import to_nir
    >>> from ranvier.models import mlp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     receipt = to_nir(mlp([64, 32, 10]), f"{folder}/mlp.nir", dt=1e-3)
    ...     network = from_nir(receipt.path)
    >>> network(torch.rand(5, 64), steps=4).shape
    torch.Size([4, 5, 10])
    """
    nir = import_nir()
    path = Path(path)
    if not path.is_file():
        why = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {why}. Pass a .nir file.")
    _check_seal(path)
    try:
        # Types are checked below, on what is computed: NIR's own check takes less than what is written in its name.
        graph = nir.read(path, type_check=False)
    except Exception as error:  # whatever HDF5 and nir make of a broken file
        raise ValueError(
            f"{path} could not be read as a NIR graph ({type(error).__name__}: {error}). It may be truncated or of "
            "another kind: write it again."
        ) from error
    with _blaming(str(path), "the file"):
        return _Reader(graph, str(path), dt, use_metadata, dtype).run()


def _check_seal(path: Path) -> None:
    """Raise if the checksum that files of ours end with is not that of the rest."""
    content = memoryview(path.read_bytes())
    length = len(seal_of(b""))
    body, seal = content[:-length], bytes(content[-length:])
    if seal.startswith(SEAL) and seal != seal_of(body):
        raise ValueError(f"{path} is damaged: its checksum is not that of its content. Copy or write it again.")


@contextmanager
def _blaming(source: str, what: str) -> Iterator[None]:
    """Say of which part of a file an error is that comes from building or running it."""
    try:
        yield
    except _NIRError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise _NIRError(
            f"{source}: {what} holds something else than expected ({type(error).__name__}: {error}). It may be "
            "damaged, or of another version of NIR: write it again."
        ) from error


class _NIRError(ValueError):
    """An error that says already what is wrong, and where."""


class _Reader:
    def __init__(
        self, graph: Any, source: str, dt: float | None, use_metadata: bool, dtype: torch.dtype | None
    ) -> None:
        self.source = source
        self.metadata = _plain(graph.metadata)
        version = self.metadata.get(FORMAT, 0)
        if not version <= NEWEST:
            raise self.error(f"is of layout {version}, but this version of ranvier knows {NEWEST}. Update ranvier.")
        self.use_metadata = use_metadata and version > 0
        if dt is None and "dt" in self.metadata:
            dt = float(self.metadata["dt"])
        if dt is not None and not 0 < dt < np.inf:
            raise _NIRError(f"dt is {dt}, but a step takes more than 0 seconds, and no infinite time.")
        self.dt = dt
        double = version > 0 and self.metadata.get("dtype") == "float64"
        self.dtype = dtype or (torch.float64 if double else torch.float32)
        self.nodes: dict[str, Any] = dict(graph.nodes)
        self.inputs: dict[str, list[str]] = {name: [] for name in self.nodes}
        for begin, end in graph.edges:
            for name in (begin, end):
                if name not in self.nodes:
                    raise self.error(f"has an edge {begin} -> {end}, but no node {name}.")
            self.inputs[end].append(begin)
        self.graph = fx.Graph()
        self.parts: dict[str, nn.Module | Tensor] = {}
        self.neurons: dict[str, Neuron] = {}
        self.values: dict[str, fx.Node] = {}
        self.name = ""
        """Of the node that is being read."""

    def error(self, what: str) -> _NIRError:
        return _NIRError(f"{self.source} {what}")

    def here(self) -> str:
        """The node that is being read, for messages."""
        return f"{self.source}: node {self.name} ({type(self.nodes[self.name]).__name__})"

    def run(self) -> GraphSNN:
        first, last = self._only("Input"), self._only("Output")
        for name in self._ordered():
            self.name = name
            if name not in self.values:  # the second of a pair came with the first
                with _blaming(self.source, f"node {name} ({type(self.nodes[name]).__name__})"):
                    self.values[name] = self._value(name)
        self.graph.output(self.values[last])
        module = fx.GraphModule(self.parts, self.graph).eval().requires_grad_(False)
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
        neurons = {name: neuron for name, neuron in self.neurons.items() if name in dict(module.named_modules())}
        if not neurons:
            raise self.error("has no neurons that reach its output, so it is no spiking network.")
        shape, dims = self._input_shape(first), self._frame_dims(first)
        size = (shape[1], shape[2]) if dims == (4,) else None  # [C, H, W], for which pooling was written
        decay = float(self.metadata.get("readout_decay", 1.0)) if self.use_metadata else 1.0
        return GraphSNN(spiking(module.to(self.dtype), neurons), dims, size, readout_decay=decay)

    def _frame_dims(self, first: str) -> tuple[int, ...]:
        """Ranks of images; ours may take them flattened or not."""
        rank = len(self._input_shape(first)) + 1
        if FORMAT not in self.metadata:
            return (rank,)
        dims = tuple(map(int, self.metadata["frame_dims"]))
        if rank not in dims:
            raise self.error(
                f"holds images of {rank - 1} dimensions, but says that batches have {dims}. Write it again."
            )
        return dims

    def _input_shape(self, name: str) -> tuple[int, ...]:
        shape = self.nodes[name].input_type["input"]
        if shape is None:
            raise self.error(f"does not say what shape the images of {name} have. Give the Input node its shape.")
        return tuple(_numbers(shape))

    def _only(self, kind: str) -> str:
        found = [name for name, node in self.nodes.items() if type(node).__name__ == kind]
        if len(found) != 1:
            raise self.error(f"has {len(found)} nodes of kind {kind}, but must have one.")
        return found[0]

    def _ordered(self) -> list[str]:
        """Names so that each comes after its inputs."""
        order: list[str] = []
        waiting = dict.fromkeys(self.nodes)
        while waiting:
            ready = [name for name in waiting if all(source not in waiting for source in self.inputs[name])]
            if not ready:
                raise self.error(
                    f"is recurrent: {' -> '.join(self._loop(waiting))}. Networks without feedback can be read."
                )
            order += ready
            for name in ready:
                del waiting[name]
        return order

    def _loop(self, waiting: Mapping[str, None]) -> list[str]:
        """A loop among nodes each of which waits for another."""
        path = [next(iter(waiting))]
        while path.count(path[-1]) < 2:
            path.append(next(source for source in self.inputs[path[-1]] if source in waiting))
        return path[path.index(path[-1]) :][::-1]

    # Values

    def _value(self, name: str) -> fx.Node:
        node = self.nodes[name]
        kind = type(node).__name__
        if kind == "Input":
            return self._images(name)
        if kind not in KNOWN:
            what = "a graph inside the graph" if kind == "NIRGraph" else f"a {kind}, which is not known here"
            raise self.error(f"cannot be read: node {name} is {what}. Known are {', '.join(KNOWN)}.")
        if not self.inputs[name]:
            raise self.error(f"has a node {name} ({kind}) without input.")
        value = self._input(name)
        if kind == "Output":
            return value
        if kind in NEURONS:
            return self._neuron(name, node, kind, value)
        if kind in LAYERS:
            return self._called(name, _layer(node, kind, self.dtype), value)
        if kind in ("AvgPool2d", "SumPool2d"):
            kernel, stride, padding = (_numbers(getattr(node, key)) for key in ("kernel_size", "stride", "padding"))
            plain = (value, kernel, stride, padding)
            summed = (*plain, False, True, 1)  # a divisor of 1
            return self._computed("avg_pool2d", summed if kind == "SumPool2d" else plain)
        if kind == "Scale":
            path = self._path(f"{name}_scale")
            self.parts[path] = self._fitting("scale", _tensor(node.scale), value).unsqueeze(0).to(self.dtype)
            return self._computed("mul", (value, self.graph.create_node("get_attr", path)))
        return self._computed("reshape_samples", (value, self._flat(name, node, sizes(value))))

    def _images(self, name: str) -> fx.Node:
        shape = self._input_shape(name)
        value = with_sizes(self.graph.placeholder("images"), shape)
        if len(shape) == 1 and FORMAT in self.metadata:  # ours may come as images, too
            return self._computed("reshape_samples", (value, list(shape)))
        return value

    def _input(self, name: str) -> fx.Node:
        """The sum of what edges bring."""
        total, *others = (self.values[source] for source in self.inputs[name])
        for other in others:
            if sizes(other) != sizes(total):
                raise _NIRError(f"{self.here()} gets inputs of shapes {list(sizes(total))} and {list(sizes(other))}.")
            total = self._computed("add", (total, other))
        return total

    def _called(self, name: str, module: nn.Module, value: fx.Node) -> fx.Node:
        path = self._path(name)
        self.parts[path] = module
        node = self.graph.call_module(path, (value,))
        return with_sizes(node, tuple(module(self._nothing(value)).shape[1:]))

    def _computed(self, function: str, arguments: tuple[Any, ...]) -> fx.Node:
        node = self.graph.call_function(FUNCTIONS[function], arguments)
        if function in ("add", "mul"):
            return with_sizes(node, sizes(arguments[0]))
        value, *others = arguments
        return with_sizes(node, tuple(FUNCTIONS[function](self._nothing(value), *others).shape[1:]))

    def _nothing(self, value: fx.Node) -> Tensor:
        """No samples of a value: what is computed on them tells what fits, and the shape of the result."""
        return torch.zeros(0, *sizes(value), dtype=self.dtype)

    def _path(self, name: str) -> str:
        return free_path(node_name(name), self.parts)

    def _fitting(self, what: str, tensor: Tensor, value: fx.Node) -> Tensor:
        """Numbers for each value, or one for all."""
        if tensor.numel() == 1:
            return tensor.reshape(())
        if tuple(tensor.shape) != sizes(value):
            raise _NIRError(
                f"{self.here()} has {what} of shape {list(tensor.shape)}, but its input is {list(sizes(value))}."
            )
        return tensor

    def _flat(self, name: str, node: Any, shape: tuple[int, ...]) -> list[int]:
        """Sizes of a flattened sample. Some writers count the batch as a dimension: what comes after it tells."""
        start, end = int(node.start_dim), int(node.end_dim)
        spelled = _merged(shape, start, end)
        counted = _merged(shape, start - (start > 0), end - (end > 0))
        taken = [_taken_by(self.nodes[after]) for after in self.nodes if name in self.inputs[after]]
        return counted if counted in taken and spelled not in taken else spelled

    # Neurons

    def _neuron(self, name: str, node: Any, kind: str, value: fx.Node) -> fx.Node:
        told = _plain(node.metadata) if self.use_metadata else {}
        second = self._second_of(name) if self.use_metadata else None
        neuron = self._ours(node, told, second, value) if "ranvier_neuron" in told else None
        if neuron is None:
            neuron = self._foreign(node, told, value)
        path = self._path(name)
        self.parts[path] = Rectifier()
        self.neurons[path] = neuron.to(self.dtype)
        fired = self.graph.call_module(path, (value,))
        if second is None or not isinstance(neuron, LIFPair):
            return with_sizes(fired, sizes(value))
        channels = sizes(value)[0]
        halves = (
            self.graph.call_function(slice_axis, (fired, 1, begin, begin + channels, None)) for begin in (0, channels)
        )
        first, self.values[second] = (with_sizes(half, sizes(value)) for half in halves)
        return first

    def _second_of(self, name: str) -> str | None:
        """The neuron that the spikes of `name` reset."""
        for other, node in self.nodes.items():
            same = sorted(self.inputs[other]) == sorted(self.inputs[name])
            if same and _plain(getattr(node, "metadata", {})).get(PAIR) == name:
                return other
        return None

    def _ours(self, node: Any, told: Mapping[str, Any], second: str | None, value: fx.Node) -> Neuron | None:
        """The neuron that was written, or None if the file was changed so that it is that no more."""
        kind = told["ranvier_neuron"]
        if kind == "ConvertedIF":
            return _converted(node, told) if self._is(node, value) else None
        threshold = float(told["ranvier_v_threshold"])
        given: dict[str, Any] = {"v_threshold": threshold, "reset": told.get("ranvier_reset", "hard")}
        if kind == "IF":
            return IF(**given) if self._is(node, value, v_threshold=threshold) else None
        if kind == "PLIF":
            neuron = PLIF(**given)
            neuron.decay.data = torch.tensor(float(told["ranvier_decay"]), dtype=torch.float64)
            return neuron if self._is(node, value, v_threshold=threshold, tau=neuron.tau) else None
        given["tau"] = tau = float(told["ranvier_tau_steps"])
        if kind != "LIF" or not self._is(node, value, v_threshold=threshold, tau=tau):
            return None
        pair = LIFPair(**given)
        paired = second and self._is(self.nodes[second], value, v_threshold=pair.params.v_burst, tau=tau)
        return pair if paired else LIF(**given)

    def _is(self, node: Any, value: fx.Node, **expected: float) -> bool:
        """Whether a node has the numbers that were written with it, for every neuron."""
        found = self._constants(node)
        expected |= {"r": 1.0, "v_reset": 0.0} | ({"v_leak": 0.0} if "tau" in expected else {})
        return ("tau" in found) == ("tau" in expected) and all(
            tuple(found[name].shape) == sizes(value)
            and bool(((found[name].double() - number).abs() <= CLOSE * abs(number)).all())
            for name, number in expected.items()
        )

    def _constants(self, node: Any) -> dict[str, Tensor]:
        """What `AffineIF` calls them, in steps; in the precision of the file, in which dt / dt is 1."""
        names = [name for name in ("tau", "r", "v_leak", "v_threshold", "v_reset") if hasattr(node, name)]
        found = {name: _tensor(getattr(node, name)) for name in names}
        step = self._step()
        if "tau" in found:
            return {**found, "tau": found["tau"] / step}
        return {**found, "r": found["r"] / (1 / step)}

    def _step(self) -> float:
        """Seconds."""
        if self.dt is None:
            raise self.error("does not say how long a step is. Pass dt, in seconds: dt=1e-3.")
        return self.dt

    def _foreign(self, node: Any, told: Mapping[str, Any], value: fx.Node) -> Neuron:
        given: dict[str, Any] = {name: self._fitting(name, n, value) for name, n in self._constants(node).items()}
        tau = given.pop("tau", None)
        if tau is not None:
            if not bool((tau >= 1 - CLOSE).all()):
                dt = self._step()
                raise _NIRError(
                    f"{self.here()} has a time constant of {float(tau.min()) * dt:.3g} s, below dt = {dt:.3g} s, so "
                    "that a step would overshoot. Pass a smaller dt."
                )
            tau = tau.clamp_min(1)
        return AffineIF(
            tau=tau,
            **given,
            ties_fire=bool(told.get("ranvier_ties_fire", False)),
            reset=told.get("ranvier_reset", "hard"),
            fires="v_threshold" in given,
        )


def _converted(node: Any, told: Mapping[str, Any]) -> ConvertedIF | None:
    threshold = _tensor(node.v_threshold)
    flat = threshold.reshape(len(threshold), -1)
    if bool((flat != flat[:, :1]).any()):
        return None
    bias, v_init = _tensor(told["ranvier_bias"]), _tensor(told["ranvier_v_init"])
    shape = v_init.shape if v_init.ndim > 1 else None
    signed = bool(told["ranvier_signed"])
    neuron = ConvertedIF(len(threshold), steps=len(bias), shape=shape, signed=signed, binary=True)
    neuron.load_state_dict({"threshold": flat[:, 0].clone(), "bias": bias, "v_init": v_init}, assign=True)
    return neuron


def _layer(node: Any, kind: str, dtype: torch.dtype) -> nn.Module:
    """A layer with the weights of a node."""
    state = {"weight": _tensor(node.weight).to(dtype)}
    if kind != "Linear":
        state["bias"] = _tensor(node.bias).to(dtype)
    weight = state["weight"]
    module: nn.Module
    if kind in ("Affine", "Linear"):
        module = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in state, device="meta")
    else:
        build: Any = nn.Conv1d if kind == "Conv1d" else nn.Conv2d
        groups = int(node.groups)
        module = build(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            stride=_numbers(node.stride),
            padding=node.padding if isinstance(node.padding, str) else _numbers(node.padding),
            dilation=_numbers(node.dilation),
            groups=groups,
            device="meta",
        )
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False)


def _taken_by(node: Any) -> list[int] | None:
    """Sizes of what a node takes, where its parameters tell."""
    kind = type(node).__name__
    if kind in ("Affine", "Linear"):
        return [int(node.weight.shape[-1])]
    if kind == "Output":
        shape = node.output_type["output"]
        return None if shape is None else _numbers(shape)
    if kind in NEURONS or kind == "Scale":
        return list(np.shape(node.scale if kind == "Scale" else node.r))
    return None


def _merged(shape: Sequence[int], start: int, end: int) -> list[int]:
    """Sizes after axes `start` to `end` became one."""
    end %= len(shape)
    return [*shape[:start], int(np.prod(shape[start : end + 1])), *shape[end + 1 :]]


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))


def _numbers(value: Any) -> list[int]:
    return [int(number) for number in np.atleast_1d(np.asarray(value)).tolist()]


def _plain(metadata: Any) -> dict[str, Any]:
    """Metadata as HDF5 returns them, with texts and numbers of Python."""
    if not isinstance(metadata, Mapping):
        return {}
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in metadata.items()}
