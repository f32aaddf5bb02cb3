"""IF, LIF and PLIF against traces computed by hand and gradients computed in plain Python."""

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from ranvier.dynamics import (
    ATan,
    IFParams,
    LIFParams,
    NeuronState,
    PLIFParams,
    Triangle,
    if_scan,
    lif_scan,
    lif_step,
    plif_scan,
)

Mode = Literal["hard", "soft"]


def trace(scan: Any, current: list[float], params: Any, *learned: Tensor) -> tuple[list[float], list[float]]:
    """Spikes and potentials after each step, of one neuron."""
    spikes, potentials, state = [], [], None
    for x in current:
        s, state = scan(torch.tensor(x).view(1, 1, 1), state, params, *learned)
        spikes.append(s.item())
        potentials.append(state.v.item())
    return spikes, potentials


# All numbers are sums of powers of two, so every trace is exact.
@pytest.mark.parametrize(
    ("reset", "current", "spikes", "potentials"),
    [
        ("hard", [0.25, 0.25, 0.25], [0, 1, 0], [0.25, 0.0, 0.25]),  # 0.5 is a tie: fires
        ("hard", [0.25, 0.125, 0.0625], [0, 0, 0], [0.25, 0.375, 0.4375]),  # silent, no leak
        ("hard", [2.0, 2.0, 2.0], [1, 1, 1], [0.0, 0.0, 0.0]),  # saturated
        ("hard", [-1.0, 1.25, 0.25], [0, 0, 1], [-1.0, 0.25, 0.0]),  # below rest
        ("soft", [0.25, 0.25, 0.25], [0, 1, 0], [0.25, 0.0, 0.25]),
        ("soft", [0.75, 0.25, 0.0], [1, 1, 0], [0.25, 0.0, 0.0]),  # the rest of 0.75 stays, 0.25 + 0.25 ties
        ("soft", [2.0, 0.0, 0.0], [1, 1, 1], [1.5, 1.0, 0.5]),  # one spike per step at most
    ],
)
def test_if_by_hand(reset: Mode, current: list[float], spikes: list[float], potentials: list[float]) -> None:
    assert trace(if_scan, current, IFParams(reset=reset)) == (spikes, potentials)


LIF_TRACES = [
    # tau = 2: v halves, and half of the input is added.
    ("hard", [1.0, 1.0], [1, 1], [0.0, 0.0]),  # 0.5 is a tie: fires
    ("hard", [0.5, 0.5, 0.5], [0, 0, 0], [0.25, 0.375, 0.4375]),  # silent: tends to 0.5 from below
    ("hard", [0.5, 1.0, 0.5], [0, 1, 0], [0.25, 0.0, 0.25]),  # 0.25 + (1 - 0.25) / 2 = 0.625
    ("hard", [0.5, 0.75, 0.0], [0, 1, 0], [0.25, 0.0, 0.0]),  # 0.25 + (0.75 - 0.25) / 2 = 0.5: tie
    ("hard", [0.0, 0.0, 0.0], [0, 0, 0], [0.0, 0.0, 0.0]),
    ("hard", [-1.0, 0.0, 2.0], [0, 0, 1], [-0.5, -0.25, 0.0]),
    ("soft", [1.5, 0.5, 1.0], [1, 0, 1], [0.25, 0.375, 0.1875]),  # 0.375 + 0.625 / 2 = 0.6875
    ("soft", [4.0, 0.0, 0.0], [1, 1, 0], [1.5, 0.25, 0.125]),
]


@pytest.mark.parametrize(("reset", "current", "spikes", "potentials"), LIF_TRACES)
def test_lif_by_hand(reset: Mode, current: list[float], spikes: list[float], potentials: list[float]) -> None:
    assert trace(lif_scan, current, LIFParams(reset=reset)) == (spikes, potentials)


@pytest.mark.parametrize(("reset", "current", "spikes", "potentials"), LIF_TRACES)
def test_plif_by_hand(reset: Mode, current: list[float], spikes: list[float], potentials: list[float]) -> None:
    """sigmoid(0) = 1/2 is tau = 2."""
    assert trace(plif_scan, current, PLIFParams(reset=reset), torch.tensor(0.0)) == (spikes, potentials)


def test_saturated_lif_charges_to_0_6_and_fires_at_every_step() -> None:
    """Constant input 1.2 from rest: v = 0.6, spike, v = 0, and again."""
    # A threshold above 0.6 shows the charge itself; 1.2 / 2 is exact in float32.
    _, v = lif_step(torch.tensor(1.2), torch.tensor(0.0), LIFParams(v_threshold=0.75))
    assert v.item() == torch.tensor(1.2).item() / 2
    assert trace(lif_scan, [1.2] * 5, LIFParams()) == ([1] * 5, [0] * 5)


