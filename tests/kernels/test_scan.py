"""Compiled scans against the reference. Each combination compiles for seconds, so they are chosen sparingly."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ranvier import dynamics, kernels, nn
from ranvier.dynamics import IFParams, LIFBParams, LIFParams, NeuronState, PLIFParams
from ranvier.kernels.dispatch import Implementation
from ranvier.provenance import cpp_compiler

pytestmark = [
    pytest.mark.skipif(cpp_compiler() is None, reason="torch.compile needs a C++ compiler"),
    # The compiler of torch 2.13 instantiates the autograd function that it traces, and torch warns about that.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # torch.compile imports parts of torch that use the deprecated TorchScript.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
]

STEPS, CHANNELS = 3, 5


@pytest.fixture(scope="module", autouse=True)
def leave_no_graphs() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """Graphs compiled so far in this process."""
    return counters["stats"]["unique_graphs"]


def binary(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiples of 1/64 in [-1, 3): sums and halves of them are exact, so that no fused operation moves a spike."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-64, 192, shape, generator=generator) / 64).to(dtype)


def learned(name: str) -> list[Tensor]:
    if name == "plif":
        return [torch.tensor(0.0, requires_grad=True)]  # tau 2
    if name == "lifb":
        return [torch.tensor([2.0, 0.5, -1.25, 1.0, 3.0], requires_grad=True)]
    return []


PARAMS: dict[str, Callable[..., Any]] = {"if": IFParams, "lif": LIFParams, "plif": PLIFParams, "lifb": LIFBParams}


@pytest.mark.parametrize(
    ("name", "reset", "with_state"),
    [
        ("if", "hard", False),
        ("if", "soft", True),
        ("lif", "hard", True),
        ("lif", "soft", False),
        ("plif", "hard", False),
        ("plif", "soft", True),
        ("lifb", "hard", True),
        ("lifb", "soft", False),
    ],
)
def test_compiled_equals_reference(name: str, reset: Literal["hard", "soft"], with_state: bool) -> None:
    params = PARAMS[name](reset=reset)
    before = graphs()
    # Odd sizes on both sides of the vector width, and less than it.
    for seed, shape in enumerate(
        [(STEPS, 7, CHANNELS, 3, 11), (STEPS, 2, CHANNELS, 13, 17), (STEPS, 3, CHANNELS, 2, 3)]
    ):
        results = {}
        for implementation in ("reference", "compiled"):
            current = binary(*shape, seed=seed).requires_grad_()
            state = NeuronState(binary(*shape[1:], seed=seed + 10).requires_grad_()) if with_state else None
            tensors = learned(name)
            scan = getattr(kernels, f"{name}_scan")
            spikes, end = scan(current, state, params, *tensors, implementation=implementation)
            loss = (binary(*shape, seed=seed + 20) * spikes).sum() + (binary(*shape[1:], seed=seed + 30) * end.v).sum()
            wanted = [current, *([state.v] if state else []), *tensors]
            results[implementation] = spikes, end, torch.autograd.grad(loss, wanted)
        spikes, end, gradients = results["compiled"]
        expected_spikes, expected_end, expected_gradients = results["reference"]
        assert torch.equal(spikes, expected_spikes)
        assert torch.equal(end.v, expected_end.v)  # exact in binary, like the spikes
        assert 0 < (spikes != 0).float().mean() < 1
        for gradient, expected in zip(gradients, expected_gradients, strict=True):
            # Sums of up to 3000 float32 values in another order, relative to the largest of them.
            scale = expected.abs().max().item()
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5 * scale)
            assert scale > 0
    assert graphs() - before <= 1  # for all three sizes; none if another test has compiled it


@pytest.mark.parametrize("with_state", [False, True])
def test_another_batch_size_does_not_compile_again(with_state: bool) -> None:
    def run(batch: int, positions: int) -> None:
        current = binary(STEPS, batch, CHANNELS, positions, positions).requires_grad_()
        state = NeuronState(binary(batch, CHANNELS, positions, positions).requires_grad_()) if with_state else None
        kernels.lif_scan(current, state, LIFParams(), implementation="compiled")

    run(16, 6)
    before = graphs()
    for batch, positions in [(15, 6), (2, 6), (64, 6), (16, 9)]:
        run(batch, positions)
    assert graphs() == before


def test_another_channel_count_does_not_compile_again() -> None:
    """Layers of a network differ in channels, and with them the strengths of LIFB."""

    def run(channels: int) -> Tensor:
        current = binary(STEPS, 4, channels, 7, 3).requires_grad_()
        strength = torch.full((channels,), 2.0, requires_grad=True)
        return kernels.lifb_scan(current, None, LIFBParams(reset="soft"), strength, implementation="compiled")[0]

    run(CHANNELS)
    before = graphs()
    for channels in (8, 3, 64):
        assert run(channels).shape[2] == channels
    assert graphs() == before


def test_the_callers_tensors_are_not_marked() -> None:
    """Sizes are opened on views: a mark on the caller's tensor would leak into models that they compile themselves."""
    current = binary(STEPS, 4, CHANNELS, 7, 3).requires_grad_()
    strength = torch.ones(CHANNELS, requires_grad=True)
    kernels.lifb_scan(current, None, LIFBParams(reset="soft"), strength, implementation="compiled")
    for tensor in (current, strength):
        assert tensor._base is None
        assert not [name for name in vars(tensor) if name.startswith("_dynamo")]


