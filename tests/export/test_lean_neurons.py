import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from ranvier import provenance
from ranvier.dynamics import NeuronState
from ranvier.export.lean_neurons import LEAN, Lean, LeanConvertedIF, as_bytes, make_lean
from ranvier.kernels import native_scan
from ranvier.kernels.native_scan import PreparedScan
from ranvier.nn import IF, LIF, LIFB, PLIF, ConvertedIF, Neuron

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


CALL = st.tuples(
    st.tuples(st.integers(1, 3), st.integers(0, 3), st.just(4), st.integers(1, 9)),
    st.sampled_from(["contiguous", "channels last", "repeated", "gaps"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 3),
)


@NATIVE
@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(list(NEURONS)), sends_bytes=st.booleans(), calls=st.lists(CALL, min_size=1, max_size=8))
def test_equals_the_neuron_call_after_call(name: str, sends_bytes: bool, calls: list[tuple[Any, ...]]) -> None:
    """Shapes, layouts and dtypes follow one another on one neuron: the first call of each plans, later ones follow."""
    neuron, lean = pair(name)
    neuron.implementation = "native"
    lean.sends_bytes = sends_bytes and name != "lifb"
    for shape, layout, dtype, times in [*calls, *calls]:
        state = after = None
        for _ in range(times):
            x = currents(*shape, layout=layout).to(dtype)
            expected, state = neuron(x, state, return_state=True)
            found, after = lean(x, after, return_state=True)
            assert torch.equal(found.to(dtype), expected)
            assert torch.equal(after.v, state.v)
            assert found.dtype == (torch.uint8 if lean.sends_bytes else dtype)
            assert found.stride() == expected.stride()
        assert torch.equal(lean(x).to(dtype), neuron(x))


@NATIVE
@settings(max_examples=40, deadline=None)
@given(
    signed=st.booleans(),
    binary=st.booleans(),
    sends_bytes=st.booleans(),
    each=st.booleans(),
    calls=st.lists(CALL, min_size=1, max_size=5),
)
def test_converted_neurons_call_after_call(
    signed: bool, binary: bool, sends_bytes: bool, each: bool, calls: list[tuple[Any, ...]]
) -> None:
    neuron = ConvertedIF(4, steps=9, shape=(4, 5) if each else None, signed=signed, binary=binary)
    sends_bytes = sends_bytes and binary and not signed
    neuron.threshold, neuron.bias = 0.5 + torch.rand(4), torch.randn(9, 4) / 4
    neuron.v_init = torch.rand(neuron.v_init.shape)
    lean = copy.deepcopy(neuron)
    make_lean(lean, is_native=True)
    assert isinstance(lean, LeanConvertedIF)
    lean.sends_bytes = sends_bytes
    for shape, layout, dtype, times in [*calls, *calls]:
        state = after = None
        for _ in range(times):
            x = currents(*shape[:3], 5 if layout != "gaps" else 10, layout=layout).to(dtype)
            expected, state = neuron.scan(x, state)
            found, after = lean(x, after, return_state=True)
            assert torch.equal(found.to(dtype), expected)
            assert torch.equal(after.v, state.v)
            assert torch.equal(after.emitted, state.emitted)
            assert (after.step, found.dtype) == (state.step, torch.uint8 if sends_bytes else dtype)
    assert lean._prepared is not None
    with pytest.raises(ValueError, match="is for 4 channels"):
        lean(torch.zeros(1, 1, 3, 5))
    with pytest.raises(ValueError, match="threshold is for 3 channels"):
        lean_converted(torch.ones(3))(torch.zeros(2, 3, 1))
    twin = pickle.loads(pickle.dumps(lean))  # bytes made right here
    x = currents(2, 3, 4, 5)
    assert torch.equal(twin(x), lean(x))
    lean.threshold = lean.threshold / 2
    neuron.threshold = neuron.threshold / 2
    assert torch.equal(lean(x).float(), neuron(x))
    if binary and not signed:
        lean.sends_bytes = not sends_bytes
        assert (lean(x).dtype == torch.uint8) == lean.sends_bytes
        assert torch.equal(lean(x).float(), neuron(x))


@NATIVE
def test_a_state_of_another_precision() -> None:
    neuron, lean = pair("lif")
    x = currents(2, 3, 4, 6)
    lean(x)
    state = NeuronState(torch.rand(3, 4, 6).to(torch.bfloat16))
    assert torch.equal(lean(x, state), neuron(x, state))


@NATIVE
def test_a_state_on_another_device_is_refused() -> None:
    _, lean = pair("lif")
    x = currents(2, 3, 4, 6)
    lean(x)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError), match="device|meta|Meta"):
        lean(x, NeuronState(torch.zeros(3, 4, 6, device="meta"))).sum().item()


@NATIVE
def test_numbers_that_change_between_calls() -> None:
    _, lean = pair("lif")
    x = currents(2, 3, 4, 6)
    assert lean(x).sum() > 0
    lean.params = dataclasses.replace(lean.params, v_threshold=100.0)
    assert lean(x).sum() == 0
    lean.sends_bytes = True
    assert lean(x).dtype == torch.uint8


