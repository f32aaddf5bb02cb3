"""From settings, as they stand in recipes and on cards, to a network."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ranvier import models
from ranvier.checks import check_choice, check_count, check_positive
from ranvier.dynamics import Reset
from ranvier.kernels.dispatch import Implementation
from ranvier.nn import IF, LIF, LIFB, PLIF, QCFS
from ranvier.nn.normalization import Statistics

ModelName = Literal[
    "mlp", "conv4", "vggsnn", "snn6", "vgg16", "resnet19", "resnet20", "sew-resnet18", "sew-resnet34", "spikformer"
]
NeuronName = Literal["if", "lif", "plif", "lifb"]
ActivationName = Literal["relu", "qcfs"]

MODELS: dict[ModelName, Callable[..., models.Network]] = {
    "conv4": models.conv4,
    "vggsnn": models.vggsnn,
    "snn6": models.snn6,
    "vgg16": models.vgg16,
    "resnet19": models.resnet19,
    "resnet20": models.resnet20,
    "sew-resnet18": models.sew_resnet18,
    "sew-resnet34": models.sew_resnet34,
    "spikformer": models.spikformer,
}
UNCONVERTIBLE: tuple[ModelName, ...] = ("spikformer",)
"""Models that are no ANN with ReLU: the product of two activations, attention, is no input of a neuron."""
SIZED: tuple[ModelName, ...] = ("conv4", "vggsnn", "snn6", "vgg16", "spikformer")
"""Models whose layers depend on the image size; the others pool globally."""
GAINED: tuple[ModelName, ...] = ("conv4", "vggsnn", "snn6", "vgg16")
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
        _warn_of_idle(
            self,
            f"model {self.model} and neuron {self.neuron}",
            burst_init=self.neuron == "lifb",
            tau=self.neuron != "if",
            hidden=self.model == "mlp",
            gain=self.model in GAINED,
            statistics=self.model != "mlp",
        )

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
        _warn_of_idle(
            self,
            f"model {self.model} and activation {self.activation}",
            levels=self.activation == "qcfs",
            ceiling_init=self.activation == "qcfs",
            hidden=self.model == "mlp",
        )

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
            return _build(self.model, lambda _: nn.ReLU(), num_classes, in_channels, image_size, self.hidden)

        def quantized(channels: int) -> nn.Module:
            return QCFS(channels, levels=self.levels, ceiling_init=self.ceiling_init)

        return _build(self.model, quantized, num_classes, in_channels, image_size, self.hidden)


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


def _warn_of_idle(settings: Any, with_what: str, **used: bool) -> None:
    """Warn of every field that differs from its default though nothing uses it."""
    for name, has_effect in used.items():
        value = getattr(settings, name)
        if not has_effect and value != type(settings).__dataclass_fields__[name].default:
            warnings.warn(f"{name}={value} has no effect with {with_what}.", stacklevel=5)
