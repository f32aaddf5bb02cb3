"""The neurons of NIR against traces by hand, a simulation of their equations, and the neurons that they are."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranvier.dynamics import (
    AffineParams,
    ATan,
    IFParams,
    LIFParams,
    NeuronState,
    Reset,
    affine_scan,
    affine_step,
    if_scan,
    lif_scan,
)

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)
taus = st.sampled_from([1.0, 1.5, 1.7, 2.0, 3.0, 16.0])


def constants(
    tau: float = 2.0, r: float = 1.0, v_leak: float = 0.0, v_threshold: float = 0.5, v_reset: float = 0.0
) -> list[Tensor]:
    return [torch.tensor(value) for value in (tau, r, v_leak, v_threshold, v_reset)]


def trace(current: list[float], params: AffineParams, **numbers: float) -> tuple[list[float], list[float]]:
    """What one neuron sends, and its potentials after each step."""
    sent, potentials, state = [], [], None
    for x in current:
        s, state = affine_scan(torch.tensor(x).view(1, 1, 1), state, params, *constants(**numbers))
        sent.append(s.item())
        potentials.append(state.v.item())
    return sent, potentials


# All numbers are sums of powers of two, so every trace is exact.
@pytest.mark.parametrize(
    ("kind", "numbers", "current", "sent", "potentials"),
    [
        ({}, {}, [1.0, 1.0], [0, 1], [0.5, 0.0]),  # 0.5 is a tie: silent; then 0.75
        ({"ties_fire": True}, {}, [1.0, 1.0], [1, 1], [0.0, 0.0]),
        ({}, {"r": 2.0}, [0.75, 0.0], [1, 0], [0.0, 0.0]),
        ({}, {"tau": 4.0, "r": 4.0}, [0.5, 0.375, 0.0], [0, 1, 0], [0.5, 0.0, 0.0]),  # 0.5 + (1.5 - 0.5) / 4
        ({}, {"v_leak": 0.25}, [0.0, 0.0], [0, 0], [0.25, 0.25]),  # rests at the leak
        ({}, {"v_leak": 1.0}, [0.0, 0.0, 0.0], [1, 0, 1], [0.0, 0.5, 0.0]),  # driven by the leak alone
        ({}, {"v_leak": -1.0, "v_reset": -2.0}, [5.0, 0.0, 0.0], [1, 0, 0], [-2.0, -1.5, -1.25]),  # -1 + 5 / 2
        ({}, {"v_reset": 0.25}, [2.0, 0.0, 0.0], [1, 0, 0], [0.25, 0.125, 0.0625]),  # rest is 0, the leak
        ({"reset": "soft"}, {}, [3.0, 0.0], [1, 0], [1.0, 0.5]),  # 1.5 - 0.5; 0.5 is a tie
        ({"leaky": False}, {}, [0.25, 0.25, 0.25], [0, 0, 1], [0.25, 0.5, 0.0]),
        ({"leaky": False}, {"r": 0.5}, [1.0, 0.5], [0, 1], [0.5, 0.0]),
        ({"leaky": False}, {"v_reset": 0.25}, [0.25, 0.25], [0, 1], [0.5, 0.25]),  # starts at the reset
        ({"leaky": False}, {"v_leak": 9.0, "tau": 8.0}, [0.25, 0.125], [0, 0], [0.25, 0.375]),  # no leak, no meaning
        ({"leaky": False, "reset": "soft"}, {}, [2.0, 0.0], [1, 1], [1.5, 1.0]),
        ({"fires": False}, {"v_leak": 1.0}, [0.0, 2.0, 0.0], [1, 2, 1.5], [1, 2, 1.5]),
        ({"fires": False, "leaky": False}, {"r": 0.5}, [1.0, 2.0, -4.0], [0.5, 1.5, -0.5], [0.5, 1.5, -0.5]),
    ],
)
def test_by_hand(
    kind: dict[str, Any], numbers: dict[str, float], current: list[float], sent: list[float], potentials: list[float]
) -> None:
    assert trace(current, AffineParams(**kind), **numbers) == (sent, potentials)


def simulated(
    current: np.ndarray, params: AffineParams, numbers: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, float]:
    """NIR's equations step by step: what is sent, the last potential, and the smallest distance from a threshold."""
    tau, r, v_leak, v_threshold, v_reset = numbers.values()
    v = np.broadcast_to(v_leak if params.leaky else v_reset, current.shape[1:])
    sent, distance = [], np.inf
    for x in current:
        v = v + ((v_leak - v) + r * x) * (1 / tau) if params.leaky else v + r * x
        if not params.fires:
            sent.append(v)
            continue
        distance = min(distance, np.abs(v - v_threshold).min())
        fired = v > v_threshold
        sent.append(fired.astype(float))
        v = np.where(fired, v - v_threshold if params.reset == "soft" else v_reset, v)
    return np.array(sent), v, distance


