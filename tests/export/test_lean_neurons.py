import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranvier import provenance
from ranvier.export.lean_neurons import LEAN, Lean, as_bytes, make_lean
from ranvier.kernels.native_scan import PreparedScan
from ranvier.nn import IF, LIF, LIFB, PLIF, Neuron

NEURONS: dict[str, Callable[[], Neuron]] = {
    "if": lambda: IF(reset="soft"),
    "lif": lambda: LIF(tau=3.0),
    "plif": lambda: PLIF(tau=1.7),
    "lifb": lambda: LIFB(4),
}
NATIVE = pytest.mark.skipif(provenance.cpp_compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def pair(name: str, *, is_native: bool = True) -> tuple[Neuron, Lean]:
    neuron = NEURONS[name]()
    for parameter in neuron.parameters():
        parameter += 0.3 * torch.rand_like(parameter)
    lean = copy.deepcopy(neuron)
    make_lean(lean, is_native=is_native)
    assert isinstance(lean, Lean)
    return neuron, lean


def currents(*shape: int, layout: str = "contiguous") -> Tensor:
    x = 2 * torch.randn(shape)
    if layout == "channels last":
        return x.transpose(2, -1).contiguous().transpose(2, -1)
    if layout == "repeated":
        return x[:1].expand(shape)
    return x[:, :, :, ::2] if layout == "gaps" else x


@NATIVE
@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(NEURONS)),
    shape=st.tuples(st.integers(1, 3), st.integers(0, 3), st.just(4), st.integers(1, 9)),
    layout=st.sampled_from(["contiguous", "channels last", "repeated", "gaps"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    sends_bytes=st.booleans(),
    calls=st.integers(1, 3),
)
def test_equals_the_neuron_call_after_call(
    name: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype, sends_bytes: bool, calls: int
) -> None:
    neuron, lean = pair(name)
    neuron.implementation = "native"
    lean.sends_bytes = sends_bytes and name != "lifb"
    state = after = None
    for _ in range(calls):  # the first call makes a plan, the others follow it
        x = currents(*shape, layout=layout).to(dtype)
        expected, state = neuron(x, state, return_state=True)
        found, after = lean(x, after, return_state=True)
        assert torch.equal(found.to(dtype), expected)
        assert torch.equal(after.v, state.v)
        assert found.dtype == (torch.uint8 if lean.sends_bytes else dtype)
        assert found.stride() == expected.stride()
        assert torch.equal(lean(x).to(dtype), neuron(x))


@NATIVE
@pytest.mark.parametrize("name", NEURONS)
def test_learned_numbers_are_those_of_now(name: str) -> None:
    neuron, lean = pair(name)
    x = currents(3, 2, 4, 50)
    lean(x)
    for parameter in neuron.parameters():
        parameter += 0.5
    lean.load_state_dict(neuron.state_dict())
    assert torch.equal(lean(x), neuron(x))


@NATIVE
def test_a_state_laid_out_otherwise() -> None:
    neuron, lean = pair("lif")
    x = currents(2, 3, 4, 6)
    _, state = neuron(x.transpose(2, 3).contiguous().transpose(2, 3), return_state=True)
    lean(x)
    assert state.v.stride() != x[0].stride()
    assert torch.equal(lean(x, state), neuron(x, state))


@pytest.mark.parametrize("name", NEURONS)
def test_without_the_kernels_it_is_the_neuron(name: str) -> None:
    neuron, lean = pair(name, is_native=False)
    x = currents(3, 2, 4, 5)
    assert torch.equal(lean(x), neuron(x))
    assert lean._prepared is None
    if name != "lifb":
        lean.sends_bytes = True
        assert torch.equal(lean(x), neuron(x).to(torch.uint8))


@NATIVE
def test_what_watches_sees_operators() -> None:
    neuron, lean = pair("lif")
    x = currents(3, 2, 4, 5)
    with torch.enable_grad():
        trained = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(lean(trained).sum(), trained)
        (expected,) = torch.autograd.grad(neuron(trained).sum(), trained)
    assert torch.equal(gradient, expected)
    compiled = torch.compile(lean, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), neuron(x))
    assert lean._prepared is None


@NATIVE
def test_copies_and_pickles() -> None:
    neuron, lean = pair("lif")
    x = currents(3, 2, 4, 5)
    lean(x)
    for other in (copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))):  # bytes made right here
        assert isinstance(other._prepared, PreparedScan)
        assert torch.equal(other(x), neuron(x))


def test_other_neurons_stay() -> None:
    class Own(LIF):
        """A neuron that somebody changed."""

    own = Own()
    make_lean(own, is_native=True)
    assert type(own) is Own
    assert set(LEAN) == {IF, LIF, PLIF, LIFB}


def test_bad_input_is_named() -> None:
    _, lean = pair("lif")
    with pytest.raises(ValueError, match=r"\[T, B"):
        lean(torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spikes_as_bytes(dtype: torch.dtype) -> None:
    spikes = (torch.rand(3, 2, 4, 5, 5) < 0.4).to(dtype).permute(0, 1, 4, 2, 3)
    found = as_bytes(spikes)
    assert found.dtype == torch.uint8
    assert torch.equal(found, spikes.to(torch.uint8))
    assert found.stride() == spikes.stride()
