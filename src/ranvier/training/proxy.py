"""Proxy learning: the answer of a spiking network, the gradient of the ANN that has the same weights.

    n = spiking(images, T)             run without gradients, a few steps at a time, so that memory does not grow with T
    z = analog(images)                 one pass of the ANN
    y = n + (z - stopgrad(z))          the value of the one, the graph of the other
    L = MSE(y, one-hot)  or  CE(scale y, label),  and backpropagation through the ANN

The error of the spiking network so reaches the weights by the path of the ANN: no surrogate gradient is needed, and
nothing is kept for each time step.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranvier.checks import check_choice, check_count, check_logits, check_positive
from ranvier.conversion.trace_network import example_images
from ranvier.dynamics import Reset
from ranvier.dynamics.reset import check_reset
from ranvier.evaluation.mode import evaluating
from ranvier.kernels.dispatch import Implementation
from ranvier.models import Network
from ranvier.nn import IF, BatchNorm, ConvertedIF, Neuron
from ranvier.nn.proxy import ProxyActivation, ProxyNorm, analog
from ranvier.nn.structure import Activation, Chain

Target = Literal["counts", "rates", "cross_entropy"]
Worth = Literal["one", "threshold"]
ProxyReadout = Literal["spikes", "membrane"]
Normalizations = Literal["separate", "shared"]
Pooling = Literal["average", "max"]
InitialWeights = Literal["network", "torch"]


@dataclass(frozen=True)
class ProxyForm:
    """How a network spikes, and what its ANN is: `proxy_network` builds it. The defaults are what measured best."""

    v_threshold: float = 1.0
    """Firing threshold of all neurons."""
    reset: Reset = "soft"
    """Reset after a spike."""
    v_init: float = 0.5
    """Initial potential as a share of the threshold; a soft reset keeps it, a hard one would lose it."""
    worth: Worth = "threshold"
    """What a spike is worth: 1, or the threshold, at which the mean of the spikes is the ReLU of the mean current."""
    clipped: bool = True
    """Whether the ANN's activation is bounded by what a neuron sends that fires at every step. Without that bound
    cross-entropy drives the neurons into saturation, where the ANN still sees a gradient and nothing changes."""
    readout: ProxyReadout = "membrane"
    """`membrane`: the last layer answers with its current, the logits. `spikes`: neurons after it are counted."""
    normalization: Normalizations = "shared"
    """Running averages for each mode (`separate`), or those of the ANN for both (`shared`): `ranvier.nn.ProxyNorm`."""
    pooling: Pooling = "average"
    """`average`, or `max`, where a spike of any neuron passes."""
    biases: bool = True
    """Whether convolutions and linear layers keep their biases."""
    initial_weights: InitialWeights = "network"
    """Initial weights: of the network as it came, or PyTorch's usual ones."""

    def __post_init__(self) -> None:
        check_positive("v_threshold", self.v_threshold)
        check_reset(self.reset)
        for name, choices in (
            ("worth", ("one", "threshold")),
            ("readout", ("spikes", "membrane")),
            ("normalization", ("separate", "shared")),
            ("pooling", ("average", "max")),
            ("initial_weights", ("network", "torch")),
        ):
            check_choice(name, getattr(self, name), choices)
        if not 0 <= self.v_init < 1:
            raise ValueError(f"v_init is {self.v_init}, but is a share of the threshold: from 0 to below 1.")
        if self.reset == "hard" and (self.v_init or self.worth == "threshold"):
            raise ValueError(
                f"reset is hard, with v_init={self.v_init} and worth={self.worth!r}. A hard reset discards what "
                "exceeds the threshold, so that neither makes the neuron a better ReLU. Use reset='soft', or v_init=0 "
                "and worth='one'."
            )

    def neuron(self, num_channels: int, implementation: Implementation = "auto") -> Neuron:
        """The neuron of this form for C channels."""
        if self.reset == "hard":
            return IF(num_channels, v_threshold=self.v_threshold, reset="hard", implementation=implementation)
        neuron = ConvertedIF(num_channels, binary=self.worth == "one", implementation=implementation)
        neuron.threshold.fill_(self.v_threshold)
        neuron.v_init.fill_(self.v_init * self.v_threshold)
        return neuron

    @property
    def ceiling(self) -> float:
        """What a neuron sends that fires at every step."""
        return self.v_threshold if self.worth == "threshold" else 1.0


