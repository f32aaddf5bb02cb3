"""Weights fitted to what spikes bring: least squares, layer by layer, in forward passes."""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ranvier.conversion.spiking import ConvertedSNN
from ranvier.conversion.walk import walk

RIDGE = 1e-2
"""Weight of staying near the ANN's weights, relative to the mean square of the inputs."""
MAX_ROWS = 2**16
"""Samples times positions that one batch contributes to the fit of a layer; more are thinned out evenly."""


class Refit:
    """Fits the weights of all layers after the first neuron to the spikes that enter them.

    A layer that receives the mean of spikes, x = mean over steps, instead of the activation that they stand for,
    misses its output z in the ANN in a systematic way: spikes come late, are clipped, are rounded. The change D of its
    weights that best makes up for that is a linear regression with a closed form,

        D = argmin |(W + D) x - z|^2 + ridge |D|^2 = (z - W x) x' (x x' + ridge)^-1,

    bias included, x the patches that a convolution sees. Layers are fitted in forward order, each on what reaches it
    through the fitted ones before it. Only forward passes are used, and neither labels nor gradients.

    Each batch that `update` is given adds to the sums x x' and (z - W x) x', and sets the weights anew.

    Args:
        ann: From `trace`; its weights stay.
        snn: From `spiking`, of that graph; its weights are changed.
        steps: T.

    Note: grouped convolutions are left as they are, since each output sees only part of the patches.

    Source: our own; the least-squares step of Li et al. 2021 (weight calibration), which they take by gradient descent.
    """

    def __init__(self, ann: fx.GraphModule, snn: ConvertedSNN, steps: int) -> None:
        self.ann = ann
        self.snn = snn
        self.steps = steps
        self.squares: dict[str, Tensor] = {}
        self.products: dict[str, Tensor] = {}

    def update(self, images: Tensor) -> None:
        """Fit all layers again, with one batch `[B, ...]` more."""
        walk(self.ann, self.snn, images, self.steps, visit_layer=self._fit)

    def _fit(self, name: str, layer: nn.Module, spikes: Tensor, target: Tensor) -> None:
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear)
        if len(spikes) != self.steps * len(target) or (not isinstance(layer, nn.Linear) and layer.groups > 1):
            return
        original = self.ann.get_submodule(name)
        assert isinstance(original, nn.Conv1d | nn.Conv2d | nn.Linear)
        mean = spikes.unflatten(0, (self.steps, -1)).mean(0)
        x, z = _patches(layer, mean), target.movedim(1, -1).flatten(0, -2)
        if len(x) > MAX_ROWS:
            kept = torch.arange(0, len(x), -(-len(x) // MAX_ROWS), device=x.device)
            x, z = x[kept], z[kept]
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        bias = original.bias if original.bias is not None else x.new_zeros(len(original.weight))
        before = torch.cat([original.weight.flatten(1), bias.unsqueeze(1)], 1)
        self.squares[name] = self.squares.get(name, 0) + x.T @ x
        self.products[name] = self.products.get(name, 0) + (z - x @ before.T).T @ x
        squares, products = self.squares[name].double(), self.products[name].double()
        ridge = RIDGE * squares.diagonal().mean() * torch.eye(len(squares), dtype=squares.dtype, device=x.device)
        change = torch.linalg.solve(squares + ridge, products, left=False).float()
        after = before + change
        if layer.bias is None:
            layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
        layer.weight.copy_(after[:, :-1].view_as(layer.weight))
        layer.bias.copy_(after[:, -1])


def _patches(layer: nn.Conv1d | nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
    """What each output of a layer sees, one row per sample and position, in the order of its flattened weights."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    if isinstance(layer, nn.Conv1d):
        x = x.unsqueeze(2)
    assert not isinstance(layer.padding, str)
    one = (1,) if isinstance(layer, nn.Conv1d) else ()
    none = (0,) if isinstance(layer, nn.Conv1d) else ()
    seen = F.unfold(
        x,
        (*one, *layer.kernel_size),
        dilation=(*one, *layer.dilation),
        padding=(*none, *layer.padding),
        stride=(*one, *layer.stride),
    )
    return seen.transpose(1, 2).flatten(0, 1)
