"""Logits whose running mean is a leaky average."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranvier.dynamics import LeakyMeanState, leaky_mean

steps = st.integers(1, 12)
decays = st.floats(0, 1)
seeds = st.integers(0, 2**16)


def random_logits(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, 4, generator=torch.Generator().manual_seed(seed)).double()


@given(steps, decays, seeds)
@settings(deadline=None)
def test_the_mean_of_the_first_steps_is_the_leaky_average(count: int, decay: float, seed: int) -> None:
    x = random_logits(count, seed)
    y, _ = leaky_mean(x, decay)
    for t in range(1, count + 1):
        weights = torch.tensor([decay ** (t - s) for s in range(1, t + 1)], dtype=torch.float64).view(-1, 1, 1)
        torch.testing.assert_close(y[:t].mean(0), (weights * x[:t]).sum(0) / weights.sum(), rtol=1e-9, atol=1e-9)


@given(steps, decays, seeds)
@settings(deadline=None)
def test_streaming_is_one_call_bit_for_bit(count: int, decay: float, seed: int) -> None:
    x = random_logits(count, seed).float()
    state: LeakyMeanState | None = None
    parts = []
    for t in range(count):
        y, state = leaky_mean(x[t : t + 1], decay, state)
        parts.append(y)
    whole, after = leaky_mean(x, decay)
    assert torch.equal(torch.cat(parts), whole)
    assert state is not None
    assert all(torch.equal(one, other) for one, other in zip(state, after, strict=True))


def test_no_decay_changes_nothing_and_full_decay_keeps_the_last_step() -> None:
    x = random_logits(6, 0)
    torch.testing.assert_close(leaky_mean(x, 1.0)[0], x)
    torch.testing.assert_close(leaky_mean(x, 0.0)[0].cumsum(0) / torch.arange(1, 7).view(-1, 1, 1), x)


def test_zeros_are_rest() -> None:
    """As programs start that take their state as an input."""
    x = random_logits(4, 1)
    y, after = leaky_mean(x, 0.3)
    again, _ = leaky_mean(x, 0.3, LeakyMeanState(*(torch.zeros_like(each) for each in after)))
    assert torch.equal(again, y)


def test_states_of_others() -> None:
    x = random_logits(2, 4)
    _, state = leaky_mean(x, 0.5)
    with pytest.raises(ValueError, match=r"state is of logits of shape \[3, 4\], but these are \[2, 4\] at each step"):
        leaky_mean(x[:, :2], 0.5, state)
    with pytest.raises(TypeError, match="state is a tuple, but must be what an earlier call returned"):
        leaky_mean(x, 0.5, tuple(state))  # type: ignore[arg-type]


def test_half_precision_is_summed_in_float32() -> None:
    x = random_logits(16, 2).bfloat16()
    y, state = leaky_mean(x, 0.5)
    assert y.dtype == state.total.dtype == torch.float32
    torch.testing.assert_close(y, leaky_mean(x.float(), 0.5)[0])


@pytest.mark.parametrize("decay", [0.25, 0.9])
def test_gradients(decay: float) -> None:
    x = random_logits(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: leaky_mean(logits, decay)[0], (x,))
