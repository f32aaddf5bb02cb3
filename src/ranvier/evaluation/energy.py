"""Energy of a spiking network beside that of the ANN with the same layers, from counted operations and a cost table."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from ranvier.atomic import write_json
from ranvier.checks import check_choice
from ranvier.evaluation.operations import Operations, count_operations


@dataclass(frozen=True)
class Costs:
    """Energy of single operations [J].

    Args:
        name: How results call it.
        multiply_accumulate: A multiplication and the addition of its result.
        accumulate: An addition.
        update: Of one neuron at one step.
        source: Where the numbers come from: results print it.

    >>> Costs("mine", 3.2e-12, 0.1e-12, source="45 nm, 32-bit integers").update
    0.0
    """

    name: str
    multiply_accumulate: float
    accumulate: float
    update: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        for cost in (self.multiply_accumulate, self.accumulate, self.update):
            if not 0 <= cost < math.inf:
                raise ValueError(f"a cost of {self.name!r} is {cost}, but must be at least 0, in joules: 4.6e-12.")


_HOROWITZ = "Horowitz 2014, Computing's energy problem, ISSCC, 45 nm, 0.9 V"
COSTS: dict[str, Costs] = {
    "45nm": Costs(
        "45nm",
        4.6e-12,
        0.9e-12,
        source=f"{_HOROWITZ}: 32-bit floats, 3.7 pJ a multiplication and 0.9 pJ an addition",
    ),
    "45nm-neurons": Costs(
        "45nm-neurons",
        4.6e-12,
        0.9e-12,
        4.6e-12,
        source=f"{_HOROWITZ}: as 45nm; an update of a leaky neuron taken as one multiplication and one addition",
    ),
    "45nm-int8": Costs(
        "45nm-int8",
        0.3e-12,
        0.1e-12,
        source=f"{_HOROWITZ}: 0.2 pJ an 8-bit multiplication, 0.1 pJ a 32-bit integer addition to a 32-bit sum",
    ),
}
"""Named cost tables: `45nm` is what most papers use."""


@dataclass(frozen=True)
class Energy:
    """Energy for one image [J], on average, after 1 .. T steps, and of the ANN with the same layers.

    `print` shows the result and what it rests on; rich also shows tables.
    """

    operations: Operations
    costs: Costs

    @property
    def by_step(self) -> tuple[float, ...]:
        """Of each step alone."""
        counts = zip(self.operations.multiply_accumulates, self.operations.accumulates, strict=True)
        updates = self.operations.updates * self.costs.update
        return tuple(self.costs.multiply_accumulate * mac + self.costs.accumulate * ac + updates for mac, ac in counts)

    @property
    def after(self) -> tuple[float, ...]:
        """Of the first t steps together."""
        return tuple(accumulate(self.by_step))

    @property
    def total(self) -> float:
        """Of all steps."""
        return self.after[-1]

    @property
    def ann(self) -> float:
        """Of the ANN, which runs once."""
        return self.costs.multiply_accumulate * self.operations.ann

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the numbers rest on."""
        costs = self.costs
        charged = "not charged" if costs.update == 0 else f"charged at {_picojoules(costs.update)} each"
        operations = self.operations
        images = "images hold whole numbers, and a value of n counts as n spikes"
        analog = ", ".join(layer.name for layer in operations.layers if any(layer.multiply_accumulates))
        return (
            f"costs {costs.name}: {_picojoules(costs.multiply_accumulate)} a multiply-accumulate, "
            f"{_picojoules(costs.accumulate)} an accumulate ({costs.source or 'given by the caller, no source'})",
            images if operations.whole_images else "images hold analog values",
            "accumulates: one for each output that a spike reaches; a burst is two spikes",
            f"multiply-accumulates in layers on analog values ({analog or 'none'}): one a connection, zeros too",
            "layers before the first neuron run once on a constant image, at the first step",
            f"{operations.updates:,} neurons are updated at every step: {charged}",
            "pooling, sums and constant factors hand spikes on at no cost; normalisation is folded; biases are free",
            "the ANN has the same layers and runs once, on one frame; padding is no connection, neither here nor there",
            "no memory access, no routing, no static power, on either side",
        )

    def __str__(self) -> str:
        return "\n".join([self._summary(), *(f"- {line}" for line in self.assumptions)])

    def _summary(self) -> str:
        over = f"estimated {_joules(self.total)} for an image over {self.operations.steps} steps"
        ratio = f": {_percent(self.total, self.ann)}" if self.ann > 0 else ""
        return f"{over}, against {_joules(self.ann)} for the ANN{ratio} (n = {self.operations.samples})"

    def __rich__(self) -> Group:
        """Tables for the terminal, and what they rest on."""
        return Group(self.operations, self.table(), Text(str(self)))

    def table(self) -> Table:
        """Energy after each step, for the terminal."""
        over = f"over its first 1 .. {self.operations.steps} steps"
        table = Table(title=f"Energy for an image, {over} (n = {self.operations.samples})", min_width=72)
        for name in ("steps", "spikes,\nburst = 2", "accumulates", "multiply-acc.", "energy", "of the ANN's"):
            table.add_column(name, justify="right")
        rows = (self.operations.spikes, self.operations.accumulates, self.operations.multiply_accumulates)
        for t, (*counts, energy) in enumerate(zip(*map(accumulate, rows), self.after, strict=True), 1):
            table.add_row(str(t), *(f"{count:,.0f}" for count in counts), _joules(energy), _percent(energy, self.ann))
        table.add_section()
        table.add_row("ANN", "", "", f"{self.operations.ann:,.0f}", _joules(self.ann), _percent(self.ann, self.ann))
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return {
            "operations": self.operations.to_json(),
            "costs": asdict(self.costs),
            "energy_by_step": self.by_step,
            "energy_after": self.after,
            "energy": self.total,
            "energy_ann": self.ann,
            "assumptions": self.assumptions,
        }

    def save(self, path: str | Path) -> None:
        """Write everything as json."""
        write_json(path, self.to_json())


