"""The first thing a newcomer runs, on the bundled digits: neurons, training methods, conversion, event recordings."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ranvier.atomic import write_json
from ranvier.data import load_digits, simulated_events
from ranvier.data.events import to_frames
from ranvier.evaluation import record_spikes
from ranvier.recipes.compare import ComparedMethod, compare
from ranvier.recipes.comparison import Comparison, Outcome
from ranvier.recipes.digits import digits
from ranvier.recipes.evaluate import energy
from ranvier.recipes.events import simulated_digits_dvs
from ranvier.recipes.run import RESULTS, load_trained, run
from ranvier.report import Section, draw_frames, draw_recording, spike_raster

EVENTS = "LIFB, simulated events"
METHODS: tuple[ComparedMethod, ...] = ("direct", "etc", "proxy", "convert")
STEPS = 4
EVENT_EPOCHS = 10
"""Its frames are larger than the digits: a third fewer epochs keep the demo below two minutes."""


def demo(out: str | Path, *, seed: int = 0, **overrides: Any) -> Comparison:
    """Compare neurons, training methods and conversion on the bundled digits, and train on simulated events of them.

    The last network does not see the digits but simulated event recordings of them, one frame a step.

    Leaves in `out`: results.json, accuracy.png, energy.png, raster.png, events.png, frames.png and report.html, and
    the networks in demo-networks.

    Args:
        out: Output folder; what an earlier demo left in it is replaced.
        seed: Decides initial weights, order and augmentation.
        overrides: Fields of the recipes to change.

    Raises:
        FileExistsError: `out` holds something else.
    """
    out = Path(out)
    _check_replaceable(out)
    networks = out / "demo-networks"
    shutil.rmtree(networks, ignore_errors=True)
    recipe = digits(seed=seed, **overrides)
    images = compare(recipe, networks, steps=range(1, STEPS + 1), methods=METHODS, activation="relu")
    Console(stderr=True).print(f"[bold]{EVENTS}[/]")
    shown = replace(
        images,
        title="Digits",
        outcomes=(*images.outcomes, _see_events(out, networks / "events", seed, overrides)),
        out=out,
    )
    write_json(out / RESULTS, {outcome.name: _plain(outcome) for outcome in shown.outcomes})
    shown.draw()
    _draw_raster(images.out / "networks" / f"etc-lifb-T{STEPS}-seed{seed}", out / "raster.png")
    _write_page(shown)
    return shown


def _check_replaceable(out: Path) -> None:
    """Raise if `out` has the results of something other than a demo, of any version, which would be lost."""
    if not (out / RESULTS).exists():
        return
    try:
        found = json.loads((out / RESULTS).read_text())
    except ValueError:
        found = {}
    if "LIFB, consistency" not in found:
        raise FileExistsError(f"{out} holds results of something other than a demo. Choose another --out.")


def _see_events(out: Path, folder: Path, seed: int, overrides: dict[str, Any]) -> Outcome:
    """Train on simulated recordings of the digits, and draw one."""
    settings = {"epochs": EVENT_EPOCHS} | overrides
    recipe = simulated_digits_dvs(seed=seed, neuron="lifb", method="etc", steps=STEPS, **settings)
    trained = run(recipe, folder)
    assert trained.firing_rate is not None
    recordings = simulated_events(load_digits(), recipe.saccades).test
    (events,) = recordings.read([0])
    title = f"Simulated recording of a {int(recordings.labels[0])}"
    draw_recording(events, recordings.sensor_size, title=title, path=out / "events.png")
    frames = torch.from_numpy(to_frames(events, recipe.frames, recordings.sensor_size))
    draw_frames(frames, title=title, path=out / "frames.png")
    return Outcome(
        name=EVENTS,
        seed=seed,
        accuracy=trained.accuracy_by_step,
        firing_rate=trained.firing_rate,
        seconds=trained.seconds,
        networks=(str(folder.relative_to(out)),),
        energy=energy(folder).after,
    )


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {
        "accuracy_by_step": outcome.accuracy,
        "firing_rate": outcome.firing_rate,
        "energy_after": outcome.energy,
        "seconds": outcome.seconds,
    }


def _draw_raster(folder: Path, path: Path) -> None:
    trained = load_trained(folder)
    images, labels = next(iter(trained.batches()))
    spikes = record_spikes(trained.model, images[:1], trained.steps)
    layers = {f"layer {index}": emitted for index, emitted in enumerate(spikes.values(), 1)}
    spike_raster(layers, title=f"Burst neurons looking at a {int(labels[0])}", path=path)


def _write_page(shown: Comparison) -> None:
    shown.write_page(
        "Every network ran for four time steps and was scored after each: the accuracy after t steps is that of the "
        "mean of the first t outputs of one run, ties counting as misses. Consistency (ETC) lets every time step teach "
        "the others; burst neurons (LIFB) may answer a strong input with a stronger spike; in proxy learning a spiking "
        "network corrects the ANN that shares its weights; the converted network was trained as an ANN, then converted "
        "for each T without backpropagation. The last saw no images, but recordings of a simulated event camera that "
        "moves over them, one frame a step: its first step has seen a quarter of the movement, and its frames are "
        "larger. One run on 600 test images, so that one image is 0.17 %: look at the shape of the curves, not at "
        "tenths.",
        [
            Section("Spikes of one image, layer by layer", image=shown.out / "raster.png"),
            Section("A simulated recording, event by event", image=shown.out / "events.png"),
            Section("The same as the network sees it", image=shown.out / "frames.png"),
        ],
    )
