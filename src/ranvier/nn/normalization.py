"""Batch normalisation of sequences: over time and batch together (tdBN), or step by step."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranvier.checks import check_choice, check_sequence
from ranvier.nn.time import fold_time, unfold_time

Statistics = Literal["folded", "per_step"]


class BatchNorm(nn.Module):
    """Batch normalisation of `[T, B, C, ...]`, with the same scale and shift at every step.

        y = gain (x - mean) / sqrt(variance + eps) + bias

    In training, `folded` takes mean and variance of each channel over T, B and positions together, and `per_step` over
    B and positions, one step at a time. Running averages are shared by all steps; evaluation uses them in both modes.

    Args:
        num_channels: C.
        statistics: `folded` as in tdBN, or `per_step` as in networks that are trained step by step.
        gain: Initial scale. tdBN starts at `alpha * v_threshold`, so that currents arrive at the threshold's scale.
        eps: Added to the variance.
        momentum: Share of the new batch in the running averages.

    Source: Zheng et al. 2021, "Going Deeper With Directly-Trained Larger Spiking Neural Networks" (tdBN). Differs from
    it in: the gain is stored as one parameter, its factor `alpha * v_threshold` being only an initial value.

    Note: with several processes, statistics are those of each process's part of the batch.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        statistics: Statistics = "folded",
        gain: float = 1.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        check_choice("statistics", statistics, ("folded", "per_step"))
        self.statistics: Statistics = statistics
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.full((num_channels,), float(gain)))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[T, B, C, ...]`."""
        check_sequence("input", x)
        if self.training and self.statistics == "per_step":
            return torch.stack([self._normalize(step) for step in x.unbind(0)])
        return unfold_time(self._normalize(fold_time(x)), x.shape[0])

    def _normalize(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def extra_repr(self) -> str:
        """Settings, as printed."""
        return f"{len(self.weight)}, statistics={self.statistics!r}"