@few
@given(seeds, st.booleans(), st.booleans(), st.sampled_from(["hard", "soft"]), st.integers(1, 6))
def test_equations_of_nir(seed: int, leaky: bool, fires: bool, reset: Reset, T: int) -> None:
    """Each of 2 x 3 neurons has numbers of its own."""
    rng = np.random.default_rng(seed)
    numbers = {
        "tau": rng.uniform(1, 5, (2, 3)),
        "r": rng.uniform(0.5, 2, (2, 3)),
        "v_leak": rng.normal(0, 0.3, (2, 3)),
        "v_threshold": rng.uniform(0.3, 1, (2, 3)),
        "v_reset": rng.normal(0, 0.3, (2, 3)),
    }
    current = rng.normal(0.5, 1, (T, 4, 2, 3))
    params = AffineParams(leaky=leaky, fires=fires, reset=reset)
    expected, v, distance = simulated(current, params, numbers)
    assume(distance > 1e-9)  # the order of operations rounds differently
    sent, state = affine_scan(torch.from_numpy(current), None, params, *map(torch.from_numpy, numbers.values()))
    # Six steps of float64, with values of order 1.
    np.testing.assert_allclose(sent.numpy(), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(state.v.numpy(), v, rtol=0, atol=1e-13)


@few
@given(seeds, taus, st.sampled_from([0.3, 0.5, 1.0]), st.sampled_from(["hard", "soft"]), st.booleans())
def test_with_ties_it_is_lif_or_if_bit_for_bit(
    seed: int, tau: float, threshold: float, reset: Reset, double: bool
) -> None:
    """Files without metadata give the very potentials of the network that was written."""
    dtype = torch.float64 if double else torch.float32
    generator = torch.Generator().manual_seed(seed)
    current = torch.randint(-16, 33, (8, 64, 8), generator=generator).to(dtype) / 16 * (1 if seed % 2 else 0.3)
    numbers = [number.to(dtype) for number in constants(tau=1.0)]
    numbers[0], numbers[3] = torch.tensor(tau, dtype=dtype), torch.tensor(threshold, dtype=dtype)
    for leaky in (True, False):
        params = AffineParams(leaky=leaky, ties_fire=True, reset=reset)
        spikes, state = affine_scan(current, None, params, *numbers)
        if leaky:
            expected, end = lif_scan(current, None, LIFParams(tau=tau, v_threshold=threshold, reset=reset))
        else:
            expected, end = if_scan(current, None, IFParams(v_threshold=threshold, reset=reset))
        assert torch.equal(spikes, expected)
        assert torch.equal(state.v, end.v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 1.0])
def test_the_next_lower_threshold_fires_at_ties(dtype: torch.dtype, threshold: float) -> None:
    """`v >= a` is `v > b` with b the next number below a: what strict files rest on."""
    generator = torch.Generator().manual_seed(0)
    current = torch.randint(-8, 17, (6, 200, 4), generator=generator).to(dtype) * threshold / 8
    exact = torch.tensor(threshold, dtype=dtype)
    below = torch.nextafter(exact, torch.tensor(-torch.inf, dtype=dtype))
    numbers = [number.to(dtype) for number in constants()]
    fired, silent, next_lower = (
        affine_scan(current, None, AffineParams(ties_fire=ties), *numbers[:3], value, numbers[4])[0]
        for ties, value in ((True, exact), (False, exact), (False, below))
    )
    assert torch.equal(fired, next_lower)
    assert (fired != silent).float().mean() > 0.01  # there are ties


def test_gradients_are_those_of_lif() -> None:
    generator = torch.Generator().manual_seed(3)
    current = torch.randn(5, 8, 4, dtype=torch.float64, generator=generator) + 0.3
    weights = torch.randn(5, 8, 4, dtype=torch.float64, generator=generator)
    surrogate = ATan(3.0)
    gradients = []
    for scan, params, numbers in (
        (affine_scan, AffineParams(surrogate=surrogate), [number.double() for number in constants()]),
        (lif_scan, LIFParams(surrogate=surrogate), []),
    ):
        x = current.clone().requires_grad_()
        (scan(x, None, params, *numbers)[0] * weights).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    assert (gradients[0] != 0).all()


