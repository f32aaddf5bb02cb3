"""Evaluation mode for the length of a block, and where a model is."""

from contextlib import suppress

import pytest
import torch
from torch import nn

from ranvier.evaluation.mode import device_of, evaluating
from ranvier.nn import AffineIF


@pytest.mark.parametrize("fails", [False, True])
def test_each_module_gets_its_own_mode_back(fails: bool) -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
    model[1].eval()
    model[1][0].train()
    modes = [module.training for module in model.modules()]
    assert modes == [True, True, False, True, False]
    with suppress(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        if fails:
            raise KeyError
    assert [module.training for module in model.modules()] == modes


def test_device_is_that_of_parameters_or_buffers() -> None:
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert device_of(AffineIF().to("meta")) == torch.device("meta")  # it has buffers only
    mixed = nn.Sequential(AffineIF(), nn.Linear(2, 2, device="meta"))
    assert device_of(mixed) == torch.device("meta")