PUBLISHED_FORM = ProxyForm(
    v_threshold=2.0,
    reset="hard",
    v_init=0.0,
    worth="one",
    clipped=False,
    readout="spikes",
    normalization="separate",
    pooling="max",
    biases=False,
    initial_weights="torch",
)
"""The released notebook of Kheradpisheh et al. 2022 on Fashion-MNIST."""


def proxy_network(
    network: Network,
    form: ProxyForm | None = None,
    *,
    images: Tensor | None = None,
    implementation: Implementation = "auto",
) -> Network:
    """A network with two modes, spiking and analog, from one of `ranvier.models`.

    It spikes, unless it is called within `with ranvier.nn.analog(network):`, where it is an ANN with ReLU. Both modes
    have the same weights. Whatever works on spiking networks works on it.

    Args:
        network: Built with any neuron or activation, all of which are replaced. Not modified.
        form: What the modes are.
        images: Examples `[B, ...]`, for their shape; None makes some up.
        implementation: Of the neurons, where the network is not compiled whole.

    Returns:
        A network of the same architecture, called as before.

    Raises:
        TypeError: `network` is no `Network`.
        ValueError: Nothing tells what its images look like, and none were given.

    >>> from ranvier import models
    >>> from ranvier.nn import analog
    >>> model = proxy_network(models.mlp([64, 32, 10]))
    >>> with analog(model):
    ...     model(torch.zeros(5, 64), steps=1).shape
    torch.Size([1, 5, 10])
    >>> model(torch.zeros(5, 64), steps=4).shape
    torch.Size([4, 5, 10])
    """
    form = form or ProxyForm()
    if not isinstance(network, Network):
        raise TypeError(
            f"network is a {type(network).__name__}, but must be a Network of ranvier.models. Build it from encoder, "
            "body and readout, as ranvier.models.mlp does."
        )
    network = copy.deepcopy(network)
    channels, num_classes = _observed(network, example_images(network) if images is None else images)

    def replaced(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, Activation):
            neuron = form.neuron(channels[name], implementation)
            return ProxyActivation(neuron, "clipped" if form.clipped else "relu", form.ceiling)
        if isinstance(module, BatchNorm):
            # Before the first neuron both modes see the same image, so that there is nothing to keep apart.
            separate = form.normalization == "separate" and not name.startswith("encoder.")
            norm = ProxyNorm(len(module.weight), separate=separate, eps=module.eps, momentum=module.momentum)
            norm.weight, norm.bias = module.weight, module.bias
            return norm
        if isinstance(module, nn.AvgPool2d) and form.pooling == "max":
            return nn.MaxPool2d(module.kernel_size, module.stride, module.padding)
        return None

    for name, module in list(network.named_modules()):
        if (new := replaced(name, module)) is not None:
            parent, _, child = name.rpartition(".")
            network.get_submodule(parent).add_module(child, new)
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            if form.initial_weights == "torch":
                module.reset_parameters()
            if not form.biases:
                module.bias = None
    if form.readout == "spikes":
        neuron = form.neuron(num_classes, implementation)
        network.body = Chain(network.body, network.readout, ProxyActivation(neuron, "none"))
        network.readout = nn.Identity()
    return network


@torch.no_grad()
def _observed(network: Network, images: Tensor) -> tuple[dict[str, int], int]:
    """Channels at each activation, by name, and the number of classes."""
    channels: dict[str, int] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: channels.__setitem__(name, inputs[0].shape[2]))
        for name, module in network.named_modules()
        if isinstance(module, Activation)
    ]
    with evaluating(network):
        logits = network(images, 1)
    for handle in handles:
        handle.remove()
    return channels, logits.shape[2]


