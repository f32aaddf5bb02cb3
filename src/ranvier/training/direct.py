"""Direct training: the loss of one batch, differentiated through the surrogate gradients."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ranvier import losses
from ranvier.checks import check_choice, check_positive

Method = Literal["direct", "etc", "tet", "proxy"]
METHODS = ("direct", "etc", "tet", "proxy")
Forward = Callable[[Tensor, int | None], Tensor]


@dataclass(frozen=True)
class DirectLoss:
    """What direct training minimises. Labels are class indices `[B]` or probabilities `[B, K]`, as of mixed recordings.

    - direct: CE(mean logits)
    - etc: CE(mean logits) + consistency_weight * temporal_consistency
    - tet: (1 - tet_weight) mean_t CE(logits[t]) + tet_weight MSE(logits, 1)
    - proxy: none of these; a recipe takes `ranvier.training.ProxyLoss`
    """

    method: Method = "etc"
    """`direct` (cross-entropy of the mean), `etc` (with temporal consistency), `tet`, or `proxy` (proxy learning)."""
    consistency_weight: float = 1.0
    """Weight of temporal consistency (lambda in the paper)."""
    temperature: float = 4.0
    """Temperature of temporal consistency (tau in the paper)."""
    tet_weight: float = 0.05
    """Share of the pull to the mean in TET (lambda in its paper)."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_positive("temperature", self.temperature)
        for name, top in (("tet_weight", 1.0), ("label_smoothing", 1.0), ("consistency_weight", math.inf)):
            if not 0 <= getattr(self, name) <= top:
                raise ValueError(f"{name} is {getattr(self, name)}, but must lie between 0 and {top}.")

    def check_steps(self, steps: int) -> None:
        """Raise, before any time is spent, if this loss cannot be taken at `steps` time steps."""
        if self.method == "etc" and steps < 2:
            raise ValueError(
                f"method etc compares time steps, but steps={steps}. Train with --steps 2 or more (the network may be "
                "run with one step afterwards), or use --method direct."
            )

    def __call__(self, forward: Forward, images: Tensor, labels: Tensor, steps: int | None) -> tuple[Tensor, Tensor]:
        """Loss (scalar) and logits `[T, B, K]` of one batch; `forward` is the model, compiled or not."""
        logits = forward(images, steps).float()
        return self.of_logits(logits, labels), logits

    def of_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of given logits `[T, B, K]`."""
        if self.method == "proxy":
            raise ValueError(
                "method proxy is no function of the logits, but of two runs of the network. Use "
                "ranvier.training.ProxyLoss with a network from proxy_network."
            )
        if self.method == "tet":
            return losses.tet(logits, labels, label_smoothing=self.label_smoothing, weight=self.tet_weight)
        loss = losses.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if self.method == "etc":
            loss = loss + self.consistency_weight * losses.temporal_consistency(logits, temperature=self.temperature)
        return loss
