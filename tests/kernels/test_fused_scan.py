"""One kernel for all steps against the reference: native ones, and Triton's in its interpreter.

Here the native kernels run. `test_triton_scan.py` runs this file once more, in a process of its own with
TRITON_INTERPRET=1, which must be set before Triton is imported. A launch costs milliseconds there for each program, so
inputs stay below a few thousand elements a step.
"""

import math
import os
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from ranvier import dynamics, kernels, nn
from ranvier.dynamics import (
    ATan,
    IFParams,
    LIFBParams,
    LIFParams,
    NeuronState,
    PLIFParams,
    Rectangle,
    Sigmoid,
    Surrogate,
    Triangle,
)
from ranvier.kernels import dispatch, fused_scan, native_library

BACKEND: Any = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "native"
OBSTACLE = dispatch._fused_obstacle(BACKEND)
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))

HELD_STEPS = 32

PARAMS = {"if": IFParams, "lif": LIFParams, "plif": PLIFParams, "lifb": LIFBParams}
SURROGATES = (Triangle(0.5), Triangle(0.8), ATan(2.0), ATan(3.0), Sigmoid(4.0), Rectangle(0.7))
STEPS = {"if": dynamics.if_step, "lif": dynamics.lif_step, "plif": dynamics.plif_step, "lifb": dynamics.lifb_step}

LAYOUTS = [
    "contiguous",
    "channels last",
    "batch first",
    "a part of the channels",
    "a part of the steps",
    "one step held",
]

Result = tuple[Tensor, Tensor, list[Tensor | None]]


def test_all_potentials_are_held_up_to_the_same_number_of_steps() -> None:
    """What the tests of long runs below count on."""
    if BACKEND == "native":
        assert native_library.UNROLLED == HELD_STEPS
    else:
        from ranvier.kernels import triton_scan

        assert triton_scan.INTERPRETED
        assert triton_scan.HELD_STEPS == HELD_STEPS


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def laid_out(current: Tensor, layout: str) -> Tensor:
    """The same values `[T, B, C, ...]` in other memory."""
    if layout == "channels last":
        return current.movedim(2, -1).contiguous().movedim(-1, 2)
    if layout == "batch first":
        return current.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "a part of the channels":
        return torch.cat((current, current), 2)[:, :, : current.shape[2]]
    if layout == "a part of the steps":
        return torch.stack((current, current), 1).flatten(0, 1)[::2]
    if layout == "one step held":
        return current[:1].expand_as(current)
    return current.contiguous()


def learned_by(name: str, channels: int, seed: int) -> list[Tensor]:
    if name == "plif":
        return [normal(seed=seed)]
    if name == "lifb":  # multiples of 1/8: what is sent is exact in bfloat16, which the interpreter truncates to
        return [(8 * normal(channels, seed=seed)).round() / 8]
    return []


def run(
    implementation: Any,
    name: str,
    params: Any,
    current: Tensor,
    state: Tensor | None,
    learned: list[Tensor],
    used: str = "both",
    seed: int = 0,
) -> Result:
    """Spikes, end state, and gradients of current, learned tensors and state for a random loss on what is `used`."""
    current, *learned = (tensor.detach().requires_grad_() for tensor in (current, *learned))
    start = None if state is None else NeuronState(state.detach().requires_grad_())
    spikes, end = getattr(kernels, f"{name}_scan")(current, start, params, *learned, implementation=implementation)
    loss = torch.zeros(())
    if used in ("spikes", "both"):
        loss = loss + (spikes * normal(*spikes.shape, seed=seed + 1, dtype=spikes.dtype)).float().sum()
    if used in ("state", "both"):
        loss = loss + (end.v * normal(*end.v.shape, seed=seed + 2)).sum()
    wanted = [current, *learned, *([start.v] if start else [])]
    return spikes.detach(), end.v.detach(), list(torch.autograd.grad(loss, wanted, allow_unused=True))


def assert_equal(got: Result, expected: Result, rounding: float = 2e-6) -> None:
    """Spikes and potentials bit for bit. Gradients to `rounding`: products and sums come in another order there."""
    assert got[0].dtype == expected[0].dtype
    assert torch.equal(got[0], expected[0])
    assert got[1].dtype == expected[1].dtype == torch.float32
    assert torch.equal(got[1], expected[1])
    of_current = expected[2][0]
    assert of_current is not None
    for index, (ours, theirs) in enumerate(zip(got[2], expected[2], strict=True)):
        if theirs is None:  # the reference leaves out what has no part in the loss
            assert ours is None or not ours.any()
            continue
        assert ours is not None
        assert ours.dtype == theirs.dtype
        largest = theirs.abs().max().item()
        if theirs.numel() <= 8 and index > 0:  # learned: sums over everything, in which much cancels
            largest += of_current.abs().sum().item()
        torch.testing.assert_close(ours, theirs, rtol=8 * rounding, atol=8 * rounding * largest)


