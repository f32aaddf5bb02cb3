"""Neurons of converted networks against traces computed by hand and the law that nothing is lost at a reset."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranvier.dynamics import ConvertedState, NeuronState, Triangle, converted_scan, converted_step

NONE = torch.zeros(1, 1)
ONE = torch.ones(1)


def trace(
    current: list[float], threshold: float = 1.0, v_init: float = 0.5, *, signed: bool = False, bias: Tensor = NONE
) -> tuple[list[float], float]:
    """What one neuron transmits, and its potential afterwards."""
    x = torch.tensor(current).view(-1, 1, 1)
    y, state = converted_scan(x, None, torch.tensor([threshold]), bias, torch.tensor([v_init]), signed)
    assert state.step == len(current)
    return y.flatten().tolist(), state.v.item()


# All numbers are sums of powers of two, so every trace is exact.
@pytest.mark.parametrize(
    ("current", "threshold", "v_init", "sent", "v"),
    [
        ([0.25, 0.25, 0.25], 1.0, 0.5, [0, 1, 0], 0.25),  # 0.75, then 1 is a tie: fires
        ([0.125, 0.125, 0.125], 1.0, 0.5, [0, 0, 0], 0.875),  # silent, no leak
        ([-4.0, 0.0, 4.5], 1.0, 0.5, [0, 0, 1], 0.0),  # what was taken away must come back first
        ([3.0, 3.0, 3.0], 1.0, 0.5, [1, 1, 1], 6.5),  # saturated: one spike a step, the rest stays
        ([3.0, 0.0, 0.0, 0.0], 1.0, 0.5, [1, 1, 1, 0], 0.5),  # and is sent later
        ([0.25, 0.25, 0.25], 0.5, 0.25, [0.5, 0, 0.5], 0.0),  # a spike carries its threshold
        ([0.25, 0.25, 0.25], 0.5, 0.0, [0, 0.5, 0], 0.25),
        ([-1.0, -1.0, -1.0], 1.0, 0.5, [0, 0, 0], -2.5),  # never negative
    ],
)
def test_by_hand(current: list[float], threshold: float, v_init: float, sent: list[float], v: float) -> None:
    assert trace(current, threshold, v_init) == (sent, v)


@pytest.mark.parametrize(
    ("current", "sent", "v"),
    [
        ([-1.0, -1.0], [0, 0], -1.5),  # nothing was sent, so there is nothing to take back
        ([1.0, -1.0, -1.0], [1, -1, 0], -0.5),  # one spike: taken back once
        ([0.5, -1.0, 1.0], [1, -1, 1], 0.0),  # 1 ties; -1 + 1 = 0; 1 ties
        ([0.75, -0.25, 0.0], [1, 0, 0], 0.0),  # a potential of zero takes nothing back
        ([2.0, 0.0, -3.0, 0.0, 0.0], [1, 1, -1, -1, 0], -0.5),  # 1.5, 0.5, -2.5 + 1, -1.5 + 1, -0.5
        ([-1.0, 2.0, -1.0, -1.0], [0, 1, -1, 0], -0.5),  # the count is of spikes, not of input
    ],
)
def test_signed_by_hand(current: list[float], sent: list[float], v: float) -> None:
    assert trace(current, signed=True) == (sent, v)


def test_signed_differs_only_once_a_potential_is_negative() -> None:
    current = [2.0, 0.0, -3.0, 0.0, 0.0]
    assert trace(current)[0] == [1, 1, 0, 0, 0]
    assert trace(current[:2], signed=True) == trace(current[:2])


def test_bias_has_a_row_for_each_step() -> None:
    bias = torch.tensor([[0.5], [-1.0], [0.25]])
    # h = 0.5 + 0.5 - 0.5 = 0.5; 0.5 + 0.5 + 1 = 2, leaves 1; 1 + 0.5 - 0.25 = 1.25, leaves 0.25
    assert trace([0.5, 0.5, 0.5], bias=bias) == ([0, 1, 1], 0.25)
    assert trace([0.5, 0.5], bias=bias) == ([0, 1], 1.0)  # fewer steps than rows
    assert trace([0.5, 0.5, 0.5], bias=torch.tensor([[-0.25]])) == ([1, 1, 0], 0.75)  # one row for all steps


def test_channels_have_their_own_numbers() -> None:
    current = torch.full((1, 2, 3, 2, 2), 0.5)
    threshold, v_init = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.0, 0.25, 1.0])
    bias = torch.tensor([[0.0, -0.25, -1.0]])
    y, state = converted_scan(current, None, threshold, bias, v_init)
    for channel, (sent, v) in enumerate([(0.5, 0.0), (1.0, 0.0), (2.0, 0.5)]):
        assert (y[:, :, channel] == sent).all()
        assert (state.v[:, channel] == v).all()


def test_one_step_is_charge_compare_subtract() -> None:
    x, v = torch.tensor([0.5, -1.0]), torch.tensor([1.0, 0.25])
    y, after, emitted = converted_step(x, v, torch.tensor([0.0, 2.0]), torch.tensor(1.0), torch.tensor(0.25), True)
    assert y.tolist() == [1.0, -1.0]
    assert after.tolist() == [0.25, 0.0]
    assert emitted.tolist() == [1.0, 1.0]
    assert v.tolist() == [1.0, 0.25]


multiples = st.integers(-192, 192).map(lambda n: n / 64)


@settings(max_examples=150, deadline=None)
@given(
    current=st.lists(st.lists(multiples, min_size=2, max_size=2), min_size=1, max_size=12),
    log_threshold=st.integers(-2, 1),
    bias=st.lists(multiples, min_size=12, max_size=12),
    v_init=multiples,
    signed=st.booleans(),
)
def test_nothing_is_lost(
    current: list[list[float]], log_threshold: int, bias: list[float], v_init: float, signed: bool
) -> None:
    """Sum of what is sent = sum of what came + v_init - v[T], exactly: all numbers are multiples of 1/64."""
    x = torch.tensor(current).view(-1, 1, 2)
    rows = torch.tensor(bias).view(12, 1)
    threshold = torch.tensor([2.0**log_threshold])
    y, state = converted_scan(x, None, threshold, rows, torch.tensor([v_init]), signed)
    assert torch.equal(y.sum(0), (x - rows[: len(x)].unsqueeze(1)).sum(0) + v_init - state.v)
    spikes = y / threshold
    assert set(spikes.flatten().tolist()) <= ({-1.0, 0.0, 1.0} if signed else {0.0, 1.0})
    assert (spikes.cumsum(0) >= 0).all()  # a neuron takes back no more than it sent
    if signed:
        assert torch.equal(state.emitted, spikes.sum(0))


@pytest.mark.parametrize("signed", [False, True])
def test_streaming_equals_one_call_bit_for_bit(signed: bool) -> None:
    """Random floats: the same operations in the same order, whatever a call covers."""
    generator = torch.Generator().manual_seed(0)
    current = torch.randn(6, 3, 4, 5, 2, generator=generator) + 0.3
    threshold = torch.rand(4, generator=generator) + 0.2
    bias = 0.3 * torch.randn(6, 4, generator=generator)
    v_init = threshold * torch.rand(4, generator=generator)
    whole, end = converted_scan(current, None, threshold, bias, v_init, signed)
    assert (whole < 0).any() == signed
    state, parts = None, []
    for t in range(6):
        before = None if state is None else ConvertedState(state.v.clone(), state.emitted.clone(), state.step)
        sent, after = converted_scan(current[t : t + 1], state, threshold, bias, v_init, signed)
        if state is not None and before is not None:  # the caller's state is left as it was
            assert torch.equal(state.v, before.v)
            assert torch.equal(state.emitted, before.emitted)
        parts.append(sent)
        state = after
        assert state.step == t + 1
    assert state is not None
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(state.v, end.v)
    assert torch.equal(state.emitted, end.emitted)
    early, middle = converted_scan(current[:2], None, threshold, bias, v_init, signed)
    late, _ = converted_scan(current[2:], middle, threshold, bias, v_init, signed)
    assert torch.equal(torch.cat([early, late]), whole)


def test_more_steps_than_rows_raise() -> None:
    current, bias = torch.zeros(4, 1, 2), torch.zeros(4, 2)
    _, state = converted_scan(current, None, ONE, bias, ONE)
    with pytest.raises(ValueError, match=r"step 5 was asked for, but .* steps 1 to 4.*convert again with steps=5"):
        converted_scan(torch.zeros(5, 1, 2), None, ONE, bias, ONE)
    with pytest.raises(ValueError, match=r"step 6 was asked for"):
        converted_scan(current[:2], state, ONE, bias, ONE)
    _, state = converted_scan(current, None, ONE, NONE, ONE)
    assert converted_scan(current, state, ONE, NONE, ONE)[1].step == 8  # one row is for any number of steps


def test_initial_potential_per_neuron() -> None:
    v_init = torch.tensor([0.0, 0.25, 0.5, 0.75]).view(1, 2, 2)
    current = torch.full((2, 3, 1, 2, 2), 0.25)
    y, state = converted_scan(current, None, ONE, NONE, v_init)
    assert (y[0] == torch.tensor([0.0, 0, 0, 1]).view(1, 2, 2)).all()
    assert (y[1] == torch.tensor([0.0, 0, 1, 0]).view(1, 2, 2)).all()
    assert (state.v == torch.tensor([0.5, 0.75, 0.0, 0.25]).view(1, 2, 2)).all()
    assert v_init.flatten().tolist() == [0.0, 0.25, 0.5, 0.75]


def test_bfloat16_keeps_its_potential_in_float32() -> None:
    """256 + 1 is 256 in bfloat16: a neuron far from its threshold would never get there."""
    current = torch.ones(8, 1, 1).bfloat16()
    y, state = converted_scan(current, None, torch.tensor([264.0]), NONE, torch.tensor([256.0]))
    assert y.dtype == torch.bfloat16
    assert state.v.dtype == torch.float32
    assert y.flatten().tolist() == [0.0] * 7 + [264.0]


def test_float64_stays() -> None:
    y, state = converted_scan(torch.ones(1, 1, 1, dtype=torch.float64), None, ONE, NONE, ONE)
    assert (y.dtype, state.v.dtype) == (torch.float64, torch.float64)


def test_memory_layout_is_kept() -> None:
    current = torch.zeros(6, 4, 5, 5).to(memory_format=torch.channels_last).unflatten(0, (2, 3))
    _, state = converted_scan(current, None, ONE, NONE, torch.rand(4), signed=True)
    assert state.v.is_contiguous(memory_format=torch.channels_last)
    assert state.emitted.is_contiguous(memory_format=torch.channels_last)


def wrong_shapes() -> list[tuple[str, tuple, str]]:
    x = torch.zeros(2, 3, 4, 5, 5)
    four, rows = torch.ones(4), torch.zeros(1, 4)
    state = ConvertedState(torch.zeros(3, 4, 5, 5), torch.zeros(0), 0)
    return [
        ("one axis", (torch.zeros(4), None, ONE, NONE, ONE), "time-first"),
        ("no channels", (torch.zeros(4, 2), None, ONE, NONE, ONE), r"shape \[4, 2\].* need channels: \[T, B, C, ...\]"),
        ("no steps", (x[:0], None, four, rows, four), "T = 0 steps"),
        ("integers", (x.long(), None, four, rows, four), "needs a floating type"),
        ("threshold", (x, None, torch.ones(3), rows, four), r"threshold is for 3 channels, .* \[T, B, 3, ...\]"),
        ("bias", (x, None, four, torch.zeros(2, 5), four), "bias is for 5 channels"),
        ("v_init", (x, None, four, rows, torch.ones(2)), "v_init is for 2 channels"),
        ("one channel", (x[:, :, :1], None, four, NONE, ONE), "threshold is for 4 channels"),
        ("image size", (x, None, four, rows, torch.ones(4, 7, 7)), r"each neuron of \[4, 7, 7\].*images of the size"),
        ("one neuron", (x, None, four, rows, torch.ones(4, 1, 1)), r"each neuron of \[4, 1, 1\]"),
        ("batch", (x[:, :2], state, four, rows, four), r"state\.v has shape \[3, 4, 5, 5\] but .*state=None"),
        ("unsigned state", (x, state, four, rows, four, True), "signed neurons need their counts"),
    ]


@pytest.mark.parametrize(("arguments", "message"), [pytest.param(*case[1:], id=case[0]) for case in wrong_shapes()])
def test_wrong_shapes_raise(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        converted_scan(*arguments)


def test_state_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="NeuronState, but must be the ConvertedState"):
        converted_scan(torch.zeros(1, 2, 3), NeuronState(torch.zeros(2, 3)), ONE, NONE, ONE)  # type: ignore[arg-type]


def test_a_state_of_less_than_no_steps_is_refused() -> None:
    _, state = converted_scan(torch.zeros(1, 2, 3), None, ONE, NONE, ONE)
    with pytest.raises(ValueError, match="state.step is -1, but steps so far are at least 0"):
        converted_scan(torch.zeros(1, 2, 3), state._replace(step=-1), ONE, NONE, ONE)


@pytest.mark.parametrize("signed", [False, True])
def test_a_surrogate_changes_no_value(signed: bool) -> None:
    current = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    threshold, bias = torch.rand(4) + 0.1, 0.1 * torch.randn(6, 4)
    plain, end = converted_scan(current, None, threshold, bias, threshold / 2, signed)
    smooth, other = converted_scan(current, None, threshold, bias, threshold / 2, signed, surrogate=Triangle(1.0))
    assert torch.equal(plain, smooth)
    assert torch.equal(end.v, other.v)
    assert (plain != 0).any()
    assert not signed or (plain < 0).any()


def test_gradients_of_one_step_by_hand() -> None:
    """y = threshold H(h / threshold - 1), with q the triangle: dy/dx = q(u), dy/dthreshold = s - q(u) h / threshold."""
    x = torch.tensor([0.5, 1.5, 3.0, 5.0], dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    v_init = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    y, _ = converted_scan(x.view(1, 4, 1), None, threshold, bias, v_init, surrogate=Triangle(1.0))
    assert y.flatten().tolist() == [0, 0, 2, 2]
    gradients = torch.autograd.grad(y.sum(), (x, threshold, bias, v_init))
    q = torch.tensor([0.25, 0.75, 0.5, 0.0], dtype=torch.float64)  # 1 - |h / 2 - 1|
    assert gradients[0].tolist() == q.tolist()
    assert float(gradients[1]) == 2 - float((q * x.detach() / 2).sum())
    assert float(gradients[2]) == -float(q.sum())
    assert float(gradients[3]) == float(q.sum())


def test_the_reset_is_not_differentiated() -> None:
    """h[2] = h[1] + x[2] - y[1], with y[1] a constant: the first input reaches the second step with slope 1."""
    x = torch.tensor([1.5, 0.9], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    y, _ = converted_scan(x.view(2, 1, 1), None, one, torch.zeros(1, 1), 0 * one, surrogate=Triangle(1.0))
    assert y.flatten().tolist() == [1, 1]
    (gradient,) = torch.autograd.grad(y[1].sum(), x)
    assert gradient.tolist() == pytest.approx([0.6, 0.6])  # h = 1.5 + 0.9 - 1 = 1.4
