"""A normalisation in training and the neuron behind it, as one operator where there is one."""

import torch
from torch import Tensor, nn

from ranvier.dynamics import if_step, lif_step, lifb_step, plif_step
from ranvier.dynamics.scan import Step
from ranvier.kernels.normalized_scan import fits, normalized_scan
from ranvier.nn.neurons import IF, LIF, LIFB, PLIF
from ranvier.nn.normalization import BatchNorm

_STEPS: dict[type[nn.Module], Step] = {IF: if_step, LIF: lif_step, PLIF: plif_step, LIFB: lifb_step}


def normalized(norm: BatchNorm, neuron: nn.Module, x: Tensor, added: Tensor | None = None) -> Tensor | None:
    """`neuron(norm(x))`, and what is `added` to it, without the tensors between them.

    None where it takes one after the other.

    Values and gradients agree with those of both to rounding: see `ranvier.kernels.normalized_scan`. Running averages
    move as they do there.

    Args:
        norm: In training, and without hooks, like the neuron.
        neuron: IF, LIF, PLIF or LIFB; others take both.
        x: `[T, B, C, ...]`.
        added: What is added to the spikes, or None; the operator takes it in the shape and dtype of `x`.
    """
    step = _STEPS.get(type(neuron))
    if step is None:
        return None
    assert isinstance(neuron, IF | LIF | PLIF | LIFB)
    learned = tuple(neuron.parameters())
    if not fits(x, norm.weight, norm.bias, step, neuron.params, *learned, implementation=neuron.implementation):
        return None
    per_step = norm.statistics == "per_step"
    values = x[0, :, 0].numel() * (1 if per_step else len(x))  # of a channel
    if values < 2:
        return None  # which raises, and says why
    if added is not None and (added.shape != x.shape or added.dtype != x.dtype or added.device != x.device):
        return None
    spikes, mean, variance = normalized_scan(
        x, norm.weight, norm.bias, norm.eps, per_step, step, neuron.params, *learned, added=added
    )
    with torch.no_grad():
        for one_mean, one_variance in zip(mean.unbind(0), variance.unbind(0), strict=True):
            norm.running_mean.lerp_(one_mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_((one_variance * (values / (values - 1))).to(norm.running_var.dtype), norm.momentum)
    return spikes
