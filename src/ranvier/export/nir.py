"""NIR files with a receipt: what was written, what NIR cannot say, and how the file compares with the network."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from rich.table import Table
from torch import Tensor, nn

from ranvier import provenance
from ranvier.atomic import tuples, write_json
from ranvier.checks import check_count
from ranvier.conversion.trace_network import example_images
from ranvier.evaluation import record_spikes
from ranvier.evaluation.mode import evaluating
from ranvier.export.nir_read import from_nir
from ranvier.export.nir_write import count_neurons, cut, write_nir
from ranvier.models import Network
from ranvier.nn import LIFB, LIFPair, Neuron

__all__ = ["NIRReceipt", "from_nir", "to_nir"]


@dataclass(frozen=True)
class NIRReceipt:
    """What became of a network in a NIR file, checked by reading the file back. `print` or `rich.print` shows it."""

    path: str
    dt: float
    """Seconds of a step."""
    steps: int
    """Steps of the comparison."""
    samples: int
    """Images of the comparison."""
    nodes: Mapping[str, int]
    """How many NIR nodes of each kind."""
    neurons: int
    unsaid: Mapping[str, tuple[str, ...]]
    """What NIR cannot say, and of which neurons; written as metadata, which ranvier reads."""
    spike_mismatch: Mapping[str, float]
    """Share of spikes (neurons x steps x images) that differ between network and file, by layer."""
    logit_difference: float
    """Largest difference of logits over the largest logit."""
    same_predictions: float
    """Share of images with the same answer after all steps."""
    plain_spike_mismatch: float
    """Largest mismatch of a layer when the metadata are ignored, as other tools do."""
    plain_same_predictions: float
    bytes: int
    versions: Mapping[str, str]

    @property
    def largest_mismatch(self) -> float:
        """Of all layers."""
        return max(self.spike_mismatch.values())

    def __rich__(self) -> Table:
        """Table for the terminal."""
        title = f"{self.path}: {self.neurons:,} neurons, {self.bytes / 1e6:.1f} MB, dt = {self.dt:g} s"
        caption = f"compared on {self.samples} images, {self.steps} steps"
        table = Table(title=title, caption=caption, min_width=72, show_header=False)
        table.add_column("", overflow="fold")
        table.add_column("", overflow="fold")
        table.add_row("nodes", ", ".join(f"{count} {kind}" for kind, count in self.nodes.items()))
        for what, names in self.unsaid.items():
            table.add_row(f"not in NIR: {what}", f"{cut(names)} (metadata)")
        table.add_row("read back: largest spike mismatch", _share(self.largest_mismatch))
        table.add_row("read back: largest difference of logits", f"{self.logit_difference:.1e} of the largest")
        table.add_row("read back: same predictions", _share(self.same_predictions))
        table.add_row("without metadata: largest spike mismatch", _share(self.plain_spike_mismatch))
        table.add_row("without metadata: same predictions", _share(self.plain_same_predictions))
        return table

    def save(self, path: str | Path) -> None:
        """Write everything as json."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote."""
        content = tuples(json.loads(Path(path).read_text()))
        content["unsaid"] = {what: tuple(names) for what, names in content["unsaid"].items()}
        return cls(**content)


@torch.no_grad()
def to_nir(
    model: nn.Module,
    path: str | Path,
    *,
    dt: float = 1e-3,
    images: Tensor | None = None,
    steps: int = 4,
    strict: bool = False,
) -> NIRReceipt:
    """Write a spiking network to a NIR file, read it back, and say what is the same.

    Normalisation is folded into layers, burst neurons are decoupled, and what converted neurons send becomes a spike of
    1 with the threshold in the next weights. Then LIF neurons have tau in seconds (tau steps times dt), r = 1 and
    v_leak = 0; IF neurons r = 1 / dt; sums are edges that meet. Grouped convolutions are written without groups, since
    readers disagree about them.

    NIR has no soft reset, no neuron that resets another, no initial potential, and neurons that fire only above the
    threshold. These are written as metadata, which `from_nir` reads and other tools ignore; the receipt names them, and
    how much the network changes without them.

    Args:
        model: A `Network` of `ranvier.models`, or what `convert` or `decouple` made.
        path: The file, by custom `*.nir`.
        dt: Seconds of a step.
        images: `[B, ...]` to compare on, and for the size of images; random ones if None.
        steps: T of the comparison.
        strict: Raise rather than leave anything out of the graph proper.

    Returns:
        The receipt.

    Raises:
        ConversionError: A part that NIR cannot say, such as max-pooling, concatenation or self-attention; it is named.
        ImportError: The package nir is missing.
        OSError: The file cannot be written; an older one is untouched.
        ValueError: `strict`, and something would be left out.

    >>> from ranvier.models import mlp
    >>> receipt = to_nir(mlp([64, 32, 10]), "/tmp/mlp.nir", dt=1e-3)  # doctest: +SKIP
    """
    check_count("steps", steps)
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if images is None:
        if not isinstance(model, Network):
            raise ValueError("images are needed to write this network: a batch [B, ...] as it takes them.")
        images = example_images(model, 8)
    traced, written = write_nir(model, Path(path), images, dt, strict)
    read, plain = (from_nir(path, use_metadata=use).to(images.device) for use in (True, False))
    with evaluating(model):
        spikes = dict(zip(traced.neurons, binary_spikes_of(model, images, steps), strict=True))
        logits = model(images, steps)
    found, seen = read(images, steps), plain(images, steps)
    return NIRReceipt(
        path=str(path),
        dt=float(dt),
        steps=steps,
        samples=len(images),
        nodes=dict(Counter(type(node).__name__ for node in written.nodes.values())),
        neurons=count_neurons(written),
        unsaid={what: tuple(names) for what, names in written.unsaid.items()},
        spike_mismatch=_mismatch(spikes, record_spikes(read, images, steps)),
        logit_difference=float((found - logits).abs().max() / logits.abs().max().clamp_min(1e-12)),
        same_predictions=_same(found, logits),
        plain_spike_mismatch=max(_mismatch(spikes, record_spikes(plain, images, steps)).values()),
        plain_same_predictions=_same(seen, logits),
        bytes=os.path.getsize(path),
        versions=provenance.versions(),
    )


def binary_spikes_of(model: nn.Module, images: Tensor, steps: int) -> list[Tensor]:
    """Spikes `[T, B, ...]` of all neurons in the order in which they run; of bursts those of both neurons of a pair."""
    found: list[Tensor] = []

    def note(neuron: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(neuron, LIFB):
            own = neuron.params
            output = LIFPair(tau=own.tau, v_threshold=own.v_threshold, reset=own.reset)(inputs[0])
        found.append(output.sign().cpu())

    handles = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, Neuron)]
    try:
        model(images, steps)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _same(logits: Tensor, others: Tensor) -> float:
    """Share of equal answers."""
    return float((logits.mean(0).argmax(1) == others.mean(0).argmax(1)).double().mean())


def _mismatch(spikes: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of differing spikes by layer; pairs of the one network may be two layers of the other."""
    layers = {path.removeprefix("network.").removesuffix(".neuron"): sent for path, sent in others.items()}
    found: dict[str, float] = {}
    for name, sent in spikes.items():
        path = name.replace(".", "_")
        other = layers[path]
        if other.shape != sent.shape:
            other = torch.cat((other, layers[f"{path}_burst"]), 2)
        found[name] = float((sent != other).double().mean())
    return found


def _share(value: float) -> str:
    return f"{100 * value:.4g} %"
