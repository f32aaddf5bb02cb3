"""From settings, as they stand in recipes and on cards, to a network."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ranvier import models
from ranvier.checks import check_choice
from ranvier.dynamics import Reset
from ranvier.kernels.dispatch import Implementation
from ranvier.nn import IF, LIF, LIFB, PLIF
from ranvier.nn.normalization import Statistics

ModelName = Literal[
    "mlp", "conv4", "vggsnn", "snn6", "vgg16", "resnet19", "resnet20", "sew-resnet18", "sew-resnet34", "spikformer"
]
NeuronName = Literal["if", "lif", "plif", "lifb"]

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
        for name, used in (
            ("burst_init", self.neuron == "lifb"),
            ("tau", self.neuron != "if"),
            ("hidden", self.model == "mlp"),
            ("gain", self.model in GAINED),
            ("statistics", self.model != "mlp"),
        ):
            if not used and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                warnings.warn(
                    f"{name}={getattr(self, name)} has no effect with model {self.model} and neuron {self.neuron}.",
                    stacklevel=3,
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
        neuron = self.neuron_factory(implementation)
        if self.model == "mlp":
            return models.mlp([in_channels * image_size**2, *self.hidden, num_classes], neuron=neuron)
        arguments: dict[str, Any] = {"neuron": neuron}
        if self.statistics is not None:
            arguments["statistics"] = self.statistics
        if self.model == "resnet19":
            arguments["v_threshold"] = self.v_threshold
        if self.model in GAINED:
            arguments["gain"] = self.gain
        if self.model in SIZED:
            arguments["image_size"] = image_size
        return MODELS[self.model](num_classes, in_channels, **arguments)

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
