"""Corrections of converted neurons that take forward passes only: temporal biases (FTBC), constant ones, potentials."""

import functools
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, fx

from ranvier.checks import check_choice
from ranvier.conversion.spiking import ConvertedSNN
from ranvier.conversion.walk import VisitLayer, walk
from ranvier.dynamics.converted import begin, converted_step
from ranvier.dynamics.scan import per_channel
from ranvier.kernels.dispatch import choose, compile_whole, run_size
from ranvier.kernels.scan import sizes_open
from ranvier.nn import ConvertedIF

Bias = Literal["none", "light", "potential", "ftbc"]
BIASES: tuple[Bias, ...] = ("none", "light", "potential", "ftbc")

Variant = Literal["V1", "V2", "V3"]
VARIANTS: tuple[Variant, ...] = ("V1", "V2", "V3")


def ftbc(
    ann: fx.GraphModule,
    snn: ConvertedSNN,
    images: Tensor,
    steps: int,
    *,
    step_size: float = 0.4,
    variant: Variant = "V1",
    visit_layer: VisitLayer | None = None,
) -> None:
    """One round of forward temporal bias correction: the biases of all layers and steps, from one batch.

    Layer by layer in forward order, and in each layer step by step,

        e[t, c]  = mean over batch and positions of (y[t] - a)        y transmitted, a the activation of the ANN
        b[t, c] += step_size e[t, c]

    so that after enough rounds every channel transmits, at every single step, what its activation is on average. How
    the neurons go on to the next step is where the published codes differ:

        V1    take the spikes of this step back and fire again with the new bias
        V2    go on with what was fired under the old bias
        V3    run without any bias; subtract the error of each neuron, y - a, from its potential, and fire again

    The layers after it see what the layer transmits with its new biases.

    Args:
        ann: From `trace`.
        snn: From `spiking`, of that graph. Its biases are changed; they have one row per step.
        images: One batch `[B, ...]`.
        steps: T.
        step_size: Share of the error that is corrected (alpha in the paper).
        variant: V1 (the released code for plain ReLU networks), V2 (that for RTS on ImageNet) or V3 (for QCFS).
        visit_layer: Called for every layer with weights before it runs; see `walk`.

    Source: Wu et al. 2024, "FTBC: Forward Temporal Bias Correction for Optimizing ANN-SNN Conversion", ECCV, with
    details from its released code. Differs from it in: where a mean activation exceeds the threshold, which no bias can
    bring about, the target is the threshold, so that the bias stops once the channel always fires; a tie fires. V3
    never sees what its biases did, so that its rounds only add up: their number times the step size is to be about 1,
    as published.
    """
    check_choice("variant", variant, VARIANTS)

    def update(name: str, neuron: ConvertedIF, current: Tensor, activation: Tensor) -> Tensor:
        if len(neuron.bias) != steps:
            neuron.bias = neuron.bias.expand(steps, -1).clone()
        target = torch.minimum(channel_means(activation.unsqueeze(0))[0], neuron.threshold)
        if variant == "V1":
            return _fire_again(neuron, current, target, step_size)
        if variant == "V2":
            neuron.bias += step_size * (channel_means(neuron(current)) - target)
        else:
            neuron.bias += step_size * _errors_followed(neuron, current, activation, target)
        sent: Tensor = neuron(current)
        return sent

    walk(ann, snn, images, steps, update, visit_layer)


def light(ann: fx.GraphModule, snn: ConvertedSNN, batches: Iterable[Tensor], steps: int) -> None:
    """One constant bias per channel, layer by layer in forward order.

        b[c] = mean over batch, positions and steps of (y - a)

    Source: Li et al. 2021, "A Free Lunch From ANN: Towards Efficient, Accurate Spiking Neural Networks Calibration",
    ICML, light pipeline. Differs from it in: the mean is over all batches, each seeing the layers before it corrected
    by the batches up to it.
    """
    for number, images in enumerate(batches, 1):

        def update(name: str, neuron: ConvertedIF, current: Tensor, activation: Tensor, number: int = number) -> Tensor:
            before = neuron.bias
            neuron.bias = torch.zeros_like(before[:1])
            sent: Tensor = neuron(current)
            error = channel_means(sent).mean(0) - channel_means(activation.unsqueeze(0))[0]
            neuron.bias = before[:1] + (error - before[:1]) / number
            corrected: Tensor = neuron(current)
            return corrected

        walk(ann, snn, images, steps, update)


