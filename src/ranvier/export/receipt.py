"""What was written, and the proof that the file computes what the network computes."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ranvier.atomic import write_json
from ranvier.checks import shape_of
from ranvier.models import SpikingNetwork

BATCH = "batch"
"""Size of an axis that is left open."""

ROUNDING = 2.0**-16
"""Largest difference of logits that counts as rounding, as a share of the largest logit.

128 roundings of float32 (2^-23 each). Sums in the order of another runtime differed by 1 to 4 of them, however deep the
network, because a layer's rounding goes no further than its neurons, which round to spikes. A spike more or less moved
logits by 2^-10 and more: the two are far apart. Both were measured on networks of `ranvier.models`.
"""

NOISE = 2.0**-19
"""By how much, relative to itself, each number of a network is changed to see what rounding may do: 16 roundings of
float32. Runtimes that add in another order differ by less.
"""

PROBES = 16
"""How often that is tried before a sample counts as one that rounding does not move.

A potential 4 roundings below its threshold, the most that sums were seen to differ by, crosses it in about two of five
probes: in 1,000 such samples that is missed less than once.
"""

LARGER = 3.0
"""How much larger than the network's own the differences may be, on average, where rounding moves most samples."""

MANY = 8
"""So many flips, none of which float64 shows, are not chance: 1 in 256, if it shows half of what rounding causes."""

Runner = Callable[..., tuple[Tensor, ...]]
"""A file that was read back, as a function of tensors."""


class ExportError(RuntimeError):
    """The network cannot be exported, or the file would not compute what the network computes."""


@dataclass(frozen=True)
class Port:
    """An input or output of the file."""

    name: str
    shape: tuple[int | str, ...]
    """Sizes; `batch` where any will do."""
    dtype: str
    """As numpy calls it."""
    holds: str
    """What it means."""

    def zeros(self, batch: int) -> Tensor:
        """Zeros for `batch` samples: the state before the first step."""
        sizes = [batch if size == BATCH else int(size) for size in self.shape]
        return torch.zeros(sizes, dtype=getattr(torch, self.dtype), device="cpu")

    @property
    def sizes(self) -> str:
        """The shape as it is written in messages, `[batch, 3, 32, 32]`."""
        return f"[{', '.join(map(str, self.shape))}]"

    def __str__(self) -> str:
        return f"{self.name} {self.sizes} {self.dtype}: {self.holds}"


class Parity(NamedTuple):
    """How a file compares with its network; the fields of `Receipt` of the same names."""

    difference: float
    tolerance: float
    flipped: int
    agreement: float
    samples: int
    batch_sizes: tuple[int, ...]


