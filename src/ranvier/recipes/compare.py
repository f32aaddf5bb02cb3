"""Every method on one architecture and data set, side by side at every number of time steps."""

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console

from ranvier import provenance
from ranvier.atomic import differences
from ranvier.checks import check_choice, check_count
from ranvier.conversion import Account, ConversionError, Settings
from ranvier.evaluation import firing_rates
from ranvier.recipes.comparison import AnnOutcome, Comparison, Outcome
from ranvier.recipes.convert import convert
from ranvier.recipes.evaluate import energy
from ranvier.recipes.network import UNCONVERTIBLE, ActivationName, AnnSettings, NeuronName
from ranvier.recipes.recipe import AnnRecipe, EventRecipe, FinetuneRecipe, Recipe, TrainingRecipe
from ranvier.recipes.run import RESULTS, InputFormat, load_data, load_trained, run, sample
from ranvier.report import Section
from ranvier.training import DirectLoss, lay_out, start_processes

ComparedMethod = Literal["direct", "tet", "etc", "proxy", "convert", "signed", "finetune"]

METHODS: dict[ComparedMethod, tuple[str, str]] = {
    "direct": ("cross-entropy", "Cross-entropy: of the mean output, through surrogate gradients."),
    "tet": ("TET", "TET: the cross-entropy of every step's output (Deng et al. 2022)."),
    "etc": ("consistency", "Consistency (ETC): every time step teaches the others (Zhao et al. 2025)."),
    "proxy": (
        "proxy learning",
        "Proxy learning: the spiking network corrects the ANN that shares its weights; no surrogate gradients.",
    ),
    "convert": (
        "converted",
        "Converted: trained as an ANN, then calibrated for each T on training images, in float32, without "
        "backpropagation; thresholds and corrections were chosen on other training images.",
    ),
    "signed": (
        "converted, signed",
        "Signed: converted neurons that take back what they sent too early, if hardware can send negative spikes.",
    ),
    "finetune": (
        "converted, finetuned",
        "Finetuned: a converted network that was trained further, through its spikes.",
    ),
}
"""What is compared, by the names of the command line: names of the rows, and what they are."""

_DIRECT = ("direct", "tet", "etc")
_OF_ANN = ("convert", "signed", "finetune")
_NAMES: dict[NeuronName, str] = {"if": "IF", "lif": "LIF", "plif": "PLIF", "lifb": "LIFB"}
NEURONS: tuple[NeuronName, ...] = ("lif", "lifb")


@dataclass(frozen=True)
class Row:
    """A method, and the neuron where there is a choice."""

    method: ComparedMethod
    neuron: NeuronName | None = None

    @property
    def name(self) -> str:
        """In tables."""
        name = METHODS[self.method][0]
        return name if self.neuron is None else f"{_NAMES[self.neuron]}, {name}"


ROWS = tuple(Row(method, neuron) for method in METHODS for neuron in (_NAMES if method in _DIRECT else (None,)))
"""All that there can be, in the order of tables."""