@settings(deadline=None, max_examples=60 if BACKEND == "native" else 100, derandomize=True)
@given(
    name=st.sampled_from(sorted(PARAMS)),
    reset=st.sampled_from(["hard", "soft"]),
    detach=st.booleans(),
    surrogate=st.sampled_from(SURROGATES),
    tau=st.sampled_from([1.0, 2.0, 3.0, 4.0, 1.7]),
    steps=st.sampled_from([1, 2, 3, 5, 8]),
    shape=st.sampled_from(
        [(1, 1), (3, 5), (2, 5, 3), (1, 3, 7, 11), (4, 1, 5, 5), (2, 7, 1, 1), (5, 6, 13), (2, 2, 700)]
    ),
    layout=st.sampled_from(LAYOUTS),
    with_state=st.booleans(),
    used=st.sampled_from(["spikes", "both", "both", "state"]),
    dtype=st.sampled_from([torch.float32, *fused_scan.DTYPES[BACKEND]]),
    seed=st.integers(0, 10_000),
)
def test_equals_the_reference(
    name: str,
    reset: Any,
    detach: bool,
    surrogate: Surrogate,
    tau: float,
    steps: int,
    shape: tuple[int, ...],
    layout: str,
    with_state: bool,
    used: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    numbers = {"tau": tau} if name in ("lif", "lifb") else {}
    params = PARAMS[name](v_threshold=0.4, reset=reset, detach_reset=detach, surrogate=surrogate, **numbers)
    current = laid_out((1.5 * normal(steps, *shape, seed=seed) + 0.4).to(dtype), layout)
    state = normal(*shape, seed=seed + 3) if with_state else None
    learned = learned_by(name, shape[1], seed + 4)
    got = run(BACKEND, name, params, current, state, learned, used, seed)
    expected = run("reference", name, params, current, state, learned, used, seed)
    # bfloat16 keeps 8 bits and float16 11, of which both sides round away half a last one, or here all of it.
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert_equal(got, expected, rounding)
    if layout in ("contiguous", "channels last"):  # a convolution that follows need not copy
        assert [a for a, n in zip(got[0].stride(), got[0].shape, strict=True) if n > 1] == [
            a for a, n in zip(current.stride(), current.shape, strict=True) if n > 1
        ]


def test_trace_by_hand() -> None:
    """Charge 0.6 with tau 2: 0.3, 0.45, 0.525. Then a tie and, reset by the binary event, a burst that is a tie too."""
    lif = kernels.lif_scan(torch.full((4, 1, 1), 0.6), None, LIFParams(), implementation=BACKEND)
    assert lif[0].flatten().tolist() == [0, 0, 1, 0]
    assert lif[1].v.item() == pytest.approx(0.3)
    strength = torch.tensor([1.5])
    current = torch.tensor([1.0, 2.0, 0.5, 0.75]).view(4, 1, 1)
    spikes, state = kernels.lifb_scan(current, None, LIFBParams(), strength, implementation=BACKEND)
    assert spikes.flatten().tolist() == [1, 1.5, 0, 1]  # potentials 0.5, 1, 0.25, 0.5
    assert state.v.item() == 0


@pytest.mark.parametrize("name", sorted(PARAMS))
@pytest.mark.parametrize("steps", [HELD_STEPS, HELD_STEPS + 1, 2 * HELD_STEPS + 3])
def test_long_runs_are_cut_into_segments(name: str, steps: int) -> None:
    """With state, hard reset; and from rest, soft reset that is differentiated."""
    current, state = normal(steps, 2, 3, 5, seed=steps) + 0.4, normal(2, 3, 5, seed=1)
    learned = learned_by(name, 3, 2)
    for params, start in (
        (PARAMS[name](surrogate=ATan()), state),
        (PARAMS[name](reset="soft", detach_reset=False, surrogate=ATan()), None),
    ):
        got = run(BACKEND, name, params, current, start, learned)
        # Differences in rounding pass through up to 67 steps.
        assert_equal(got, run("reference", name, params, current, start, learned), 1e-5)


@pytest.mark.parametrize("name", sorted(PARAMS))
@pytest.mark.parametrize("parts", [(1, 1, 1, 1, 1), (3, 2), (1, HELD_STEPS, 3)])
def test_streaming_equals_one_call_bit_for_bit(name: str, parts: tuple[int, ...]) -> None:
    current, learned = normal(sum(parts), 3, 5, 7, seed=0) + 0.4, learned_by(name, 5, 1)
    scan, params = getattr(kernels, f"{name}_scan"), PARAMS[name](reset="soft")
    whole, end = scan(current, None, params, *learned, implementation=BACKEND)
    state, sent = None, []
    for part in current.split(parts):
        spikes, state = scan(part, state, params, *learned, implementation=BACKEND)
        sent.append(spikes)
    assert torch.equal(torch.cat(sent), whole)
    assert state is not None
    assert torch.equal(state.v, end.v)
    assert 0.05 < (whole != 0).float().mean() < 0.95


def test_gradient_passes_through_carried_state() -> None:
    current = (normal(6, 3, 7, seed=0) + 0.4).requires_grad_()
    _, state = kernels.lif_scan(current[:3], None, LIFParams(surrogate=ATan()), implementation=BACKEND)
    late, _ = kernels.lif_scan(current[3:], state, LIFParams(surrogate=ATan()), implementation=BACKEND)
    (gradient,) = torch.autograd.grad(late.sum(), current)
    (expected,) = torch.autograd.grad(
        kernels.lif_scan(current, None, LIFParams(surrogate=ATan()), implementation="reference")[0][3:].sum(), current
    )
    torch.testing.assert_close(gradient, expected)
    assert gradient[:3].any()


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((7, 5), "contiguous"),
        ((1, 5), "contiguous"),
        ((40, 3, 9), "contiguous"),
        ((3, 1, 50), "contiguous"),
        ((9, 6, 4, 4), "channels last"),
        ((40, 130), "contiguous"),
        ((70, 3, 2, 2), "channels last"),
    ],
)
def test_burst_strengths_find_their_channels(shape: tuple[int, ...], layout: str) -> None:
    """Every channel has its own strength; its gradient counts the bursts, each times the upstream gradient."""
    current = laid_out((32 * normal(3, *shape, seed=0)).round() / 32 + 0.5, layout)
    strength = (torch.arange(shape[1]) / 4 - 1).requires_grad_()
    spikes, _ = kernels.lifb_scan(current, None, LIFBParams(), strength, implementation=BACKEND)
    expected, _ = kernels.lifb_scan(current, None, LIFBParams(), strength, implementation="reference")
    assert torch.equal(spikes, expected)
    upstream = torch.randint(-8, 8, current.shape, generator=torch.Generator().manual_seed(1)).float()
    (gradient,) = torch.autograd.grad((spikes * upstream).sum(), strength)
    (counted,) = torch.autograd.grad((expected * upstream).sum(), strength)
    assert torch.equal(gradient, counted)  # sums of small whole numbers
    assert counted.any()


