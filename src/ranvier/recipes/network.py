"""From settings, as they stand in recipes and on cards, to a network."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch import nn

from ranvier import models
from ranvier.checks import check_choice, check_count, check_positive
from ranvier.dynamics import Reset
from ranvier.kernels.dispatch import Implementation
from ranvier.nn import IF, LIF, LIFB, PLIF, QCFS, ReLU
from ranvier.nn.normalization import Statistics
from ranvier.training import PUBLISHED_FORM, PUBLISHED_LOSS, ProxyForm, ProxyLoss
from ranvier.training.proxy import InitialWeights, Normalizations, Pooling, ProxyReadout, Target, Worth

ModelName = Literal[
    "mlp",
    "conv3",
    "conv4",
    "vggsnn",
    "snn6",
    "vgg16",
    "resnet9",
    "resnet19",
    "resnet20",
    "sew-resnet18",
    "sew-resnet34",
    "spikformer",
]
NeuronName = Literal["if", "lif", "plif", "lifb"]
ActivationName = Literal["relu", "qcfs"]


def conv3(num_classes: int = 10, in_channels: int = 1, **arguments: Any) -> models.Network:
    """Three convolutions of 128 channels and four linear layers: 128C3-128C3-AP2-128C3-AP2-2560-1152-256-FC.

    Source: Kheradpisheh et al. 2022 (proxy learning), Fashion-MNIST. Differs from it in: average pooling and biases,
    both of which `ranvier.training.proxy_network` can change.
    """
    layout = (128, 128, "A", 128, "A")
    hidden = (2560, 1152, 256)
    return models.vgg(layout, num_classes=num_classes, in_channels=in_channels, hidden=hidden, **arguments)  # type: ignore[arg-type]


MODELS: dict[ModelName, Callable[..., models.Network]] = {
    "conv3": conv3,
    "conv4": models.conv4,
    "vggsnn": models.vggsnn,
    "snn6": models.snn6,
    "vgg16": models.vgg16,
    "resnet9": models.resnet9,
    "resnet19": models.resnet19,
    "resnet20": models.resnet20,
    "sew-resnet18": models.sew_resnet18,
    "sew-resnet34": models.sew_resnet34,
    "spikformer": models.spikformer,
}
UNCONVERTIBLE: tuple[ModelName, ...] = ("spikformer",)
"""Models that are no ANN with ReLU: the product of two activations, attention, is no input of a neuron."""
SIZED: tuple[ModelName, ...] = ("conv3", "conv4", "vggsnn", "snn6", "vgg16", "spikformer")
"""Models whose layers depend on the image size; the others pool globally."""
GAINED: tuple[ModelName, ...] = ("conv3", "conv4", "vggsnn", "snn6", "vgg16")
"""Models that take the initial scale of their normalisation."""


@dataclass(frozen=True)
class NetworkSettings:
    """Which network, with which neurons."""

    model: ModelName = "conv4"
    """Architecture."""
    neuron: NeuronName = "lif"
    """Neuron of all layers."""
    burst_init: float = 2.0
    """Initial burst strength (lifb)."""
    tau: float = 2.0
    """Membrane time constant in steps (lif, lifb), or its initial value (plif)."""
    v_threshold: float = 0.5
    """Firing threshold."""
    reset: Reset = "hard"
    """Reset after a spike."""
    statistics: Statistics | None = None
    """Batch normalisation over all time steps together (folded, tdBN) or over each; None for the network's own."""
    gain: float = 1.0
    """Initial scale of the normalisation; tdBN has v_threshold. Residual networks use their published values."""
    hidden: tuple[int, ...] = (128, 128)
    """Widths of the hidden layers (mlp)."""

    def __post_init__(self) -> None:
        check_choice("model", self.model, ("mlp", *MODELS))
        check_choice("neuron", self.neuron, ("if", "lif", "plif", "lifb"))

    def build(
        self, num_classes: int, in_channels: int, image_size: int, implementation: Implementation = "auto"
    ) -> models.Network:
        """The network for images of that shape.

        Args:
            num_classes: K.
            in_channels: Channels of the images.
            image_size: Height and width.
            implementation: Of the neurons, where the network is not compiled whole.
        """
        arguments: dict[str, Any] = {}
        if self.statistics is not None:
            arguments["statistics"] = self.statistics
        if self.model == "resnet19":
            arguments["v_threshold"] = self.v_threshold
        if self.model in GAINED:
            arguments["gain"] = self.gain
        neuron = self.neuron_factory(implementation)
        return _build(self.model, neuron, num_classes, in_channels, image_size, self.hidden, **arguments)

    def neuron_factory(self, implementation: Implementation = "auto") -> Callable[[int], nn.Module]:
        """Builds the chosen neuron for a channel count."""
        shared: dict[str, Any] = {
            "v_threshold": self.v_threshold,
            "reset": self.reset,
            "implementation": implementation,
        }
        if self.neuron == "if":
            return lambda channels: IF(channels, **shared)
        if self.neuron == "lif":
            return lambda channels: LIF(channels, tau=self.tau, **shared)
        if self.neuron == "plif":
            return lambda channels: PLIF(channels, tau=self.tau, **shared)
        return lambda channels: LIFB(channels, tau=self.tau, burst_init=self.burst_init, **shared)