@pytest.mark.parametrize("tau", [1.0, 1.5, 2.0, 5.0])
def test_tau_is_an_euler_step_with_decayed_input(tau: float) -> None:
    """From rest, a constant input x gives v[t] = x (1 - (1 - 1/tau)^t): neither x t nor an exponential."""
    current = torch.full((6, 1, 1), 0.375, dtype=torch.float64)
    for t in range(1, 7):
        _, state = lif_scan(current[:t], None, LIFParams(tau=tau))
        # Six steps of float64.
        assert state.v.item() == pytest.approx(0.375 * (1 - (1 - 1 / tau) ** t), rel=1e-14)


@pytest.mark.parametrize("tau", [1.25, 2.0, 7.0])
def test_plif_is_lif_with_one_plus_exp_minus_decay(tau: float) -> None:
    generator = torch.Generator().manual_seed(1)
    current = torch.randn(9, 4, 3, dtype=torch.float64, generator=generator) + 0.3
    learned, _ = plif_scan(current, None, PLIFParams(), torch.tensor(-math.log(tau - 1), dtype=torch.float64))
    fixed, _ = lif_scan(current, None, LIFParams(tau=tau))
    assert torch.equal(learned, fixed)  # random float64 potentials do not lie within rounding of the threshold


@pytest.mark.parametrize("threshold", [0.25, 1.0, 3.0])
def test_threshold_scales_with_the_input(threshold: float) -> None:
    generator = torch.Generator().manual_seed(2)
    current = torch.randn(6, 5, 4, generator=generator) + 0.3
    unit, _ = lif_scan(current, None, LIFParams(v_threshold=1.0, reset="soft"))
    # Powers of two scale floats exactly; 3 rounds, but no potential here is within rounding of the threshold.
    scaled, _ = lif_scan(current * threshold, None, LIFParams(v_threshold=threshold, reset="soft"))
    assert torch.equal(scaled, unit)


def test_carried_state_continues_the_trace() -> None:
    spikes, state = lif_scan(torch.tensor([0.5]).view(1, 1, 1), NeuronState(torch.tensor([[0.75]])), LIFParams())
    assert spikes.item() == 1  # 0.75 + (0.5 - 0.75) / 2 = 0.625
    assert state.v.item() == 0


# dL/dx1 of L = s2 for IF at x1 = x2: h1 = x1, v1 after the reset, h2 = v1 + x2. Triangle of width 0.5.
@pytest.mark.parametrize(
    ("reset", "detach", "x1", "x2", "expected"),
    [
        # x1 = 0.375 is silent: q(h1 - 0.5) = 2 - 4 * 0.125 = 1.5; h2 = 0.625, q = 1.5.
        ("hard", True, 0.375, 0.25, 1.5 * 1),
        ("hard", False, 0.375, 0.25, 1.5 * (1 - 0.375 * 1.5)),
        ("soft", True, 0.375, 0.25, 1.5 * 1),
        ("soft", False, 0.375, 0.25, 1.5 * (1 - 0.5 * 1.5)),
        # x1 = 0.75 fires: q = 1. Hard: h2 = x2 = 0.5, q = 2. Soft: h2 = 0.25 + 0.25, q = 2.
        ("hard", True, 0.75, 0.5, 0.0),
        ("hard", False, 0.75, 0.5, 2 * (0 - 0.75 * 1)),
        ("soft", True, 0.75, 0.25, 2 * 1),
        ("soft", False, 0.75, 0.25, 2 * (1 - 0.5 * 1)),
    ],
)
def test_gradient_through_the_reset(reset: Mode, detach: bool, x1: float, x2: float, expected: float) -> None:
    current = torch.tensor([x1, x2]).view(2, 1, 1).requires_grad_()
    spikes, _ = if_scan(current, None, IFParams(reset=reset, detach_reset=detach))
    (gradient,) = torch.autograd.grad(spikes[1].sum(), current)
    assert gradient[0].item() == expected  # exact in binary


def test_the_only_path_through_time_is_the_charge() -> None:
    """Hard, detached: dv[t+1]/dv[t] = (1 - 1/tau)(1 - s[t])."""
    current = torch.tensor([[0.5, 1.0], [0.5, 0.5]]).view(2, 1, 2).requires_grad_()  # the second one fires at t = 1
    _, state = lif_scan(current, None, LIFParams(tau=4.0, v_threshold=0.25))
    (gradient,) = torch.autograd.grad(state.v.sum(), current)
    assert gradient[:, 0].tolist() == [[0.25 * 0.75, 0.0], [0.25, 0.25]]


