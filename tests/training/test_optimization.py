import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ranvier.nn import PLIF, QCFS, ConvertedIF
from ranvier.training import Optimization


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    schedule = Optimization(lr=0.4, warmup_epochs=2)
    rates = [schedule.learning_rate(step, total_steps=100, steps_per_epoch=2) for step in range(4)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_cosine_ends_at_the_floor() -> None:
    schedule = Optimization(lr=1.0, min_lr=0.1, warmup_epochs=0)
    assert schedule.learning_rate(0, 10, 5) == 1.0
    assert schedule.learning_rate(5, 10, 5) == pytest.approx(0.55)
    assert schedule.learning_rate(10, 10, 5) == pytest.approx(0.1)


@given(
    step=st.integers(0, 199),
    warmup=st.floats(0, 30),
    lr=st.floats(1e-5, 1.0),
)
def test_rate_stays_between_zero_and_peak(step: int, warmup: float, lr: float) -> None:
    rate = Optimization(lr=lr, warmup_epochs=warmup).learning_rate(step, 200, 10)
    assert 0 < rate <= lr * (1 + 1e-12)


def test_decay_spares_vectors_and_scalars() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), PLIF())
    decayed, spared = Optimization(weight_decay=0.1).build(model).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3)]
    assert decayed["weight_decay"] == 0.1
    assert sorted(tuple(p.shape) for p in spared["params"]) == [(), (4,), (4,), (4,)]
    assert spared["weight_decay"] == 0


def test_decay_spares_neurons_whatever_shape_their_parameters_have() -> None:
    """Of a converted network in training: biases for each step, and potentials for each neuron."""
    neuron = ConvertedIF(4, steps=3, shape=(4, 2, 2))
    neuron.make_trainable(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), neuron, QCFS())
    decayed, spared = Optimization(weight_decay=0.1).build(model).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3, 1, 1)]
    assert sorted(tuple(p.shape) for p in spared["params"]) == [(), (3, 4), (4,), (4,), (4, 2, 2)]


def test_sgd_step_by_hand() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    optimizer = Optimization(optimizer="sgd", lr=0.1, weight_decay=0.0).build(layer)
    layer.weight.grad = torch.tensor([[2.0]])
    optimizer.step()
    # Nesterov, first step: gradient + 0.9 * gradient.
    assert layer.weight.item() == pytest.approx(1 - 0.1 * (2 + 0.9 * 2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"optimizer": "lion"},
        {"betas": (0.9, 1.0)},
        {"lr": 0},
        {"lr": -1},
        {"clip_norm": 0},
        {"weight_decay": -1},
        {"min_lr": 2.0},
        {"lr": math.nan},
    ],
)
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Optimization(**wrong)


def test_adam_decays_in_the_gradient_and_takes_its_betas() -> None:
    """The first update of Adam is lr times the sign of the gradient, decay included; AdamW's decay stands beside it."""
    steps = {}
    for optimizer in ("adam", "adamw"):
        layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(layer.weight, 2.0)
        built = Optimization(optimizer, lr=0.1, weight_decay=0.5, betas=(0.8, 0.99)).build(layer)  # type: ignore[arg-type]
        assert {group["betas"] for group in built.param_groups} == {(0.8, 0.99)}
        layer.weight.grad = torch.full_like(layer.weight, -0.5)  # against a decay of 0.5 * 2
        built.step()
        steps[optimizer] = layer.weight.item() - 2
    assert steps == pytest.approx({"adam": -0.1, "adamw": 0.1 - 0.1 * 0.5 * 2}, abs=1e-5)
