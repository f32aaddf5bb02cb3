"""Small networks of every family that fire, for the tests of export."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ranvier import models
from ranvier.conversion import ConvertedSNN, convert, decouple
from ranvier.nn import IF, LIF, LIFB, PLIF, AffineIF, BatchNorm, Neuron, Readout, TimeFolded
from ranvier.nn.structure import Activation, Chain, Concat, conv_norm

STEPS = 3


def fitted(model: models.SpikingNetwork, shape: tuple[int, ...]) -> models.SpikingNetwork:
    """With the running statistics of noise, so that currents have unit variance and deep layers fire."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(8, *shape), 2)
    return model.eval()


@torch.no_grad()
def round_weights(network: nn.Module) -> None:
    """Four weights of 1/2 or -1/2 to each output, and no bias: sums are exact at any precision, in any order."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            size = (len(layer.weight), layer.weight[0].numel())
            kept = torch.rand(size).argsort(1).argsort(1) < 4
            layer.weight.copy_((torch.where(torch.rand(size) < 0.3, -0.5, 0.5) * kept).view_as(layer.weight))
            if layer.bias is not None:
                layer.bias.zero_()


def close(found: Tensor, wanted: Tensor) -> None:
    """But for the readout, which adds up in another order."""
    assert wanted.std() > 0.05
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def check_streamed_and_apart(fast: nn.Module, apart: nn.Module, images: Tensor) -> None:
    """One step at a time gives the logits of one call; with two kernels for each pair all states are the same."""
    state, logits = None, []
    for _ in range(STEPS):
        step, state = fast(images, 1, state=state, return_state=True)
        logits.append(step)
    close(torch.cat(logits), fast(images, STEPS))
    _, states = fast(images, STEPS, return_state=True)
    _, wanted = apart(images, STEPS, return_state=True)
    assert len(states) == len(wanted) > 0
    for one, other in zip(states, wanted, strict=True):
        for name, value in one._asdict().items():
            expected = getattr(other, name)
            assert torch.equal(value, expected) if isinstance(value, Tensor) else value == expected, name


def converted(*, signed: bool = False) -> ConvertedSNN:
    """With a bias for each step, and initial potentials for each neuron of the first layer; if signed, the second layer
    sends its spikes as 1.
    """
    ann = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten()
    )
    snn = convert(
        nn.Sequential(*ann, nn.Linear(24, 3)),
        torch.rand(20, 1, 8, 8),
        steps=STEPS,
        threshold="max",
        bias="none",
        signed=signed,
    )
    first, second = snn.neurons.values()
    first.bias = 0.05 * torch.randn(STEPS, 4)
    first.v_init = first.threshold.view(4, 1, 1) * torch.rand(4, 8, 8)
    second.bias = 0.05 * torch.randn(STEPS, 6)
    second.binary = signed
    return snn


def forgetful() -> ConvertedSNN:
    """With a readout that forgets."""
    snn = converted()
    snn.readout_decay = 0.5
    return snn


def dense() -> models.Network:
    """Branches side by side, with neurons of several kinds and the input itself."""
    inner = Concat(Chain(conv_norm(4, 3), Activation(PLIF(3))), nn.Identity())
    grown = Concat(Chain(), Chain(conv_norm(4, 4), Activation(LIFB(4, burst_init=1.5)), inner))
    body = Chain(Activation(LIFB(4)), grown, conv_norm(11, 6), Activation(LIF()), TimeFolded(nn.AdaptiveAvgPool2d(1)))
    return models.Network(conv_norm(2, 4), body, Readout(6, 3))


FAMILIES: dict[str, tuple[Callable[[], models.SpikingNetwork], tuple[int, ...]]] = {
    "mlp-if": (lambda: models.mlp([12, 20, 3], neuron=partial(IF, reset="soft")), (12,)),
    "mlp-lif": (lambda: models.mlp([12, 20, 3], neuron=LIF), (12,)),
    "mlp-plif": (lambda: models.mlp([12, 20, 3], neuron=partial(PLIF, tau=1.7)), (12,)),
    "mlp-lifb": (lambda: models.mlp([12, 20, 20, 3], neuron=partial(LIFB, burst_init=1.5)), (3, 2, 2)),
    "mlp-affine": (
        lambda: models.mlp([12, 20, 3], neuron=partial(AffineIF, v_leak=torch.linspace(-0.3, 0.3, 20), v_reset=-0.1)),
        (12,),
    ),
    "decoupled": (lambda: decouple(models.mlp([12, 20, 20, 3], neuron=LIFB)), (12,)),
    "vgg": (
        lambda: models.vgg((4, "A", 6, "A"), num_classes=3, in_channels=1, image_size=8, neuron=LIFB, hidden=(8,)),
        (1, 8, 8),
    ),
    "resnet20": (lambda: models.resnet20(3, 2, neuron=IF), (2, 8, 8)),
    "sew-resnet18": (lambda: models.sew_resnet18(3, 2), (2, 8, 8)),
    "dense": (dense, (2, 8, 8)),
    "spikformer": (
        lambda: models.spikformer(3, 2, image_size=8, depth=1, dim=16, heads=2, patch_size=2, scale=0.5),
        (2, 8, 8),
    ),
    "converted": (converted, (1, 8, 8)),
    "converted-signed": (lambda: converted(signed=True), (1, 8, 8)),
    "converted-leaky": (forgetful, (1, 8, 8)),
    "ann": (lambda: models.mlp([12, 20, 3], neuron=lambda _: nn.ReLU()), (12,)),
}


def build(name: str, batch: int = 8) -> tuple[models.SpikingNetwork, Tensor]:
    """A network in evaluation mode and images for it, always the same."""
    torch.manual_seed(0)
    make, shape = FAMILIES[name]
    model = fitted(make(), shape)
    return model, torch.randn(batch, *shape) if "converted" not in name else torch.rand(batch, *shape)


def rates(model: nn.Module, images: Tensor, steps: int) -> list[float]:
    """Share of values that are not zero, of what each layer of neurons sends."""
    found: list[float] = []
    handles = [
        module.register_forward_hook(lambda _, __, sent: found.append(float((sent != 0).float().mean())))
        for module in model.modules()
        if isinstance(module, Neuron)
    ]
    with torch.no_grad():
        model(images, steps)
    for handle in handles:
        handle.remove()
    return found
