"""The neuron of converted networks as a module."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ranvier import kernels
from ranvier.checks import check_positive, shape_of
from ranvier.dynamics import ConvertedState, Surrogate, Triangle
from ranvier.kernels.dispatch import Implementation
from ranvier.nn.neurons import Neuron


class ConvertedIF(Neuron):
    """Integrate-and-fire neuron that stands for a ReLU: `ranvier.dynamics.converted_scan` as a module.

        h = v + x - bias[t];  s = (h >= threshold);  y = threshold s;  v = h - y

    Thresholds, biases and initial potentials are buffers that `ranvier.conversion` fills; as built the neuron has
    threshold 1, no bias and starts at half its threshold.

    Args:
        num_channels: C.
        steps: Rows of the bias, one for each step; 1 for the same bias at all steps.
        shape: Shape of the initial potential, `[C, H, W]` for one per neuron; None for one per channel.
        signed: Whether a neuron that fired too often may take a spike back.
        binary: Whether a spike is sent as 1 and not as the threshold, by which the next weights are multiplied then.
        implementation: `auto`, `reference` or `compiled`.

    >>> ConvertedIF(1)(torch.full((4, 1, 1), 0.6)).flatten().tolist()
    [1.0, 0.0, 1.0, 0.0]
    """

    threshold: Tensor
    bias: Tensor
    v_init: Tensor

    def __init__(
        self,
        num_channels: int,
        *,
        steps: int = 1,
        shape: Sequence[int] | None = None,
        signed: bool = False,
        binary: bool = False,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__(implementation, num_channels)
        check_positive("steps", steps)
        shape = list(shape or (num_channels,))
        if shape[0] != num_channels:
            raise ValueError(f"shape is {shape}, but must begin with the {num_channels} channels: [C, H, W].")
        self.signed = signed
        self.binary = binary
        self.surrogate: Surrogate | None = None
        self.register_buffer("threshold", torch.ones(num_channels))
        self.register_buffer("bias", torch.zeros(steps, num_channels))
        self.register_buffer("v_init", torch.full(shape, 0.5))

    def make_trainable(self, steps: int, surrogate: Surrogate | None = None) -> None:
        """Turn thresholds, initial potentials and biases, one for each of `steps`, into parameters of the same names.

        Args:
            steps: T.
            surrogate: Gradient of a spike, in thresholds; None for a triangle of half-width 1.
        """
        self.surrogate = surrogate or Triangle(1.0)
        bias = self.bias.expand(steps, -1) if len(self.bias) == 1 else self.bias[:steps]
        for name, value in (("threshold", self.threshold), ("bias", bias), ("v_init", self.v_init)):
            delattr(self, name)
            setattr(self, name, nn.Parameter(value.detach().clone()))

    def analog(self, current: Tensor) -> Tensor:
        """The activation that the neuron stands for, of `[T, B, C, ...]`: what it sends on average if it is exact.

        min(max(x - mean_t bias[t], 0), threshold)
        """
        shape = (-1,) + (1,) * (current.ndim - 3)
        return (current - self.bias.mean(0).view(shape)).clamp_min(0).minimum(self.threshold.view(shape))

    def scan(self, current: Tensor, state: ConvertedState | None) -> tuple[Tensor, ConvertedState]:  # type: ignore[override]
        """Run `converted_scan`."""
        return kernels.converted_scan(
            current,
            state,
            self.threshold,
            self.bias,
            self.v_init,
            self.signed,
            self.binary,
            self.surrogate,
            implementation=self.implementation,
        )

    def extra_repr(self) -> str:
        """Settings, as printed."""
        steps = f", steps={len(self.bias)}" if len(self.bias) > 1 else ""
        shape = f", shape={shape_of(self.v_init)}" if self.v_init.ndim > 1 else ""
        return f"{len(self.threshold)}{steps}{shape}" + ", signed" * self.signed + ", binary" * self.binary
