"""The burst neuron: two comparators, one potential, reset by the lower one; and the pair of neurons that it is."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranvier.dynamics import (
    LIFBParams,
    LIFPairParams,
    LIFParams,
    NeuronState,
    Triangle,
    lif_pair_scan,
    lif_scan,
    lifb_scan,
)

Mode = Literal["hard", "soft"]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# tau = 2, threshold 0.5, burst threshold 1, strength 1.5; sums of powers of two, so exact.
@pytest.mark.parametrize(
    ("reset", "current", "spikes", "v"),
    [
        ("hard", [0.5, 0.5], [0, 0], 0.375),  # silent
        ("hard", [1.0, 1.5], [1, 1], 0.0),  # 0.5 ties and fires; 0.75
        ("hard", [2.0, 0.5], [1.5, 0], 0.25),  # 1.0 ties and bursts, then from rest
        ("hard", [1.9375, 4.0], [1, 1.5], 0.0),  # just below; 2.0
        ("hard", [0.5, 1.75], [0, 1.5], 0.0),  # 0.25 + 0.75 = 1.0: tie
        ("soft", [2.0, 0.5], [1.5, 1], 0.0),  # a burst subtracts the threshold once: 0.5, then 0.5 ties
        ("soft", [4.0, 0.0], [1.5, 1], 0.25),
    ],
)
def test_by_hand(reset: Mode, current: list[float], spikes: list[float], v: float) -> None:
    x = torch.tensor(current).view(2, 1, 1)
    s, state = lifb_scan(x, None, LIFBParams(reset=reset), torch.tensor([1.5]))
    assert s.flatten().tolist() == spikes
    assert state.v.item() == v


def test_constant_1_2_fires_at_every_step_and_never_bursts() -> None:
    """v = 0.6 at each step; a burst unit of its own with threshold 1 would fire at step 3."""
    s, state = lifb_scan(torch.full((4, 1, 1), 1.2), None, LIFBParams(), torch.tensor([7.0]))
    assert s.flatten().tolist() == [1, 1, 1, 1]
    assert state.v.item() == 0


def test_burst_threshold_is_twice_the_threshold() -> None:
    assert LIFBParams().v_burst == 1.0
    assert LIFBParams(v_threshold=0.75).v_burst == 1.5


@given(
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 6),
    reset=st.sampled_from(["hard", "soft"]),
    detach=st.booleans(),
    tau=st.sampled_from([1.0, 2.0, 3.7]),
)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_strength_one_is_lif_bit_for_bit(seed: int, steps: int, reset: Mode, detach: bool, tau: float) -> None:
    current = (2 * randn(steps, 2, 3, 4, seed=seed, dtype=torch.float32)).requires_grad_()
    weight = randn(steps, 2, 3, 4, seed=seed + 1, dtype=torch.float32)
    chosen = {"reset": reset, "detach_reset": detach, "tau": tau}
    burst, burst_state = lifb_scan(current, None, LIFBParams(**chosen), torch.ones(3))
    plain, plain_state = lif_scan(current, None, LIFParams(**chosen))
    assert torch.equal(burst, plain)
    assert torch.equal(burst_state.v, plain_state.v)
    (burst_gradient,) = torch.autograd.grad((weight * burst).sum(), current)
    (plain_gradient,) = torch.autograd.grad((weight * plain).sum(), current)
    # (strength - 1) = 0 adds zeros, but autograd may add up the paths in another order: float32 rounding.
    torch.testing.assert_close(burst_gradient, plain_gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("strength", [2.0, 0.5, 0.0, -1.25, 40.0])
def test_the_binary_event_resets(reset: Mode, strength: float) -> None:
    """Reset with the graded spike would leave v (1 - strength) behind, and the potential would not be a LIF's."""
    current = 2 * randn(8, 3, 2, seed=1)
    v_burst = v_plain = None
    bursts = 0
    for x in current.split(1):
        s, v_burst = lifb_scan(x, v_burst, LIFBParams(reset=reset), torch.full((2,), strength, dtype=torch.float64))
        fired, v_plain = lif_scan(x, v_plain, LIFParams(reset=reset))
        assert torch.equal(v_burst.v, v_plain.v)
        assert (s[fired == 0] == 0).all()
        bursts += int(((s - fired) != 0).sum())
    assert bursts > 5


