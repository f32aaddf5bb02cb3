"""Neurons written down and built again: the same kind, settings and shapes."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranvier.conversion.neuron_card import PLAIN, SURROGATES, neuron_from_card, neuron_to_card
from ranvier.dynamics import NeuronState, Rectangle, Triangle
from ranvier.nn import IF, LIF, LIFB, PLIF, AffineIF, ConvertedIF, LIFPair, Neuron

resets = st.sampled_from(["hard", "soft"])
above_zero = st.floats(0.125, 8)
surrogates = st.builds(lambda kind, setting: kind(setting), st.sampled_from(list(SURROGATES.values())), above_zero)
common = {"v_threshold": above_zero, "reset": resets, "detach_reset": st.booleans(), "surrogate": surrogates}
leaky = {**common, "tau": st.floats(1.5, 8)}
neurons = st.one_of(
    st.builds(IF, **common),
    st.builds(LIF, **leaky),
    st.builds(PLIF, **leaky),
    st.builds(LIFB, st.integers(1, 5), burst_init=above_zero, **leaky),
    st.builds(LIFPair, coupled=st.booleans(), **leaky),
    st.builds(
        AffineIF,
        tau=st.one_of(st.none(), st.just(2.0), st.just(torch.tensor([[2.0], [3.0]]))),
        v_leak=st.just(torch.rand(2, 3)),
        ties_fire=st.booleans(),
        reset=resets,
        fires=st.booleans(),
        surrogate=surrogates,
    ),
    st.builds(
        ConvertedIF,
        st.just(4),
        steps=st.integers(1, 3),
        shape=st.sampled_from([None, (4, 2, 2)]),
        signed=st.booleans(),
        binary=st.booleans(),
    ),
)


@settings(derandomize=True, deadline=None)
@given(neuron=neurons)
def test_the_same_comes_back(neuron: Neuron) -> None:
    again = neuron_from_card(**json.loads(json.dumps(neuron_to_card(neuron))))
    again.load_state_dict(neuron.state_dict())
    assert repr(again) == repr(neuron)
    assert type(again) is type(neuron)
    if not isinstance(neuron, ConvertedIF):
        assert again.params == neuron.params


def test_the_kinds_are_all_there_are() -> None:
    kinds = {kind.__name__ for kind in Neuron.__subclasses__() if kind.__module__.startswith("ranvier.nn")}
    assert kinds == {*PLAIN, "AffineIF", "ConvertedIF", "LIFB"}


class Own(LIF):
    def scan(self, current: Tensor, state: NeuronState | None) -> tuple[Tensor, NeuronState]:
        return 2 * current, NeuronState(current[-1])


@dataclass(frozen=True)
class Steep(Triangle):
    pass


@pytest.mark.parametrize(
    ("neuron", "message"),
    [
        (Own(), r"a Own cannot be kept in a file: only neurons of ranvier.nn can.*ranvier.weights.save, and make it"),
        (LIF(surrogate=Steep()), r"the surrogate is a Steep, which cannot.*one of ATan, Rectangle, Sigmoid, Triangle"),
    ],
    ids=["neuron", "surrogate"],
)
def test_what_cannot_be_kept(neuron: Neuron, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        neuron_to_card(neuron)


def test_kinds_of_other_versions() -> None:
    card: dict[str, Any] = neuron_to_card(LIF(surrogate=Rectangle()))
    assert card["surrogate"] == {"kind": "Rectangle", "width": 0.5}
    with pytest.raises(ValueError, match="a neuron is a 'GIF', which is not known here.*another version"):
        neuron_from_card(**{**card, "kind": "GIF"})