def test_split_run_equals_one_run_bit_for_bit() -> None:
    """Random floats: the compiled code of 3 and of 6 steps must round alike."""
    generator = torch.Generator().manual_seed(1)
    current = (torch.randn(2 * STEPS, 7, CHANNELS, 3, 11, generator=generator) + 0.4).requires_grad_()
    start = NeuronState(torch.rand(7, CHANNELS, 3, 11, generator=generator).requires_grad_())
    run = lambda part, state: kernels.lif_scan(part, state, LIFParams(), implementation="compiled")  # noqa: E731
    whole, end = run(current, start)
    early, state = run(current[:STEPS], start)
    late, split_end = run(current[STEPS:], state)
    assert torch.equal(torch.cat([early, late]), whole)
    assert torch.equal(split_end.v, end.v)
    (gradient,) = torch.autograd.grad(late.sum(), current)
    assert (gradient[:STEPS] != 0).any()  # it crosses the carried state
    (expected,) = torch.autograd.grad(whole[STEPS:].sum(), current)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)  # float32, other order of sums


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_other_dtypes(dtype: torch.dtype, kept: torch.dtype) -> None:
    results = {}
    for implementation in ("reference", "compiled"):
        current = binary(STEPS, 3, 7, 5, dtype=dtype).requires_grad_()
        spikes, state = kernels.lif_scan(current, None, LIFParams(), implementation=implementation)
        (gradient,) = torch.autograd.grad((binary(STEPS, 3, 7, 5, seed=1).to(dtype) * spikes).sum(), current)
        results[implementation] = spikes, state.v, gradient
    for got, expected in zip(results["compiled"], results["reference"], strict=True):
        assert got.dtype == expected.dtype
        # Exact in binary but for the gradients, which bfloat16 rounds by 2^-8 once on each side.
        torch.testing.assert_close(got, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-12, atol=0)
    assert results["compiled"][0].dtype == dtype
    assert results["compiled"][1].dtype == kept
    assert torch.equal(results["compiled"][0], results["reference"][0])


def leaky_sum_step(x: Tensor, v: Tensor, params: float, gain: Tensor) -> tuple[Tensor, Tensor]:
    """A neuron of a user's own."""
    v = params * v + gain * x
    return torch.relu(v), v


