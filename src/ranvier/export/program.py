"""Networks as programs of torch.export: all steps at once, or one step whose state comes in and goes out.

What is captured is the reference of `ranvier.dynamics`: plain torch operations, unrolled over the steps, and no kernel.
"""

import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ranvier import dynamics, provenance
from ranvier.atomic import replacing
from ranvier.checks import check_count, shape_of
from ranvier.dynamics import ConvertedState, LeakyMeanState, SummedState
from ranvier.dynamics.scan import per_channel
from ranvier.export.receipt import BATCH, ExportError, Port, Receipt, Runner, check_parity
from ranvier.models import SpikingNetwork
from ranvier.nn import IF, LIF, LIFB, PLIF, ConvertedIF, LIFPair, Neuron
from ranvier.nn.converted import fixed_copy

CARD = "ranvier.json"
"""Name of the card inside a `*.pt2` file."""

TRACED_BATCH = 2
"""Batch that an open batch is traced with: of a batch of 1, the tracer would conclude that it is always 1."""

FROM_ZERO = (IF, LIF, LIFB, LIFPair, PLIF)
"""Neurons that start with a potential of 0, as a state does that comes into a file for the first time."""

TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")
"""What the tracer notes at every operation: lines of source with their paths, several times the size of the network."""


def to_program(
    model: nn.Module,
    path: str | Path,
    *,
    images: Tensor,
    steps: int,
    streaming: bool = False,
    dynamic_batch: bool = True,
    class_names: Sequence[str] | None = None,
) -> Receipt:
    """Write a network as a program that `torch.export.load` reads without ranvier.

        all steps   images [B, ...]                           -> logits [T, B, K]
        streaming   images [B, ...], state_0, state_1, ...    -> logits [B, K], state_0, state_1, ...

    The network is exported as it runs in evaluation mode, whatever mode it is in, from a copy on the CPU. A state is
    zeros before the first step, whatever it means; the receipt says what each one is. The file carries a card,
    `ranvier.json`, with versions, T and layout.

    Args:
        model: A network of `ranvier.models`, or what `ranvier.conversion` made; compiled or not.
        path: The file, `*.pt2`.
        images: A constant input `[B, ...]` as the network is used on, at best 8 or more: the file is run on them.
        steps: T. With `streaming`, T to check over, which the file does not depend on.
        streaming: Export one step. Its size does not grow with T, and every step may have images of its own.
        dynamic_batch: Whether the file takes batches of any size, or only of that of `images`.
        class_names: Names of the K classes, for the card.

    Returns:
        The receipt, with the comparison of network and file.

    Raises:
        ExportError: The network cannot be traced, or the file computes something else; nothing was written.
        OSError: The file could not be written; an older one is untouched.
        TypeError: `model` is no such network, or `images` is no tensor of float32.
        ValueError: Images that the network does not take, steps out of range, parameters that are not float32, or a
            file name that does not end in `.pt2`.

    Read `*.pt2` files from people you trust only: `torch.export.load` may unpickle.

    >>> import tempfile
    >>> from ranvier.models import mlp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     receipt = to_program(mlp([16, 8, 3]), f"{folder}/mlp.pt2", images=torch.rand(8, 16), steps=2)
    ...     program = torch.export.load(receipt.path).module()
    >>> program(torch.rand(5, 16)).shape
    torch.Size([2, 5, 3])
    """
    check_ending(path, ".pt2")
    with torch.inference_mode(False), torch.no_grad():
        prepared = prepare(model, images, steps, streaming, dynamic_batch, class_names)
        with replacing(path) as temporary:
            capture = capture_network(prepared)
            buffer = io.BytesIO()  # given a path, torch insists on its ending
            with without_exporter_noise():
                torch.export.save(capture.program, buffer, extra_files={CARD: json.dumps(capture.card, indent=2)})
            temporary.write_bytes(buffer.getvalue())
            return Receipt(
                path=str(path),
                format="torch.export",
                opset=None,
                bytes=temporary.stat().st_size,
                checked_with=f"torch {torch.__version__}",
                versions=provenance.versions(),
                **confirmed(prepared, capture, _reader(temporary)),
            )


def _reader(path: Path) -> Runner:
    """The file as a function."""
    with without_exporter_noise():
        loaded = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = loaded(*tensors)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return call


@dataclass(frozen=True)
class Prepared:
    """What is to be exported: a copy of the network as the file will run it, and the user's wishes, checked."""

    network: SpikingNetwork
    images: Tensor
    steps: int
    streaming: bool
    dynamic_batch: bool
    class_names: tuple[str, ...]
    num_classes: int