def bptt(
    x: np.ndarray, v0: float, grad_s: np.ndarray, grad_v: float, inverse_tau: float, params: LIFParams | PLIFParams
) -> tuple[list[float], list[float], float, float]:
    """Backpropagation through time of one LIF neuron, written out: spikes, dL/dx, dL/dv0, dL/d(1/tau)."""
    slope = params.surrogate.derivative
    threshold, hard = params.v_threshold, params.reset == "hard"
    h, s, before = [], [], []
    v = v0
    for current in x:
        before.append(v)
        h.append(v + (current - v) * inverse_tau)
        s.append(1.0 if h[-1] >= threshold else 0.0)
        v = h[-1] * (1 - s[-1]) if hard else h[-1] - threshold * s[-1]
    grad_x = [0.0] * len(x)
    grad_leak = 0.0
    for t in reversed(range(len(x))):
        q = slope(torch.tensor(h[t] - threshold, dtype=torch.float64)).item()
        grad_fired = grad_s[t]
        if not params.detach_reset:
            grad_fired += grad_v * (-h[t] if hard else -threshold)
        grad_h = grad_fired * q + grad_v * ((1 - s[t]) if hard else 1.0)
        grad_x[t] = grad_h * inverse_tau
        grad_leak += grad_h * (x[t] - before[t])
        grad_v = grad_h * (1 - inverse_tau)
    return s, grad_x, grad_v, grad_leak


@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("surrogate", [Triangle(), ATan()], ids=repr)
@pytest.mark.parametrize("learned", [False, True], ids=["lif", "plif"])
def test_gradients_equal_plain_backpropagation(
    reset: Mode, detach: bool, surrogate: Triangle | ATan, learned: bool
) -> None:
    steps, neurons, tau = 7, 6, 2.5
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    current = (random(steps, 1, neurons) + 0.4).requires_grad_()
    v0 = (0.3 * random(1, neurons)).requires_grad_()
    decay = torch.tensor(-math.log(tau - 1), dtype=torch.float64, requires_grad=True)
    grad_s, grad_v = random(steps, 1, neurons), random(1, neurons)
    if learned:
        params = PLIFParams(reset=reset, detach_reset=detach, surrogate=surrogate)
        spikes, end = plif_scan(current, NeuronState(v0), params, decay)
    else:
        params = LIFParams(reset=reset, detach_reset=detach, surrogate=surrogate, tau=tau)
        spikes, end = lif_scan(current, NeuronState(v0), params)
    loss = (grad_s * spikes).sum() + (grad_v * end.v).sum()
    wanted = (current, v0, decay) if learned else (current, v0)
    grad_x, grad_v0, *grad_decay = torch.autograd.grad(loss, wanted)

    leak = torch.sigmoid(decay).item() if learned else 1 / tau
    total_leak = 0.0
    for n in range(neurons):
        s, gx, gv0, gleak = bptt(
            current[:, 0, n].detach().numpy(),
            v0[0, n].item(),
            grad_s[:, 0, n].numpy(),
            grad_v[0, n].item(),
            leak,
            params,
        )
        assert spikes[:, 0, n].tolist() == s
        # Float64 over seven steps whose factors are below 10: some hundred roundings of 1e-16.
        assert grad_x[:, 0, n].tolist() == pytest.approx(gx, rel=1e-12, abs=1e-12)
        assert grad_v0[0, n].item() == pytest.approx(gv0, rel=1e-12, abs=1e-12)
        total_leak += gleak
    if learned:
        assert grad_decay[0].item() == pytest.approx(total_leak * leak * (1 - leak), rel=1e-12, abs=1e-12)
        assert abs(total_leak) > 1e-3


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("params", [IFParams, LIFParams, PLIFParams])
def test_bad_threshold_raises(params: type[IFParams], threshold: float) -> None:
    with pytest.raises(ValueError, match=r"v_threshold is .* must be greater than 0"):
        params(v_threshold=threshold)


@pytest.mark.parametrize("tau", [0.5, 0.0, -2.0, float("nan")])
def test_bad_tau_raises(tau: float) -> None:
    with pytest.raises(ValueError, match=r"tau is .* must be at least 1"):
        LIFParams(tau=tau)


@pytest.mark.parametrize("params", [IFParams, LIFParams, PLIFParams])
def test_bad_reset_raises(params: type[IFParams]) -> None:
    with pytest.raises(ValueError, match="reset is 'zero', but must be one of 'hard', 'soft'"):
        params(reset="zero")  # type: ignore[arg-type]


def test_defaults_are_those_of_direct_training() -> None:
    params = LIFParams()
    assert (params.tau, params.v_threshold, params.reset, params.detach_reset) == (2.0, 0.5, "hard", True)
    assert params.surrogate == Triangle(0.5)
