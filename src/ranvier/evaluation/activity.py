"""How much a network spikes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ranvier.atomic import write_json
from ranvier.evaluation.mode import device_of, evaluating
from ranvier.nn import LIFB, Neuron

SHOWN_STEPS = 4
"""Up to so many steps a table shows each, beyond that the first two, the middle and the last."""


@dataclass(frozen=True)
class LayerActivity:
    """Firing of one layer: mean spikes per neuron at each step, bursts counted as one; and the bursts alone.

    A burst is told by its value: at a strength of exactly 1, where it transmits what a spike does, it counts as one.
    """

    name: str
    neurons: int
    firing_rate: tuple[float, ...]
    burst_rate: tuple[float, ...]

    @property
    def mean_firing_rate(self) -> float:
        """Spikes per neuron and step."""
        return sum(self.firing_rate) / len(self.firing_rate)


@dataclass(frozen=True)
class Activity:
    """Firing rates of all layers [spikes per neuron and step]."""

    layers: tuple[LayerActivity, ...]
    samples: int

    @property
    def mean_firing_rate(self) -> float:
        """Over all neurons of the network."""
        neurons = sum(layer.neurons for layer in self.layers)
        return sum(layer.neurons * layer.mean_firing_rate for layer in self.layers) / neurons

    def __str__(self) -> str:
        rates = "\n".join(
            f"{layer.name}: {layer.mean_firing_rate:.4f} ({' '.join(f'{rate:.4f}' for rate in layer.firing_rate)})"
            for layer in self.layers
        )
        return f"{rates}\nall: {self.mean_firing_rate:.4f} spikes per neuron and step (n = {self.samples})"

    def __rich__(self) -> Table:
        """Table for the terminal."""
        steps = len(self.layers[0].firing_rate)
        shown = [t for t in range(1, steps + 1) if steps <= SHOWN_STEPS or t in (1, 2, steps // 2, steps)]
        caption = None if len(shown) == steps else f"mean over all {steps} steps"
        table = Table(title=f"Spikes per neuron and step (n = {self.samples})", caption=caption)
        table.add_column("layer", overflow="fold")
        table.add_column("neurons", justify="right")
        for title in (*(f"t={t}" for t in shown), "mean", "bursts"):
            table.add_column(title, justify="right")
        for layer in self.layers:
            bursts = sum(layer.burst_rate) / steps
            rates = [*(layer.firing_rate[t - 1] for t in shown), layer.mean_firing_rate, bursts]
            table.add_row(layer.name.removesuffix(".neuron"), str(layer.neurons), *(f"{rate:.3f}" for rate in rates))
        return table

    def save(self, path: str | Path) -> None:
        """Write the rates as json."""
        write_json(path, asdict(self))


def firing_rates(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], steps: int | None = None, *, batches: int | None = None
) -> Activity:
    """Measure firing rates of every spiking layer.

    Args:
        model: Called as `model(images, steps)`; not a compiled one, whose layers cannot be watched.
        loader: Batches of images and labels.
        steps: T; None for sequences, which bring their own.
        batches: How many batches to run; None for all.

    Returns:
        Rates per layer and step, in the order in which the layers run.

    Raises:
        ValueError: The loader is empty, or the model has no spiking neurons of `ranvier.nn`.
    """
    device = device_of(model)
    tally = _Tally()
    samples = 0
    with watching(model, tally.count), evaluating(model), torch.inference_mode():
        for number, (images, labels) in enumerate(loader):
            if number == batches:
                break
            model(images.to(device), steps)
            samples += len(labels)
    if samples == 0:
        raise ValueError("the loader gave no samples, so there is nothing to count. Check the data set or its split.")
    return Activity(tally.layers(samples), samples)


class _Tally:
    """Counts what neurons emit; sums stay on the device."""

    def __init__(self) -> None:
        self.spikes: dict[str, Tensor] = {}
        self.bursts: dict[str, Tensor] = {}
        self.values: dict[str, int] = {}

    def count(self, name: str, neuron: Neuron, inputs: tuple[Any, ...], spikes: Tensor) -> None:
        features = tuple(range(1, spikes.ndim))
        # A neuron has no state, so a network may use one module in several places: each adds its values.
        self.values[name] = self.values.get(name, 0) + spikes[0].numel()
        fired = (spikes != 0).sum(features) * neuron.fires
        graded = ((spikes != 0) & (spikes != 1)).sum(features) if isinstance(neuron, LIFB) else torch.zeros_like(fired)
        self.spikes[name] = self.spikes.get(name, 0) + fired
        self.bursts[name] = self.bursts.get(name, 0) + graded

    def layers(self, samples: int) -> tuple[LayerActivity, ...]:
        return tuple(
            LayerActivity(
                name=name,
                neurons=values // samples,
                firing_rate=tuple((self.spikes[name] / values).tolist()),
                burst_rate=tuple((self.bursts[name] / values).tolist()),
            )
            for name, values in self.values.items()
        )


def record_spikes(model: nn.Module, images: Tensor, steps: int | None = None) -> dict[str, Tensor]:
    """Everything that the spiking layers emit for one batch, for looking at it.

    Args:
        model: Called as `model(images, steps)`; not a compiled one.
        images: One batch.
        steps: T; None for sequences.

    Returns:
        Spikes `[T, B, ...]` of each layer, on the CPU, in the order in which the layers run; potentials of neurons that
        do not fire.
    """
    found: dict[str, Tensor] = {}

    def note(name: str, neuron: Neuron, inputs: tuple[Any, ...], spikes: Tensor) -> None:
        found[name] = spikes.cpu()

    with watching(model, note), evaluating(model), torch.inference_mode():
        model(images.to(device_of(model)), steps)
    return found


Note = Callable[[str, Neuron, tuple[Any, ...], Tensor], None]
"""`note(name, neuron, inputs, spikes [T, B, ...])`."""


@contextmanager
def watching(model: nn.Module, note: Note) -> Iterator[None]:
    """Call `note` in a block whenever a neuron of the model has run.

    Raises:
        ValueError: The model has no neurons of `ranvier.nn`.
    """
    neurons = [(name, module) for name, module in model.named_modules() if isinstance(module, Neuron)]
    if not neurons:
        raise ValueError("the model has no neurons of ranvier.nn, so there are no spikes to count.")
    handles = [
        neuron.register_forward_hook(
            # With its state, where the network streams.
            lambda neuron, inputs, sent, name=name: note(
                name, neuron, inputs, sent[0] if isinstance(sent, tuple) else sent
            )
        )
        for name, neuron in neurons
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
