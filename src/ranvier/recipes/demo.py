"""The first thing a newcomer runs, on the bundled digits: neurons, training methods, conversion, event recordings."""

import itertools
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ranvier.atomic import write_json
from ranvier.data import load_digits, simulated_events
from ranvier.data.events import to_frames
from ranvier.evaluation import record_spikes
from ranvier.recipes.convert import convert
from ranvier.recipes.digits import digits, digits_ann
from ranvier.recipes.evaluate import evaluate
from ranvier.recipes.events import simulated_digits_dvs
from ranvier.recipes.run import RESULTS, Result, load_trained, run
from ranvier.report import Section, accuracy_curves, draw_frames, draw_recording, spike_raster, write_page

METHODS = {"direct": "cross-entropy", "etc": "consistency"}
NEURONS = {"lif": "LIF", "lifb": "LIFB"}
CONVERTED = "ReLU ANN, converted"
EVENTS = "LIFB, consistency, simulated events"
STEPS = 4


@dataclass(frozen=True)
class DemoResult:
    """One network of the demo: accuracy after 1 .. T steps, spikes per neuron and step, seconds to make it."""

    accuracy_by_step: tuple[float, ...]
    firing_rate: float
    seconds: float


@dataclass(frozen=True)
class Demo:
    """Results of the demo by name, and the folder with its files."""

    results: dict[str, DemoResult]
    out: Path

    def rows(self) -> list[list[str]]:
        """Name, accuracy in percent after each step, spikes per neuron and step, seconds."""
        return [
            [
                name,
                *(f"{100 * accuracy:.1f}" for accuracy in result.accuracy_by_step),
                f"{result.firing_rate:.3f}",
                f"{result.seconds:.0f}",
            ]
            for name, result in self.results.items()
        ]

    def columns(self) -> list[str]:
        """Headings of `rows`."""
        steps = len(next(iter(self.results.values())).accuracy_by_step)
        return ["network", *(f"T={t}" for t in range(1, steps + 1)), "firing rate", "seconds"]

    def __rich__(self) -> Table:
        """Table for the terminal."""
        table = Table(title="Digits: test accuracy % after T time steps", caption=f"pictures and numbers: {self.out}")
        for index, column in enumerate(self.columns()):
            table.add_column(column, justify="right" if index else "left")
        for row in self.rows():
            table.add_row(*row)
        return table


def demo(out: str | Path, *, seed: int = 0, **overrides: Any) -> Demo:
    """Train LIF and burst neurons, with and without temporal consistency, and convert an ANN, on the bundled digits.

    The last network does not see the digits but simulated event recordings of them, one frame a step.

    Leaves in `out`: results.json, accuracy.png, raster.png, events.png, frames.png, report.html, and a folder per run.

    Args:
        out: Output folder; runs of an earlier demo in it are replaced.
        seed: Decides initial weights, order and augmentation.
        overrides: Fields of the recipes to change.
    """
    out = Path(out)
    console = Console(stderr=True)
    results: dict[str, DemoResult] = {}
    for (neuron, neuron_name), (method, method_name) in itertools.product(NEURONS.items(), METHODS.items()):
        name = f"{neuron_name}, {method_name}"
        console.print(f"[bold]{name}[/]")
        folder = _emptied(out / f"{neuron}-{method}")
        trained = run(digits(seed=seed, neuron=neuron, method=method, steps=STEPS, **overrides), folder)
        assert trained.firing_rate is not None
        results[name] = DemoResult(trained.accuracy_by_step, trained.firing_rate, trained.seconds)
    console.print(f"[bold]{CONVERTED}[/]")
    results[CONVERTED] = _convert(out, seed, overrides)
    console.print(f"[bold]{EVENTS}[/]")
    results[EVENTS] = _see_events(out, seed, overrides)
    shown = Demo(results, out)
    write_json(out / RESULTS, {name: asdict(result) for name, result in results.items()})
    curves = {name: result.accuracy_by_step for name, result in results.items()}
    accuracy_curves(curves, title="Digits, test accuracy", path=out / "accuracy.png")
    _draw_raster(out / "lifb-etc", out / "raster.png")
    _write_report(shown, trained)
    return shown