@dataclass(frozen=True)
class Capture:
    """A traced network: the program, what goes in and comes out, and what its file says of itself."""

    program: torch.export.ExportedProgram
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    card: dict[str, Any]


def check_ending(path: str | Path, ending: str) -> None:
    """Raise unless the file is named as its readers expect."""
    if Path(path).suffix != ending:
        raise ValueError(f"path is {path}, but must end in {ending}, by which readers know the format.")


def prepare(
    model: nn.Module,
    images: Tensor,
    steps: int,
    streaming: bool,
    dynamic_batch: bool,
    class_names: Sequence[str] | None,
) -> Prepared:
    """Check what the user wants, with a run of one image, before anything is traced.

    Raises:
        TypeError: `model` is no network of ours, or `images` is no tensor of float32.
        ValueError: They do not fit, `steps` is out of range, or there are names for another number of classes.
    """
    steps = check_count("steps", steps)
    network = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if not isinstance(network, SpikingNetwork):
        raise TypeError(
            f"model is a {type(network).__name__}, but export knows networks of ranvier.models and ranvier.conversion. "
            "Of a wrapper (DataParallel, say) pass what it wraps, model.module; convert an ANN first: "
            "ranvier.conversion.convert(ann, images, steps=4)."
        )
    network = fixed_copy(network).cpu().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, Neuron):
            module.implementation = "reference"
    dtypes = {tensor.dtype for tensor in network.state_dict().values() if tensor.dtype.is_floating_point}
    if dtypes - {torch.float32}:
        raise ValueError(f"the network has tensors of {', '.join(map(str, dtypes))}. Export float32: model.float().")
    _check_images(images, network)
    images = images.detach().to("cpu", copy=True)
    try:
        logits = network(images[:1], steps)
    except RuntimeError as error:
        raise ValueError(
            f"images have shape {shape_of(images)}, which the network does not take: {error}. "
            "Pass a batch as the network was trained on."
        ) from error
    names, num_classes = tuple(class_names or ()), logits.shape[2]
    if class_names is not None and len(names) != num_classes:
        raise ValueError(f"class_names has {len(names)} names, but the network tells {num_classes} classes apart.")
    return Prepared(network, images, steps, streaming, dynamic_batch, names, num_classes)


def _check_images(images: Tensor, network: SpikingNetwork) -> None:
    """Raise unless they are a constant input of float32."""
    if not isinstance(images, Tensor) or images.dtype != torch.float32:
        came = f"a tensor of {images.dtype}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise TypeError(f"images are {came}, but must be a torch.Tensor of float32, [B, ...].")
    if images.ndim not in network.frame_dims or len(images) == 0:
        ranks = " or ".join(map(str, network.frame_dims))
        raise ValueError(
            f"images have shape {shape_of(images)}, but export takes a constant input of {ranks} dimensions, [B, ...], "
            "B > 0. Of a sequence [T, B, ...] pass one step, images[0], and streaming=True: the file then takes "
            "the steps one by one."
        )
    if not bool(images.isfinite().all()):
        raise ValueError("the images hold NaN or infinity, on which nothing can be compared. Mend the data.")


def capture_network(prepared: Prepared) -> Capture:
    """Trace what `prepare` gave.

    Raises:
        ExportError: The network holds something that torch.export cannot trace.
    """
    images, num_classes = prepared.images, prepared.num_classes
    batch = TRACED_BATCH if prepared.dynamic_batch else len(images)
    size = BATCH if prepared.dynamic_batch else batch
    example = images.new_zeros(batch, *images.shape[1:])
    module: AllSteps | OneStep
    state: tuple[Port, ...] = ()
    if prepared.streaming:
        module = OneStep(prepared.network, example)
        state = module.ports(size)
        logits = Port("logits", (size, num_classes), "float32", "scores of this step; the answer is the mean so far")
        given = "the input of this step"
    else:
        module = AllSteps(prepared.network, prepared.steps)
        held = "scores of each step; the answer after t steps is the mean of the first t"
        logits = Port("logits", (prepared.steps, size, num_classes), "float32", held)
        given = "a constant input"
    card = {
        "ranvier": provenance.versions()["ranvier"],
        "torch": torch.__version__,
        "commit": provenance.commit() or "",
        "steps": prepared.steps,
        "streaming": prepared.streaming,
        "layout": "[B, K]" if prepared.streaming else "[T, B, K]",
        "state": {port.name: port.holds for port in state},
        "class_names": prepared.class_names,
    }
    return Capture(
        program=_trace(module, example, state, prepared.dynamic_batch),
        inputs=(Port("images", (size, *images.shape[1:]), "float32", given), *state),
        outputs=(logits, *(replace(port, name=f"next_{port.name}") for port in state)),
        card=card,
    )