def potential(ann: fx.GraphModule, snn: ConvertedSNN, batches: Iterable[Tensor], steps: int) -> None:
    """One initial potential per neuron, layer by layer in forward order, added to the one that is there.

        v_init += T mean over batch of (a - mean over steps of y)

    Source: Li et al. 2021, advanced pipeline, potential calibration. Differs from it as `light` does.
    """
    first = {name: neuron.v_init.clone() for name, neuron in snn.neurons.items()}
    for number, images in enumerate(batches, 1):

        def update(name: str, neuron: ConvertedIF, current: Tensor, activation: Tensor, number: int = number) -> Tensor:
            base = per_channel(first[name], current[0]).expand(current.shape[2:])
            before = neuron.v_init - base if number > 1 else torch.zeros_like(base)
            neuron.v_init = base.clone()
            sent: Tensor = neuron(current)
            error = steps * (activation - sent.mean(0)).mean(0)
            neuron.v_init = (base + before + (error - before) / number).contiguous()
            corrected: Tensor = neuron(current)
            return corrected

        walk(ann, snn, images, steps, update)


def channel_means(x: Tensor) -> Tensor:
    """Mean of each channel at each step, `[T, B, C, ...]` to `[T, C]`."""
    return x.mean((1, *range(3, x.ndim)))


def refire_step(
    x: Tensor,
    v: Tensor,
    emitted: Tensor,
    threshold: Tensor,
    bias: Tensor,
    target: Tensor,
    step_size: Tensor,
    signed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of variant V1: fire, move the bias by the mean error, fire again from the same potential."""
    sent, _, _ = converted_step(x, v, emitted, threshold, bias, signed)
    error = sent.mean((0, *range(2, sent.ndim)), keepdim=True)[0] - target
    bias = bias + step_size * error
    return *converted_step(x, v, emitted, threshold, bias, signed), bias


def _fire_again(neuron: ConvertedIF, current: Tensor, target: Tensor, step_size: float) -> Tensor:
    """Variant V1; what it fires is what the neuron fires with the new biases, so that it need not run once more."""
    v, emitted, rows, _ = begin(current, None, neuron.bias, neuron.v_init, neuron.signed)
    compiled = choose(neuron.implementation, current.device, run_size(current)).implementation == "compiled"
    step = _compiled_step() if compiled else refire_step
    threshold, target = per_channel(neuron.threshold, current[0]), per_channel(target, current[0])
    size = torch.tensor(step_size, device=current.device)
    sent, biases = torch.empty_like(current), []
    for x, row, y in zip(current.unbind(0), rows, sent.unbind(0), strict=True):
        fired, v, emitted, bias = step(x, v, emitted, threshold, row, target, size, signed=neuron.signed)
        y.copy_(fired)
        biases.append(bias.flatten())
    neuron.bias.copy_(torch.stack(biases))
    return sent


@functools.cache
def _compiled_step() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    compiled: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = compile_whole(refire_step)

    def step(*tensors: Tensor, signed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return compiled(*map(sizes_open, tensors), signed)

    return step


def _errors_followed(neuron: ConvertedIF, current: Tensor, activation: Tensor, target: Tensor) -> Tensor:
    """Mean errors `[T, C]` of variant V3, whose potentials follow the activation of each neuron."""
    v, emitted, rows, _ = begin(current, None, torch.zeros_like(neuron.bias), neuron.v_init, neuron.signed)
    threshold = per_channel(neuron.threshold, current[0])
    errors = []
    for x, none in zip(current.unbind(0), rows, strict=True):
        sent, _, _ = converted_step(x, v, emitted, threshold, none, neuron.signed)
        error = sent - activation
        errors.append(channel_means(sent.unsqueeze(0)) - target)
        _, v, emitted = converted_step(x, v, emitted, threshold, error, neuron.signed)
    return torch.cat(errors)
