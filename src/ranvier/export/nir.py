"""NIR files with a receipt: what was written, what NIR cannot say, and how the file compares with the network."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from ranvier import provenance
from ranvier.atomic import replacing, tuples, write_json
from ranvier.checks import check_count, shape_of
from ranvier.conversion.trace_network import example_images, usual_steps
from ranvier.evaluation import record_spikes
from ranvier.evaluation.activity import watching
from ranvier.evaluation.mode import evaluating
from ranvier.export.nir_read import from_nir
from ranvier.export.nir_write import Written, content_of, count_neurons, cut, precision_of, translated
from ranvier.kernels.full_float32 import full_float32
from ranvier.models import Network, SpikingNetwork
from ranvier.nn import LIFB, LIFPair, Neuron, ProxyActivation

__all__ = ["NIRReceipt", "from_nir", "to_nir"]


@dataclass(frozen=True)
class NIRReceipt:
    """What became of a network in a NIR file, checked by reading the file back. `rich.print` shows a table.

        mismatch of a layer = values that differ between network and file / spikes that the layer of the network sent

    A value is what one neuron sends at one step for one image. Nothing is divided by the silent ones, which are most,
    so that a mismatch of 1 is as many wrong spikes as there are spikes, and more is possible. Of a layer that sent none
    it is the number of values that differ.
    """

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
    spikes: int
    """Of the network in the comparison: of all neurons, steps and images."""
    spike_mismatch: Mapping[str, float]
    """By layer, as above."""
    logit_difference: float
    """Largest difference of logits over the largest logit."""
    same_predictions: float
    """Share of images with the same answer after all steps. A tie for the largest logit, in either, is no answer."""
    plain_spike_mismatch: float
    """Largest mismatch of a layer when the metadata are ignored, as other tools do."""
    plain_same_predictions: float
    bytes: int
    versions: Mapping[str, str]

    @property
    def largest_mismatch(self) -> float:
        """Of all layers."""
        return max(self.spike_mismatch.values(), default=0.0)

    @property
    def warning(self) -> str:
        """What makes the comparison say nothing; empty where there is nothing of the kind."""
        return "" if self.spikes else "no neuron fired on these images, so that no spike was compared"

    def __str__(self) -> str:
        compared = (
            f"{self.spikes:,} spikes on {self.samples} images in {self.steps} steps; read back: largest mismatch "
            f"{_share(self.largest_mismatch)}, same predictions {_share(self.same_predictions)}; without metadata: "
            f"{_share(self.plain_spike_mismatch)}, {_share(self.plain_same_predictions)}"
        )
        warning = f"; warning: {self.warning}" * bool(self.warning)
        return f"{self.path}: {self.neurons:,} neurons, dt = {self.dt:g} s; {compared}{warning}"

    def __rich__(self) -> Table:
        """Table for the terminal."""
        title = f"{escape(self.path)}: {self.neurons:,} neurons, {self.bytes / 1e6:.1f} MB, dt = {self.dt:g} s"
        caption = f"compared on {self.samples} images, {self.steps} steps; mismatches over {self.spikes:,} spikes"
        table = Table(title=title, caption=caption, min_width=72, show_header=False)
        table.add_column("", overflow="fold")
        table.add_column("", overflow="fold")
        table.add_row("nodes", ", ".join(f"{count} {kind}" for kind, count in self.nodes.items()))
        for what, names in self.unsaid.items():
            table.add_row(f"not in NIR: {what}", f"{escape(cut(names))} (metadata)")
        table.add_row("read back: largest spike mismatch", _share(self.largest_mismatch))
        table.add_row("read back: largest difference of logits", f"{self.logit_difference:.1e} of the largest")
        table.add_row("read back: same predictions", _share(self.same_predictions))
        table.add_row("without metadata: largest spike mismatch", _share(self.plain_spike_mismatch))
        table.add_row("without metadata: same predictions", _share(self.plain_same_predictions))
        if self.warning:
            table.add_row("warning", self.warning)
        return table

    def save(self, path: str | Path) -> None:
        """Write everything as json."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: An earlier version wrote it, whose mismatches were of something else.
        """
        content = tuples(json.loads(Path(path).read_text()))
        if "spikes" not in content:
            raise ValueError(
                f"{path} was written by an earlier version of ranvier, which divided differences by all values and not "
                "by the spikes. Export the network again."
            )
        content["unsaid"] = {what: tuple(names) for what, names in content["unsaid"].items()}
        return cls(**content)


@full_float32()
@torch.inference_mode(False)
@torch.no_grad()
def to_nir(
    model: nn.Module,
    path: str | Path,
    *,
    dt: float = 1e-3,
    images: Tensor | None = None,
    steps: int | None = None,
    strict: bool = False,
) -> NIRReceipt:
    """Write a spiking network to a NIR file, read it back, and say what is the same.

    Normalisation is folded into layers, burst neurons are decoupled, and what converted neurons send becomes a spike of
    1 with the threshold in the next weights. Then LIF neurons have tau in seconds (tau steps times dt), r = 1 and
    v_leak = 0; IF neurons r = 1 / dt; sums are edges that meet. Grouped convolutions are written without groups, since
    readers disagree about them.

    NIR has no soft reset, no neuron that resets another, no initial potential, no leaky mean of what comes out, and
    neurons that fire only above the threshold. These are written as metadata, which `from_nir` reads and other tools
    ignore; the receipt names them, and how much the network changes without them. With `strict` they are refused, but
    for ties: the threshold is then the largest number of the potential's precision below ours, so that a potential
    equal to ours is above it.

    Args:
        model: A `Network` of `ranvier.models`, or what `convert`, `decouple` or `from_nir` made.
        path: The file, by custom `*.nir`.
        dt: Seconds of a step.
        images: `[B, ...]` to compare on, or a sequence `[T, B, ...]`, and for the size of images; random ones if None.
        steps: T of the comparison; None for the length of a sequence, or that which the network was converted for,
            else 4.
        strict: Raise rather than leave anything out of the graph proper.

    Returns:
        The receipt.

    Raises:
        ConversionError: A part that NIR cannot say, such as max-pooling, concatenation or self-attention; it is named.
        ImportError: The package nir is missing.
        OSError: The file cannot be written; an older one is untouched.
        TypeError: `model` is no spiking network of ranvier, or `images` is no floating tensor.
        ValueError: `strict`, and something would be left out; or images that the network does not take; or it is in
            analog mode.

    >>> import tempfile
    >>> from ranvier.models import mlp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     receipt = to_nir(mlp([64, 32, 10]), f"{folder}/mlp.nir", dt=1e-3, strict=True)
    >>> receipt.nodes, receipt.largest_mismatch
    ({'Input': 1, 'Affine': 2, 'LIF': 1, 'Output': 1}, 0.0)
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    frame = None
    if images is not None:
        images = _prepared(images, model)
        assert isinstance(model, SpikingNetwork)  # or _prepared would have refused it
        is_sequence = images.ndim not in model.frame_dims
        frame = images[0] if is_sequence else images
        steps = len(images) if steps is None and is_sequence else steps
    steps = usual_steps(model) if steps is None else steps
    steps = check_count("steps", steps)
    traced, written, graph = translated(model, frame, dt, strict)
    if any(isinstance(module, ProxyActivation) and module.analog for module in model.modules()):
        raise ValueError(
            "the network is in analog mode, in which it does not spike: there is nothing to compare the file with. "
            "Write it outside of the block `with ranvier.nn.analog(model)`."
        )
    if images is None:
        assert isinstance(model, Network)  # of others the trace wants images
        images = example_images(model, 8)
    with evaluating(model):  # before anything is written: a network may not run so many steps
        spikes = dict(zip(traced.neurons, binary_spikes_of(model, images, steps), strict=True))
        logits = model(images, steps)
    spikes = {name: sent for name, sent in spikes.items() if traced.neurons[name].fires}
    total = sum(int(sent.count_nonzero()) for sent in spikes.values())
    with replacing(path) as temporary:
        size = temporary.write_bytes(content_of(graph))
        read, plain = (from_nir(temporary, use_metadata=use).to(images.device) for use in (True, False))
        images = images.to(precision_of(traced))
        found, seen = read(images, steps), plain(images, steps)
        return NIRReceipt(
            path=str(path),
            dt=float(dt),
            steps=steps,
            samples=logits.shape[1],
            nodes=dict(Counter(type(node).__name__ for node in written.nodes.values())),
            neurons=count_neurons(written),
            unsaid={what: tuple(names) for what, names in written.unsaid.items()},
            spikes=total,
            spike_mismatch=_mismatch(spikes, record_spikes(read, images, steps), written),
            logit_difference=float((found - logits).abs().max() / logits.abs().max().clamp_min(1e-12)),
            same_predictions=_same(found, logits),
            plain_spike_mismatch=max(
                _mismatch(spikes, record_spikes(plain, images, steps), written).values(), default=0.0
            ),
            plain_same_predictions=_same(seen, logits),
            bytes=size,
            versions=provenance.versions(),
        )


