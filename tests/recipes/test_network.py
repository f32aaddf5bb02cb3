import pytest
import torch

from ranvier.nn import IF, LIF, LIFB, PLIF
from ranvier.recipes.network import MODELS, SIZED, NetworkSettings


@pytest.mark.parametrize("name", ["mlp", "conv4", "snn6", "resnet20"])
@pytest.mark.parametrize(("neuron", "kind"), [("if", IF), ("lif", LIF), ("plif", PLIF), ("lifb", LIFB)])
def test_any_network_takes_any_neuron(name: str, neuron: str, kind: type) -> None:
    network = NetworkSettings(model=name, neuron=neuron).build(5, 3, 16)  # type: ignore[arg-type]
    assert any(isinstance(module, kind) for module in network.modules())
    assert network(torch.rand(2, 3, 16, 16), steps=2).shape == (2, 2, 5)


def test_settings_reach_the_neurons() -> None:
    settings = NetworkSettings(neuron="lifb", burst_init=1.5, tau=3.0, v_threshold=0.25, reset="soft")
    neuron = settings.neuron_factory("reference")(4)
    assert isinstance(neuron, LIFB)
    assert neuron.strength.tolist() == [1.5] * 4
    assert (neuron.params.tau, neuron.params.v_threshold, neuron.params.reset) == (3.0, 0.25, "soft")
    assert neuron.implementation == "reference"


def test_sized_models_exist() -> None:
    assert set(SIZED) <= set(MODELS)