@pytest.mark.parametrize("name", ["plif", "lifb"])
def test_learned_gradients_are_the_same_bits_every_time(name: str) -> None:
    current, learned = normal(4, 40, 5, 9, seed=0) + 0.4, learned_by(name, 5, 1)
    first, second = (run(BACKEND, name, PARAMS[name](), current, None, learned)[2] for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_backward_keeps_only_the_input() -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    current = normal(5, 3, 4, seed=0).requires_grad_()
    strength = torch.ones(4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kernels.lifb_scan(current, None, LIFBParams(), strength, implementation=BACKEND)
    assert sum(tensor.numel() for tensor in saved) == current.numel() + strength.numel()
    assert current.data_ptr() in [tensor.data_ptr() for tensor in saved]


@pytest.mark.parametrize("name", sorted(PARAMS))
def test_all_memory_is_written(name: str) -> None:
    """New memory is filled with NaN here, so that what no program writes shows. The sizes fit no tile."""
    learned = learned_by(name, 3, 2)
    current, state = normal(HELD_STEPS + 2, 7, 3, 13, seed=0) + 0.4, normal(7, 3, 13, seed=1)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        for start in (None, state):
            spikes, end, gradients = run(BACKEND, name, PARAMS[name](), current, start, learned)
            for tensor in (spikes, end, *gradients):
                assert tensor is not None
                assert not tensor.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


def test_nan_is_not_hidden() -> None:
    """Training stops at it. A NaN potential does not fire and stays; what is upstream of it becomes NaN."""
    current = normal(4, 2, 5, seed=0)
    current[1, 0, 2] = math.nan
    for surrogate in (Triangle(), ATan(), Sigmoid()):
        got = run(BACKEND, "lif", LIFParams(surrogate=surrogate), current, None, [])
        expected = run("reference", "lif", LIFParams(surrogate=surrogate), current, None, [])
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], equal_nan=True)
        torch.testing.assert_close(got[2][0], expected[2][0], equal_nan=True)
        assert got[2][0] is not None
        assert got[2][0].isnan().any()


