"""The neuron of converted networks as a module."""

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ranvier import kernels
from ranvier.checks import check_positive, shape_of
from ranvier.dynamics import ConvertedState, Surrogate, Triangle
from ranvier.kernels.dispatch import Implementation
from ranvier.nn.neurons import Neuron

FLOOR = 1 / 16
"""Share of its initial threshold below which a threshold that is trained falls ever more slowly."""

M = TypeVar("M", bound=nn.Module)


class AboveZero(nn.Module):
    """Thresholds that stay positive, whatever an optimizer does to the parameter `p` that they are computed from.

        threshold = p                        for p >= floor,    floor = initial threshold / 16
                    floor / (2 - p / floor)  below

    Above the floor training is as without it; the two pieces meet with the same slope, which is never 0.

    >>> AboveZero(torch.tensor([2.0]))(torch.tensor([[2.0], [0.125], [0.0], [-0.25]])).flatten().tolist()
    [2.0, 0.125, 0.0625, 0.03125]
    """

    floor: Tensor

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        self.register_buffer("floor", FLOOR * initial.detach().clone(), persistent=False)

    def forward(self, p: Tensor) -> Tensor:
        """The thresholds of a parameter, `[C]`."""
        falling = self.floor / (2 - p.minimum(self.floor) / self.floor)
        return torch.where(p >= self.floor, p, falling)


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
        implementation: `auto`, `reference`, `compiled`, `native` or `triton`.

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

        That of the thresholds stands behind `AboveZero`: `threshold` is always greater than 0.

        Args:
            steps: T.
            surrogate: Gradient of a spike, in thresholds; None for a triangle of half-width 1.

        Raises:
            ValueError: The neuron has biases for fewer steps, or a threshold that is not above 0.
        """
        if 1 < len(self.bias) < steps:
            raise ValueError(
                f"steps is {steps}, but the neuron has biases for {len(self.bias)} steps. Train at {len(self.bias)} or "
                f"fewer, or convert again with steps={steps}."
            )
        check_thresholds(self, "the neuron")
        self.surrogate = surrogate or Triangle(1.0)
        trained = parametrize.is_parametrized(self, "threshold")
        bias = self.bias.expand(steps, -1) if len(self.bias) == 1 else self.bias[:steps]
        for name, value in (("threshold", self.threshold), ("bias", bias), ("v_init", self.v_init)):
            if name != "threshold" or not trained:
                delattr(self, name)
                setattr(self, name, nn.Parameter(value.detach().clone()))
        if not trained:
            parametrize.register_parametrization(self, "threshold", AboveZero(self.threshold))

    def fixed(self, *, binary: bool | None = None) -> "ConvertedIF":
        """A neuron that fires the same, with what was learned in buffers: nothing in it is trainable.

        Args:
            binary: Whether it sends its spikes as 1; None as this one.
        """
        twin = ConvertedIF(
            max(len(self.threshold), len(self.v_init)),  # one threshold may be that of all channels
            steps=len(self.bias),
            shape=self.v_init.shape if self.v_init.ndim > 1 else None,
            signed=self.signed,
            binary=self.binary if binary is None else binary,
            implementation=self.implementation,
        )
        learned = {"threshold": self.threshold, "bias": self.bias, "v_init": self.v_init}
        twin.load_state_dict({name: value.detach().clone() for name, value in learned.items()}, assign=True)
        return twin.train(self.training)

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


def fixed_copy(network: M) -> M:
    """A copy of a network in which no converted neuron is trainable, see `ConvertedIF.fixed`."""
    network = copy.deepcopy(network)
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, ConvertedIF) and (
                child.surrogate is not None or any(True for _ in child.parameters())
            ):
                setattr(module, name, child.fixed())
    return network


def check_thresholds(neuron: ConvertedIF, what: str) -> None:
    """Raise unless all thresholds are greater than 0."""
    lowest = float(neuron.threshold.detach().min())
    if not lowest > 0:
        raise ValueError(
            f"{what} has a threshold of {lowest:.3g}, but thresholds must be greater than 0: at any other a neuron "
            "fires without input. Convert or train the network again."
        )
