import pytest
import torch

from ranvier.nn import IF, LIF, LIFB, PLIF, QCFS, BatchNorm, Neuron
from ranvier.recipes.network import GAINED, MODELS, SIZED, UNCONVERTIBLE, AnnSettings, NetworkSettings
from ranvier.training import Optimization


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
    assert set(GAINED) <= set(MODELS)
    assert set(UNCONVERTIBLE) <= set(MODELS)


@pytest.mark.parametrize("name", ["mlp", "conv4", "resnet20"])
@pytest.mark.parametrize(("activation", "kind"), [("relu", torch.nn.ReLU), ("qcfs", QCFS)])
def test_anns_are_the_same_networks_without_neurons(name: str, activation: str, kind: type) -> None:
    ann = AnnSettings(model=name, activation=activation).build(5, 3, 16)  # type: ignore[arg-type]
    snn = NetworkSettings(model=name).build(5, 3, 16)  # type: ignore[arg-type]
    assert not any(isinstance(module, Neuron) for module in ann.modules())
    found = [module for module in ann.modules() if isinstance(module, kind)]
    assert len(found) == sum(isinstance(module, Neuron) for module in snn.modules())
    ceilings = len(found) if kind is QCFS else 0  # one parameter for each layer, and no other difference
    assert sum(p.numel() for p in ann.parameters()) == sum(p.numel() for p in snn.parameters()) + ceilings
    with torch.no_grad():
        logits = ann.eval()(torch.rand(2, 3, 16, 16), steps=2)
    assert logits.shape == (2, 2, 5)
    assert torch.equal(logits[0], logits[1])  # no state: every step gives the same


def test_ann_settings_reach_the_activations() -> None:
    ann = AnnSettings(model="mlp", levels=3, ceiling_init=2.5, hidden=(7, 6, 5)).build(4, 1, 8)
    activations = [module for module in ann.modules() if isinstance(module, QCFS)]
    assert [(module.levels, module.ceiling.item()) for module in activations] == [(3, 2.5)] * 3
    assert [tuple(p.shape) for p in ann.parameters() if p.ndim == 2] == [(7, 64), (6, 7), (5, 6), (4, 5)]


def test_models_that_are_no_ann_are_refused() -> None:
    for name in UNCONVERTIBLE:
        with pytest.raises(ValueError, match=f"model is '{name}', but must be one of 'mlp', 'conv3', 'conv4'"):
            AnnSettings(model=name)


def test_ceilings_do_not_decay() -> None:
    """Pulled to zero, a ceiling would cut off what it is to let through."""
    ann = AnnSettings(model="mlp").build(4, 1, 8)
    optimizer = Optimization("sgd", weight_decay=0.1).build(ann)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(m.ceiling)] for m in ann.modules() if isinstance(m, QCFS)] == [0.0, 0.0]
    assert sorted(set(decay.values())) == [0.0, 0.1]