def test_a_step_of_ones_own() -> None:
    results = {}
    for implementation in ("reference", "compiled"):
        gain = torch.tensor(2.0, requires_grad=True)
        current = binary(STEPS, 4, 9)
        out, state = kernels.scan(leaky_sum_step, current, None, 0.5, gain, implementation=implementation)
        (gradient,) = torch.autograd.grad(out.sum(), gain)
        results[implementation] = out, state.v, gradient
    for got, expected in zip(results["compiled"], results["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)  # the gradient is a sum in another order
    assert results["reference"][0][0, 0, 0] == 2 * binary(STEPS, 4, 9)[0, 0, 0].clamp(min=0)


def test_a_model_with_neurons_compiles_whole() -> None:
    """fullgraph=True raises at a graph break; inside, the neuron is traced rather than compiled on its own."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.TimeFolded(torch.nn.Linear(6, 8))
            self.norm = nn.BatchNorm(8)
            self.neuron = nn.LIF(8, implementation="auto")

        def forward(self, x: Tensor) -> Tensor:
            return self.neuron(self.norm(self.linear(x)))

    torch.manual_seed(0)
    model = Model().double()
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    expected = model(x)
    torch.compiler.reset()
    before = graphs()
    got = torch.compile(model, fullgraph=True)(x)
    assert torch.equal(got, expected)  # float64: no random potential lies within rounding of its threshold
    assert graphs() == before + 1


class Shift(torch.nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def test_each_whole_has_a_count_of_recompilations_of_its_own() -> None:
    """torch counts per line of code: the next network of a class would fail once the count is reached."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for by in (1.0, 2.0, 3.0):
            shift = kernels.compile_whole(Shift(by))
            assert shift(torch.zeros(2)).tolist() == [by, by]
        assert shift(torch.zeros(2).double()).dtype == torch.float64


def test_a_whole_does_not_break() -> None:
    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        kernels.compile_whole(breaks)(torch.zeros(2))


@pytest.mark.parametrize("implementation", ["reference", "compiled"])
@pytest.mark.parametrize(
    ("current", "state", "message"),
    [
        (torch.zeros(4), None, "must be time-first"),
        (torch.zeros(0, 2), None, "T = 0 steps"),
        (torch.zeros(2, 3, dtype=torch.int64), None, "needs a floating type"),
        (torch.zeros(2, 3, 4), NeuronState(torch.zeros(2, 4)), r"state\.v has shape \[2, 4\]"),
    ],
)
def test_bad_input_raises_before_anything_compiles(
    implementation: Implementation, current: Tensor, state: NeuronState | None, message: str
) -> None:
    before = graphs()
    with pytest.raises(ValueError, match=message):
        kernels.lif_scan(current, state, LIFParams(), implementation=implementation)
    with pytest.raises(ValueError, match=message):
        kernels.scan(dynamics.lif_step, current, state, LIFParams(), implementation=implementation)
    assert graphs() == before


def test_names_and_signatures_follow_the_reference() -> None:
    for name in ("if_scan", "lif_scan", "plif_scan", "lifb_scan", "scan"):
        assert getattr(kernels, name).__name__ == getattr(dynamics, name).__name__
    assert kernels.lif_scan.__doc__ == dynamics.lif_scan.__doc__


def test_sizes_that_did_not_vary_so_far_are_open_too() -> None:
    """A size of 1 compiles again; then the compiler tells sizes that have varied from others, such as C here."""
    torch._dynamo.reset()  # it must not know of other tests' sizes

    def run(params: IFParams, *shape: int) -> None:
        kernels.if_scan(binary(STEPS, *shape), None, params, implementation="compiled")

    run(IFParams(), 4, 5, 7, 11)
    run(IFParams(), 3, 5, 1, 3)
    run(IFParams(reset="soft"), 4, 5, 7, 11)
    before = graphs()
    run(IFParams(reset="soft"), 4, 6, 7, 11)
    assert graphs() == before