def compare(
    recipe: Recipe,
    out: str | Path,
    *,
    steps: Sequence[int] = (1, 2, 4, 8),
    methods: Sequence[ComparedMethod] | None = None,
    neurons: Sequence[NeuronName] = NEURONS,
    seeds: Sequence[int] | None = None,
    each: bool = False,
    activation: ActivationName = "qcfs",
    resume: bool = False,
    quiet: bool = False,
) -> Comparison:
    """Train and convert one architecture by several methods, and score all of them at several numbers of time steps.

    They share data, augmentation, epochs, batch size, optimizer and precision: those of `recipe`. Networks are trained
    once, for the most steps, and read after fewer. Conversions are made for each number of steps, in float32, all
    choices left to `auto`. Finetuning takes three more epochs, with the usual settings of `ranvier finetune`. What
    counts is the test set, after the last epoch.

    Leaves in `out`: results.json, accuracy.png, energy.png and report.html, up to date after every row, and a folder
    for each network in networks.

    Args:
        recipe: Data, architecture and training; its own method, neuron, steps and seed do not matter.
        out: Output folder.
        steps: Numbers of time steps T.
        methods: Rows; None for all that data, architecture and steps allow.
        neurons: Of the networks that are trained through surrogate gradients.
        seeds: Of initial weights, order, augmentation and calibration images; None for that of `recipe`.
        each: Train a network for each number of steps, instead of one that is read after fewer.
        activation: Of the ANN that is converted.
        resume: Keep what is in `out` and go on; methods, neurons and seeds may be added.
        quiet: Show nothing.

    Raises:
        FileExistsError: `out` holds results, and `resume` is not set.
        ValueError: Settings do not fit each other, or those that `out` was made with.
    """
    out = Path(out)
    steps = tuple(sorted({check_count("steps", t) for t in steps}))
    if not steps:
        raise ValueError("there are no steps. Pass the numbers of time steps to compare at, such as 1 2 4 8.")
    seeds = [recipe.seed] if seeds is None else list(dict.fromkeys(seeds))
    if not seeds or min(seeds) < 0:
        raise ValueError(f"seeds are {seeds}, but must be at least one whole number of at least 0.")
    rows = _rows(recipe, steps, methods, neurons)
    check_choice("activation", activation, get_args(ActivationName))
    if recipe.hold_out:
        raise ValueError(
            f"hold_out is {recipe.hold_out}, but a comparison is scored on the test set, as conversions are. Choose "
            "settings with ranvier train --hold-out first, then compare without it."
        )
    _warn_of_idle_arguments(rows, neurons, each, activation)
    processes = start_processes(recipe.execution)
    if processes.num_processes > 1:
        raise ValueError(
            f"{processes.num_processes} processes were started, but a comparison runs in one. Start it by itself: "
            "ranvier compare."
        )
    recipe = replace(recipe, execution=recipe.execution.settled(processes.device))
    comparison = _start(out, resume, recipe, {"steps": steps, "each": each, "activation": activation})
    known = {(one.name, one.seed) for one in comparison.outcomes}
    jobs = [(row, seed) for seed in seeds for row in rows]
    console = Console(stderr=True, quiet=quiet)
    for number, (row, seed) in enumerate(jobs, 1):
        if (row.name, seed) in known:
            continue
        console.print(f"[bold]{row.name}[/], seed {seed} ({number} of {len(jobs)})", highlight=False)
        maker = _Maker(replace(recipe, seed=seed), out, steps, each, activation, processes.device, quiet)
        comparison = _with(comparison, maker.outcome(row), [maker.ann] if row.method in _OF_ANN else [])
        comparison.save(out / RESULTS)
        _show(comparison)
    _show(comparison)  # also where a run was stopped between the numbers and the pictures
    return comparison


def _warn_of_idle_arguments(rows: Iterable[Row], neurons: Sequence[NeuronName], each: bool, activation: str) -> None:
    methods = {row.method for row in rows}
    for name, value, changed, users in (
        ("neurons", neurons, tuple(neurons) != NEURONS, _DIRECT),
        ("each", each, each, (*_DIRECT, "proxy", "finetune")),
        ("activation", activation, activation != "qcfs", _OF_ANN),
    ):
        if changed and not methods & set(users):
            warnings.warn(f"{name}={value} has no effect without one of {', '.join(users)}.", stacklevel=3)


def _rows(
    recipe: Recipe,
    steps: tuple[int, ...],
    methods: Sequence[ComparedMethod] | None,
    neurons: Sequence[NeuronName],
) -> list[Row]:
    for method in methods or ():
        check_choice("methods", method, tuple(METHODS))
    for neuron in neurons:
        check_choice("neurons", neuron, tuple(_NAMES))
    refused = _refusals(recipe, steps)
    chosen = [method for method in METHODS if method not in refused] if methods is None else methods
    for method in chosen:
        if method in refused:
            raise ValueError(f"methods has {method}, but {refused[method]}")
    rows = [row for row in ROWS if row.method in chosen and (row.neuron is None or row.neuron in neurons)]
    if not rows:
        raise ValueError("there is nothing to compare. Pass at least one method, and a neuron for direct, tet and etc.")
    return rows


def _refusals(recipe: Recipe, steps: tuple[int, ...]) -> dict[str, str]:
    """Methods that data, architecture or steps do not allow, and why."""
    refused: dict[str, str] = {}
    if steps[-1] == 1:
        refused["etc"] = "it compares time steps, and there is one. Add a number of steps above 1, or leave it out."
    why = ""
    if isinstance(recipe, EventRecipe):
        why = f"{recipe.name} are recordings, which no ANN is trained on here. Leave it out."
    elif recipe.network.model in UNCONVERTIBLE:
        why = f"{recipe.network.model} is no ANN with ReLU. Leave it out, or choose another model."
    return refused | {method: why for method in _OF_ANN if why}


