"""Weights fitted to what spikes bring: least squares, layer by layer, in forward passes."""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ranvier.conversion.bias import ftbc
from ranvier.conversion.spiking import ConvertedSNN
from ranvier.conversion.walk import Destination, walk
from ranvier.nn import unfold_time

Layer = nn.Conv1d | nn.Conv2d | nn.Linear

RIDGE = 1e-2
"""Weight of staying near the weights that a sweep began with, relative to the mean square of the inputs."""
MAX_ROWS = 2**16
"""Samples times positions that one batch contributes to the fit of a layer; of more, positions are drawn at random."""


class Refit:
    """Fits the weights of all layers after the first neuron to the spikes that enter them.

    A layer that receives the mean of spikes, x = mean over steps, instead of the activation that they stand for,
    misses its output z in the ANN in a systematic way: spikes come late, are clipped, are rounded. So does what is
    added to its output on the way to the next activation, a instead of the ANN's b. What is missed after both, and as
    far as that activation tells it apart, phi(y) = max(y, 0),

        r = phi(z + b) - phi(W x + a),

    is made up for by the change D of the weights that a linear regression of r finds in closed form,

        D = argmin |D x - r|^2 + ridge |D|^2 = r x' (x x' + ridge)^-1,

    bias included, x the patches that a convolution sees. (phi is the identity where no activation comes next, and a and
    b are left out, with phi, where what is added has not run yet.) Layers are fitted in forward order, each on what
    reaches it through the fitted ones before it. Only forward passes are used, and neither labels nor gradients.

    Each batch that `update` is given adds to the sums x x' and r x', with W as it was at first, and sets the weights
    anew. Without phi a sweep over the batches ends at the least squares. With it, it is one step of a descent, since
    x x' is an upper bound of the second derivative: another `Refit` of the same network goes on from there.

    A regression on noisy inputs gives smaller outputs, on which neurons would fire too seldom; with `step_size`, a
    round of FTBC on the same pass keeps their means where they belong.

    Args:
        ann: From `trace`; its weights stay.
        snn: From `spiking`, of that graph; its weights are changed.
        steps: T.
        step_size: Of the FTBC round (variant V1) that goes with each update; None leaves biases alone.

    Note: grouped convolutions are left as they are, since each output sees only part of the patches.

    Source: our own; the least-squares step of Li et al. 2021 (weight calibration), which they take by gradient descent.
    """

    def __init__(self, ann: fx.GraphModule, snn: ConvertedSNN, steps: int, step_size: float | None = None) -> None:
        self.ann = ann
        self.snn = snn
        self.steps = steps
        self.step_size = step_size
        self.first: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.products: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    def update(self, images: Tensor) -> None:
        """Fit all layers again, with one batch `[B, ...]` more."""
        if self.step_size is None:
            walk(self.ann, self.snn, images, self.steps, visit_layer=self._fit)
        else:
            ftbc(self.ann, self.snn, images, self.steps, step_size=self.step_size, visit_layer=self._fit)

    def _fit(self, name: str, layer: nn.Module, spikes: Tensor, destination: Destination) -> None:
        assert isinstance(layer, Layer)
        if not isinstance(layer, nn.Linear) and layer.groups > 1:
            return
        before = self.first.setdefault(name, _weights(layer))
        wanted, beside = destination.output, None
        if destination.beside is not None:
            wanted = wanted + destination.beside[0]
            beside = unfold_time(destination.beside[1], self.steps).mean(0)
        x, wanted, beside = self._rows(layer, unfold_time(spikes, self.steps).mean(0), wanted, beside)
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        found = x @ before.T if beside is None else torch.addmm(beside, x, before.T)
        missed = wanted.clamp_min(0) - found.clamp_min(0) if destination.rectified else wanted - found
        self.squares[name] = self.squares.get(name, 0) + x.T @ x
        self.products[name] = self.products.get(name, 0) + missed.T @ x
        squares, products = self.squares[name].double(), self.products[name].double()
        ridge = RIDGE * squares.diagonal().mean() * torch.eye(len(squares), dtype=squares.dtype, device=x.device)
        change = torch.linalg.solve(squares + ridge, products, left=False).to(before.dtype)
        after = before + change
        if layer.bias is None:
            layer.bias = nn.Parameter(after.new_empty(len(after)), requires_grad=False)
        layer.weight.copy_(after[:, :-1].view_as(layer.weight))
        layer.bias.copy_(after[:, -1])

    def _rows(
        self, layer: Layer, x: Tensor, wanted: Tensor, beside: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs of a layer, and values of its outputs, one row per sample and position, at most about `MAX_ROWS`."""
        if wanted.ndim == 2:
            return x, wanted, beside
        wanted = _by_position(layer, wanted)
        positions = wanted.shape[1]
        kept = torch.randperm(positions, generator=self.generator)[: max(MAX_ROWS // len(x), 1)].to(x.device)
        # Few samples at a time, because all patches of a batch can be a hundred times as large as it is.
        parts = x.split(max(MAX_ROWS // positions, 1))
        seen = [_patches(layer, part).unflatten(0, (len(part), -1))[:, kept] for part in parts]
        beside = None if beside is None else _by_position(layer, beside)[:, kept].flatten(0, 1)
        return torch.cat(seen).flatten(0, 1), wanted[:, kept].flatten(0, 1), beside


def _weights(layer: Layer) -> Tensor:
    """Weights of each output and then its bias, a row per output; a copy."""
    bias = layer.bias if layer.bias is not None else layer.weight.new_zeros(len(layer.weight))
    return torch.cat([layer.weight.flatten(1), bias.unsqueeze(1)], 1)


def _by_position(layer: Layer, y: Tensor) -> Tensor:
    """Outputs of a layer as `[B, positions, channels]`."""
    return (y if isinstance(layer, nn.Linear) else y.movedim(1, -1)).flatten(1, -2)


def _patches(layer: Layer, x: Tensor) -> Tensor:
    """What each output of a layer sees, one row per sample and position, in the order of its flattened weights."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    kernel, stride, padding, dilation = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    assert not isinstance(padding, str), "traced layers have numbers"
    if isinstance(layer, nn.Conv1d):
        x, kernel, stride, padding, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
    return F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2).flatten(0, 1)