def binary_spikes_of(model: nn.Module, images: Tensor, steps: int) -> list[Tensor]:
    """Spikes `[T, B, ...]` of all neurons in the order in which they run; of bursts those of both neurons of a pair."""
    found: list[Tensor] = []

    def note(name: str, neuron: Neuron, inputs: tuple[Any, ...], sent: Tensor) -> None:
        if isinstance(neuron, LIFB):
            own = neuron.params
            sent = LIFPair(tau=own.tau, v_threshold=own.v_threshold, reset=own.reset)(inputs[0])
        found.append(sent.sign().cpu())

    with watching(model, note):
        model(images, steps)
    return found


def _prepared(images: Tensor, model: nn.Module) -> Tensor:
    """Images where the network is, in its precision, once they are such as it takes."""
    if not isinstance(model, SpikingNetwork):
        raise TypeError(
            f"model is a {type(model).__name__}, but must be a network of ranvier.models, or what ranvier.conversion "
            "made."
        )
    if not isinstance(images, Tensor) or not images.is_floating_point():
        came = f"a tensor of {images.dtype}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise TypeError(f"images are {came}, but must be a floating torch.Tensor [B, ...] or [T, B, ...].")
    is_known = any(images.ndim in (rank, rank + 1) for rank in model.frame_dims)
    if not is_known or 0 in images.shape:
        ranks = " or ".join(map(str, model.frame_dims))
        raise ValueError(
            f"images have shape {shape_of(images)}, but must be constant images [B, ...] of {ranks} dimensions, or a "
            "sequence with one more, [T, B, ...]; at least one image and one step."
        )
    own = next((tensor for tensor in model.state_dict().values() if tensor.is_floating_point()), images)
    return images.to(own.device, own.dtype)


def _same(logits: Tensor, others: Tensor) -> float:
    """Share of equal answers; a tie is none."""
    (answers, sure), (same, sure_too) = map(_answers, (logits, others))
    return float(((answers == same) & sure & sure_too).double().mean())


def _answers(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Class of the largest mean logit, and whether no other is as large."""
    means = logits.mean(0)
    return means.argmax(1), (means == means.amax(1, keepdim=True)).sum(1) == 1


def _mismatch(spikes: Mapping[str, Tensor], others: Mapping[str, Tensor], written: Written) -> dict[str, float]:
    """Differences over spikes by layer; pairs of the one network may be two layers of the other."""
    found: dict[str, float] = {}
    for name, sent in spikes.items():
        paths = (f"network.{node}.neuron" for node in written.neurons[name])
        other = torch.cat([others[path] for path in paths if path in others], 2)
        found[name] = int((sent != other).sum()) / max(int(sent.count_nonzero()), 1)
    return found


def _share(value: float) -> str:
    return f"{100 * value:.4g} %"
