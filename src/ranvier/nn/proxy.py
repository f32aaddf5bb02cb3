"""Layers with two modes over one set of parameters: they spike, or they are the layers of an ANN.

Proxy learning runs a network in both: spiking, for its answer, and analog, for the gradient. The mode belongs to a
model as its training mode does; `with analog(model):` sets it for a block of code. Layers without neurons and
normalisation are the same in both, so that a network has one weight tensor for each layer, whatever is saved, loaded or
moved.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranvier.checks import check_choice, check_positive, check_sequence
from ranvier.dynamics import clip, relu
from ranvier.nn.converted import ConvertedIF
from ranvier.nn.neurons import Neuron
from ranvier.nn.normalization import BatchNorm
from ranvier.nn.structure import Activation
from ranvier.nn.time import Carry, fold_time, unfold_time

Rectification = Literal["relu", "clipped", "none", "own"]
RECTIFICATIONS = ("relu", "clipped", "none", "own")


class ProxyActivation(Activation):
    """A neuron, in analog mode the activation that it stands for.

        spiking  the neuron
        analog   max(x, 0);  clipped: min(max(x, 0), ceiling);  none: x;  own: what the neuron says

    The neuron is one of `ranvier.nn`, so that whatever counts, traces or exports networks knows it. Starts spiking.

    Args:
        neuron: Neuron of the spiking mode.
        rectification: Activation of the analog mode; `none` for neurons of an output, whose ANN is linear there,
            `own` for converted neurons with the `analog` of their thresholds and biases.
        ceiling: Largest value of the clipped activation: what a neuron sends that fires at every step.

    >>> from ranvier.nn import IF
    >>> layer = ProxyActivation(IF(v_threshold=1.0))
    >>> x = torch.tensor([-1.0, 0.25, 2.5]).expand(4, 1, -1)
    >>> layer(x).mean(0).tolist()
    [[0.0, 0.25, 1.0]]
    >>> with analog(layer):
    ...     layer(x[:1]).tolist()
    [[[0.0, 0.25, 2.5]]]
    """

    def __init__(self, neuron: Neuron, rectification: Rectification = "relu", ceiling: float = math.inf) -> None:
        super().__init__(neuron)
        check_choice("rectification", rectification, RECTIFICATIONS)
        if rectification == "own" and not isinstance(neuron, ConvertedIF):
            raise ValueError(
                f"rectification is 'own', but a {type(neuron).__name__} has none: only a ConvertedIF does."
            )
        check_positive("ceiling", ceiling)
        self.rectification: Rectification = rectification
        self.ceiling = ceiling
        self.analog = False

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        """Map currents `[T, B, ...]` to spikes, or to activations without memory, which carry nothing."""
        if not self.analog:
            return super().forward(x, carry)
        if self.rectification == "none":
            return x
        if self.rectification == "own":
            assert isinstance(self.neuron, ConvertedIF)
            return self.neuron.analog(x)
        return relu(x) if self.rectification == "relu" else clip(x, 0, self.ceiling)

    def extra_repr(self) -> str:
        """Settings, as printed."""
        return f"analog={self.rectification}" + f", ceiling={self.ceiling}" * (self.rectification == "clipped")


class ProxyNorm(BatchNorm):
    """Batch normalisation with one scale and shift, and with statistics as each mode needs them.

        y = gain (x - mean) / sqrt(variance + eps) + bias

                    analog, training    analog, evaluation   spiking, training        spiking, evaluation
        shared      batch; updates A    A                    A                        A
        separate    batch; updates A    A                    each step; updates S     S

    A and S are running averages. `shared` is what an ANN has when its normalisation is folded into its weights: the
    spiking network is trained as it will run. `separate` adapts to the spikes, whose statistics differ, but at every
    step by other numbers than in evaluation, until the normalisation is frozen (put into evaluation mode).

    Args:
        num_channels: C.
        separate: Whether each mode has running averages of its own.
        gain: Initial scale.
        eps: Added to the variance.
        momentum: Share of the new batch in the running averages.

    Source: `separate`: the released notebook of Kheradpisheh et al. 2022 (proxy learning), which freezes after the
    first epoch. In the buffers `running_mean` and `running_var` are the averages of the spiking mode.
    """

    analog_mean: Tensor | None
    analog_var: Tensor | None

    def __init__(
        self,
        num_channels: int,
        *,
        separate: bool = False,
        gain: float = 1.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(num_channels, statistics="per_step", gain=gain, eps=eps, momentum=momentum)
        self.separate = separate
        self.analog = False
        self.register_buffer("analog_mean", torch.zeros(num_channels) if separate else None)
        self.register_buffer("analog_var", torch.ones(num_channels) if separate else None)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[T, B, C, ...]`."""
        if self.separate and not self.analog:
            return super().forward(x)
        check_sequence("input", x)
        mean, var = (self.analog_mean, self.analog_var) if self.separate else (self.running_mean, self.running_var)
        learns = self.training and self.analog
        y = F.batch_norm(fold_time(x), mean, var, self.weight, self.bias, learns, self.momentum, self.eps)
        return unfold_time(y, x.shape[0])

    def extra_repr(self) -> str:
        """Settings, as printed."""
        return f"{len(self.weight)}, separate={self.separate}"


@contextmanager
def analog(model: nn.Module) -> Iterator[None]:
    """Analog mode in a block; then each layer's own mode again.

    Args:
        model: Any module; compiled or distributed ones, too. Layers without modes are the same in both.

    >>> from ranvier.nn import IF
    >>> layer = ProxyActivation(IF())
    >>> with analog(layer):
    ...     layer.analog
    True
    >>> layer.analog
    False
    """
    layers = [module for module in model.modules() if isinstance(module, ProxyActivation | ProxyNorm)]
    before = [layer.analog for layer in layers]
    for layer in layers:
        layer.analog = True
    try:
        yield
    finally:
        for layer, mode in zip(layers, before, strict=True):
            layer.analog = mode