def test_negative_strengths() -> None:
    x = torch.tensor([0.5, 1.5, 3.0]).expand(1, 2, 3)  # channels at rest, spiking, bursting
    s, _ = lifb_scan(x, None, LIFBParams(), torch.tensor([-2.0, -2.0, -2.0]))
    assert s.tolist() == [[[0, 1, -2], [0, 1, -2]]]


def test_strength_is_per_channel_the_third_axis() -> None:
    x = torch.full((2, 3, 2, 2, 2), 3.0)  # T, B, C, H, W with sizes that could be mistaken for each other
    s, _ = lifb_scan(x, None, LIFBParams(), torch.tensor([2.0, 3.0]))
    assert (s[:, :, 0] == 2).all()
    assert (s[:, :, 1] == 3).all()


@pytest.mark.parametrize("strength", [1.1, -0.3, 1e-3, 1000.7])
def test_a_burst_transmits_the_strength(strength: float) -> None:
    s, _ = lifb_scan(torch.full((1, 1, 1), 3.0), None, LIFBParams(), torch.tensor([strength]))
    # 1 + (strength - 1) rounds twice, each at the scale of 1 or of the strength.
    assert s.item() == pytest.approx(strength, rel=2**-23, abs=2**-23)


@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 4, 3, 2, 2)])
def test_strength_gradient_is_the_burst_masked_sum(reset: Mode, shape: tuple[int, ...]) -> None:
    """Integer output gradients make every order of summation exact."""
    strength = torch.tensor([2.0, 0.5, -1.0], dtype=torch.float64, requires_grad=True)
    current = 4 * randn(*shape, seed=2)
    grad_s = torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(3)).double()
    spikes, _ = lifb_scan(current, None, LIFBParams(reset=reset), strength)
    spikes.backward(grad_s)
    bursts = (spikes != 0) & (spikes != 1)
    assert bursts.sum() > 10
    other = tuple(axis for axis in range(len(shape)) if axis != 2)
    assert strength.grad is not None
    assert torch.equal(strength.grad, (grad_s * bursts).sum(other))


def test_strength_one_still_gets_a_gradient() -> None:
    strength = torch.ones(1, requires_grad=True)
    lifb_scan(torch.tensor([3.0, 0.0, 1.2]).view(3, 1, 1), None, LIFBParams(), strength)[0].sum().backward()
    assert strength.grad is not None
    assert strength.grad.tolist() == [1.0]


# ds/dh = q(h - 0.5) + (strength - 1) q(h - 1), q(u) = max(0, 2 - 4 |u|); tau = 1 gives h = x.
@pytest.mark.parametrize("strength", [2.0, 0.5, -1.5])
@pytest.mark.parametrize(
    ("h", "q_fire", "q_burst"),
    [(0.0, 0, 0), (0.25, 1, 0), (0.5, 2, 0), (0.75, 1, 1), (1.0, 0, 2), (1.25, 0, 1), (1.5, 0, 0), (-3.0, 0, 0)],
)
def test_slope_by_hand(strength: float, h: float, q_fire: float, q_burst: float) -> None:
    x = torch.tensor(h).view(1, 1, 1).requires_grad_()
    lifb_scan(x, None, LIFBParams(tau=1.0), torch.tensor([strength]))[0].sum().backward()
    assert x.grad is not None
    assert x.grad.item() == q_fire + (strength - 1) * q_burst
    if h == 0.75:
        assert x.grad.item() == strength


