"""Energy of a spiking network beside that of the ANN with the same layers, from counted operations and a cost table."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from torch import Tensor, nn

from ranvier.atomic import write_json
from ranvier.checks import check_choice
from ranvier.evaluation.operations import Operations, count_operations


@dataclass(frozen=True)
class Costs:
    """Energy of single operations [J]."""

    name: str
    multiply_accumulate: float
    accumulate: float
    update: float = 0.0
    """Of a neuron at a step."""
    source: str = ""

    def __post_init__(self) -> None:
        lowest = min(self.multiply_accumulate, self.accumulate, self.update)
        if not lowest >= 0:
            raise ValueError(f"costs are {self}, but none may be negative. Give them in joules: 4.6e-12.")


_HOROWITZ = "Horowitz 2014, Computing's energy problem, ISSCC, 45 nm at 0.9 V"
COSTS: dict[str, Costs] = {
    "45nm": Costs(
        "45nm", 4.6e-12, 0.9e-12, source=f"{_HOROWITZ}: 32-bit float, 3.7 pJ a multiplication, 0.9 pJ an addition"
    ),
    "45nm-neurons": Costs(
        "45nm-neurons",
        4.6e-12,
        0.9e-12,
        4.6e-12,
        source=f"{_HOROWITZ}: 32-bit float; a neuron's leak and charge as one multiplication and one addition",
    ),
    "45nm-int8": Costs(
        "45nm-int8", 0.3e-12, 0.1e-12, source=f"{_HOROWITZ}: 0.2 pJ an 8-bit multiplication, 0.1 pJ a 32-bit addition"
    ),
}
"""Named cost tables: `45nm` is what most papers use."""


@dataclass(frozen=True)
class Energy:
    """Energy for one image [J], on average, after 1 .. T steps, and of the ANN with the same layers."""

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
        """Of the ANN."""
        return self.costs.multiply_accumulate * self.operations.ann

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the numbers rest on."""
        costs = self.costs
        charged = "not charged" if costs.update == 0 else f"{costs.update * 1e12:g} pJ each"
        analog = [layer.name for layer in self.operations.layers if any(layer.multiply_accumulates)]
        return (
            f"costs {costs.name}: {costs.multiply_accumulate * 1e12:g} pJ a multiply-accumulate, "
            f"{costs.accumulate * 1e12:g} pJ an accumulate ({costs.source or 'given by the caller'})",
            f"{self.operations.updates:,} neurons, updated at every step: {charged}",
            "bursts decoupled: a burst costs what two spikes cost; normalisation folded",
            "layers on analog values (multiply-accumulates): " + (", ".join(analog) or "none"),
            "on a constant image they run once; pooling and sums hand spikes on at no cost; biases are not charged",
            "no memory access, no routing, no static power",
        )

    def __str__(self) -> str:
        return (
            f"{_joules(self.total)} for an image at T={self.operations.steps}, "
            f"the ANN {_joules(self.ann)} ({self.total / self.ann:.2f} of it)"
        )

    def __rich__(self) -> Group:
        """Tables for the terminal, and what they rest on."""
        return Group(self.operations, self.table(), *self.assumptions)

    def table(self) -> Table:
        """Energy after each step, for the terminal."""
        table = Table(title=f"Energy for an image (n = {self.operations.samples})", min_width=72)
        for name in ("T", "spikes", "accumulates", "multiply-acc.", "energy", "of the ANN's"):
            table.add_column(name, justify="right")
        rows = (self.operations.spikes, self.operations.accumulates, self.operations.multiply_accumulates)
        for t, (*counts, energy) in enumerate(zip(*map(accumulate, rows), self.after, strict=True), 1):
            table.add_row(
                str(t), *(f"{count:,.0f}" for count in counts), _joules(energy), f"{100 * energy / self.ann:.1f} %"
            )
        table.add_section()
        table.add_row("ANN", "", "", f"{self.operations.ann:,.0f}", _joules(self.ann), "100.0 %")
        return table

    def to_json(self) -> dict[str, Any]:
        """Everything, in json's types."""
        return {
            **asdict(self),
            "energy_by_step": self.by_step,
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
    """Energy that a network needs for an image, from its actual spikes.

        E = sum over steps  e_mac MAC[t] + e_ac AC[t] + e_update neurons

    Args:
        model: As in `count_operations`, like the others.
        loader: Batches of images and labels.
        steps: T; None for sequences.
        costs: Name of a table in `COSTS`, or one of your own.
        batches: How many batches to run; None for all.

    Raises:
        ValueError: An unknown table, or an empty loader.
        ConversionError: A part that cannot be traced, such as self-attention.
    """
    if isinstance(costs, str):
        check_choice("costs", costs, tuple(COSTS))
        costs = COSTS[costs]
    return Energy(count_operations(model, loader, steps, batches=batches), costs)


def _joules(value: float) -> str:
    """With a prefix."""
    for factor, unit in ((1e-3, "mJ"), (1e-6, "µJ"), (1e-9, "nJ")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value * 1e12:.3g} pJ"
