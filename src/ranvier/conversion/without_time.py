"""Our own networks as plain ANNs: the same layers under the same names, without the time axis."""

from collections import OrderedDict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranvier.conversion.recording import ConversionError
from ranvier.conversion.vocabulary import Rectifier
from ranvier.models import Network
from ranvier.nn import BatchNorm, Neuron, TimeFolded
from ranvier.nn.structure import Activation, Chain, Concat, Residual


class Sum(nn.Module):
    """A branch and a shortcut from one input, added: `Residual` without time."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, ...]` to `[B, ...]`."""
        return self.branch(x) + self.shortcut(x)


class Concatenation(nn.Module):
    """Branches from one input side by side: `Concat` without time."""

    def __init__(self, branches: Iterable[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, ...]` to `[B, C_1 + C_2 + ..., ...]`."""
        return torch.cat([branch(x) for branch in self.branches], 1)


class RunningNorm(nn.Module):
    """Batch normalisation with running statistics: `ranvier.nn.BatchNorm` in evaluation, without time."""

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[B, C, ...]`."""
        norm = self.norm
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def without_time(network: Network, neurons: dict[str, Neuron] | None = None) -> nn.Module:
    """The ANN that a network with stateless activations is: `ann(images) = network(images, steps=1)[0]`.

    Args:
        network: Built with, for example, `neuron=QCFS`, or `neuron=lambda channels: nn.ReLU()`.
        neurons: Where to note the neurons of a network that spikes already, by path; a ReLU takes the place of each.
            None: such a network is an error.

    Returns:
        A module on `[B, ...]` that shares all layers with `network` and names them alike, `body.1.branch.0`.

    Raises:
        ConversionError: The network spikes already, or has a block, such as self-attention, that cannot be converted.
    """
    parts = [(name, _without_time(name, part, neurons)) for name, part in network.named_children()]
    ann = nn.Sequential(OrderedDict(parts))
    ann.training = network.training  # not .train(), which would reach the layers that both share
    return ann


def _without_time(path: str, part: nn.Module, neurons: dict[str, Neuron] | None) -> nn.Module:
    def inner(name: str, child: nn.Module) -> nn.Module:
        return _without_time(f"{path}.{name}", child, neurons)

    match part:
        case Activation():
            if not isinstance(part.neuron, Neuron):
                return part.neuron
            if neurons is None:
                raise spikes_already(path, part.neuron)
            neurons[path] = part.neuron
            return Rectifier()
        case BatchNorm():
            return RunningNorm(part)
        case Residual():
            return Sum(inner("branch", part.branch), inner("shortcut", part.shortcut))
        case Concat():
            return Concatenation(inner(f"branches.{index}", branch) for index, branch in enumerate(part.branches))
        case Chain():
            return nn.Sequential(*(inner(str(index), layer) for index, layer in enumerate(part.layers)))
        case nn.Sequential():  # also TimeFolded and Readout, whose layers need no time
            layers = [inner(str(index), layer) for index, layer in enumerate(part)]
            return layers[0] if isinstance(part, TimeFolded) and len(layers) == 1 else nn.Sequential(*layers)
        case _ if type(part).__module__.startswith("torch.nn."):
            return part
        case _:
            raise ConversionError(
                f"{path} ({type(part).__name__}) cannot be converted: it is not made of layers with weights, "
                "activations, sums and concatenations. Self-attention multiplies values that both depend on the "
                "images. Convert a network without it, such as ranvier.models.resnet20."
            )


def spikes_already(path: str, neuron: nn.Module) -> ConversionError:
    """The error for a network that needs no conversion."""
    return ConversionError(
        f"{path} ({type(neuron).__name__}): the network spikes already. Conversion starts from an ANN: build it with "
        "neuron=QCFS, or neuron=lambda channels: nn.ReLU(), and train that."
    )