def _start(out: Path, resume: bool, recipe: Recipe, shared: dict[str, Any]) -> Comparison:
    """The comparison in `out`, to go on with, or an empty one."""
    steps = shared["steps"]
    # Loaded before anything is written; what it says of the data tells two sets apart wherever they lie.
    same = recipe.override(method="direct", neuron="lif", steps=steps[-1], seed=0)
    form = InputFormat.of(load_data(same))
    identity = same.identity() | {"proxy": asdict(recipe.proxy)}
    settings = {**shared, "recipe": identity, "input": asdict(form)}
    if (out / RESULTS).exists():
        before = Comparison.load(out / RESULTS)
        if before.outcomes or (out / "networks").exists():
            if not resume:
                raise FileExistsError(
                    f"{out} holds results. Choose another --out for a new comparison, or pass --resume to go on with "
                    "them."
                )
            if changed := differences(before.settings, settings):
                raise ValueError(
                    f"{out} holds another comparison; it differs in {'; '.join(changed)}. Resume with the settings it "
                    "was started with, or choose another --out."
                )
            return before
    begun = Comparison(f"{recipe.name}, {recipe.network.model}", steps, (), out, settings=settings)
    begun.save(out / RESULTS)  # so that one that is stopped in its first row knows its settings
    return begun


def _with(comparison: Comparison, outcome: Outcome, anns: Sequence[AnnOutcome]) -> Comparison:
    """With one more outcome, in the order of rows, then seeds."""
    order = [row.name for row in ROWS]
    outcomes = sorted((*comparison.outcomes, outcome), key=lambda one: (order.index(one.name), one.seed))
    known = {ann.seed: ann for ann in (*comparison.anns, *anns)}
    recipe = comparison.settings["recipe"]
    facts = {
        "seed": ", ".join(map(str, sorted({one.seed for one in outcomes}))),
        "epochs": str(recipe["epochs"]),
        "batch": str(recipe["batch_size"]),
        "precision": recipe["execution"]["precision"],
        "device": "; ".join(dict.fromkeys(one.device for one in outcomes)),
        "commit": ", ".join(dict.fromkeys(one.commit or "none (an installed package)" for one in outcomes)),
        **provenance.versions(),
    }
    anns = tuple(known[seed] for seed in sorted(known))
    return replace(comparison, outcomes=tuple(outcomes), anns=anns, facts=facts)


def _show(comparison: Comparison) -> None:
    """Bring pictures and page up to date."""
    comparison.draw()
    methods = [
        method for method in METHODS if any(row.method == method for row in ROWS if row.name in comparison.names)
    ]
    explained = Section("What the rows are", " ".join(METHODS[method][1] for method in methods))
    comparison.write_page(_lead(comparison, methods), [explained])


def _lead(comparison: Comparison, methods: Sequence[ComparedMethod]) -> str:
    """How the rows were made, of those that are there."""
    most, settings = comparison.steps[-1], comparison.settings
    epochs = settings["recipe"]["epochs"]
    sentences = [
        f"The same layers, trained for {epochs} epoch{'s' * (epochs > 1)} on the same data with the same optimizer, "
        "and scored on the test set after the last epoch, ties counting as misses."
    ]
    if set(methods) - {"convert", "signed"} and len(comparison.steps) > 1:
        sentences.append(
            "A network was trained for each T."
            if settings["each"]
            else f"Networks were trained once, for {most} steps, and read after fewer: accuracy after T steps is that "
            "of the mean of the first T outputs of one run."
        )
        if "events" in settings["recipe"] and not settings["each"]:
            sentences.append(f"After fewer than {most} steps they have seen only the beginning of each recording.")
    if {"convert", "signed"} & set(methods) and len(comparison.steps) > 1:
        sentences.append("A conversion was made for each T.")
    return " ".join(sentences)


@dataclass(frozen=True)
class _Network:
    """A network on disk: accuracy after 1 .. T steps, and the seconds that it took, without its ANN."""

    folder: Path
    accuracy: tuple[float, ...]
    seconds: float
    firing_rate: float | None = None
    """None where it is to be measured."""