def _trace(
    module: nn.Module, images: Tensor, state: tuple[Port, ...], dynamic_batch: bool
) -> torch.export.ExportedProgram:
    inputs = (images, *(port.zeros(len(images)) for port in state))
    shapes: Any = None
    if dynamic_batch:
        axis = {0: torch.export.Dim(BATCH)}
        shapes = (axis, tuple(axis if port.shape else None for port in state)) if state else (axis,)
    try:
        with without_exporter_noise():
            # Strictly, because the graph of a converted network compares batch sizes by len(), which turns the open
            # size into a number unless the tracer reads the source.
            program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=True)
    except RuntimeError as error:
        raise ExportError(
            f"torch.export cannot trace the network: {str(error).strip().splitlines()[0]} Neurons and layers of your "
            "own must be made of torch operations and not decide by values; ranvier.kernels.scan makes such neurons."
        ) from error
    for node in program.graph.nodes:
        for key in TRACES:
            node.meta.pop(key, None)
    program.example_inputs = None  # a batch of states, which the file would keep
    return program


def confirmed(prepared: Prepared, capture: Capture, call: Runner) -> dict[str, Any]:
    """Fields of a receipt that all formats share, after comparing the file with the network.

    Raises:
        ExportError: The file computes something else.
    """
    parity = check_parity(
        prepared.network, call, capture.inputs, prepared.images, prepared.steps, streaming=prepared.streaming
    )
    return {
        "steps": prepared.steps,
        "streaming": prepared.streaming,
        "inputs": capture.inputs,
        "outputs": capture.outputs,
        **parity._asdict(),
    }


class AllSteps(nn.Module):
    """`images [B, ...] -> logits [T, B, K]`."""

    def __init__(self, network: SpikingNetwork, steps: int) -> None:
        super().__init__()
        self.network = network
        self.steps = steps

    def forward(self, images: Tensor) -> Tensor:
        """Run all steps."""
        logits: Tensor = self.network(images, self.steps)
        return logits


BETWEEN: dict[type, str] = {SummedState: "max-pooling", LeakyMeanState: "the readout"}
"""Kinds of state of what is no neuron."""


class Stepped(NamedTuple):
    """State of a neuron that has to know which step it is."""

    own: Any
    """What the neuron carries, a NamedTuple of tensors."""
    step: Tensor
    """Steps so far, int64 `[]`."""


class ConvertedTensors(NamedTuple):
    """What `ranvier.dynamics.ConvertedState` holds in tensors."""

    v: Tensor
    emitted: Tensor


class SteppedIF(Neuron):
    """One step of a converted neuron that looks up in its state which step it is.

    In the state of `ConvertedIF` the step is a number, which a trace would keep for ever.
    """

    def __init__(self, neuron: ConvertedIF) -> None:
        super().__init__("reference")
        self.neuron = neuron

    def scan(self, current: Tensor, state: Stepped | None) -> tuple[Tensor, Stepped]:  # type: ignore[override]
        """Run one step of `converted_scan`, on `[1, B, C, ...]`. At step 0 the state's potential does not count."""
        own, first = self.neuron, current[0]
        if state is None:
            v = torch.zeros_like(first)
            state = Stepped(ConvertedTensors(v, v if own.signed else v.new_empty(0)), _no_steps())
        start = own.v_init if own.v_init.ndim > 1 else per_channel(own.v_init, first)
        # A look-up fails past the last row, where a slice would be empty: biases end where calibration did.
        bias = own.bias.index_select(0, state.step.reshape(1)) if len(own.bias) > 1 else own.bias
        before = ConvertedState(torch.where(state.step == 0, start, state.own.v), state.own.emitted, 0)
        sent, after = dynamics.converted_scan(current, before, own.threshold, bias, own.v_init, own.signed, own.binary)
        return sent, Stepped(ConvertedTensors(after.v, after.emitted), state.step + 1)

    def extra_repr(self) -> str:
        """Nothing: the neuron inside tells."""
        return ""


class FromRest(Neuron):
    """One step of a neuron that may start from anything: at step 0 from where it does when it gets no state.

    That is not known before the neuron runs, so that it runs twice, once without the state.
    """

    def __init__(self, neuron: Neuron) -> None:
        super().__init__("reference")
        self.neuron = neuron

    def scan(self, current: Tensor, state: Stepped | None) -> tuple[Tensor, Stepped]:  # type: ignore[override]
        """Run one step of the neuron."""
        sent, after = self.neuron.scan(current, None)
        if state is None:
            return sent, Stepped(after, _no_steps() + 1)
        sent_on, after_on = self.neuron.scan(current, state.own)
        rests = state.step == 0
        carried = [torch.where(rests, *pair) for pair in zip(after, after_on, strict=True)]
        return torch.where(rests, sent, sent_on), Stepped(type(after)(*carried), state.step + 1)

    def extra_repr(self) -> str:
        """Nothing: the neuron inside tells."""
        return ""