@dataclass(frozen=True)
class AnnSettings:
    """Which ANN, with which activation: the architectures of the spiking networks, without time."""

    model: ModelName = "resnet20"
    """Architecture."""
    activation: ActivationName = "qcfs"
    """`qcfs` (quantised, made for conversion to few time steps) or `relu`."""
    levels: int = 8
    """Quantisation levels (qcfs)."""
    ceiling_init: float = 4.0
    """Initial ceiling of every layer (qcfs)."""
    hidden: tuple[int, ...] = (128, 128)
    """Widths of the hidden layers (mlp)."""

    def __post_init__(self) -> None:
        check_choice("model", self.model, ("mlp", *(name for name in MODELS if name not in UNCONVERTIBLE)))
        check_choice("activation", self.activation, ("relu", "qcfs"))
        check_count("levels", self.levels)
        check_positive("ceiling_init", self.ceiling_init)

    def build(
        self, num_classes: int, in_channels: int, image_size: int, implementation: Implementation = "auto"
    ) -> models.Network:
        """The network for images of that shape; its activations have no state, so it is run for one step.

        Args:
            num_classes: K.
            in_channels: Channels of the images.
            image_size: Height and width.
            implementation: Has no effect: there are no neurons to choose one for.
        """
        del implementation
        if self.activation == "relu":
            return _build(self.model, ReLU, num_classes, in_channels, image_size, self.hidden)

        def quantized(channels: int) -> nn.Module:
            return QCFS(channels, levels=self.levels, ceiling_init=self.ceiling_init)

        return _build(self.model, quantized, num_classes, in_channels, image_size, self.hidden)


@dataclass(frozen=True)
class ProxySettings:
    """How proxy learning is done: one of two variants, and what is to differ from it. None: as the variant has it."""

    variant: Literal["improved", "published"] = "improved"
    """`improved` (what measured best) or `published` (the released notebook)."""
    target: Target | None = None
    """`counts` (one spike of the true class), `rates` (one at every step) or `cross_entropy`."""
    logit_scale: float | None = None
    """Factor on the outputs (cross_entropy)."""
    proxy_threshold: float | None = None
    """Firing threshold."""
    proxy_reset: Reset | None = None
    """Reset after a spike; a hard one goes with v_init 0 and worth one."""
    v_init: float | None = None
    """Initial potential as a share of the threshold."""
    worth: Worth | None = None
    """What a spike is worth: `one`, or the `threshold`."""
    clipped: bool | None = None
    """Whether the ANN's activation is bounded by what a neuron sends that fires at every step."""
    readout: ProxyReadout | None = None
    """`membrane` (the last layer answers with its current) or `spikes` (of neurons after it)."""
    normalization: Normalizations | None = None
    """Running averages for each mode (`separate`) or those of the ANN for both (`shared`)."""
    freeze_epoch: int | None = None
    """Normalisation is frozen from this epoch on, counted from 0."""
    pooling: Pooling | None = None
    """`average` or `max`."""
    biases: bool | None = None
    """Whether convolutions and linear layers have biases."""
    initial_weights: InitialWeights | None = None
    """Those of the `network`, or the usual ones of `torch`."""
    steps_at_once: int | None = None
    """Steps of the spiking network that are computed in one call; more need more memory."""

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, ("improved", "published"))
        _ = self.form, self.loss  # refuse what cannot be, before any work

    @property
    def form(self) -> ProxyForm:
        """How the network spikes, and what its ANN is."""
        start = PUBLISHED_FORM if self.variant == "published" else ProxyForm()
        return replace(start, **self._changes(start, v_threshold="proxy_threshold", reset="proxy_reset"))

    @property
    def loss(self) -> ProxyLoss:
        """What is minimised."""
        start = PUBLISHED_LOSS if self.variant == "published" else ProxyLoss()
        return replace(start, **self._changes(start))

    def _changes(self, start: ProxyForm | ProxyLoss, **names: str) -> dict[str, Any]:
        """Fields of `start` that are set here, some under other names."""
        values = {own.name: getattr(self, names.get(own.name, own.name)) for own in fields(start)}
        return {name: value for name, value in values.items() if value is not None}


def _build(
    model: ModelName,
    neuron: Callable[[int], nn.Module],
    num_classes: int,
    in_channels: int,
    image_size: int,
    hidden: tuple[int, ...],
    **arguments: Any,
) -> models.Network:
    if model == "mlp":
        return models.mlp([in_channels * image_size**2, *hidden, num_classes], neuron=neuron)
    if model in SIZED:
        arguments["image_size"] = image_size
    return MODELS[model](num_classes, in_channels, neuron=neuron, **arguments)
