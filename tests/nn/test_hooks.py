"""Whatever can see a module from outside is seen."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from torch.nn.modules import module as every_module

from ranvier.nn.hooks import is_hooked


def nothing(*_: Any) -> None:
    """A hook that changes nothing."""


@pytest.mark.parametrize(
    "register",
    [
        lambda layer: layer.register_forward_hook(nothing),
        lambda layer: layer.register_forward_pre_hook(nothing),
        lambda layer: layer.register_full_backward_hook(nothing),
        lambda layer: layer.register_full_backward_pre_hook(nothing),
        lambda layer: every_module.register_module_forward_hook(nothing),
        lambda layer: every_module.register_module_forward_pre_hook(nothing),
        lambda layer: every_module.register_module_full_backward_hook(nothing),
        lambda layer: every_module.register_module_full_backward_pre_hook(nothing),
    ],
)
def test_every_kind_of_hook_and_its_removal(register: Callable[[nn.Module], Any]) -> None:
    layer = nn.Linear(2, 2)
    assert not is_hooked(layer)
    handle = register(layer)
    try:
        assert is_hooked(layer)
    finally:
        handle.remove()
    assert not is_hooked(layer)


def test_another_forward() -> None:
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    assert is_hooked(layer)
    del layer.forward
    assert not is_hooked(layer)