def bptt(
    x: list[float], v0: float, grad_s: list[float], grad_v: float, strength: float, params: LIFBParams
) -> tuple[list[float], list[float], float, float]:
    """Backpropagation through time of one neuron, written out: spikes, dL/dx, dL/dv0, dL/dstrength."""
    threshold, hard = params.v_threshold, params.reset == "hard"

    def q(u: float) -> float:
        return max(0.0, 2 - 4 * abs(u))

    h, f, b = [], [], []
    v = v0
    for current in x:
        h.append(v + (current - v) / params.tau)
        f.append(1.0 if h[-1] >= threshold else 0.0)
        b.append(1.0 if h[-1] >= 2 * threshold else 0.0)
        v = h[-1] * (1 - f[-1]) if hard else h[-1] - threshold * f[-1]
    spikes = [1 + (strength - 1) if burst else fired for fired, burst in zip(f, b, strict=True)]
    grad_x, grad_strength = [0.0] * len(x), 0.0
    for t in reversed(range(len(x))):
        grad_fired = grad_s[t]
        if not params.detach_reset:
            grad_fired += grad_v * (-h[t] if hard else -threshold)
        grad_burst = grad_s[t] * (strength - 1)
        grad_h = grad_fired * q(h[t] - threshold) + grad_burst * q(h[t] - 2 * threshold)
        grad_h += grad_v * ((1 - f[t]) if hard else 1.0)
        grad_strength += grad_s[t] * b[t]
        grad_x[t] = grad_h / params.tau
        grad_v = grad_h * (1 - 1 / params.tau)
    return spikes, grad_x, grad_v, grad_strength


@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("detach", [True, False])
def test_gradients_equal_plain_backpropagation(reset: Mode, detach: bool) -> None:
    steps, channels = 7, 6
    params = LIFBParams(reset=reset, detach_reset=detach, tau=2.5, surrogate=Triangle())
    current = (2 * randn(steps, 1, channels, seed=4) + 1).requires_grad_()
    v0 = (0.3 * randn(1, channels, seed=5)).requires_grad_()
    strength = (2 * randn(channels, seed=6)).requires_grad_()
    grad_s, grad_v = randn(steps, 1, channels, seed=7), randn(1, channels, seed=8)
    spikes, end = lifb_scan(current, NeuronState(v0), params, strength)
    loss = (grad_s * spikes).sum() + (grad_v * end.v).sum()
    grad_x, grad_v0, grad_strength = torch.autograd.grad(loss, (current, v0, strength))
    for c in range(channels):
        s, gx, gv0, gk = bptt(
            current[:, 0, c].tolist(),
            v0[0, c].item(),
            grad_s[:, 0, c].tolist(),
            grad_v[0, c].item(),
            strength[c].item(),
            params,
        )
        assert spikes[:, 0, c].tolist() == s
        # Float64 over seven steps whose factors are below 10: some hundred roundings of 1e-16.
        assert grad_x[:, 0, c].tolist() == pytest.approx(gx, rel=1e-12, abs=1e-12)
        assert grad_v0[0, c].item() == pytest.approx(gv0, rel=1e-12, abs=1e-12)
        assert grad_strength[c].item() == pytest.approx(gk, rel=1e-12, abs=1e-12)
    assert ((spikes != 0) & (spikes != 1)).sum() > 5


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 5), (4, 3, 1, 2)])
def test_wrong_channel_count_raises(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"current has shape .*3 burst strengths need \[T, B, 3, \.\.\.\]"):
        lifb_scan(torch.zeros(shape), None, LIFBParams(), torch.ones(3))


# Pairs of LIF neurons


