"""Firing rates against counting by hand, and by brute force."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ranvier.dynamics import NeuronState
from ranvier.evaluation import Activity, LayerActivity, firing_rates, record_spikes
from ranvier.models import mlp
from ranvier.nn import LIF, LIFB, AffineIF, BatchNorm, Neuron, TimeFolded

STEPS = 3


class Single(nn.Module):
    """One layer of neurons, without parameters of its own."""

    def __init__(self, neuron: nn.Module, gain: float = 1.0) -> None:
        super().__init__()
        self.neuron = neuron
        self.gain = gain

    def forward(self, images: Tensor, steps: int | None) -> Tensor:
        return self.neuron(self.gain * images.expand(steps or 1, *images.shape))


def images_and_labels(*images: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(batch, torch.zeros(len(batch), dtype=torch.int64)) for batch in images]


def test_by_hand() -> None:
    """Input 1 fires always; 0.7 gives v = 0.35, 0.525: every second step; 0 and 0.5 never."""
    loader = images_and_labels(torch.tensor([[1.0, 0.7, 0.0]]), torch.tensor([[1.0, 1.0, 0.5], [0.0, 0.0, 0.0]]))
    activity = firing_rates(Single(LIF()), loader, STEPS)
    (layer,) = activity.layers
    assert (layer.name, layer.neurons, activity.samples) == ("neuron", 3, 3)
    # Of 9 neurons (3 samples): 3 fire at steps 1 and 3, 4 at step 2. Rates are float32 quotients.
    assert layer.firing_rate == pytest.approx((3 / 9, 4 / 9, 3 / 9), rel=1e-6)
    assert layer.burst_rate == (0, 0, 0)
    assert layer.mean_firing_rate == pytest.approx(10 / 27, rel=1e-6)
    assert activity.mean_firing_rate == pytest.approx(10 / 27, rel=1e-6)


@pytest.mark.parametrize("strength", [2.0, 0.5, -1.0])
def test_bursts_count_as_one_spike_and_once_more_alone(strength: float) -> None:
    loader = images_and_labels(torch.tensor([[3.0, 1.2, 0.0, 2.0]]))  # burst, spike, nothing, burst (a tie)
    activity = firing_rates(Single(LIFB(4, burst_init=strength)), loader, 2)
    assert activity.layers[0].firing_rate == (0.75, 0.75)
    assert activity.layers[0].burst_rate == (0.5, 0.5)


@pytest.mark.parametrize("neuron", [LIF, lambda channels: LIFB(channels, burst_init=1.7)])
def test_equals_brute_force(neuron: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = mlp([12, 7, 5, 3], neuron=neuron)
    batches = [4 * torch.rand(size, 12) for size in (4, 4, 1)]
    activity = firing_rates(model, images_and_labels(*batches), STEPS)
    recorded = [record_spikes(model, batch, STEPS) for batch in batches]
    assert [layer.name for layer in activity.layers] == list(recorded[0])
    assert [layer.neurons for layer in activity.layers] == [7, 5]
    total = 0
    for layer in activity.layers:
        for t in range(STEPS):
            values = [v for spikes in recorded for v in spikes[layer.name][t].flatten().tolist()]
            assert len(values) == 9 * layer.neurons
            assert layer.firing_rate[t] == pytest.approx(sum(v != 0 for v in values) / len(values), rel=1e-6)  # float32
            assert layer.burst_rate[t] == pytest.approx(sum(v not in (0, 1) for v in values) / len(values), rel=1e-6)
            total += sum(v != 0 for v in values)
    assert activity.mean_firing_rate == pytest.approx(total / (9 * 12 * STEPS), rel=1e-6)
    assert total > 20


def test_batches_limits_the_run() -> None:
    loader = images_and_labels(torch.ones(2, 3), torch.zeros(5, 3))
    activity = firing_rates(Single(LIF()), loader, 2, batches=1)
    assert activity.samples == 2
    assert activity.layers[0].firing_rate == (1, 1)


def test_a_neuron_used_twice_counts_both_places() -> None:
    """Neurons have no state, so a network may share one; a rate above 1 would be nonsense."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neuron = LIF()

        def forward(self, images: Tensor, steps: int | None) -> Tensor:
            x = self.neuron(images.expand(2, -1, -1))
            return self.neuron(x[..., :1])

    (layer,) = firing_rates(Shared(), images_and_labels(torch.tensor([[1.0, 0.0, 0.0]] * 5)), 2).layers
    assert layer.neurons == 4
    assert layer.firing_rate == (0.5, 0.5)


def test_neurons_that_return_their_state_are_counted() -> None:
    class Streaming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neuron = LIF()

        def forward(self, images: Tensor, steps: int | None) -> Tensor:
            return self.neuron(images.expand(2, -1, -1), return_state=True)[0]

    loader = images_and_labels(torch.tensor([[1.0, 0.0]]))
    assert firing_rates(Streaming(), loader, 2).layers[0].firing_rate == (0.5, 0.5)
    assert record_spikes(Streaming(), loader[0][0], 2)["neuron"].tolist() == [[[1, 0]], [[1, 0]]]


