"""Folding time into the batch, and carrying states through a network."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ranvier.dynamics import NeuronState
from ranvier.nn import IF, LIF, Carry, TimeFolded, fire, fold_time, repeat, unfold_time
from ranvier.nn.time import steps_of


@given(shape=st.lists(st.integers(1, 4), min_size=2, max_size=5), empty=st.booleans())
@settings(deadline=None, max_examples=40, derandomize=True)
def test_unfold_undoes_fold_without_copying(shape: list[int], empty: bool) -> None:
    if empty:
        shape[1] = 0
    x = torch.randn(shape)
    folded = fold_time(x)
    assert folded.shape == (shape[0] * shape[1], *shape[2:])
    back = unfold_time(folded, shape[0])
    assert torch.equal(back, x)
    assert back.data_ptr() == x.data_ptr()


def test_fold_keeps_the_order() -> None:
    assert fold_time(torch.arange(6).view(3, 2)).tolist() == [0, 1, 2, 3, 4, 5]


def test_time_folded_equals_the_loop() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AvgPool2d(2), nn.Flatten(1), nn.Linear(12, 5)).double()
    folded = TimeFolded(*layers)
    x = torch.randn(4, 3, 2, 6, 6, dtype=torch.float64)
    # Float64; a convolution may add in another order at another batch size.
    torch.testing.assert_close(folded(x), torch.stack([layers(step) for step in x]), rtol=1e-12, atol=1e-12)


def test_time_folded_keeps_the_names_of_a_sequence() -> None:
    assert list(TimeFolded(nn.Linear(2, 3)).state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(("shape", "message"), [((3,), "must be time-first"), ((0, 3), "T = 0 steps")])
def test_time_folded_refuses_what_is_no_sequence(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimeFolded(nn.Identity())(torch.zeros(shape))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_repeat_is_a_view(steps: int) -> None:
    x = torch.randn(1, 2, 3)
    repeated = repeat(x, steps)
    assert torch.equal(repeated, torch.cat([x] * steps))
    assert repeated.data_ptr() == x.data_ptr()


def run(carry: Carry, current: torch.Tensor) -> torch.Tensor:
    """Two neurons in a row, as a network would."""
    return fire(LIF(), 2 * fire(IF(), current, carry), carry)


def test_carry_hands_states_on_in_order() -> None:
    current = torch.rand(6, 2, 3, generator=torch.Generator().manual_seed(1))
    whole = fire(LIF(), 2 * fire(IF(), current, None), None)
    state: tuple[NeuronState, ...] | None = None
    parts = []
    for part in current.split([1, 3, 2]):
        carry = Carry(state)
        parts.append(run(carry, part))
        state = carry.finish()
        assert len(state) == 2
    assert torch.equal(torch.cat(parts), whole)
    assert 0 < whole.mean() < 1


def test_carry_takes_any_iterable_and_leaves_it() -> None:
    current = torch.rand(2, 2, 3)
    first = Carry()
    run(first, current)
    states = list(first.finish())
    from_list, from_generator = Carry(states), Carry(state for state in states)
    assert torch.equal(run(from_list, current), run(from_generator, current))
    assert len(states) == 2


@pytest.mark.parametrize("held", [0, 1, 3])
def test_carry_with_another_number_of_states_raises(held: int) -> None:
    current = torch.rand(2, 2, 3)
    carry = Carry([NeuronState(torch.zeros(2, 3))] * held)

    def network() -> None:
        run(carry, current)
        carry.finish()

    with pytest.raises(ValueError, match=rf"state holds {held} neuron states, but the network has (more|2) neurons"):
        network()


@pytest.mark.parametrize("streams", [False, True])
def test_fire_passes_stateless_activations(streams: bool) -> None:
    carry = Carry() if streams else None
    assert fire(nn.ReLU(), torch.tensor([[-1.0, 2.0]]), carry).tolist() == [[0.0, 2.0]]
    if carry is not None:
        assert carry.finish() == ()


def test_steps_of_a_constant_and_of_a_sequence() -> None:
    image = torch.zeros(2, 3, 4, 4)
    x, steps = steps_of(image, (4,), 5)
    assert (x.shape, steps) == ((1, 2, 3, 4, 4), 5)
    for given_steps in (None, 7):
        x, steps = steps_of(image.expand(7, -1, -1, -1, -1), (4,), given_steps)
        assert (x.shape, steps) == ((7, 2, 3, 4, 4), 7)


@pytest.mark.parametrize(
    ("shape", "steps", "message"),
    [
        ((2, 3, 4, 4), None, r"constant input, so the number of time steps is open.*steps=4"),
        ((2, 3, 4, 4), 0, "steps is 0, but a network needs at least one"),
        ((5, 2, 3, 4, 4), 0, "steps is 0, but a network needs at least one"),
        ((5, 2, 3, 4, 4), 4, r"5 steps, but steps=4.*images\[:4\]"),
        ((0, 2, 3, 4, 4), None, "T = 0 steps"),
        ((3, 4, 4), 4, r"\(3 dimensions\), but this network takes a constant input of 4 dimensions"),
        ((1, 5, 2, 3, 4, 4), 4, r"\(6 dimensions\)"),
    ],
)
def test_steps_of_bad_input_raises(shape: tuple[int, ...], steps: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steps_of(torch.zeros(shape), (4,), steps)


@pytest.mark.parametrize("steps", [2.0, "4", True])
def test_steps_are_a_whole_number(steps: Any) -> None:
    with pytest.raises(TypeError, match=f"steps is {steps!r}, a {type(steps).__name__}, but must be a whole number"):
        steps_of(torch.zeros(2, 3, 4, 4), (4,), steps)
