"""Firing thresholds from the activations of the ANN."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from ranvier.checks import check_choice
from ranvier.nn import QCFS

Threshold = Literal["max", "percentile", "mmse", "balance", "qcfs"]
THRESHOLDS: tuple[Threshold, ...] = ("max", "percentile", "mmse", "balance", "qcfs")

BINS = 2048
"""Values above zero that a histogram tells apart; a multiple of usual numbers of levels, which then fall on bins."""
BALANCE_RATE, BALANCE_ITERATIONS = 0.1, 1000


def fractions() -> Tensor:
    """Shares of the maximum among which `mmse` searches, as published."""
    return 1 - 0.01 * torch.arange(95)


@dataclass(frozen=True)
class Activations:
    """Distribution of the activations of one layer, channel by channel, as a histogram.

    Attributes:
        top: Largest activation of each channel, `[C]`.
        counts: Activations that rounded up to `top k / BINS`, `[C, BINS + 1]`; the first column counts those at zero.
    """

    top: Tensor
    counts: Tensor

    @property
    def values(self) -> Tensor:
        """What the columns of `counts` stand for, `[C, BINS + 1]`."""
        return self.top.unsqueeze(1) * torch.linspace(0, 1, BINS + 1, device=self.top.device)

    def merged(self) -> "Activations":
        """All channels as one, binned anew up to the largest of them."""
        index = (self.values * (BINS / self.top.max().clamp_min(1e-30)) - 1e-3).ceil().clamp(0, BINS).long()
        counts = self.counts.new_zeros(1, BINS + 1)
        return Activations(self.top.max().view(1), counts.index_add_(1, index.flatten(), self.counts.view(1, -1)))


@torch.no_grad()
def observe(ann: fx.GraphModule, sites: Iterable[str], batches: Iterable[Tensor]) -> dict[str, Activations]:
    """Distributions of all activations over the calibration images, in two passes of the ANN.

    Args:
        ann: From `trace`.
        sites: Names of its activations.
        batches: Images; gone through twice.
    """
    sites, batches = list(sites), list(batches)
    tops: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}

    def take_top(name: str, a: Tensor) -> None:
        top = a.transpose(0, 1).flatten(1).amax(1)
        tops[name] = torch.maximum(tops[name], top) if name in tops else top

    def count(name: str, a: Tensor) -> None:
        channels, shape = a.shape[1], (-1, *[1] * (a.ndim - 2))
        scale = (BINS / tops[name].clamp_min(1e-30)).view(shape)
        # A hair is taken off, because a level may lie above its bin by a rounding error.
        index = (a * scale - 1e-3).ceil_().clamp_(0, BINS).long()
        index += torch.arange(channels, device=a.device).view(shape) * (BINS + 1)
        found = torch.bincount(index.flatten(), minlength=channels * (BINS + 1)).view(channels, BINS + 1)
        counts[name] = counts[name] + found if name in counts else found

    for take in (take_top, count):
        handles = [
            ann.get_submodule(name).register_forward_hook(lambda _, __, a, name=name, take=take: take(name, a))
            for name in sites
        ]
        try:
            for images in batches:
                ann(images)
        finally:
            for handle in handles:
                handle.remove()
    return {name: Activations(tops[name], counts[name].double()) for name in sites}


def thresholds(
    kind: Threshold,
    observed: Activations,
    activation: nn.Module,
    steps: int,
    *,
    name: str = "the activation",
    per_channel: bool = True,
    percentile: float = 99.9,
    v_init: float = 0.5,
) -> Tensor:
    """Thresholds of one layer, `[C]`.

        max          largest activation
        percentile   the value below which `percentile` % of the activations lie, zeros included
        mmse         the minimiser of E (q(a) - a)^2, q(a) = theta / T clip(floor(T a / theta + v_init), 0, T): what
                     neurons transmit on average for a constant current, among 100 %, 99 %, ..., 6 % of the maximum
        balance      local threshold balancing: from 0, 1000 times theta += 0.1 * 2 E max(a - theta, 0)
        qcfs         the ceiling that a QCFS activation has learned

    Channels for which this gives zero, such as a percentile of one that is rarely active, get their largest activation;
    those that were never active on the calibration images get that of the layer.

    Args:
        kind: See above.
        observed: Distribution of the activations.
        activation: The ANN's module, for `qcfs`.
        steps: T, for `mmse`.
        name: Of the activation, for errors.
        per_channel: One threshold per channel, or one for the layer; `qcfs` has one.
        percentile: For `percentile`.
        v_init: Initial potential in thresholds, for `mmse`.

    Raises:
        ValueError: `qcfs` for an activation that has no learned ceiling.

    Source: max and percentile: Diehl et al. 2015, Rueckauer et al. 2017. mmse: Li et al. 2021, whose q has no v_init;
    v_init=0 gives theirs. balance: Bu et al. 2025, "Inference-Scale Complexity in ANN-SNN Conversion for
    High-Performance and Low-Power Applications", CVPR; differs from it in: activations are those of the ANN without
    clipping in the layers before. qcfs: Bu et al. 2022.
    """
    check_choice("threshold", kind, THRESHOLDS)
    seen = observed if per_channel else observed.merged()
    if kind == "qcfs":
        found = _ceiling(activation, name)
    elif kind == "max":
        found = seen.top
    elif kind == "percentile":
        found = _quantile(seen, percentile / 100)
    elif kind == "mmse":
        found = _least_squares(seen, steps, v_init)
    else:
        found = _balanced(seen)
    # The smallest threshold keeps a layer that is silent on all images from firing at a current of zero.
    quiet = observed.top.max().clamp_min(1e-6)
    instead = torch.where(seen.top > 0, seen.top, quiet)
    return torch.where(found > 0, found, instead).float().expand_as(observed.top).clone()


def _ceiling(activation: nn.Module, name: str) -> Tensor:
    if not isinstance(activation, QCFS):
        raise ValueError(
            f"threshold='qcfs' takes the ceilings that a network with QCFS activations has learned, but {name} is a "
            "ReLU. Use threshold='mmse', or train the ANN with rv.nn.QCFS in place of ReLU."
        )
    if not bool((activation.ceiling > 0).all()):
        raise ValueError(
            f"the ceiling that {name} has learned is {float(activation.ceiling.min()):.3g}, not above 0: "
            "the layer is dead. Train the ANN with a lower learning rate."
        )
    return activation.ceiling.detach()


def _quantile(observed: Activations, share: float) -> Tensor:
    cumulated = observed.counts.cumsum(1) / observed.counts.sum(1, keepdim=True)
    # 99.9 / 100 is a rounding error more than 999 / 1000, which would take in the one value that is to be left out.
    index = (cumulated < share - 1e-9).sum(1, keepdim=True).clamp_max(BINS)
    return observed.values.gather(1, index).squeeze(1)


def _least_squares(observed: Activations, steps: int, v_init: float) -> Tensor:
    values = observed.values
    candidates = observed.top * fractions().to(observed.top.device).unsqueeze(1)  # [95, C]
    errors = []
    for theta in candidates.clamp_min(1e-30).unsqueeze(2).unbind(0):
        # A level that should round up must not be kept from it by a rounding error: 1e-4.
        sent = (values * (steps / theta) + (v_init + 1e-4)).floor().clamp(0, steps) * (theta / steps)
        errors.append((observed.counts * (sent - values) ** 2).sum(1))
    best = torch.stack(errors).argmin(0, keepdim=True)
    return candidates.gather(0, best).squeeze(0)


def _balanced(observed: Activations) -> Tensor:
    theta = torch.zeros_like(observed.counts[:, :1])
    shares = observed.counts / observed.counts.sum(1, keepdim=True)
    for _ in range(BALANCE_ITERATIONS):
        theta = theta + BALANCE_RATE * 2 * (shares * (observed.values - theta).clamp_min(0)).sum(1, keepdim=True)
    return theta.squeeze(1)