def test_gradient_of_what_does_not_fire() -> None:
    """v[2] = (x[0] / 2 + x[1]) / 2."""
    x = torch.ones(2, 1, 1, requires_grad=True)
    affine_scan(x, None, AffineParams(fires=False), *constants())[0][-1].sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [0.25, 0.5]


@pytest.mark.parametrize("leaky", [True, False])
@pytest.mark.parametrize("fires", [True, False])
def test_split_runs_with_carried_state_equal_one_run(leaky: bool, fires: bool) -> None:
    current = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(4)) + 0.3
    numbers = [torch.rand(4, generator=torch.Generator().manual_seed(k)) + 1.0 * (k == 0) for k in range(5)]
    params = AffineParams(leaky=leaky, fires=fires)
    whole, end = affine_scan(current, None, params, *numbers)
    for cut in range(1, 6):
        first, state = affine_scan(current[:cut], None, params, *numbers)
        second, last = affine_scan(current[cut:], state, params, *numbers)
        assert torch.equal(torch.cat((first, second)), whole)
        assert torch.equal(last.v, end.v)


def test_a_state_is_not_modified_and_rest_is_not_shared() -> None:
    numbers = constants(v_leak=0.25)
    _, state = affine_scan(torch.zeros(1, 2, 3), None, AffineParams(), *numbers)
    before = state.v.clone()
    affine_scan(torch.ones(2, 2, 3), state, AffineParams(), *numbers)
    assert torch.equal(state.v, before)
    assert numbers[2].item() == 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_the_potential_in_float32(dtype: torch.dtype) -> None:
    current = torch.full((200, 1, 1), 0.25, dtype=dtype)
    numbers = constants(tau=256.0, v_threshold=10.0)
    spikes, state = affine_scan(current, None, AffineParams(), *(number.to(dtype) for number in numbers))
    assert spikes.dtype == dtype
    assert state.v.dtype == torch.float32
    # In bfloat16 a leak of 1/256 would round away: the potential would stay at 0.125.
    assert state.v.item() == pytest.approx(0.25 * (1 - (1 - 1 / 256) ** 200), rel=1e-5)  # 200 roundings of 6e-8


def test_numbers_in_double_precision_do_not_spread() -> None:
    """Files of others have float64 numbers beside float32 weights."""
    numbers = [number.double() for number in constants()]
    spikes, state = affine_scan(torch.ones(2, 1, 3), None, AffineParams(), *numbers)
    assert spikes.dtype == state.v.dtype == torch.float32


@pytest.mark.parametrize("shape", [(3,), (4, 1), (1, 5), (2, 4, 5), (1, 4, 5)])
def test_numbers_that_do_not_fit_are_named(shape: tuple[int, ...]) -> None:
    numbers = constants()
    numbers[3] = torch.full(shape, 0.5)
    if shape in ((4, 1), (1, 5)):  # one for each row, or column
        assert affine_scan(torch.ones(2, 3, 4, 5), None, AffineParams(), *numbers)[0].shape == (2, 3, 4, 5)
        return
    with pytest.raises(
        ValueError, match=r"current has shape \[2, 3, 4, 5\], but the neurons are .*, which need \[T, B"
    ):
        affine_scan(torch.ones(2, 3, 4, 5), None, AffineParams(), *numbers)


def test_bad_calls_raise() -> None:
    with pytest.raises(ValueError, match="reset is 'none'"):
        AffineParams(reset="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="time-first"):
        affine_scan(torch.ones(2), None, AffineParams(), *constants())
    with pytest.raises(ValueError, match="T = 0 steps"):
        affine_scan(torch.ones(0, 2, 3), None, AffineParams(), *constants())
    with pytest.raises(ValueError, match=r"state\.v has shape \[9, 3\]"):
        affine_scan(torch.ones(2, 2, 3), NeuronState(torch.zeros(9, 3)), AffineParams(), *constants())
    with pytest.raises(TypeError, match="NeuronState"):
        affine_scan(torch.ones(2, 2, 3), torch.zeros(2, 3), AffineParams(), *constants())  # type: ignore[arg-type]


def test_one_step_is_one_step_of_the_scan() -> None:
    x, v = torch.tensor([[0.5, 2.0]]), torch.tensor([[0.25, 0.0]])
    spikes, after = affine_step(x, v, AffineParams(), *constants())
    scanned, state = affine_scan(x.unsqueeze(0), NeuronState(v), AffineParams(), *constants())
    assert torch.equal(spikes, scanned[0])
    assert torch.equal(after, state.v)
    assert spikes.tolist() == [[0.0, 1.0]]
