"""Sums of residual blocks that are written over the spikes of the branch, and when they are not."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ranvier.export.lean_neurons import make_lean
from ranvier.export.lean_residual import LeanResidual, add_in_place
from ranvier.nn import LIF, Carry
from ranvier.nn.structure import Activation, Chain, Residual


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def blocks(*, shortcut: nn.Module | None = None) -> tuple[Residual, Residual]:
    """One as it was made, and one that only runs."""
    plain = Residual(Chain(Activation(LIF())), Chain() if shortcut is None else Chain(shortcut))
    lean = copy.deepcopy(plain)
    for part in list(lean.modules()):
        if isinstance(part, LIF):
            make_lean(part, is_native=False)
    add_in_place(lean)
    assert type(lean) is LeanResidual
    return plain, lean


def sent_at(block: Residual) -> list[int]:
    """Where spikes of the neurons lie in memory, in this and every later call."""
    places: list[int] = []
    neuron = block.branch.layers[-1].neuron  # type: ignore[attr-defined]
    scan = neuron.scan

    def told(*given: object) -> tuple[Tensor, object]:
        spikes, after = scan(*given)
        places.append(spikes.data_ptr())
        return spikes, after

    neuron.scan = told
    return places


def test_the_sum_lies_where_the_spikes_did_and_nothing_that_came_is_changed() -> None:
    plain, lean = blocks()
    x, places = torch.randint(0, 3, (4, 2, 3, 5, 5)).float(), sent_at(lean)
    before = x.clone()
    y = lean(x)
    assert places == [y.data_ptr()]
    assert torch.equal(y, plain(x))
    assert torch.equal(x, before)
    assert set(y.unique().tolist()) >= {0.0, 2.0, 3.0}


def test_states_are_carried() -> None:
    plain, lean = blocks(shortcut=Activation(LIF()))
    x, sums, carries = torch.rand(6, 2, 3), [], [None, None]
    for step in x:
        pair = []
        for number, block in enumerate((plain, lean)):
            carry = Carry(carries[number])
            pair.append(block(step[None], carry))
            carries[number] = carry.after
        sums.append(torch.equal(*pair))
    assert all(sums)
    assert torch.equal(plain(x), lean(x))


@pytest.mark.parametrize("where", ["the neurons", "the activation", "the branch"])
def test_what_hooks_were_given_stays_as_it_was(where: str) -> None:
    plain, lean = blocks()
    watched = {"the branch": lean.branch}
    watched["the activation"] = lean.branch.layers[-1]  # type: ignore[attr-defined]
    watched["the neurons"] = watched["the activation"].neuron  # type: ignore[assignment]
    seen: list[Tensor] = []
    watched[where].register_forward_hook(lambda _, __, spikes: seen.append(spikes))
    x = torch.full((3, 2, 4), 3.0)
    assert torch.equal(lean(x), plain(x))
    assert seen[0].max() == 1


def test_sums_of_another_type_or_shape_are_new() -> None:
    for shortcut in (nn.AdaptiveAvgPool1d(1), _Double()):
        plain, lean = blocks(shortcut=shortcut)
        x = torch.rand(3, 2, 4)
        y = lean(x)
        assert y.dtype == plain(x).dtype
        assert torch.equal(y, plain(x))


def test_gradients_keep_what_was_sent() -> None:
    _, lean = blocks()
    with torch.enable_grad():
        places = sent_at(lean)
        assert lean(torch.rand(3, 2, 4)).data_ptr() != places[0]


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()