# tau = 2, thresholds 0.5 and 1; sums of powers of two, so exact. Spikes of the first and the second neuron.
@pytest.mark.parametrize(
    ("reset", "current", "fired", "burst", "v"),
    [
        ("hard", [0.5, 0.5], [0, 0], [0, 0], 0.375),  # silent
        ("hard", [1.0, 1.5], [1, 1], [0, 0], 0.0),  # 0.5 ties; 0.75 resets the second neuron, too
        ("hard", [2.0, 0.5], [1, 0], [1, 0], 0.25),  # 1.0 ties in the second
        ("hard", [1.9375, 4.0], [1, 1], [0, 1], 0.0),  # just below; 2.0
        ("hard", [0.5, 1.75], [0, 1], [0, 1], 0.0),
        ("soft", [2.0, 0.5], [1, 1], [1, 0], 0.0),  # both subtract the first one's threshold: 0.5, then 0.5 ties
        ("soft", [4.0, 2.0], [1, 1], [1, 1], 1.25),  # 2.0 leaves 1.5, then 1.75
    ],
)
def test_pair_by_hand(reset: Mode, current: list[float], fired: list[int], burst: list[int], v: float) -> None:
    spikes, state = lif_pair_scan(torch.tensor(current).view(2, 1, 1), None, LIFPairParams(reset=reset))
    assert spikes.shape == (2, 1, 2)
    assert spikes[:, 0, 0].tolist() == fired
    assert spikes[:, 0, 1].tolist() == burst
    assert state.v.flatten().tolist() == [v]  # one potential for both


@given(
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 16),
    reset=st.sampled_from(["hard", "soft"]),
    detach=st.booleans(),
    tau=st.sampled_from([1.0, 2.0, 3.7]),
    threshold=st.sampled_from([0.5, 0.3, 1.1]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    rest=st.booleans(),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_pair_is_the_burst_neuron_bit_for_bit(
    seed: int, steps: int, reset: Mode, detach: bool, tau: float, threshold: float, dtype: torch.dtype, rest: bool
) -> None:
    """Spikes, potentials, and what strengths make of the spikes; from rest or from a carried state."""
    chosen = {"reset": reset, "detach_reset": detach, "tau": tau, "v_threshold": threshold}
    current = 2 * randn(steps, 2, 3, 4, seed=seed, dtype=torch.float32).to(dtype) + 0.5
    strength = 2 * randn(3, seed=seed + 1, dtype=torch.float32)
    potential = torch.float64 if dtype == torch.float64 else torch.float32  # what scans keep
    v = None if rest else 0.3 * randn(2, 3, 4, seed=seed + 2, dtype=potential)
    expected, end = lifb_scan(current, None if v is None else NeuronState(v), LIFBParams(**chosen), strength)
    spikes, pair_end = lif_pair_scan(current, None if v is None else NeuronState(v), LIFPairParams(**chosen))
    assert spikes.dtype == dtype
    fired, burst = spikes.to(potential).chunk(2, 2)
    assert torch.equal((fired + (strength.view(3, 1) - 1) * burst).to(dtype), expected)
    assert ((burst == 0) | (fired == 1)).all()
    assert torch.equal(pair_end.v, end.v)


def test_pair_bursts() -> None:
    """The property above is about something: of random currents as there, many make a burst."""
    spikes, _ = lif_pair_scan(2 * randn(16, 2, 3, 4, seed=0) + 0.5, None, LIFPairParams())
    fired, burst = spikes.chunk(2, 2)
    assert 0.3 < fired.mean() < 0.6
    assert 0.1 < burst.mean() < 0.4


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_pair_streams(reset: Mode, coupled: bool) -> None:
    params = LIFPairParams(reset=reset, coupled=coupled)
    current = 2 * randn(6, 3, 4, seed=1, dtype=torch.float32)
    whole, end = lif_pair_scan(current, None, params)
    state = None
    for t in range(6):
        before = None if state is None else state.v.clone()
        spikes, after = lif_pair_scan(current[t : t + 1], state, params)
        assert torch.equal(spikes[0], whole[t])
        assert state is None or torch.equal(state.v, before), "the state is not modified"
        state = after
    assert state is not None
    assert torch.equal(state.v, end.v)


@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("detach", [True, False])
def test_pair_has_the_gradients_of_the_burst_neuron(reset: Mode, detach: bool) -> None:
    """Two chains with a potential each share what flows through one: their sum is the same."""
    current = (2 * randn(7, 2, 3, 4, seed=2) + 1).requires_grad_()
    strength = 2 * randn(3, seed=3)
    weight = randn(7, 2, 3, 4, seed=4)
    chosen = {"reset": reset, "detach_reset": detach, "tau": 2.5}
    expected = torch.autograd.grad(
        (weight * lifb_scan(current, None, LIFBParams(**chosen), strength)[0]).sum(), current
    )
    fired, burst = lif_pair_scan(current, None, LIFPairParams(**chosen))[0].chunk(2, 2)
    sent = fired + (strength.view(3, 1) - 1) * burst
    gradient = torch.autograd.grad((weight * sent).sum(), current)
    assert (gradient[0] != 0).double().mean() > 0.3
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)  # sums in another order