def test_neurons_of_ones_own_are_counted() -> None:
    class Halving(Neuron):
        """Graded output that is no burst."""

        def scan(self, current: Tensor, state: NeuronState | None) -> tuple[Tensor, NeuronState]:
            return current / 2, NeuronState(current[-1])

    (layer,) = firing_rates(Single(Halving("auto")), images_and_labels(torch.tensor([[1.0, 0.0]])), 2).layers
    assert layer.firing_rate == (0.5, 0.5)
    assert layer.burst_rate == (0, 0)


def test_potentials_are_no_spikes() -> None:
    loader = images_and_labels(torch.tensor([[1.0, 0.0, 0.3]]))
    neuron = AffineIF(tau=2.0, fires=False)
    (layer,) = firing_rates(Single(neuron), loader, 2).layers
    assert record_spikes(Single(neuron), loader[0][0], 2)["neuron"][0, 0, 0] == 0.5, "it sends something"
    assert (layer.neurons, layer.firing_rate, layer.burst_rate) == (3, (0, 0), (0, 0))


def frozen_network() -> nn.Sequential:
    class Norms(nn.Sequential):
        def forward(self, images: Tensor, steps: int | None) -> Tensor:
            return super().forward(images.expand(steps or 1, -1, -1))

    model = Norms(BatchNorm(3), BatchNorm(3), LIF())
    model.train()
    model[1].eval()
    return model


@pytest.mark.parametrize("measure", ["firing_rates", "record_spikes"])
def test_modes_averages_and_hooks_are_put_back(measure: str) -> None:
    model = frozen_network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if measure == "firing_rates":
        firing_rates(model, images_and_labels(torch.randn(4, 3)), 2)
    else:
        record_spikes(model, torch.randn(4, 3), 2)
    assert [module.training for module in (model, *model)] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("measure", ["firing_rates", "record_spikes"])
def test_hooks_are_removed_after_a_failure(measure: str) -> None:
    model = frozen_network()
    wrong = torch.zeros(4, 7)
    with pytest.raises(RuntimeError):
        firing_rates(model, images_and_labels(wrong), 2) if measure == "firing_rates" else record_spikes(
            model, wrong, 2
        )
    assert not any(module._forward_hooks for module in model.modules())
    assert [module.training for module in (model, *model)] == [True, True, False, True]


def test_record_spikes() -> None:
    torch.manual_seed(0)
    model = mlp([6, 5, 4, 3])
    images = 4 * torch.rand(2, 6)
    found = record_spikes(model, images, STEPS)
    first, second = found.values()
    assert [spikes.shape for spikes in found.values()] == [(STEPS, 2, 5), (STEPS, 2, 4)]
    assert torch.equal(first, LIF()(model.encoder(images[None]).expand(STEPS, -1, -1)))
    assert set(second.unique().tolist()) <= {0, 1}


def test_network_without_neurons_raises() -> None:
    model = nn.Sequential(TimeFolded(nn.Linear(2, 2)), nn.ReLU())
    for measure in (
        lambda: firing_rates(model, images_and_labels(torch.zeros(1, 2))),
        lambda: record_spikes(model, torch.zeros(1, 2)),
    ):
        with pytest.raises(ValueError, match=r"no neurons of ranvier\.nn"):
            measure()


@pytest.mark.parametrize("batches", [None, 0])
def test_no_samples_raise(batches: int | None) -> None:
    loader = [] if batches is None else images_and_labels(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="the loader gave no samples"):
        firing_rates(Single(LIF()), loader, 2, batches=batches)


ACTIVITY = Activity(
    (LayerActivity("a", 30, (0.1, 0.3), (0.0, 0.0)), LayerActivity("b", 10, (0.5, 0.5), (0.25, 0.0))), samples=8
)


def test_mean_is_weighted_by_neurons() -> None:
    assert ACTIVITY.mean_firing_rate == pytest.approx((30 * 0.2 + 10 * 0.5) / 40)


def test_shown_and_saved(tmp_path: Path) -> None:
    assert str(ACTIVITY) == (
        "a: 0.2000 (0.1000 0.3000)\nb: 0.5000 (0.5000 0.5000)\nall: 0.2750 spikes per neuron and step (n = 8)"
    )
    columns = [list(column.cells) for column in ACTIVITY.__rich__().columns]
    steps, mean, bursts = [["0.100", "0.500"], ["0.300", "0.500"]], ["0.200", "0.500"], ["0.000", "0.125"]
    assert columns == [["a", "b"], ["30", "10"], *steps, mean, bursts]
    ACTIVITY.save(tmp_path / "rates.json")
    saved = json.loads((tmp_path / "rates.json").read_text())
    assert saved["samples"] == 8
    assert saved["layers"][1] == {"name": "b", "neurons": 10, "firing_rate": [0.5, 0.5], "burst_rate": [0.25, 0.0]}
