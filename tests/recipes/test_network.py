import pytest
import torch

from ranvier.nn import IF, LIF, LIFB, PLIF, BatchNorm
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


@pytest.mark.parametrize(
    "idle",
    [
        {"neuron": "if", "tau": 3.0},
        {"neuron": "lif", "burst_init": 1.0},
        {"hidden": (3,)},
        {"model": "mlp", "gain": 0.5},
    ],
)
def test_settings_without_effect_warn(idle: dict) -> None:
    with pytest.warns(UserWarning, match="has no effect"):
        NetworkSettings(**idle)


def test_threshold_sets_the_gain_of_resnet19() -> None:
    one, two = (NetworkSettings(model="resnet19", v_threshold=v).build(10, 3, 32) for v in (0.5, 1.0))
    first, second = (
        next(m for m in net.modules() if isinstance(m, BatchNorm)).weight.detach()[0] for net in (one, two)
    )
    assert second == pytest.approx(2 * first)


def test_networks_keep_their_published_statistics_unless_told() -> None:
    def statistics(**settings: str) -> set[str]:
        net = NetworkSettings(**settings).build(10, 3, 32)  # type: ignore[arg-type]
        return {module.statistics for module in net.modules() if isinstance(module, BatchNorm)}

    assert statistics(model="snn6") == {"per_step"}
    assert statistics(model="snn6", statistics="folded") == {"folded"}
    assert statistics(model="conv4") == {"folded"}


def test_sized_models_exist() -> None:
    assert set(SIZED) <= set(MODELS)
