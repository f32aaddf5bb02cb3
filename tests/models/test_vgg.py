from itertools import pairwise

import pytest
import torch
from torch import nn

from ranvier.models import conv4, snn6, vgg, vgg16, vggsnn
from ranvier.models.network import Network
from ranvier.nn import LIF, BatchNorm


def num_parameters(network: Network) -> int:
    return sum(p.numel() for p in network.parameters())


def test_published_parameter_counts() -> None:
    assert num_parameters(vggsnn()) == 9_268_746  # published: 9.27 million
    assert num_parameters(snn6()) == 3_957_770  # published: 3.96 million


def test_vgg16_parameters() -> None:
    # 13 convolutions (9 * 1 634 496), their normalisation (2 * 4 224), and layers 512-4096-4096-10 with biases.
    convolutions = 9 * sum(a * b for a, b in pairwise(VGG16_CHANNELS))
    norms = 2 * sum(VGG16_CHANNELS[1:])
    linear = 513 * 4096 + 4097 * 4096 + 4097 * 10
    assert num_parameters(vgg16()) == convolutions + norms + linear == 33_642_442


VGG16_CHANNELS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def test_layout_is_built_in_order() -> None:
    network = vgg((8, "A", 16), num_classes=10, in_channels=2, image_size=8)
    kinds = (nn.Conv2d, BatchNorm, LIF, nn.AvgPool2d, nn.Linear)
    found = [type(module) for module in network.modules() if isinstance(module, kinds)]
    assert found == [nn.Conv2d, BatchNorm, LIF, nn.AvgPool2d, nn.Conv2d, BatchNorm, LIF, nn.Linear]
    assert network(torch.zeros(3, 5, 2, 8, 8)).shape == (3, 5, 10)


def test_normalisation_settings_reach_every_layer() -> None:
    network = vgg((4, 8), num_classes=2, in_channels=1, image_size=4, statistics="folded", gain=0.5)
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    assert [norm.statistics for norm in norms] == ["folded", "folded"]
    assert all((norm.weight == 0.5).all() for norm in norms)


def test_odd_images_lose_their_last_row_to_pooling() -> None:
    network = vgg((4, "A", 8, "A"), num_classes=2, in_channels=1, image_size=7)
    assert network(torch.zeros(1, 1, 7, 7), steps=1).shape == (1, 1, 2)


@pytest.mark.parametrize("layout", [(), ("A", 4)])
def test_layout_starts_with_a_convolution(layout: tuple) -> None:
    with pytest.raises(ValueError, match="must start with the channels of a convolution"):
        vgg(layout, num_classes=2, in_channels=1, image_size=4)


def test_pooling_the_image_away() -> None:
    with pytest.raises(ValueError, match="leaves nothing of a 8x8 image"):
        vggsnn(image_size=8)


def test_conv4_has_15_million_multiply_accumulates_a_step() -> None:
    """By hand for 28x28: 28^2 9 1 32 + 14^2 9 32 64 + 7^2 9 (64 128 + 128 128) + 1152 10."""
    from torch.utils.flop_counter import FlopCounterMode

    network = conv4()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 1, 28, 28), steps=1)
    by_hand = 28**2 * 9 * 32 + 14**2 * 9 * 32 * 64 + 7**2 * 9 * (64 * 128 + 128 * 128) + 1152 * 10
    assert counter.get_total_flops() == 2 * by_hand
    assert 14.6e6 < by_hand < 14.8e6
