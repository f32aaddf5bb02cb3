"""What a comparison of methods found: a table, two pictures and a page."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ranvier.atomic import tuples, write_json
from ranvier.report import Section, accuracy_curves, energy_curves, write_page

ACCURACY_PICTURE = "accuracy.png"
ENERGY_PICTURE = "energy.png"
PAGE = "report.html"


@dataclass(frozen=True)
class Outcome:
    """What one method gave with one seed, at each number of steps of its comparison."""

    name: str
    """Method, and neuron where there is a choice."""
    seed: int
    accuracy: tuple[float, ...]
    """Test accuracy in [0, 1]."""
    firing_rate: float
    """Spikes per neuron and step, at the most steps; a burst counts as one."""
    seconds: float
    """To make the network, or the networks if there is one for each number of steps, and their ANN."""
    networks: tuple[str, ...] = ()
    """Their folders, within that of the comparison."""
    energy: tuple[float, ...] | None = None
    """For an image [J], estimated from actual spikes; None where they cannot be counted."""
    energy_ann: float | None = None
    """For an image in an ANN with the same layers [J]."""

    @property
    def group(self) -> str:
        """The method alone: rows of one method have one colour in pictures."""
        return self.name.partition(", ")[2] or self.name


@dataclass(frozen=True)
class AnnOutcome:
    """The ANN that was converted, with one seed."""

    seed: int
    accuracy: float
    seconds: float
    network: str


@dataclass(frozen=True)
class Comparison:
    """Outcomes of methods on one architecture and data set, and the folder with their files.

    Attributes:
        title: Data set and architecture.
        steps: Numbers of time steps T that everything was scored at.
        outcomes: One for each method and seed, in the order of the table.
        out: Folder.
        anns: One for each seed, where there were conversions.
        settings: What was the same for all.
        facts: Device, versions and the like.
    """

    title: str
    steps: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
    out: Path
    anns: tuple[AnnOutcome, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Rows of the table."""
        return tuple(dict.fromkeys(outcome.name for outcome in self.outcomes))

    def of(self, name: str) -> tuple[Outcome, ...]:
        """Outcomes of a row, one for each seed."""
        return tuple(outcome for outcome in self.outcomes if outcome.name == name)

    def accuracy(self, name: str) -> tuple[float, ...]:
        """Mean over seeds at each number of steps."""
        return tuple(map(statistics.fmean, zip(*(outcome.accuracy for outcome in self.of(name)), strict=True)))

    def energy(self, name: str) -> tuple[float, ...] | None:
        """Mean over seeds at each number of steps [J]; None where it was not counted."""
        counted = [outcome.energy for outcome in self.of(name)]
        return None if None in counted else tuple(map(statistics.fmean, zip(*counted, strict=True)))

    @property
    def ann_accuracy(self) -> float | None:
        """Of the ANN that was converted, mean over seeds."""
        return statistics.fmean(ann.accuracy for ann in self.anns) if self.anns else None

    @property
    def ann_energy(self) -> float | None:
        """Of an ANN with the same layers [J]."""
        return next((outcome.energy_ann for outcome in self.outcomes if outcome.energy_ann is not None), None)

    def columns(self) -> list[str]:
        """Headings of `rows`."""
        most = f", T={self.steps[-1]}" if len(self.steps) > 1 else ""
        return ["network", *(f"T={t}" for t in self.steps), f"firing rate{most}", f"µJ{most}", "minutes"]

    def rows(self, *, emphasize: Callable[[str], str] = str) -> list[list[str]]:
        """Name, accuracy in percent, spikes per neuron and step, energy of an image and minutes to make it.

        Of several seeds mean ± standard deviation.

        Args:
            emphasize: Applied to the best accuracy of each column.
        """
        curves = [self.accuracy(name) for name in self.names]
        best = [max(column) for column in zip(*curves, strict=True)]
        rows = []
        for name, curve in zip(self.names, curves, strict=True):
            outcomes = self.of(name)
            cells = [
                _spread([100 * outcome.accuracy[index] for outcome in outcomes], ".1f") for index in range(len(curve))
            ]
            energy = self.energy(name)
            rows.append(
                [
                    name,
                    *(emphasize(cell) if value == top else cell for cell, value, top in zip(cells, curve, best)),  # noqa: B905
                    f"{statistics.fmean(outcome.firing_rate for outcome in outcomes):.3f}",
                    "-" if energy is None else f"{1e6 * energy[-1]:.3g}",
                    f"{statistics.fmean(outcome.seconds for outcome in outcomes) / 60:.1f}",
                ]
            )
        return rows

    def energy_rows(self) -> list[list[str]]:
        """Name and energy of an image [µJ] at each number of steps, of the networks whose spikes can be counted."""
        curves = {name: self.energy(name) for name in self.names}
        rows = [[name, *(f"{1e6 * value:.3g}" for value in curve)] for name, curve in curves.items() if curve]
        if rows and self.ann_energy is not None:
            rows.append(["ANN with the same layers", f"{1e6 * self.ann_energy:.3g}", *[""] * (len(self.steps) - 1)])
        return rows

    def ann_line(self) -> str:
        """The ANN in words; empty where there is none."""
        if self.ann_accuracy is None:
            return ""
        spent = "" if self.ann_energy is None else f", {1e6 * self.ann_energy:.3g} µJ for an image"
        minutes = statistics.fmean(ann.seconds for ann in self.anns) / 60
        accuracies = _spread([100 * ann.accuracy for ann in self.anns], ".1f")
        what = {"relu": "ReLU ", "qcfs": "QCFS "}.get(self.settings.get("activation", ""), "")
        return f"the {what}ANN that was converted: {accuracies} %{spent}, {minutes:.1f} minutes"

    def __rich__(self) -> Table:
        """Table for the terminal."""
        seeds = len({outcome.seed for outcome in self.outcomes})
        over = f", mean of {seeds} seeds" if seeds > 1 else ""
        caption = "\n".join(filter(None, (self.ann_line(), f"pictures and numbers: {self.out}")))
        table = Table(
            title=f"{self.title}: test accuracy % after T time steps{over}",
            caption=caption,
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for index, column in enumerate(self.columns()):
            table.add_column(column.replace(", ", "\n"), justify="right" if index else "left")
        for row in self.rows(emphasize="[bold]{}[/]".format):
            table.add_row(*row)
        return table

    def draw(self) -> None:
        """Write `accuracy.png`, and `energy.png` if energy was counted, into the folder."""
        ann = self.ann_accuracy
        groups = {outcome.name: outcome.group for outcome in self.outcomes}
        accuracy_curves(
            {name: self.accuracy(name) for name in self.names},
            steps=self.steps,
            spread={
                name: tuple(map(statistics.stdev, zip(*(outcome.accuracy for outcome in self.of(name)), strict=True)))
                for name in self.names
                if len(self.of(name)) > 1
            },
            groups=groups,
            reference=None if ann is None else ("ANN", ann),
            title=f"{self.title}, test accuracy",
            path=self.out / ACCURACY_PICTURE,
        )
        energies = {name: energy for name in self.names if (energy := self.energy(name))}
        if energies:
            energy_curves(
                {name: (energy, self.accuracy(name)) for name, energy in energies.items()},
                steps=self.steps,
                groups=groups,
                reference=None if ann is None or self.ann_energy is None else ("ANN", self.ann_energy, ann),
                title=f"{self.title}, accuracy for energy",
                path=self.out / ENERGY_PICTURE,
            )

    def sections(self) -> list[Section]:
        """Tables and pictures for a page; `draw` makes the pictures."""
        parts = [
            Section("Test accuracy %", self.ann_line(), columns=self.columns(), rows=self.rows()),
            Section("Accuracy by time step", image=self.out / ACCURACY_PICTURE),
        ]
        if energies := self.energy_rows():
            columns = ["network", *(f"T={t}" for t in self.steps)]
            parts += [
                Section("Accuracy for energy", image=self.out / ENERGY_PICTURE),
                Section("Energy for an image [µJ]", ENERGY_MEANS, columns=columns, rows=energies),
            ]
        return parts

    def write_page(self, lead: str, more: Sequence[Section] = ()) -> None:
        """Write `report.html`: the sections of this comparison, and others after them; `draw` comes first."""
        write_page(
            self.out / PAGE,
            title=f"{self.title}: spiking networks by method",
            lead=lead,
            sections=[*self.sections(), *more],
            facts=self.facts,
        )

    def save(self, path: str | Path) -> None:
        """Write everything as json."""
        content = asdict(self)
        del content["out"]
        write_json(path, content)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: The file is no comparison.
        """
        path = Path(path)
        content = json.loads(path.read_text())
        try:
            outcomes = tuple(Outcome(**tuples(outcome)) for outcome in content.pop("outcomes"))
            anns = tuple(AnnOutcome(**ann) for ann in content.pop("anns"))
            steps = tuple(content.pop("steps"))
            return cls(steps=steps, outcomes=outcomes, anns=anns, out=path.parent, **content)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no comparison ({error}). Choose another folder.") from error


ENERGY_MEANS = (
    "Operations are counted from actual spikes on test images, normalisation folded and bursts decoupled, and priced "
    "for 45 nm (4.6 pJ a multiply-accumulate, 0.9 pJ an accumulate): an estimate without memory access, for comparing "
    "rows."
)


def _spread(values: Sequence[float], form: str) -> str:
    """Mean, and the standard deviation if there are several."""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"
