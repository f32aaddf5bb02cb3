from typing import Any

import pytest
import torch
from torch import nn

from ranvier.models import sew_resnet18, sew_resnet34
from ranvier.nn import LIF, LIFB, BatchNorm
from ranvier.nn.structure import Residual


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_published_parameter_counts() -> None:
    # Published: 11.69 and 21.80 million. The weights are those of the ANNs of the same names.
    assert num_parameters(sew_resnet18(1000, stem="imagenet")) == 11_689_512
    assert num_parameters(sew_resnet34(1000, stem="imagenet")) == 21_797_672
    assert num_parameters(sew_resnet18()) == 11_173_962
    assert num_parameters(sew_resnet34()) == 21_282_122


def test_neurons() -> None:
    # Stem, two per block, and one on the shortcut of each stage that changes shape.
    def neurons(network: nn.Module) -> int:
        return sum(isinstance(module, LIFB) for module in network.modules())

    assert neurons(sew_resnet18(neuron=LIFB)) == 1 + 16 + 3
    assert neurons(sew_resnet34(neuron=LIFB)) == 1 + 32 + 3


def test_normalises_every_step_by_itself() -> None:
    norms = [module for module in sew_resnet18().modules() if isinstance(module, BatchNorm)]
    assert {norm.statistics for norm in norms} == {"per_step"}


def test_blocks_add_spikes() -> None:
    torch.manual_seed(0)
    network = sew_resnet18()
    outputs: list[torch.Tensor] = []
    for module in network.modules():
        if isinstance(module, Residual):
            module.register_forward_hook(lambda block, inputs, output: outputs.append(output.detach()))
    network(torch.randn(2, 3, 16, 16), steps=2)
    for output in outputs:
        assert torch.equal(output, output.round())
    # The first stage adds two branches to the spikes of the stem, the others one to those of the shortcut.
    assert [int(output.max()) for output in outputs[:2]] == [2, 3]


@pytest.mark.parametrize(("stem", "side"), [("cifar", 32), ("imagenet", 8)])
def test_stem(stem: Any, side: int) -> None:
    network = sew_resnet18(stem=stem)
    assert network.encoder(torch.zeros(1, 2, 3, 32, 32)).shape == (1, 2, 64, side, side)


def test_imagenet_stem_pools_before_it_normalises() -> None:
    kinds = (nn.Conv2d, nn.MaxPool2d, BatchNorm)
    encoder = sew_resnet18(stem="imagenet").encoder
    assert [type(module) for module in encoder.modules() if isinstance(module, kinds)] == list(kinds)


def test_unknown_stem() -> None:
    with pytest.raises(ValueError, match="stem is 'mnist', but must be one of 'cifar', 'imagenet'"):
        sew_resnet18(stem="mnist")  # type: ignore[arg-type]


def test_event_channels() -> None:
    network = sew_resnet18(11, 2, neuron=LIF)
    assert network(torch.rand(3, 2, 2, 8, 8)).shape == (3, 2, 11)