@dataclass(frozen=True)
class ProxyLoss:
    """What proxy learning minimises: the error of the spiking network, as a function of the ANN.

    counts:         mean_{b,k} (y - onehot)^2,    y from the sum of the outputs over T steps
    rates:          mean_{b,k} (y - onehot)^2,    y from their mean
    cross_entropy:  CE(logit_scale y),            y from their mean

    Where labels are probabilities `[B, K]`, these stand in place of onehot: each class is to have its share of a spike.

    For a network from `proxy_network`, called as a `Loss` of `fit`.

    Source: Kheradpisheh, Mirsadeghi and Masquelier 2022, "Spiking Neural Networks Trained via Proxy", IEEE Access 10,
    70769. `counts` is their loss.
    """

    target: Target = "cross_entropy"
    """What the outputs are to be: one spike of the true class (`counts`), a spike of it at every step (`rates`), or
    largest for it (`cross_entropy`)."""
    logit_scale: float = 1.0
    """Factor on the outputs in the cross-entropy."""
    freeze_epoch: int | None = None
    """Normalisation is frozen from this epoch on, counted from 0; None never freezes it."""
    steps_at_once: int = 2
    """Steps of the spiking network that are computed in one call; more need more memory."""

    def __post_init__(self) -> None:
        check_choice("target", self.target, ("counts", "rates", "cross_entropy"))
        check_positive("logit_scale", self.logit_scale)
        check_count("steps_at_once", self.steps_at_once)
        if self.freeze_epoch is not None and self.freeze_epoch < 0:
            raise ValueError(f"freeze_epoch is {self.freeze_epoch}, but epochs are counted from 0.")

    def begin_epoch(self, model: nn.Module, epoch: int) -> None:
        """Freeze the normalisation of a model in training mode, if it is time; a function of the epoch alone."""
        if self.freeze_epoch is not None and epoch >= self.freeze_epoch:
            for module in model.modules():
                if isinstance(module, ProxyNorm):
                    module.eval()

    def __call__(
        self, forward: Callable[..., Tensor], images: Tensor, labels: Tensor, steps: int | None
    ) -> tuple[Tensor, Tensor]:
        """Loss (scalar) and outputs of the spiking network `[T, B, K]`; `forward` is the model, compiled or not."""
        model = _model(forward)
        spiking = run_spiking(model, images, steps, self.steps_at_once).float()
        with analog(model):
            # Of a sequence the ANN sees the mean, which is what a neuron without leak adds up.
            z = model(images, 1) if steps is not None else model(images.mean(0, keepdim=True))
        z = z[0].float()
        n = spiking.sum(0) if self.target == "counts" else spiking.mean(0)
        return self.of_outputs(n + (z - z.detach()), labels), spiking  # exactly n: z - z is 0

    def of_outputs(self, y: Tensor, labels: Tensor) -> Tensor:
        """Loss of counts or means `[B, K]`; labels are class indices `[B]` or probabilities `[B, K]`."""
        check_logits(y.unsqueeze(0), labels, soft=True)
        if labels.is_floating_point():
            labels = labels.to(y.dtype)
        if self.target == "cross_entropy":
            return F.cross_entropy(self.logit_scale * y, labels)
        return F.mse_loss(y, labels if labels.ndim == 2 else F.one_hot(labels, y.shape[1]).to(y.dtype))


PUBLISHED_LOSS = ProxyLoss("counts", freeze_epoch=1)
"""The released notebook: one spike of the true class; normalisation learns its statistics in the first epoch."""


@torch.no_grad()
def run_spiking(model: nn.Module, images: Tensor, steps: int | None, steps_at_once: int) -> Tensor:
    """Outputs `[T, B, K]` without a graph, a few steps at a time: memory does not depend on T.

    Layers before the first neuron, which see a constant image once, are computed once a call.

    Args:
        model: Called as a network of `ranvier.models`, compiled or not.
        images: A constant input `[B, ...]`, or a sequence `[T, B, ...]`.
        steps: T; None for a sequence.
        steps_at_once: Steps of a call.
    """
    total = images.shape[0] if steps is None else steps
    outputs, state = [], None
    for start in range(0, total, steps_at_once):
        count = min(steps_at_once, total - start)
        part = images[start : start + count] if steps is None else images
        if start + count == total == count:
            return model(part, count)
        output, state = model(part, count, state=state, return_state=True)
        outputs.append(output)
    return torch.cat(outputs)


def _model(forward: Callable[..., Tensor]) -> nn.Module:
    model = forward if isinstance(forward, nn.Module) else None
    if model is None or not any(isinstance(module, ProxyActivation) for module in model.modules()):
        raise ValueError(
            f"proxy learning needs a network with two modes, but {type(forward).__name__} has none. Make it one: "
            "proxy_network(network)."
        )
    return model