def _emptied(folder: Path) -> Path:
    """A folder for a run, without what an earlier demo left there."""
    if (folder / RESULTS).exists() or (folder / "checkpoint.safetensors").exists():
        shutil.rmtree(folder)
    return folder


def _convert(out: Path, seed: int, overrides: dict[str, Any]) -> DemoResult:
    """Train an ANN with what `overrides` says of it, and convert it."""
    ann, snn = _emptied(out / "ann"), _emptied(out / "converted")
    known = digits_ann().places()
    shared = {name: value for name, value in overrides.items() if name in known}
    trained = run(digits_ann(seed=seed, activation="relu", **shared), ann)
    made = convert(str(ann), snn, steps=STEPS, threshold="auto", bias="auto")
    activity = evaluate(snn).activity
    assert activity is not None
    seconds = trained.seconds + made.report.total_seconds
    return DemoResult(made.accuracy.accuracy, activity.mean_firing_rate, seconds)


def _see_events(out: Path, seed: int, overrides: dict[str, Any]) -> DemoResult:
    """Train on simulated recordings of the digits, and draw one."""
    recipe = simulated_digits_dvs(seed=seed, neuron="lifb", method="etc", steps=STEPS, **overrides)
    trained = run(recipe, _emptied(out / "events"))
    assert trained.firing_rate is not None
    recordings = simulated_events(load_digits(), recipe.saccades).test
    (events,) = recordings.read([0])
    title = f"Simulated recording of a {int(recordings.labels[0])}"
    draw_recording(events, recordings.sensor_size, title=title, path=out / "events.png")
    frames = torch.from_numpy(to_frames(events, recipe.frames, recordings.sensor_size))
    draw_frames(frames, title=title, path=out / "frames.png")
    return DemoResult(trained.accuracy_by_step, trained.firing_rate, trained.seconds)


def _draw_raster(folder: Path, path: Path) -> None:
    trained = load_trained(folder)
    images, labels = next(iter(trained.batches()))
    spikes = record_spikes(trained.model, images[:1], trained.steps)
    layers = {f"layer {index}": emitted for index, emitted in enumerate(spikes.values(), 1)}
    spike_raster(layers, title=f"Burst neurons looking at a {int(labels[0])}", path=path)


def _write_report(shown: Demo, last: Result) -> None:
    write_page(
        shown.out / "report.html",
        title="Ranvier demo: spiking networks on handwritten digits",
        lead="Every network ran for four time steps and was scored after each: the accuracy after t steps is that of "
        "the mean of the first t outputs of one run, ties counting as misses. Consistency (ETC) lets every time step "
        "teach the others; burst neurons (LIFB) may answer a strong input with a stronger spike; the last but one was "
        "trained as an ANN and converted, without backpropagation through spikes. The last saw no images, but "
        "recordings of a simulated event camera that moves over them, one frame a step: its first step "
        "has seen a quarter of the movement. One run on 600 test images, so that one image is 0.17 %: look at the "
        "shape of the curves, not at tenths.",
        sections=[
            Section("Test accuracy %", columns=shown.columns(), rows=shown.rows()),
            Section("Accuracy by time step", image=shown.out / "accuracy.png"),
            Section("Spikes of one image, layer by layer", image=shown.out / "raster.png"),
            Section("A simulated recording, event by event", image=shown.out / "events.png"),
            Section("The same as the network sees it", image=shown.out / "frames.png"),
        ],
        facts={
            "one run each, seed": str(last.seed),
            "epochs": str(last.epochs),
            "device": last.device,
            **last.versions,
        },
    )