def test_offsets_pass_two_to_the_31() -> None:
    """Two steps that lie 2^31 + 3 elements apart, in memory of which only their pages are touched."""
    apart = 2**31 + 3
    memory = torch.empty(apart + 64, dtype=torch.bfloat16)
    current = memory.as_strided((2, 4, 5), (apart, 5, 1))
    values = normal(2, 4, 5, seed=0, dtype=torch.bfloat16)
    current.copy_(values)
    got = run(BACKEND, "lif", LIFParams(), current, None, [])
    assert_equal(got, run("reference", "lif", LIFParams(), values, None, []), 2**-8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_upstream_gradients_lie_in_any_memory(layout: str) -> None:
    """A mean over time hands the same memory down for every step, a permutation other strides."""
    current = (normal(3, 2, 5, 3, 7, seed=0) + 0.4).requires_grad_()
    upstream = laid_out(normal(3, 2, 5, 3, 7, seed=1), layout)
    gradients = []
    for implementation in (BACKEND, "reference"):
        spikes, end = kernels.lif_scan(current, None, LIFParams(surrogate=ATan()), implementation=implementation)
        gradients += torch.autograd.grad([spikes, end.v], current, [upstream, upstream[0]])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["lif", "plif", "lifb"])
def test_gradients_come_in_batches(name: str) -> None:
    """`is_grads_batched`, which vectorised jacobians use, hands on gradients that have no memory of their own."""
    current, learned = normal(3, 2, 4, 5, seed=0).requires_grad_(), learned_by(name, 4, seed=1)
    wanted = [current, *(tensor.requires_grad_() for tensor in learned)]
    spikes, _ = getattr(kernels, f"{name}_scan")(current, None, PARAMS[name](), *learned, implementation=BACKEND)
    upstream = normal(2, *spikes.shape, seed=2)
    batched = torch.autograd.grad(spikes, wanted, upstream, is_grads_batched=True, retain_graph=True)
    singly = [torch.autograd.grad(spikes, wanted, each, retain_graph=True) for each in upstream]
    for gradients, each in zip(batched, zip(*singly, strict=True), strict=True):
        assert torch.equal(gradients, torch.stack(each))


