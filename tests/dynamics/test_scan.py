"""The loop over time, for every neuron: split anywhere, same result; checked input; linear memory."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranvier import dynamics
from ranvier.dynamics import IFParams, LIFBParams, LIFParams, NeuronState, PLIFParams

CHANNELS = 3
Scan = Callable[[Tensor, NeuronState | None], tuple[Tensor, NeuronState]]


def learned(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0])


SCANS: dict[str, tuple[Callable[..., Any], Any, tuple[Tensor, ...]]] = {
    "if": (dynamics.if_scan, IFParams(), ()),
    "if soft": (dynamics.if_scan, IFParams(reset="soft"), ()),
    "lif": (dynamics.lif_scan, LIFParams(), ()),
    "lif soft, tau 3": (dynamics.lif_scan, LIFParams(reset="soft", tau=3.0, detach_reset=False), ()),
    "plif": (dynamics.plif_scan, PLIFParams(), (learned(0.3),)),
    "plif soft": (dynamics.plif_scan, PLIFParams(reset="soft"), (learned(-0.4),)),
    "lifb": (dynamics.lifb_scan, LIFBParams(), (learned(2.0, 0.7, -1.3),)),
    "lifb soft": (dynamics.lifb_scan, LIFBParams(reset="soft", tau=1.7), (learned(1.0, 3.1, 0.0),)),
}


def neuron(name: str) -> Scan:
    scan, params, tensors = SCANS[name]
    return lambda current, state: scan(current, state, params, *tensors)


every_neuron = pytest.mark.parametrize("name", SCANS)


def random_current(steps: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.4 + torch.randn(steps, 2, CHANNELS, 5, generator=generator)).to(dtype)


@given(
    name=st.sampled_from(sorted(SCANS)),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_split_runs_equal_one_run_bit_for_bit(name: str, lengths: list[int], seed: int) -> None:
    run = neuron(name)
    current = random_current(sum(lengths), seed)
    whole, end = run(current, None)
    state = None
    parts = []
    for part in current.split(lengths):
        spikes, state = run(part, state)
        parts.append(spikes)
    assert state is not None
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(state.v, end.v)


@every_neuron
def test_single_steps_equal_one_run_bit_for_bit(name: str) -> None:
    run = neuron(name)
    current = random_current(7, seed=1)
    whole, end = run(current, None)
    assert 0.1 < (whole != 0).float().mean() < 0.9  # the comparison is about spikes and silence
    state = None
    for t in range(7):
        spikes, state = run(current[t : t + 1], state)
        assert torch.equal(spikes[0], whole[t])
    assert state is not None
    assert torch.equal(state.v, end.v)


@every_neuron
def test_gradient_crosses_the_carried_state(name: str) -> None:
    run = neuron(name)
    current = random_current(6, seed=2, dtype=torch.float64).requires_grad_()
    weight = random_current(6, seed=3, dtype=torch.float64)
    spikes, end = run(current, None)
    (whole,) = torch.autograd.grad((weight * spikes).sum() + end.v.square().sum(), current)

    early, state = run(current[:2], None)
    late, end = run(current[2:], state)
    loss = (weight * torch.cat([early, late])).sum() + end.v.square().sum()
    (split,) = torch.autograd.grad(loss, current)
    # Same float64 arithmetic; only the order in which gradients are summed may differ.
    torch.testing.assert_close(split, whole, rtol=1e-13, atol=1e-13)

    _, state = run(current[:2], None)
    late, _ = run(current[2:], state)
    (through_state,) = torch.autograd.grad((weight[2:] * late).sum(), current)
    assert (through_state[:2] != 0).any()


@every_neuron
@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(name: str, dtype: torch.dtype, kept: torch.dtype) -> None:
    current = random_current(4, seed=4, dtype=dtype)
    spikes, state = neuron(name)(current, None)
    assert spikes.dtype == dtype
    assert spikes.shape == current.shape
    assert state.v.dtype == kept
    assert state.v.shape == current.shape[1:]


@every_neuron
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    current = random_current(8, seed=5, dtype=dtype)
    spikes, state = neuron(name)(current, None)
    wide_spikes, wide_state = neuron(name)(current.float(), None)
    assert torch.equal(spikes, wide_spikes.to(dtype))
    assert torch.equal(state.v, wide_state.v)


def test_a_leak_below_bfloat16_resolution_survives() -> None:
    """In bfloat16 0.5 + (0.5 - 1/256) / 512 would stay 0.5: the potential would never reach its target."""
    current = torch.full((8, 1, 1), 0.5, dtype=torch.bfloat16)
    before = NeuronState(torch.full((1, 1), 0.25))
    _, after = dynamics.lif_scan(current, before, LIFParams(tau=512.0))
    decay = (1 - 1 / 512) ** 8
    # Eight float32 steps, each rounded to 2^-25.
    assert after.v.item() == pytest.approx(0.5 - 0.25 * decay, abs=8 * 2**-25)


@every_neuron
def test_arguments_are_not_modified(name: str) -> None:
    run = neuron(name)
    current, v = random_current(3, seed=6), random_current(1, seed=7)[0]
    before = NeuronState(v)
    copies = current.clone(), v.clone()
    _, after = run(current, before)
    assert torch.equal(current, copies[0])
    assert torch.equal(v, copies[1])
    assert before.v is v
    assert after.v is not v


@every_neuron
def test_rest_is_the_zero_state(name: str) -> None:
    run = neuron(name)
    current = random_current(4, seed=8)
    zero = NeuronState(torch.zeros(current.shape[1:]))
    assert torch.equal(run(current, None)[0], run(current, zero)[0])


@every_neuron
def test_channels_last_input_gives_the_same(name: str) -> None:
    """Same values in another memory layout: a scan that reads memory in order would mix them up."""
    current = random_current(4, seed=9)
    assert torch.equal(
        neuron(name)(current.transpose(0, 3).contiguous().transpose(0, 3), None)[0], neuron(name)(current, None)[0]
    )


@every_neuron
def test_an_expanded_constant_input_equals_its_copy(name: str) -> None:
    current = random_current(1, seed=10).expand(5, -1, -1, -1)
    assert torch.equal(neuron(name)(current, None)[0], neuron(name)(current.contiguous(), None)[0])


def graph_nodes(output: Tensor) -> list[str]:
    """Names of all autograd nodes behind `output`."""

    def walk() -> Iterator[str]:
        seen, todo = set(), [output.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            yield node.name()
            todo += [following for following, _ in node.next_functions]

    return list(walk())


@every_neuron
def test_backward_is_linear_in_time(name: str) -> None:
    """Indexing `current[t]` makes autograd add up a full [T, ...] tensor per step, which is quadratic in T."""
    counts = []
    for steps in (4, 8, 12):
        spikes, _ = neuron(name)(random_current(steps, seed=11).requires_grad_(), None)
        names = graph_nodes(spikes)
        assert not [node for node in names if "Select" in node or "Slice" in node or "Index" in node]
        assert sum("Unbind" in node for node in names) == 1
        counts.append(len(names))
    assert counts[2] - counts[1] == counts[1] - counts[0] > 0


@every_neuron
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4,), r"current has shape \[4\], but must be time-first"),
        ((0, 2, CHANNELS), r"current has shape \[0, 2, 3\]: T = 0 steps"),
    ],
)
def test_bad_current_raises(name: str, shape: tuple[int, ...], message: str) -> None:
    scan, params, tensors = SCANS[name]
    if len(shape) < 2 and tensors and tensors[0].ndim:
        message = r"current has shape \[4\].*the channel axis comes third"
    with pytest.raises(ValueError, match=message):
        scan(torch.zeros(shape), None, params, *tensors)


@every_neuron
def test_integer_current_raises(name: str) -> None:
    with pytest.raises(ValueError, match=r"current has dtype torch\.int64.*current\.float\(\)"):
        neuron(name)(torch.ones(2, 2, CHANNELS, dtype=torch.int64), None)


@every_neuron
@pytest.mark.parametrize("shape", [(1, CHANNELS, 5), (3, CHANNELS, 5), (2, CHANNELS), (2, CHANNELS, 1)])
def test_state_of_another_shape_raises(name: str, shape: tuple[int, ...]) -> None:
    """Also a shape that would broadcast: a changed batch must not be filled up or silently started anew."""
    with pytest.raises(ValueError, match=r"state\.v has shape .* but current is \[4, 2, 3, 5\].*state=None"):
        neuron(name)(random_current(4, seed=12), NeuronState(torch.zeros(shape)))


@every_neuron
def test_empty_batch(name: str) -> None:
    spikes, state = neuron(name)(torch.zeros(4, 0, CHANNELS, 5), None)
    assert spikes.shape == (4, 0, CHANNELS, 5)
    assert state.v.shape == (0, CHANNELS, 5)


def integrator_step(x: Tensor, v: Tensor, params: float, gain: Tensor) -> tuple[Tensor, Tensor]:
    """A neuron of a user's own: passes its potential on."""
    v = v * params + gain * x
    return v, v


def test_a_step_of_ones_own() -> None:
    current = torch.tensor([1.0, 0.0, 2.0]).view(3, 1, 1)
    gain = torch.tensor(2.0, requires_grad=True)
    out, state = dynamics.scan(integrator_step, current, None, 0.5, gain)
    assert out.flatten().tolist() == [2.0, 1.0, 4.5]
    assert state.v.item() == 4.5
    out.sum().backward()
    assert gain.grad is not None
    assert gain.grad.item() == 1 + 0.5 + 2.25


def test_functions_are_the_scan_of_their_steps() -> None:
    current = random_current(5, seed=13)
    for name, step in [("if", dynamics.if_step), ("lif", dynamics.lif_step), ("plif", dynamics.plif_step)]:
        _, params, tensors = SCANS[name]
        by_hand = partial(dynamics.scan, step)
        assert torch.equal(by_hand(current, None, params, *tensors)[0], neuron(name)(current, None)[0])