@dataclass(frozen=True)
class _Maker:
    """Makes the networks of one seed; what is in the folder already is kept."""

    recipe: Recipe
    out: Path
    steps: tuple[int, ...]
    each: bool
    activation: ActivationName
    device: torch.device
    quiet: bool

    def outcome(self, row: Row) -> Outcome:
        """A row: what its networks give at each number of steps."""
        networks = self.make(row)
        largest = networks[self.steps[-1]]
        # After t steps of the network that was made for the fewest of at least t.
        made_for = [(t, min(most for most in networks if most >= t)) for t in self.steps]
        data, device = self.recipe.data, self.device
        try:
            spent = {t: energy(one.folder, source=data, steps=t, device=device) for t, one in networks.items()}
        except ConversionError:  # a part that cannot be traced, such as self-attention
            spent = {}
        return Outcome(
            name=row.name,
            seed=self.recipe.seed,
            accuracy=tuple(networks[most].accuracy[t - 1] for t, most in made_for),
            firing_rate=self.measure(largest) if largest.firing_rate is None else largest.firing_rate,
            seconds=largest.seconds + (self.ann.seconds if row.method in _OF_ANN else 0.0),
            networks=tuple(str(one.folder.relative_to(self.out)) for one in networks.values()),
            energy=tuple(spent[most].after[t - 1] for t, most in made_for) if spent else None,
            energy_ann=spent[self.steps[-1]].ann if spent else None,
            device=provenance.device_name(device),
            commit=provenance.commit(),
        )

    def make(self, row: Row) -> dict[int, _Network]:
        """Networks of a row by their numbers of steps: one for each, or one for the most."""
        if row.method in ("convert", "signed"):
            return {t: self.convert(t, signed=row.method == "signed") for t in self.steps}
        trained_for = self.steps if self.each else self.steps[-1:]
        return {t: self.finetune(t) if row.method == "finetune" else self.train(row, t) for t in trained_for}

    def train(self, row: Row, steps: int) -> _Network:
        """A network that is trained through its spikes, or by proxy."""
        # At one step there is nothing to be consistent with, and what is left of etc is direct.
        method = "direct" if row.method == "etc" and steps == 1 else row.method
        changes = {} if row.neuron is None else {"neuron": row.neuron}
        recipe = self.recipe.override(method=method, steps=steps, **changes)
        return self._run(recipe, "-".join(filter(None, (row.method, row.neuron, f"T{steps}"))))

    def finetune(self, steps: int) -> _Network:
        """A converted network, trained further through its spikes."""
        start = self.convert(steps, signed=False)
        names = ("data", "batch_size", "seed", "train_images", "augmentation", "execution")
        recipe = FinetuneRecipe(
            start=str(start.folder.resolve()),
            steps=steps,
            loss=DirectLoss("etc" if steps > 1 else "direct", label_smoothing=self.recipe.loss.label_smoothing),
            **{name: getattr(self.recipe, name) for name in names},
        )
        made = self._run(recipe, f"finetune-T{steps}")
        return replace(made, seconds=start.seconds + made.seconds)

    def convert(self, steps: int, *, signed: bool) -> _Network:
        """A network that is converted from the ANN, every choice left to `auto`."""
        ann = self.out / self.ann.network
        folder = self._folder(f"converted{'-signed' * signed}-T{steps}")
        if not (folder / RESULTS).exists():
            convert(
                str(ann),
                folder,
                steps=steps,
                data=self.recipe.data,
                threshold="auto",
                bias="auto",
                signed=signed,
                settings=Settings(seed=self.recipe.seed),
                device=self.device,
                quiet=self.quiet,
            )
        made = json.loads((folder / RESULTS).read_text())
        return _Network(folder, tuple(made["accuracy_by_step"]), Account.from_json(made["report"]).total_seconds)

    @cached_property
    def ann(self) -> AnnOutcome:
        """The ANN, trained when it is first asked for."""
        shared = {one.name: getattr(self.recipe, one.name) for one in fields(TrainingRecipe)}
        settings = AnnSettings(self.recipe.network.model, self.activation, hidden=self.recipe.network.hidden)
        recipe = AnnRecipe(**shared, network=settings, label_smoothing=self.recipe.loss.label_smoothing)
        made = self._run(recipe, "ann")
        return AnnOutcome(recipe.seed, made.accuracy[-1], made.seconds, str(made.folder.relative_to(self.out)))

    def measure(self, network: _Network) -> float:
        """Spikes per neuron and step of a converted network."""
        trained = load_trained(network.folder)
        images = sample(trained.batches(self.recipe.data).images, trained.form, self.device, trained.steps)
        return firing_rates(lay_out(trained.model.to(self.device)), images, trained.steps).mean_firing_rate

    def _run(self, recipe: Recipe | AnnRecipe | FinetuneRecipe, name: str) -> _Network:
        folder = self._folder(name)
        with warnings.catch_warnings():
            # A setting of one method is one of the comparison, and has its effect in another row.
            warnings.filterwarnings("ignore", ".* no effect with (method|neuron)")
            made = run(recipe, folder, resume=True, quiet=self.quiet)
        return _Network(folder, made.accuracy_by_step, made.seconds, made.firing_rate)

    def _folder(self, name: str) -> Path:
        return self.out / "networks" / f"{name}-seed{self.recipe.seed}"