@dataclasses.dataclass(frozen=True)
class Mine:
    """A surrogate that has no kernel."""

    def derivative(self, u: Tensor) -> Tensor:
        return torch.exp(-u.abs())


@NATIVE
def test_what_kernels_do_not_fit_runs_as_it_was_made() -> None:
    neuron = LIF(surrogate=Mine())
    lean = copy.deepcopy(neuron)
    make_lean(lean, is_native=True)
    x = currents(2, 3, 4, 6)
    assert torch.equal(lean(x), neuron(x))
    assert torch.equal(lean(x.double()), neuron(x.double()))


@NATIVE
@pytest.mark.parametrize("channels", [1, 3, 5, 9])
def test_burst_strengths_for_other_channels(channels: int) -> None:
    _, lean = pair("lifb")
    lean(currents(2, 3, 4, 6))
    for _ in range(2):
        with pytest.raises(ValueError, match="4 burst strengths need"):
            lean(currents(2, 3, channels, 6))


@NATIVE
def test_large_outputs_ask_for_huge_pages_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(native_scan, "ask_for_huge_pages", lambda tensor: asked.append(tensor.numel()))
    _, lean = pair("lif")
    for _ in range(3):
        lean(currents(2, 3, 4, 6))
    assert asked == [2 * 3 * 4 * 6] * 3


@NATIVE
def test_shapes_are_forgotten_before_there_are_too_many() -> None:
    neuron, lean = pair("lif")
    for batch in range(1, 2 * native_scan.MOST_PLANS):
        lean(currents(1, batch, 4, 2))
    assert len(lean._prepared.scan._plans) <= native_scan.MOST_PLANS
    x = currents(1, 3, 4, 2)
    assert torch.equal(lean(x), neuron(x))


@NATIVE
def test_threads_share_a_neuron() -> None:
    neuron, lean = pair("lif")
    inputs = [currents(3, 2, 4, 500) for _ in range(8)]
    expected = [neuron(x) for x in inputs]

    def run(number: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(lean(inputs[number]), expected[number]) for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(8)))


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
        assert isinstance(other._prepared.scan, PreparedScan)
        assert torch.equal(other(x), neuron(x))


@NATIVE
@pytest.mark.parametrize("name", [*NEURONS, "converted", "converted, signed"])
def test_a_state_that_nobody_wants_is_not_made(name: str) -> None:
    """Spikes are the same without it, from rest and from a state, in first calls and in prepared ones."""
    lean = lean_converted(signed=name.endswith("signed")) if name.startswith("converted") else pair(name)[1]
    x = currents(2, 3, 4, 5)
    expected, state = lean(x, return_state=True)
    further, _ = lean(x, state, return_state=True)
    for _ in range(3):
        assert torch.equal(lean(x), expected)
        assert torch.equal(lean(x, state), further)
    assert lean.fast(x, None, False)[1] is None


def test_other_neurons_stay() -> None:
    class Own(LIF):
        """A neuron that somebody changed."""

    own = Own()
    make_lean(own, is_native=True)
    assert type(own) is Own
    assert set(LEAN) == {IF, LIF, PLIF, LIFB, ConvertedIF}


def test_bad_input_is_named() -> None:
    _, lean = pair("lif")
    with pytest.raises(ValueError, match=r"\[T, B"):
        lean(torch.zeros(3))
    for neuron in (lean, lean_converted()):
        with pytest.raises(TypeError, match="current is a list"):
            neuron([1.0])
        for state in (torch.zeros(3, 4), (torch.zeros(3, 4),)):
            with pytest.raises(TypeError, match=f"state is a {type(state).__name__}"):
                neuron(torch.zeros(2, 3, 4), state)


def lean_converted(threshold: Tensor | None = None, *, signed: bool = False) -> Lean:
    """For four channels, or for one with another threshold."""
    neuron = ConvertedIF(4 if threshold is None else 1, signed=signed)
    neuron.threshold = neuron.threshold if threshold is None else threshold
    make_lean(neuron, is_native=True)
    assert isinstance(neuron, Lean)
    return neuron


@NATIVE
def test_forward_derivatives_are_those_of_the_reference() -> None:
    """No kernel knows them: a prepared one would leave them out without a word."""
    x, direction = torch.rand(3, 2, 4), torch.ones(3, 2, 4)
    with forward_ad.dual_level():
        _, state = lean_converted()(forward_ad.make_dual(x, direction), return_state=True)
        assert torch.equal(forward_ad.unpack_dual(state.v).tangent, torch.full((2, 4), 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spikes_as_bytes(dtype: torch.dtype) -> None:
    spikes = (torch.rand(3, 2, 4, 5, 5) < 0.4).to(dtype).permute(0, 1, 4, 2, 3)
    found = as_bytes(spikes)
    assert found.dtype == torch.uint8
    assert torch.equal(found, spikes.to(torch.uint8))
    assert found.stride() == spikes.stride()
