"""Converted neurons, fast, against the reference. Few combinations, because each compiles for seconds."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ranvier import dynamics, kernels, provenance
from ranvier.dynamics import ConvertedState
from ranvier.kernels import dispatch
from ranvier.kernels.dispatch import Implementation
from ranvier.provenance import cpp_compiler

needs_compiler = pytest.mark.skipif(cpp_compiler() is None, reason="torch.compile needs a C++ compiler")
compiled = pytest.param("compiled", marks=needs_compiler)
fast = pytest.mark.parametrize("implementation", [compiled, pytest.param("native", marks=needs_compiler)])


@pytest.fixture(scope="module", autouse=True)
def leave_no_graphs() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """Graphs compiled so far in this process."""
    return counters["stats"]["unique_graphs"]


def binary(*shape: int, seed: int = 0) -> Tensor:
    """Multiples of 1/64 in [-1, 2): their sums are exact, so that no fused operation moves a spike."""
    return torch.randint(-64, 128, shape, generator=torch.Generator().manual_seed(seed)) / 64


def numbers(channels: int, rows: int = 1, seed: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    """Thresholds (powers of two), biases, initial potentials."""
    generator = torch.Generator().manual_seed(seed)
    threshold = 2.0 ** torch.randint(-2, 2, (channels,), generator=generator)
    return threshold, binary(rows, channels, seed=seed) / 4, threshold / 2


def both(
    implementation: Implementation, current: Tensor, state: ConvertedState | None, *given: Any
) -> tuple[tuple[Tensor, ConvertedState], tuple[Tensor, ConvertedState]]:
    with torch.no_grad():
        ours = kernels.converted_scan(current, state, *given, implementation=implementation)
        return ours, dynamics.converted_scan(current, state, *given)


def assert_equal(got: tuple[Tensor, ConvertedState], expected: tuple[Tensor, ConvertedState]) -> None:
    for ours, theirs in ((got[0], expected[0]), (got[1].v, expected[1].v), (got[1].emitted, expected[1].emitted)):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert got[1].step == expected[1].step
    assert 0 < (got[0] != 0).float().mean() < 1


@fast
@pytest.mark.parametrize("signed", [False, True])
def test_equals_the_reference_at_any_size_with_one_graph(implementation: Implementation, signed: bool) -> None:
    """Odd sizes on both sides of the vector width; another T, batch, channel count or image compiles nothing."""
    before = graphs()
    for seed, (steps, *frame) in enumerate([(3, 7, 5, 3, 11), (5, 2, 5, 13, 17), (3, 3, 17, 2, 3), (8, 64, 4, 5, 5)]):
        current, (threshold, bias, v_init) = binary(steps, *frame, seed=seed), numbers(frame[1], 2 * steps)
        got, expected = both(implementation, current, None, threshold, bias, v_init, signed)
        assert_equal(got, expected)
        assert (got[0] < 0).any() == signed
        assert_equal(
            *both(implementation, binary(steps, *frame, seed=seed + 10), got[1], threshold, bias, v_init, signed)
        )
    assert graphs() - before <= 1  # none if another test has compiled it


@fast
def test_potential_per_neuron_and_features_without_positions(implementation: Implementation) -> None:
    threshold, bias, _ = numbers(6)
    v_init = binary(6, 3, 5, seed=1)
    assert_equal(*both(implementation, binary(4, 2, 6, 3, 5), None, threshold, bias, v_init))
    assert_equal(*both(implementation, binary(4, 7, 6), None, *numbers(6)))


@fast
def test_channels_last_stays(implementation: Implementation) -> None:
    """As convolutions give it: the output goes to the next convolution without being copied."""
    threshold, bias, v_init = numbers(6)
    current = binary(8, 6, 5, 7).to(memory_format=torch.channels_last).unflatten(0, (4, 2))
    got, expected = both(implementation, current, None, threshold, bias, v_init, True)
    assert_equal(got, expected)
    assert got[0].flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert got[1].v.is_contiguous(memory_format=torch.channels_last)


@fast
def test_current_held_over_the_steps(implementation: Implementation) -> None:
    """Constant input reaches the first neurons as one step seen T times: what is sent needs memory for all of them."""
    current = binary(1, 3, 5, 4, 4).expand(6, -1, -1, -1, -1)
    got, expected = both(implementation, current, None, *numbers(5))
    assert_equal(got, expected)
    assert (got[0][0] != got[0][1]).any()
    assert torch.equal(current[5], binary(1, 3, 5, 4, 4)[0])


@fast
def test_bfloat16(implementation: Implementation) -> None:
    """Multiples of 1/64 below 2 are exact in bfloat16, and thresholds are powers of two."""
    threshold, bias, v_init = numbers(5)
    got, expected = both(implementation, binary(4, 3, 5, 4, 4).bfloat16(), None, threshold, bias, v_init)
    assert_equal(got, expected)
    assert (got[0].dtype, got[1].v.dtype) == (torch.bfloat16, torch.float32)


@fast
def test_streaming_equals_one_call_bit_for_bit(implementation: Implementation) -> None:
    """Random floats: each step runs the same code, whatever a call covers."""
    generator = torch.Generator().manual_seed(0)
    current = torch.randn(4, 3, 5, 6, 6, generator=generator)
    given = torch.rand(5, generator=generator) + 0.1, torch.randn(4, 5, generator=generator) / 4, torch.rand(5), True
    with torch.no_grad():
        whole, end = kernels.converted_scan(current, None, *given, implementation=implementation)
        state = None
        for t in range(4):
            sent, state = kernels.converted_scan(current[t : t + 1], state, *given, implementation=implementation)
            assert torch.equal(sent[0], whole[t])
    assert state is not None
    assert torch.equal(state.v, end.v)
    assert torch.equal(state.emitted, end.emitted)


@fast
def test_the_callers_tensors_are_neither_marked_nor_changed(implementation: Implementation) -> None:
    current, given = binary(3, 2, 5, 4, 4), numbers(5)
    copies = [tensor.clone() for tensor in (current, *given)]
    _, state = kernels.converted_scan(current, None, *given, True, implementation=implementation)
    v, emitted = state.v.clone(), state.emitted.clone()
    kernels.converted_scan(current, state, *given, True, implementation=implementation)
    for tensor, copy in zip((current, *given), copies, strict=True):
        assert torch.equal(tensor, copy)
        assert not [name for name in vars(tensor) if name.startswith("_dynamo")]
    assert torch.equal(state.v, v)
    assert torch.equal(state.emitted, emitted)


def test_small_inputs_run_the_reference() -> None:
    before = graphs()
    for implementation in ("auto", "reference"):
        sent, _ = kernels.converted_scan(binary(2, 1, 3), None, *numbers(3), implementation=implementation)
        assert torch.equal(sent, dynamics.converted_scan(binary(2, 1, 3), None, *numbers(3))[0])
    assert graphs() == before


@pytest.mark.parametrize("implementation", ["auto", "reference", compiled])
@pytest.mark.parametrize(
    ("current", "message"),
    [
        (torch.zeros(4), "must be time-first"),
        (torch.zeros(0, 2, 3), "T = 0 steps"),
        (torch.zeros(2, 2, 3, dtype=torch.int64), "needs a floating type"),
        (torch.zeros(2, 2, 4), "is for 3 channels"),
        (torch.zeros(6, 2, 3), "steps 1 to 5"),
    ],
)
def test_bad_input_raises_before_anything_compiles(
    implementation: Implementation, current: Tensor, message: str
) -> None:
    before = graphs()
    with pytest.raises(ValueError, match=message):
        kernels.converted_scan(current, None, *numbers(3, 5), implementation=implementation)
    assert graphs() == before


@pytest.mark.parametrize("implementation", ["reference", compiled, pytest.param("native", marks=needs_compiler)])
def test_threshold_of_other_channels_raises(implementation: Implementation) -> None:
    """One channel of input would be spread over three neurons without a word."""
    with pytest.raises(ValueError, match="threshold is for 3 channels"):
        kernels.converted_scan(
            torch.zeros(2, 2, 1), None, torch.ones(3), torch.zeros(1, 1), torch.ones(1), implementation=implementation
        )


def test_what_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match="current is a list"):
        kernels.converted_scan([1.0], None, *numbers(3))  # type: ignore[arg-type]


def test_without_a_compiler_compiled_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch._obstacle.cache_clear()
    monkeypatch.setattr(provenance, "cpp_compiler", lambda: None)
    with pytest.raises(RuntimeError, match=r"cannot run on cpu: .*C\+\+ compiler"):
        kernels.converted_scan(binary(2, 1, 3), None, *numbers(3), implementation="compiled")
    dispatch._obstacle.cache_clear()


def test_unknown_implementation_raises() -> None:
    with pytest.raises(ValueError, match="implementation is 'fast'"):
        kernels.converted_scan(binary(2, 1, 3), None, *numbers(3), implementation="fast")  # type: ignore[arg-type]


def test_signature_is_that_of_the_reference() -> None:
    ours = inspect.signature(kernels.converted_scan).parameters
    theirs = inspect.signature(dynamics.converted_scan).parameters
    assert list(ours) == [*theirs, "implementation"]
    assert {name: ours[name].default for name in theirs} == {name: theirs[name].default for name in theirs}