def _no_steps() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


class OneStep(nn.Module):
    """`images [B, ...], *state -> logits [B, K], *state`, with the states of all neurons as plain tensors.

    All neurons are at the same step, so that those that have to know it share one count, the first tensor. These are
    the neurons that may start from something else than zeros: `SteppedIF` and `FromRest`.

    Args:
        network: From `prepare`; copied.
        example: Images, whose states show what there is to carry.
    """

    def __init__(self, network: SpikingNetwork, example: Tensor) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        for module in list(self.network.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, ConvertedIF):
                    setattr(module, name, SteppedIF(child))
                elif isinstance(child, Neuron) and type(child) not in FROM_ZERO:
                    setattr(module, name, FromRest(child))
        names = _NamesInOrder(self.network)
        _, states = self.network(example, 1, return_state=True)
        names.remove()
        self.stepped = tuple(isinstance(state, Stepped) for state in states)
        states = tuple(state.own if isinstance(state, Stepped) else state for state in states)
        self.kinds = tuple(type(state) for state in states)
        self.examples: list[tuple[str, Tensor]] = []
        """What each tensor holds, and one like it."""
        if any(self.stepped):
            self.examples.append(("steps so far", _no_steps()))
        neurons = iter(names.found)
        self.slots = tuple(
            self._slots(BETWEEN.get(kind) or next(neurons), state)
            for kind, state in zip(self.kinds, states, strict=True)
        )
        """For each state and each field of it its place among the tensors, or None where it is empty."""

    def _slots(self, name: str, state: Any) -> tuple[int | None, ...]:
        if not hasattr(state, "_fields") or not all(isinstance(value, Tensor) for value in state):
            raise ExportError(
                f"{name} has a {type(state).__name__} as state, but a state that goes in and out of a file must be a "
                "NamedTuple of tensors, as ranvier.kernels.scan returns it. Without streaming=True it can be exported."
            )
        return tuple(self._slot(name, field, value) for field, value in state._asdict().items())

    def _slot(self, name: str, field: str, value: Tensor) -> int | None:
        if value.numel() == 0:
            return None
        what = {
            "v": "potentials",
            "emitted": "spikes less negative ones so far",
            "total": "sums so far",
            "sent": "logits sent so far",
            "weight": "weight of the steps so far",
            "steps": "steps so far",
        }.get(field, field)
        self.examples.append((f"{what} of {name.removesuffix('.neuron')}", value))
        return len(self.examples) - 1

    def ports(self, batch: int | str) -> tuple[Port, ...]:
        """The state as inputs."""
        return tuple(
            Port(
                f"state_{index}",
                (batch, *value.shape[1:]) if value.ndim else (),
                str(value.dtype).removeprefix("torch."),
                holds,
            )
            for index, (holds, value) in enumerate(self.examples)
        )

    def forward(self, images: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Run one step."""
        before = [
            kind(*[images.new_empty(0) if slot is None else state[slot] for slot in slots])
            for kind, slots in zip(self.kinds, self.slots, strict=True)
        ]
        before = [Stepped(own, state[0]) if stepped else own for own, stepped in zip(before, self.stepped, strict=True)]
        logits, after = self.network(images, 1, state=before, return_state=True)
        carried = list(state)
        for values, slots in zip(after, self.slots, strict=True):
            if isinstance(values, Stepped):
                carried[0], values = values.step, values.own
            for value, slot in zip(values, slots, strict=True):
                if slot is not None:
                    carried[slot] = value
        return (logits[0], *carried)


class _NamesInOrder:
    """Names of neurons in the order in which they run."""

    def __init__(self, network: nn.Module) -> None:
        self.found: list[str] = []
        self.handles = [
            module.register_forward_pre_hook(lambda _, __, name=name: self.found.append(name))
            for name, module in network.named_modules()
            if isinstance(module, Neuron)
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@contextmanager
def without_exporter_noise() -> Iterator[None]:
    """Keep off the user's screen what torch's exporters say of their own source and of packages nobody needs here.

    Seen with torch 2.13: deprecations inside torch, and log lines on torchvision not being there and on opsets. The
    opset of the file is checked instead.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
