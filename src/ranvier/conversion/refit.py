"""Weights fitted to what spikes bring: least squares, layer by layer, in forward passes."""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ranvier.conversion.bias import ftbc
from ranvier.conversion.spiking import ConvertedSNN
from ranvier.conversion.walk import walk
from ranvier.nn import unfold_time

Layer = nn.Conv1d | nn.Conv2d | nn.Linear

RIDGE = 1e-2
"""Weight of staying near the ANN's weights, relative to the mean square of the inputs."""
MAX_ROWS = 2**16
"""Samples times positions that one batch contributes to the fit of a layer; of more, positions are drawn at random."""


class Refit:
    """Fits the weights of all layers after the first neuron to the spikes that enter them.

    A layer that receives the mean of spikes, x = mean over steps, instead of the activation that they stand for,
    misses its output z in the ANN in a systematic way: spikes come late, are clipped, are rounded. The change D of its
    weights that best makes up for that is a linear regression with a closed form,

        D = argmin |(W + D) x - z|^2 + ridge |D|^2 = (z - W x) x' (x x' + ridge)^-1,

    bias included, x the patches that a convolution sees. Layers are fitted in forward order, each on what reaches it
    through the fitted ones before it. Only forward passes are used, and neither labels nor gradients.

    Each batch that `update` is given adds to the sums x x' and (z - W x) x', and sets the weights anew. A regression on
    noisy inputs gives smaller outputs, on which neurons would fire too seldom; with `step_size`, a round of FTBC on the
    same pass keeps their means where they belong.

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
        self.squares: dict[str, Tensor] = {}
        self.products: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    def update(self, images: Tensor) -> None:
        """Fit all layers again, with one batch `[B, ...]` more."""
        if self.step_size is None:
            walk(self.ann, self.snn, images, self.steps, visit_layer=self._fit)
        else:
            ftbc(self.ann, self.snn, images, self.steps, step_size=self.step_size, visit_layer=self._fit)

    def _fit(self, name: str, layer: nn.Module, spikes: Tensor, target: Tensor) -> None:
        original = self.ann.get_submodule(name)
        assert isinstance(layer, Layer)
        assert isinstance(original, Layer)
        if not isinstance(layer, nn.Linear) and layer.groups > 1:
            return
        x, z = self._rows(layer, unfold_time(spikes, self.steps).mean(0), target)
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        bias = original.bias if original.bias is not None else x.new_zeros(len(original.weight))
        before = torch.cat([original.weight.flatten(1), bias.unsqueeze(1)], 1)
        self.squares[name] = self.squares.get(name, 0) + x.T @ x
        self.products[name] = self.products.get(name, 0) + (z - x @ before.T).T @ x
        squares, products = self.squares[name].double(), self.products[name].double()
        ridge = RIDGE * squares.diagonal().mean() * torch.eye(len(squares), dtype=squares.dtype, device=x.device)
        change = torch.linalg.solve(squares + ridge, products, left=False).to(before.dtype)
        after = before + change
        if layer.bias is None:
            layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
        layer.weight.copy_(after[:, :-1].view_as(layer.weight))
        layer.bias.copy_(after[:, -1])

    def _rows(self, layer: Layer, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and outputs of a layer, one row per sample and position, at most about `MAX_ROWS`."""
        if target.ndim == 2:
            return x, target
        z = (target if isinstance(layer, nn.Linear) else target.movedim(1, -1)).flatten(1, -2)
        positions = z.shape[1]
        kept = torch.randperm(positions, generator=self.generator)[: max(MAX_ROWS // len(x), 1)].to(x.device)
        # Few samples at a time, because all patches of a batch can be a hundred times as large as it is.
        parts = x.split(max(MAX_ROWS // positions, 1))
        seen = [_patches(layer, part).unflatten(0, (len(part), -1))[:, kept] for part in parts]
        return torch.cat(seen).flatten(0, 1), z[:, kept].flatten(0, 1)


def _patches(layer: Layer, x: Tensor) -> Tensor:
    """What each output of a layer sees, one row per sample and position, in the order of its flattened weights."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    kernel, stride, padding, dilation = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    assert not isinstance(padding, str), "traced layers have numbers"
    if isinstance(layer, nn.Conv1d):
        x, kernel, stride, padding, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
    return F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2).flatten(0, 1)
