"""SEW-ResNet-18 and VGGSNN as a user of SpikingJelly 2.0 builds them, for benchmarks that compare ours with them.

    pip install --no-deps -r benchmarks/requirements.txt && pip install loguru

Built from its layers in multi-step mode, since `spikingjelly.activation_based.model` imports torchvision, whose wheel
does not import beside the CPU build of torch. The same layers in the same order as `ranvier.models`, so that weights
can be copied one by one; neurons and normalisation compute what ours do, see `spikes_differ`.

    net = sew_resnet18()
    functional.reset_net(net)          # of spikingjelly.activation_based, before every sequence
    logits = net(x)                    # x [T, B, C, H, W] -> [T, B, K]
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ranvier.models.resnet import block_shapes
from ranvier.models.vgg import VGGSNN_LAYOUT
from ranvier.nn import BatchNorm, Neuron

try:
    from spikingjelly.activation_based import functional, layer, neuron, surrogate
except ImportError as error:
    raise ImportError(f"{error}: pip install --no-deps -r benchmarks/requirements.txt && pip install loguru") from None


class Residual(nn.Module):
    """Spikes of a branch and of a shortcut, added."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)


def lif() -> nn.Module:
    """Neurons as ours: tau 2, threshold 0.5, hard reset that is not differentiated, triangle of half-width 1/2."""
    return neuron.LIFNode(
        tau=2.0,
        v_threshold=0.5,
        v_reset=0.0,
        surrogate_function=surrogate.PiecewiseQuadratic(alpha=2.0),
        detach_reset=True,
        step_mode="m",
    )


def conv_norm(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> list[nn.Module]:
    conv = layer.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False, step_mode="m"
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, layer.BatchNorm2d(out_channels, step_mode="m")]


def sew_resnet18(num_classes: int = 10, in_channels: int = 3) -> nn.Sequential:
    """`ranvier.models.sew_resnet18` with `statistics="folded"`: 3x3 stem, 2 blocks each of 64, 128, 256, 512."""
    parts: list[nn.Module] = [*conv_norm(in_channels, 64), lif()]
    for shape in block_shapes(64, (64, 128, 256, 512), (2, 2, 2, 2)):
        branch = nn.Sequential(
            *conv_norm(shape.in_channels, shape.out_channels, stride=shape.stride),
            lif(),
            *conv_norm(shape.out_channels, shape.out_channels),
            lif(),
        )
        shortcut: nn.Module = nn.Identity()
        if shape.changes:
            shortcut = nn.Sequential(*conv_norm(shape.in_channels, shape.out_channels, 1, shape.stride), lif())
        parts.append(Residual(branch, shortcut))
    parts += [layer.AdaptiveAvgPool2d(1, step_mode="m"), layer.Flatten(step_mode="m")]
    return nn.Sequential(*parts, layer.Linear(512, num_classes, step_mode="m"))


def vggsnn(num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> nn.Sequential:
    """`ranvier.models.vggsnn` with `statistics="folded"`."""
    parts: list[nn.Module] = []
    channels, side = in_channels, image_size
    for entry in VGGSNN_LAYOUT:
        if entry == "A":
            parts.append(layer.AvgPool2d(2, step_mode="m"))
            side //= 2
        else:
            parts += [*conv_norm(channels, int(entry)), lif()]
            channels = int(entry)
    parts.append(layer.Flatten(step_mode="m"))
    return nn.Sequential(*parts, layer.Linear(channels * side * side, num_classes, step_mode="m"))


def copy_weights(from_ours: nn.Module, to_theirs: nn.Module) -> None:
    """Give their network the weights and running averages of ours, layer by layer in the order of both.

    Raises:
        ValueError: The networks do not have the same layers.
    """
    ours, theirs = (list(_with_weights(network)) for network in (from_ours, to_theirs))
    if len(ours) != len(theirs):
        raise ValueError(f"ours has {len(ours)} layers with weights, but theirs {len(theirs)}. Build the same network.")
    with torch.no_grad():
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            found = {name: value.shape for name, value in mine.state_dict().items()}
            expected = {
                name: value.shape for name, value in other.state_dict().items() if name != "num_batches_tracked"
            }
            if found != expected:
                raise ValueError(f"layer {number} of ours has {found}, but theirs {expected}. Build the same network.")
            other.load_state_dict(mine.state_dict(), strict=False)


def _with_weights(network: nn.Module) -> Iterator[nn.Module]:
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, BatchNorm)
    return (module for module in network.modules() if isinstance(module, kinds))


def spikes_of(network: nn.Module, call: Callable[[], Any]) -> list[Tensor]:
    """What each layer of neurons sends in a call, in the order in which they run; of our network or of theirs."""
    sent: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        sent.append(output[0] if isinstance(output, tuple) else output)

    kinds = (Neuron, neuron.LIFNode)
    handles = [part.register_forward_hook(keep) for part in network.modules() if isinstance(part, kinds)]
    with torch.no_grad():
        call()
    for handle in handles:
        handle.remove()
    return sent


def spikes_differ(ours: nn.Module, theirs: nn.Module, x: Tensor, x_of_theirs: Tensor | None = None) -> float:
    """Share of spikes of all layers that differ between two networks on `[T, B, C, H, W]`; 1 where layers do.

    `x_of_theirs` is the same input at the precision of their network, if that is another one.
    """
    given = x if x_of_theirs is None else x_of_theirs
    functional.reset_net(theirs)
    mine, other = spikes_of(ours, lambda: ours(x)), spikes_of(theirs, lambda: theirs(given))
    functional.reset_net(theirs)
    if [sent.shape for sent in mine] != [sent.shape for sent in other]:
        return 1.0
    different = sum(int((a != b).sum()) for a, b in zip(mine, other, strict=True))
    return different / sum(sent.numel() for sent in mine)
