"""From features over time to logits over time."""

from torch import Tensor, nn

from ranvier.nn.time import TimeFolded


class Readout(TimeFolded):
    """Linear classifier at every step, without a spiking output: `logits[t] = W features[t] + b`.

    Nothing is accumulated: step t stands for itself, and the prediction after t steps is the mean of the first t
    logits, taken by whoever evaluates. (The temporal-consistency paper draws an accumulating output neuron; its
    released code, like this, does not have one.)

    Args:
        num_features: Features per step after flattening.
        num_classes: K.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__(nn.Flatten(1), nn.Linear(num_features, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[T, B, ...]` to logits `[T, B, K]`."""
        return super().forward(x)
