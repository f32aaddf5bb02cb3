import pytest
import torch

from ranvier.models import mlp
from ranvier.nn import LIFB


def test_parameters() -> None:
    # 64 * 32 + 32 weights and biases, then 32 * 10 + 10.
    assert sum(p.numel() for p in mlp([64, 32, 10]).parameters()) == 2080 + 330


def test_neurons_have_the_width_of_their_layer() -> None:
    network = mlp([64, 32, 16, 10], neuron=LIFB)
    assert [len(module.strength) for module in network.modules() if isinstance(module, LIFB)] == [32, 16]


def test_takes_images_and_sequences_of_them() -> None:
    torch.manual_seed(0)
    network = mlp([12, 8, 3])
    images = torch.rand(5, 3, 2, 2)
    flat = network(images.flatten(1), steps=4)
    assert torch.equal(network(images, steps=4), flat)
    # A sequence of flat samples has the rank of neither, so it is told apart from images.
    assert torch.equal(network(images.flatten(1).expand(4, 5, 12)), flat)


def test_needs_a_hidden_layer() -> None:
    with pytest.raises(ValueError, match="at least one hidden layer"):
        mlp([64, 10])