@given(seed=st.integers(0, 2**31), reset=st.sampled_from(["hard", "soft"]), tau=st.sampled_from([1.0, 2.0, 3.7]))
@settings(deadline=None, max_examples=20, derandomize=True)
def test_free_running_pair_is_two_lif_neurons(seed: int, reset: Mode, tau: float) -> None:
    current = 2 * randn(8, 2, 3, 4, seed=seed)
    spikes, state = lif_pair_scan(current, None, LIFPairParams(tau=tau, reset=reset, coupled=False))
    lower, low_end = lif_scan(current, None, LIFParams(tau=tau, reset=reset))
    upper, high_end = lif_scan(current, None, LIFParams(tau=tau, reset=reset, v_threshold=1.0))
    assert torch.equal(spikes, torch.cat((lower, upper), 2))
    assert torch.equal(state.v, torch.cat((low_end.v, high_end.v), 1))


def test_free_running_pair_by_hand() -> None:
    """A constant current of 1.2: the burst neuron spikes at 0.6 each time, the free neuron goes 0.6, 0.9, 1.05."""
    current = torch.full((4, 1, 1), 1.2)
    spikes, state = lif_pair_scan(current, None, LIFPairParams(coupled=False))
    assert spikes[:, 0].tolist() == [[1, 0], [1, 0], [1, 1], [1, 0]]
    assert state.v[0].tolist() == pytest.approx([0.0, 0.6])
    spikes, state = lif_pair_scan(current, None, LIFPairParams())
    assert spikes[:, 0].tolist() == [[1, 0], [1, 0], [1, 0], [1, 0]]
    assert state.v[0].tolist() == [0]


@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_free_running_pair_is_wrong_from_the_second_step(reset: Mode) -> None:
    current = 2 * randn(8, 100, 100, seed=5)
    expected, _ = lif_pair_scan(current, None, LIFPairParams(reset=reset))
    spikes, _ = lif_pair_scan(current, None, LIFPairParams(reset=reset, coupled=False))
    wrong = (spikes != expected).double().mean((1, 2))
    assert torch.equal(spikes[..., :100], expected[..., :100]), "the first neuron knows nothing of the second"
    assert wrong[0] == 0
    assert (wrong[1:] > 0.005).all()


@pytest.mark.parametrize("shape", [(4,), (4, 3), (0, 2, 3)])
def test_pair_of_what_has_no_channels_or_steps(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="current has shape"):
        lif_pair_scan(torch.zeros(shape), None, LIFPairParams())


def test_pair_from_a_state_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"state\.v has shape \[2, 3\]"):
        lif_pair_scan(torch.zeros(1, 2, 3), NeuronState(torch.zeros(2, 3)), LIFPairParams(coupled=False))
    with pytest.raises(ValueError, match=r"state\.v has shape \[2, 6\]"):
        lif_pair_scan(torch.zeros(1, 2, 3), NeuronState(torch.zeros(2, 6)), LIFPairParams())