def test_gradients_of_gradients_are_refused() -> None:
    current = normal(3, 2, 5, seed=0).requires_grad_()
    spikes, _ = kernels.lif_scan(current, None, LIFParams(), implementation=BACKEND)
    (gradient,) = torch.autograd.grad((spikes * spikes).sum(), current, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_no_samples() -> None:
    current, strength = torch.zeros(3, 0, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    spikes, state = kernels.lifb_scan(current, None, LIFBParams(), strength, implementation=BACKEND)
    assert spikes.shape == (3, 0, 4)
    assert state.v.shape == (0, 4)
    gradients = torch.autograd.grad(spikes.sum(), [current, strength])
    assert gradients[0].shape == current.shape
    assert gradients[1].tolist() == [0, 0, 0, 0]


def test_the_callers_tensors_stay_as_they_are() -> None:
    current, state = normal(3, 2, 5, seed=0), NeuronState(normal(2, 5, seed=1))
    copies = current.clone(), state.v.clone()
    kernels.lif_scan(current, state, LIFParams(), implementation=BACKEND)
    assert torch.equal(current, copies[0])
    assert torch.equal(state.v, copies[1])


def test_any_scan_of_a_known_step_runs() -> None:
    current = normal(3, 2, 5, seed=0)
    spikes, _ = kernels.scan(dynamics.lif_step, current, None, LIFParams(), implementation=BACKEND)
    assert torch.equal(spikes, kernels.lif_scan(current, None, LIFParams(), implementation="reference")[0])


def test_half_precision_parameters() -> None:
    """A model that was cast whole: sigmoid and strength - 1 are rounded to bfloat16, as the reference does."""
    for name, numbers in (("plif", torch.tensor(0.3)), ("lifb", torch.tensor([0.003, 0.7, 1.3, 2.1, -0.3]))):
        learned = [numbers.bfloat16()]  # 0.003 - 1 is rounded to -0.99609375: such a burst sends 0.00390625
        current = (2 * normal(3, 4, 5, seed=1) + 0.4).bfloat16()
        got = run(BACKEND, name, PARAMS[name](), current, None, learned)
        assert_equal(got, run("reference", name, PARAMS[name](), current, None, learned), 2**-8)


def own_step(x: Tensor, v: Tensor, params: LIFParams) -> tuple[Tensor, Tensor]:
    return x, v


class Steeper(Triangle):
    """A surrogate of a user's own."""

    def derivative(self, u: Tensor) -> Tensor:
        return 2 * super().derivative(u)


def test_what_has_no_kernel_is_refused_with_a_way_out() -> None:
    current = torch.zeros(2, 3, 4)

    def refused(step: Any, x: Tensor, state: NeuronState | None, params: Any, *learned: Tensor) -> str:
        with pytest.raises(RuntimeError, match=f'implementation="{BACKEND}" cannot run on cpu: ') as error:
            kernels.scan(step, x, state, params, *learned, implementation=BACKEND)
        assert 'implementation="compiled"' in str(error.value)
        return str(error.value)

    assert "IF, LIF, PLIF and LIFB, not for own_step" in refused(own_step, current, None, LIFParams())
    assert "current has dtype torch.float64" in refused(dynamics.lif_step, current.double(), None, LIFParams())
    double = NeuronState(torch.zeros(3, 4).double())
    assert "state.v has dtype torch.float64" in refused(dynamics.lif_step, current, double, LIFParams())
    assert "surrogate Steeper" in refused(dynamics.lif_step, current, None, LIFParams(surrogate=Steeper()))
    assert "decay has shape [4]" in refused(dynamics.plif_step, current, None, PLIFParams(), torch.zeros(4))
    with pytest.raises(ValueError, match="5 burst strengths need"):
        kernels.lifb_scan(torch.zeros(2, 3, 4), None, LIFBParams(), torch.ones(5), implementation=BACKEND)


def test_auto() -> None:
    """Native kernels run where the reference would lose more time than they need; Triton's never on a CPU."""
    device, fits = torch.device("cpu"), lambda backend: None
    assert kernels.dispatch.choose_scan(BACKEND, device, 2**10, fits).implementation == BACKEND
    few = kernels.dispatch.PAYS["native"] - 1
    assert kernels.dispatch.choose_scan("auto", device, few, fits).implementation == "reference"
    assert kernels.dispatch.choose_scan("auto", device, few + 1, fits).implementation == "native"


NUMBERS = {"detach": ("hard", True, "triangle", 0.5), "differentiate": ("soft", False, "atan", 2.0)}


@pytest.mark.parametrize("name", ["lif", "plif", "lifb"])
@pytest.mark.parametrize("numbers", sorted(NUMBERS))
def test_operators_pass_opcheck(name: str, numbers: str) -> None:
    current, state = normal(3, 2, 4, 5, seed=0).requires_grad_(), normal(2, 4, 5, seed=1).requires_grad_()
    rate = torch.tensor([0.3], requires_grad=True) if name == "plif" else None
    excess = normal(4, seed=2).requires_grad_() if name == "lifb" else None
    others = BACKEND, name, *NUMBERS[numbers], 0.5, 1.0, 3.0
    for start in (None, state):
        opcheck(fused_scan._scan_operator, (current, start, rate, excess, *others))
    detached = [None if tensor is None else tensor.detach() for tensor in (current, state, rate, excess)]
    upstream = normal(3, 2, 4, 5, seed=3), normal(2, 4, 5, seed=4)
    opcheck(fused_scan._scan_backward_operator, (*upstream, *detached, *others))
    opcheck(fused_scan._scan_backward_operator, (upstream[0], None, *detached, *others))


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.TimeFolded(torch.nn.Linear(6, 8))
        self.lifb = nn.LIFB(8, implementation=BACKEND)
        self.plif = nn.PLIF(8, implementation=BACKEND)
        self.readout = nn.LIF(8, implementation=BACKEND)

    def forward(self, x: Tensor) -> Tensor:
        spikes, state = self.readout(self.plif(self.lifb(self.linear(x))), return_state=True)
        return spikes + state.v


def test_a_network_compiles_whole() -> None:
    torch.manual_seed(0)
    network, x = Network(), normal(4, 5, 6, seed=0) * 4
    expected = network(x)
    wanted = torch.autograd.grad(expected.sum(), list(network.parameters()))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    got = compiled(x)
    assert torch.equal(got, expected)
    for ours, theirs in zip(torch.autograd.grad(got.sum(), list(network.parameters())), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert compiled(normal(4, 3, 6, seed=1)).shape == (4, 3, 8)


def test_a_network_is_exported_with_its_operators() -> None:
    network, x = Network().eval(), normal(4, 5, 6, seed=0) * 4
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(network, (x,), dynamic_shapes=({1: batch},))
    operators = [str(node.target) for node in program.graph.nodes if "ranvier" in str(node.target)]
    assert operators == ["ranvier.fused_scan.default"] * 3
    assert torch.equal(program.module()(x), network(x))
    more = normal(4, 9, 6, seed=1) * 4
    assert torch.equal(program.module()(more), network(more))


def test_in_a_model_that_is_compiled_auto_is_traced() -> None:
    """So that its neurons fuse with the normalisation before them; no operator hides them."""
    neuron = nn.LIF()
    program = torch.export.export(neuron, (torch.zeros(2, 1, 70_000),))
    assert not [node for node in program.graph.nodes if "ranvier" in str(node.target)]


@pytest.mark.skipif(BACKEND != "native", reason="a network on a GPU is traced")
def test_in_a_network_that_is_compiled_on_a_cpu_auto_is_native() -> None:
    """Compiling takes half the time then. Few values are traced, which costs less than an operator."""
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph.code)
        return graph.forward

    def compiled(neuron: torch.nn.Module) -> Any:
        return torch.compile(neuron, fullgraph=True, backend=keep)

    compiled(nn.LIF())(torch.zeros(2, 1, 2**10))
    compiled(nn.LIF())(torch.zeros(2, 1, 2**10 - 1))
    compiled(nn.LIF())(torch.zeros(2, 1, 2**10).double())  # no kernel for it
    assert ["ranvier.fused_scan" in code for code in graphs] == [True, False, False]


def test_every_surrogate_and_neuron_has_a_kernel() -> None:
    assert set(fused_scan.NEURONS) == set(STEPS.values())
    for surrogate, (name, attribute) in fused_scan.SURROGATES.items():
        assert getattr(surrogate(), attribute) > 0
        params = LIFParams(surrogate=surrogate())
        kernels.lif_scan(torch.ones(1, 1, 3, requires_grad=True), None, params, implementation=BACKEND)[
            0
        ].sum().backward()
        assert name in ("triangle", "atan", "sigmoid", "rectangle")


def test_what_no_kernel_has_rules_for_runs_the_reference() -> None:
    """Tracing, torch.func, forward-mode differentiation, states of inference mode, other devices."""
    current = normal(2, 3, 2**10, seed=0) + 0.4
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        kernels.lif_scan(forward_ad.make_dual(current, current), None, LIFParams(), implementation=BACKEND)
    for before_dispatch in (False, True):
        graph = make_fx(
            lambda x: kernels.lif_scan(x, None, LIFParams(), implementation=BACKEND)[0], pre_dispatch=before_dispatch
        )(current)
        assert torch.ops.ranvier.fused_scan.default in {node.target for node in graph.graph.nodes}
    neuron = nn.LIF(surrogate=ATan())
    reference = nn.LIF(surrogate=ATan(), implementation="reference")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jit.trace warns of itself
        assert torch.equal(torch.jit.trace(neuron, current)(current), reference(current))
    _, tangent = torch.func.jvp(lambda x: 2 * x, (current,), (current,))
    assert torch.equal(tangent, 2 * current)
    with pytest.raises(RuntimeError):  # as the reference does; no kernel gives a silent zero
        torch.func.jvp(neuron, (current,), (current,))
    with torch.inference_mode():
        _, state = neuron(current, return_state=True)
    x = current.clone().requires_grad_()
    neuron(x, state).sum().backward()
    assert x.grad is not None
    elsewhere = NeuronState(torch.zeros(3, 2**10, device="meta"))
    unfit = fused_scan.unfit(BACKEND, dynamics.lif_step, current, elsewhere, LIFParams(), ())
    assert "state.v is on meta, but current on cpu" in str(unfit)