def energy(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    steps: int | None = None,
    *,
    costs: Costs | str = "45nm",
    batches: int | None = None,
) -> Energy:
    """Energy that a network needs for an image, estimated from its actual spikes.

        E = sum over steps t  e_mac MAC[t] + e_ac AC[t] + e_update neurons

    Args:
        model: As in `count_operations`, like the others.
        loader: Batches of images and labels.
        steps: T; None for sequences.
        costs: Name of a table in `COSTS`, or one of your own.
        batches: How many batches to run; None for all.

    Returns:
        The operations with their costs; `print` shows the result and its assumptions.

    Raises:
        ConversionError: A part that cannot be traced, such as self-attention.
        TypeError: `model` is no network of `ranvier`.
        ValueError: An unknown table, an empty loader, or images that `count_operations` does not take.

    >>> import torch
    >>> from ranvier.models import mlp
    >>> silent = energy(mlp([64, 32, 10]), [(torch.zeros(5, 64) + 1e-3, torch.zeros(5))], steps=4)
    >>> print(str(silent).splitlines()[0])
    estimated 9.42 nJ for an image over 4 steps, against 10.9 nJ for the ANN: 86.5 % (n = 5)
    """
    if isinstance(costs, str):
        check_choice("costs", costs, tuple(COSTS))
        costs = COSTS[costs]
    return Energy(count_operations(model, loader, steps, batches=batches), costs)


def _picojoules(value: float) -> str:
    return f"{value * 1e12:g} pJ"


def _joules(value: float) -> str:
    """With a prefix."""
    for factor, unit in ((1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ"), (1e-9, "nJ")):
        if value >= 0.9995 * factor:  # rounds to 1 in this unit, not to 1000 in the next
            return f"{value / factor:.3g} {unit}"
    return f"{value * 1e12:.3g} pJ"


def _percent(value: float, of: float) -> str:
    return f"{100 * value / of:.1f} %" if of > 0 else "-"