@dataclass(frozen=True)
class Receipt:
    """What an export wrote, and how the file compares with the network.

    `print` of rich shows a table.

    Attributes:
        path: The file.
        format: `onnx` or `torch.export`.
        steps: T of the file, or T that a streaming file was checked over.
        streaming: Whether the file computes one step, with its state as inputs and outputs.
        opset: Version of the ONNX operators; None for torch.export.
        bytes: Size of the file.
        inputs: In order.
        outputs: In order.
        checked_with: What ran the file after it was read back, with its version.
        difference: Largest difference of logits between network and file.
        tolerance: What counts as rounding: `ROUNDING` times the largest logit.
        flipped: Samples that differ by more: where rounding put a potential on the other side of its threshold.
        agreement: Share of samples with the same answer after all steps.
        samples: How many were compared.
        batch_sizes: In what batches; the second one tells whether the batch is open.
        versions: Of python, ranvier, torch and what wrote the file.
    """

    path: str
    format: str
    steps: int
    streaming: bool
    opset: int | None
    bytes: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    checked_with: str
    difference: float
    tolerance: float
    flipped: int
    agreement: float
    samples: int
    batch_sizes: tuple[int, ...]
    versions: dict[str, str]

    def __str__(self) -> str:
        return f"{self.path}: {self.format}, {self.what}, {self.bytes / 1024:.0f} KiB; {self.verdict}"

    @property
    def what(self) -> str:
        """What the file computes."""
        return "one step, state in and out" if self.streaming else f"{self.steps} steps"

    @property
    def verdict(self) -> str:
        """How file and network compare, in words."""
        spikes = f", spikes flipped in {self.flipped} of {self.samples} samples" if self.flipped else ""
        batches = " and ".join(map(str, self.batch_sizes))
        return (
            f"logits differ by {self.difference:.1e} at most (rounding: {self.tolerance:.1e}){spikes}, "
            f"{100 * self.agreement:.4g} % equal answers in batches of {batches}, run by {self.checked_with}"
        )

    def __rich__(self) -> Table:
        """Table for the terminal."""
        opset = f", opset {self.opset}" if self.opset else ""
        table = Table(
            title=escape(f"{self.path}: {self.format}{opset}, {self.what}, {self.bytes / 1024:.0f} KiB"),
            caption=self.verdict,
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        for title in ("", "name", "shape", "type", "holds"):
            table.add_column(title, overflow="fold")
        for kind, ports in (("in", self.inputs), ("out", self.outputs)):
            for port in ports:
                table.add_row(kind, port.name, escape(port.sizes), port.dtype, port.holds)
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write everything as json."""
        write_json(path, self.to_json())


def check_parity(
    network: SpikingNetwork,
    call: Runner,
    inputs: tuple[Port, ...],
    images: Tensor,
    steps: int,
    streaming: bool,
) -> Parity:
    """Compare a file with its network on images; where the batch is open, in a batch of another size as well.

    Logits may differ by rounding. Rounding may also move a potential across its threshold, and then the logits of the
    sample differ by what a spike is worth. That counts as rounding only where the network itself does it to that very
    sample: in float64, as it is or with all its numbers changed by about as much as rounding would. Where that moves
    most samples, sizes are compared too. Float64 as it is shows about half of the flips that rounding causes. Where it
    shows none of many, the network computes exactly, and the file decides ties otherwise.

    Args:
        network: In evaluation mode.
        call: What the file computes.
        inputs: Of the file.
        images: `[B, ...]`.
        steps: T; a streaming file is run so often, with its state carried.
        streaming: Whether the file computes one step.

    Returns:
        The comparison.

    Raises:
        ExportError: The file computes something else.
    """
    batches = [images]
    if inputs[0].shape[0] == BATCH:
        batches.append(images[:1] if len(images) > 1 else images.repeat(2, *[1] * (images.ndim - 1)))
    expected = [network(batch, steps) for batch in batches]
    found = [_run(call, inputs, batch, steps, streaming) for batch in batches]
    for one, other in zip(expected, found, strict=True):
        if one.shape != other.shape:
            raise ExportError(
                f"the file gives logits {shape_of(other)}, but the network {shape_of(one)}. Nothing was written."
            )
    ours, theirs = torch.cat(expected, 1), torch.cat(found, 1)
    tolerance = ROUNDING * float(ours.abs().max())
    distance = _distance(ours, theirs)
    flipped = ~(distance <= tolerance)  # also where it is NaN
    if bool(flipped.any()):
        precise, own = _moved_by_rounding(network, torch.cat(batches), steps, ours, flipped, tolerance)
        moved = own > tolerance
        larger = not float(distance.mean()) <= LARGER * float(own.mean())
        exact = int(flipped.sum()) >= MANY and not bool((precise > tolerance)[flipped].any())
        if exact or not bool(moved[flipped].all()) or (2 * int(moved.sum()) > len(moved) and larger):
            raise ExportError(
                "the file does not compute what the network does: logits differ by up to "
                f"{float(distance.max()):.2e}, in {int(flipped.sum())} of {len(distance)} samples by more than "
                f"rounding ({tolerance:.1e}), while rounding in the network itself moves {int(moved[flipped].sum())} "
                f"of these, by up to {float(own.max()):.2e}. Nothing was written; please report it."
            )
    same = ours.mean(0).argmax(1) == theirs.mean(0).argmax(1)
    return Parity(
        difference=float(distance.max()),
        tolerance=tolerance,
        flipped=int(flipped.sum()),
        agreement=float(same.double().mean()),
        samples=len(distance),
        batch_sizes=tuple(map(len, batches)),
    )


def _distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Largest difference of logits `[T, B, K]` of each sample, `[B]`."""
    return (ours - theirs).abs().amax((0, 2))


def _moved_by_rounding(
    network: SpikingNetwork, images: Tensor, steps: int, logits: Tensor, asked: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """How far float64, and how far rounding, moves the logits of each sample, `[B]`.

    The second is tried until it moved all that were asked for.
    """
    own = logits.new_zeros(len(images))
    as_it_is = own
    for probe in range(PROBES):
        generator = torch.Generator().manual_seed(probe)
        precise = copy.deepcopy(network).double()
        changed = images.double()
        if probe > 0:
            changed = _noisy(changed, generator)
            for tensor in precise.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(_noisy(tensor, generator))
        own = own.maximum(_distance(logits, precise(changed, steps)).to(own))
        as_it_is = own if probe == 0 else as_it_is
        if bool((own > tolerance)[asked].all()):
            break
    return as_it_is, own


def _noisy(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return tensor * (1 + NOISE * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))


def _run(call: Runner, inputs: tuple[Port, ...], images: Tensor, steps: int, streaming: bool) -> Tensor:
    """Logits `[T, B, K]` that the file gives."""
    try:
        if not streaming:
            return call(images)[0]
        state = [port.zeros(len(images)) for port in inputs[1:]]
        logits = []
        for _ in range(steps):
            now, *state = call(images, *state)
            logits.append(now)
        return torch.stack(logits)
    except Exception as error:  # those of the runtimes have nothing in common
        raise ExportError(
            f"the file does not run on a batch of {len(images)}: {error}. Nothing was written."
        ) from error
