"""QCFS as a module: an activation with a learned ceiling."""

from typing import Any

import pytest
import torch
from torch import nn

from ranvier import evaluation, models
from ranvier.dynamics import qcfs
from ranvier.nn import QCFS


def test_runs_qcfs_with_its_numbers() -> None:
    x = torch.linspace(-1, 4, 100).view(5, 4, 5)
    module = QCFS(4, levels=3, ceiling_init=2.0)
    assert torch.equal(module(x), qcfs(x, torch.tensor(2.0), levels=3))
    assert len(module(x).unique()) == 4


def test_learns_its_ceiling() -> None:
    """Ten values above half a step below the ceiling pull it up: dy/dceiling = 1 each."""
    module = QCFS(levels=4, ceiling_init=1.0)
    module(torch.full((10,), 3.0)).sum().backward()
    assert [name for name, _ in module.named_parameters()] == ["ceiling"]
    assert module.ceiling.grad is not None
    assert module.ceiling.grad.item() == 10.0


def test_state_dict_round_trip() -> None:
    module = QCFS(levels=4)
    with torch.no_grad():
        module.ceiling.fill_(1.25)
    assert list(module.state_dict()) == ["ceiling"]
    fresh = QCFS(levels=4)
    x = torch.linspace(-1, 4, 50)
    assert not torch.equal(fresh(x), module(x))
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x), module(x))


def test_printed_form_has_the_ceiling_as_it_is() -> None:
    module = QCFS(16, levels=4)
    assert repr(module) == "QCFS(levels=4, ceiling=4)"
    with torch.no_grad():
        module.ceiling.fill_(1.23456)
    assert repr(module) == "QCFS(levels=4, ceiling=1.23)"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"levels": 0}, "levels is 0, but must be a whole number of at least 1"),
        ({"levels": -4}, "levels is -4"),
        ({"levels": 0.5}, "levels is 0.5"),  # int(0.5) would be no level at all, and every output NaN
        ({"levels": 4.0}, "levels is 4.0"),
        ({"ceiling_init": 0.0}, "ceiling_init is 0.0, but must be greater than 0"),
        ({"ceiling_init": float("nan")}, "ceiling_init is nan"),
    ],
)
def test_bad_arguments_raise(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QCFS(**given)


def test_first_argument_is_a_channel_count() -> None:
    with pytest.raises(TypeError, match="channel count"):
        QCFS(0.5)  # type: ignore[arg-type]


def test_a_network_of_activations_answers_once_and_spikes_never() -> None:
    net = models.mlp([4, 8, 3], neuron=QCFS)
    assert [module.levels for module in net.modules() if isinstance(module, QCFS)] == [8]
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    logits = net(x, steps=2)
    assert torch.equal(logits[0], logits[1])
    with pytest.raises(ValueError, match="no neurons of ranvier.nn"):
        evaluation.firing_rates(net, [(x, torch.zeros(5, dtype=torch.int64))], steps=1)


def test_autocast_leaves_levels_alone() -> None:
    """Levels are 0.5 apart and exact in bfloat16, so that only rounding inside could move one."""
    module = nn.Sequential(QCFS(levels=8, ceiling_init=4.0))
    x = torch.linspace(-1, 5, 500).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.float(), module(x.float()))
