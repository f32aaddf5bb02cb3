"""What a comparison of methods found: a table, two pictures and a page."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.markup import escape
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
    """To make the network for the most steps, and the ANN that it comes from."""
    networks: tuple[str, ...] = ()
    """Their folders, within that of the comparison."""
    energy: tuple[float, ...] | None = None
    """For an image [J], estimated from actual spikes; None where they cannot be counted."""
    energy_ann: float | None = None
    """For an image in an ANN with the same layers [J]."""
    device: str = ""
    """Where it was made."""
    commit: str | None = None
    """Of the code that made it."""

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

    def label(self, name: str) -> str:
        """A row's name; with the number of its seeds where others have more or fewer."""
        counts = {len(self.of(other)) for other in self.names}
        return f"{name} (n={len(self.of(name))})" if len(counts) > 1 else name

    def columns(self) -> list[str]:
        """Headings of `rows`."""
        most = f", T={self.steps[-1]}" if len(self.steps) > 1 else ""
        return ["network", *(f"T={t}" for t in self.steps), f"firing rate{most}", f"µJ{most}", f"seconds{most}"]

    def rows(self, *, emphasize: Callable[[str], str] = str) -> list[list[str]]:
        """Name, accuracy in percent, spikes per neuron and step, energy of an image and seconds to make it.

        Of several seeds the mean, and of accuracy its standard deviation, as `97.5±0.3`.

        Args:
            emphasize: Applied to the best accuracy of each column.
        """
        curves = {name: self.accuracy(name) for name in self.names}
        best = [max(column) for column in zip(*curves.values(), strict=True)]
        rows = []
        for name, curve in curves.items():
            outcomes, energy = self.of(name), self.energy(name)
            accuracies = [
                _spread([100 * outcome.accuracy[index] for outcome in outcomes]) for index in range(len(curve))
            ]
            rows.append(
                [
                    self.label(name),
                    *(
                        emphasize(text) if value == highest else text
                        for text, value, highest in zip(accuracies, curve, best, strict=True)
                    ),
                    f"{statistics.fmean(outcome.firing_rate for outcome in outcomes):.3f}",
                    "-" if energy is None else f"{1e6 * energy[-1]:.3g}",
                    f"{statistics.fmean(outcome.seconds for outcome in outcomes):.0f}",
                ]
            )
        return rows

    def energy_rows(self) -> list[list[str]]:
        """Name and energy of an image [µJ] at each number of steps, of the networks whose spikes can be counted."""
        curves = {name: self.energy(name) for name in self.names}
        return [
            [self.label(name), *(f"{1e6 * value:.3g}" for value in curve)] for name, curve in curves.items() if curve
        ]

    def notes(self) -> str:
        """What the numbers of the table are, in words: the ANN, the spread, the seconds."""
        sentences = []
        if self.ann_accuracy is not None:
            what = {"relu": "ReLU ", "qcfs": "QCFS "}.get(self.settings.get("activation", ""), "")
            spent = "" if self.ann_energy is None else f", {1e6 * self.ann_energy:.3g} µJ for an image"
            seconds = statistics.fmean(ann.seconds for ann in self.anns)
            accuracies = _spread([100 * ann.accuracy for ann in self.anns])
            sentences.append(f"The {what}ANN that was converted: {accuracies} %{spent}, {seconds:.0f} s.")
        if len({outcome.seed for outcome in self.outcomes}) > 1:
            sentences.append("Mean and standard deviation over seeds.")
        return " ".join(sentences)

    def __rich__(self) -> Table:
        """Table for the terminal."""
        caption = "\n".join(filter(None, (self.notes(), f"pictures and numbers: {escape(str(self.out))}")))
        table = Table(
            title=f"{self.title}: test accuracy % after T time steps",
            caption=caption,
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for index, column in enumerate(self.columns()):
            heading = column.replace(", ", "\n")
            table.add_column(heading, justify="right" if index else "left", no_wrap=bool(index), overflow="fold")
        for row in self.rows(emphasize="[bold]{}[/]".format):
            table.add_row(*row)
        return table

    def draw(self) -> None:
        """Write `accuracy.png`, and `energy.png` if energy was counted, into the folder."""
        ann, labels = self.ann_accuracy, {name: self.label(name) for name in self.names}
        groups = {labels[outcome.name]: outcome.group for outcome in self.outcomes}
        accuracy_curves(
            {label: self.accuracy(name) for name, label in labels.items()},
            steps=self.steps,
            spread={
                label: tuple(map(statistics.stdev, zip(*(outcome.accuracy for outcome in self.of(name)), strict=True)))
                for name, label in labels.items()
                if len(self.of(name)) > 1
            },
            groups=groups,
            reference=None if ann is None else ("ANN", ann),
            title=f"{self.title}, test accuracy",
            path=self.out / ACCURACY_PICTURE,
        )
        energies = {
            label: (energy, self.accuracy(name)) for name, label in labels.items() if (energy := self.energy(name))
        }
        if energies:
            energy_curves(
                energies,
                steps=self.steps,
                groups=groups,
                reference=None if ann is None or self.ann_energy is None else ("ANN", self.ann_energy, ann),
                title=f"{self.title}, accuracy for energy",
                path=self.out / ENERGY_PICTURE,
            )

    def sections(self) -> list[Section]:
        """Tables and pictures for a page; `draw` makes the pictures."""
        parts = [
            Section(
                "Test accuracy %", f"{self.notes()} {SECONDS_MEAN}".strip(), columns=self.columns(), rows=self.rows()
            ),
            Section("Accuracy by time step", image=self.out / ACCURACY_PICTURE),
        ]
        if energies := self.energy_rows():
            columns = ["network", *(f"T={t}" for t in self.steps)]
            of_ann = "" if self.ann_energy is None else f" An ANN with the same layers: {1e6 * self.ann_energy:.3g} µJ."
            parts += [
                Section("Accuracy for energy", image=self.out / ENERGY_PICTURE),
                Section("Energy for an image [µJ]", ENERGY_MEANS + of_ann, columns=columns, rows=energies),
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
            raise ValueError(
                f"{path} is not what ranvier compare writes (it has no {error}). Choose another folder."
            ) from error


ENERGY_MEANS = (
    "Operations are counted from actual spikes on test images, normalisation folded and bursts decoupled, and priced "
    "for 45 nm (4.6 pJ a multiply-accumulate, 0.9 pJ an accumulate): an estimate without memory access, for comparing "
    "rows."
)
SECONDS_MEAN = (
    "Firing rate: spikes per neuron and step, a burst being one. Seconds: training with a scoring after every epoch; "
    "of converted networks that of the ANN, and the conversion for the most steps without its scoring."
)


def _spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation if there are several."""
    deviation = f"±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"
