from math import sqrt

import pytest
import torch
from torch import nn

from ranvier.models import resnet9, resnet19, resnet20
from ranvier.nn import LIFB, BatchNorm
from ranvier.nn.structure import Residual


def neuron_channels(network: nn.Module) -> list[int]:
    return [len(module.strength) for module in network.modules() if isinstance(module, LIFB)]


def residuals(network: nn.Module) -> list[Residual]:
    return [module for module in network.modules() if isinstance(module, Residual)]


def test_resnet9_parameters() -> None:
    convolutions = 9 * (3 * 64 + 64 * 128 + 2 * 128**2 + 128 * 256 + 256 * 512 + 2 * 512**2)
    norms = 2 * (64 + 3 * 128 + 256 + 3 * 512)
    assert sum(p.numel() for p in resnet9().parameters()) == convolutions + norms + 513 * 10 == 6_573_130
    assert neuron_channels(resnet9(neuron=LIFB)) == [64, 128, 128, 128, 256, 512, 512, 512]


def test_resnet9_pools_currents_as_it_would_activations() -> None:
    network = resnet9(neuron=lambda channels: nn.ReLU()).eval()
    images = torch.randn(2, 3, 16, 16)
    expected = network(images, 1)
    layers = network.body.layers
    pools = [index for index, layer in enumerate(layers) if "MaxPool" in str(layer)]
    assert len(pools) == 3
    for index in pools:
        layers[index], layers[index + 1] = layers[index + 1], layers[index]
    assert torch.equal(network(images, 1), expected)


def test_resnet19_parameters() -> None:
    stages = 6 * 128**2 + 128 * 256 + 5 * 256**2 + 256 * 512 + 3 * 512**2  # 3x3 convolutions of the blocks
    shortcuts = 128 * 256 + 256 * 512  # 1x1 convolutions
    norms = 2 * (128 * 8 + 256 * 7 + 512 * 5)  # stem and 6 + 1 in the first stage, 6 + 1, 4 + 1
    linear = 513 * 256 + 257 * 10
    expected = 9 * (3 * 128 + stages) + shortcuts + norms + linear
    assert sum(p.numel() for p in resnet19().parameters()) == expected == 12_698_250


def test_resnet19_neurons() -> None:
    assert neuron_channels(resnet19(neuron=LIFB)) == [128] * 7 + [256] * 6 + [512] * 4 + [256]


@pytest.mark.parametrize("v_threshold", [0.5, 1.0])
def test_resnet19_gains_follow_the_threshold(v_threshold: float) -> None:
    network = resnet19(v_threshold=v_threshold)

    def gains(module: nn.Module) -> list[float]:
        norms = [norm for norm in module.modules() if isinstance(norm, BatchNorm)]
        assert all(norm.statistics == "folded" and (norm.weight == norm.weight[0]).all() for norm in norms)
        return [round(float(norm.weight[0].detach()) / v_threshold, 6) for norm in norms]

    summand = round(sqrt(0.5), 6)
    assert gains(network.encoder) == [summand]
    for index, block in enumerate(residuals(network)):
        assert gains(block.branch) == [1.0, summand]
        assert gains(block.shortcut) == ([summand] if index in (0, 3, 6) else [])


def test_resnet19_normalises_the_first_shortcut_without_a_convolution() -> None:
    blocks = residuals(resnet19())
    convolutions = [sum(isinstance(m, nn.Conv2d) for m in block.shortcut.modules()) for block in blocks]
    assert convolutions == [0, 0, 0, 1, 0, 0, 1, 0]


def test_resnet19_threshold_must_be_positive() -> None:
    with pytest.raises(ValueError, match="v_threshold is 0"):
        resnet19(v_threshold=0)


def test_resnet20_parameters() -> None:
    convolutions = 9 * (3 * 16 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2)
    shortcuts = 16 * 32 + 32 * 64
    norms = 2 * (688 + 32 + 64)  # one per neuron, and on the two shortcuts
    assert sum(p.numel() for p in resnet20().parameters()) == convolutions + shortcuts + norms + 650 == 272_474


def test_resnet20_has_688_neuron_channels() -> None:
    channels = neuron_channels(resnet20(neuron=LIFB))
    assert channels == [16] * 7 + [32] * 6 + [64] * 6
    assert sum(channels) == 688


def test_resnet20_neuron_follows_the_sum() -> None:
    # In the first block the shortcut is the identity, so its output is relu(branch(x) + x): the sum of two currents.
    block = resnet20(neuron=lambda channels: nn.ReLU()).body.layers[1]
    x = torch.randn(1, 2, 16, 4, 4)
    assert torch.equal(block(x), torch.relu(residuals(block)[0].branch(x) + x))


def test_stages_halve_the_image() -> None:
    for network in (resnet19(), resnet20()):
        strides = [m.stride for m in network.body.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert strides.count((2, 2)) == 2
        assert strides[0] == (1, 1)
