"""The native kernel of converted neurons: any layout, size and state, bit for bit."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranvier import dynamics, kernels
from ranvier.dynamics import ConvertedState, Triangle
from ranvier.kernels import native_converted, native_library, native_scan
from ranvier.kernels.converted import Converted
from ranvier.kernels.native_converted import PreparedConverted, run

pytestmark = pytest.mark.skipif(native_scan.obstacle() is not None, reason=str(native_scan.obstacle()))

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(2, -1).contiguous().movedim(-1, 2),
    "batch innermost": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "with gaps": lambda x: torch.stack((x, x), -1)[..., 0],
    "steps apart": lambda x: torch.cat((x, x))[::2] if len(x) % 2 == 0 else x,
    "held": lambda x: x[:1].expand_as(x),
}


def neurons(
    generator: torch.Generator, channels: int, rows: int, each: tuple[int, ...] = (), **kind: bool
) -> Converted:
    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    return Converted(
        draw(channels) + 0.1,
        draw(rows, channels) - 0.5,
        draw(*(each or (channels,))),
        **{"signed": False, "binary": False} | kind,
    )


def assert_equal(got: tuple[Tensor, ConvertedState], expected: tuple[Tensor, ConvertedState]) -> None:
    assert got[0].dtype == expected[0].dtype
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1].v, expected[1].v)
    assert torch.equal(got[1].emitted, expected[1].emitted)
    assert got[1].step == expected[1].step


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    steps=st.sampled_from([1, 2, 3]),
    batch=st.integers(1, 3),
    channels=st.sampled_from([1, 2, 5, 16, 17, 33]),
    frame=st.sampled_from([(), (1,), (3,), (1, 1), (3, 5), (4, 4)]),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
    varies=st.booleans(),
    shared=st.sampled_from(["nothing", "all but the potential", "all"]),
    each=st.booleans(),
    signed=st.booleans(),
    binary=st.booleans(),
)
def test_two_calls_are_those_of_the_reference(
    seed: int,
    steps: int,
    batch: int,
    channels: int,
    frame: tuple[int, ...],
    layouts: tuple[str, str],
    varies: bool,
    shared: str,
    each: bool,
    signed: bool,
    binary: bool,
) -> None:
    """Random floats: no operation rounds otherwise. The second call goes on from the state of the first, which may lie
    in memory in another way.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = neurons(
        generator,
        channels if shared == "nothing" else 1,
        2 * steps if varies else 1,
        (channels, *frame) if each and frame else (1 if shared == "all" else channels,),
        signed=signed,
        binary=binary,
    )
    first, second = (
        LAYOUTS[layout](torch.randn(steps, batch, channels, *frame, generator=generator)) for layout in layouts
    )
    got, expected = run(first, None, kind), dynamics.converted_scan(first, None, *kind)
    assert_equal(got, expected)
    assert_equal(run(second, got[1], kind), dynamics.converted_scan(second, expected[1], *kind))


@pytest.mark.parametrize("steps", [31, 32, 33, 40])
def test_more_steps_than_loops_unroll(steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    kind, current = neurons(generator, 5, steps, signed=True), torch.randn(steps, 2, 5, 7, generator=generator)
    assert_equal(run(current, None, kind), dynamics.converted_scan(current, None, *kind))
    assert native_library.UNROLLED == 32


@pytest.mark.parametrize("signed", [False, True])
def test_bfloat16_rounds_what_is_sent_and_nothing_else(signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    kind, current = (
        neurons(generator, 17, 4, signed=signed),
        torch.randn(4, 3, 17, 5, 5, generator=generator).bfloat16(),
    )
    got = run(current, None, kind)
    assert_equal(got, dynamics.converted_scan(current, None, *kind))
    assert (got[0].dtype, got[1].v.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("spare", [0, 3])
def test_outputs_larger_than_the_caches(spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written past them, where lines are whole, and like any other where they are not."""
    generator, asked = torch.Generator().manual_seed(0), []
    monkeypatch.setattr(native_converted, "ask_for_huge_pages", lambda tensor: asked.append(tensor.numel()))
    current = torch.randn(2, 2**11 + spare, 2**11 + spare, generator=generator)
    assert current.numel() * 4 >= native_library.PAST_CACHES
    kind = neurons(generator, 2**11 + spare, 2)
    assert_equal(run(current, None, kind), dynamics.converted_scan(current, None, *kind))
    assert asked == [current.numel()]


def test_bytes_are_the_binary_spikes() -> None:
    generator = torch.Generator().manual_seed(0)
    kind, current = neurons(generator, 5, 4, binary=True), torch.randn(4, 3, 5, 7, 7, generator=generator)
    spikes, state = run(current, None, kind, sends_bytes=True)
    expected, after = dynamics.converted_scan(current, None, *kind)
    assert spikes.dtype == torch.uint8
    assert torch.equal(spikes.float(), expected)
    assert torch.equal(state.v, after.v)


def test_numbers_that_are_none_and_infinite_currents() -> None:
    """NaN fires nowhere and stays; infinity fires, and what is left of it is infinite."""
    current = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.0]).view(1, 4, 1).repeat(3, 1, 1)
    kind = Converted(torch.ones(1), torch.zeros(1, 1), torch.zeros(1), True, False)
    got, expected = run(current, None, kind), dynamics.converted_scan(current, None, *kind)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1].v.nan_to_num(9), expected[1].v.nan_to_num(9))


def test_nothing_to_run_on() -> None:
    kind = neurons(torch.Generator(), 5, 1)
    sent, state = run(torch.zeros(3, 0, 5, 2), None, kind)
    assert (sent.shape, state.v.shape, state.step) == ((3, 0, 5, 2), (0, 5, 2), 3)
    sent, state = run(torch.zeros(3, 2, 0), None, neurons(torch.Generator(), 0, 1))
    assert (sent.shape, state.v.shape) == ((3, 2, 0), (2, 0))


def test_prepared_neurons_follow_their_thresholds_and_any_size() -> None:
    generator = torch.Generator().manual_seed(0)
    kind = neurons(generator, 5, 8)
    scan = PreparedConverted()
    for turn in range(2):
        state: Any = None
        expected: Any = None
        for steps in (1, 2, 1, 2):
            current = torch.randn(steps, 3 + turn, 5, 4, generator=generator)
            sent, state = scan(current, state, kind)
            wanted, expected = dynamics.converted_scan(current, expected, *kind)
            assert torch.equal(sent, wanted)
            assert torch.equal(state.v, expected.v)
        kind.threshold.mul_(0.5)
        kind.bias.add_(0.1)
        assert_equal(scan(current, None, kind), dynamics.converted_scan(current, None, *kind))
    kind = kind._replace(binary=True)
    assert_equal(scan(current, None, kind), dynamics.converted_scan(current, None, *kind))
    for batch in range(1, 2 * native_converted.MOST_PLANS):
        scan(torch.zeros(1, batch, 5), None, kind)
    assert len(scan._plans(kind[:3], dict, *kind[3:])) <= native_converted.MOST_PLANS
    for twin in (copy.deepcopy(scan), pickle.loads(pickle.dumps(scan))):
        assert torch.equal(twin(current, None, kind)[0], scan(current, None, kind)[0])


def test_prepared_neurons_follow_a_threshold_whose_data_are_replaced() -> None:
    """It stays the same tensor, in the same version."""
    generator = torch.Generator().manual_seed(0)
    kind, scan = neurons(generator, 5, 1), PreparedConverted()
    current = torch.randn(4, 3, 5, generator=generator)
    for _ in range(8):
        assert_equal(scan(current, None, kind), dynamics.converted_scan(current, None, *kind))
        kind.threshold.data = torch.rand(5, generator=generator) + 0.1


def test_as_many_sizes_as_are_remembered_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plan_of = native_converted._Plan.of
    monkeypatch.setattr(native_converted, "MOST_PLANS", 3)
    monkeypatch.setattr(native_converted._Plan, "of", lambda *given: made.append(len(given[0][0])) or plan_of(*given))
    kind, scan = neurons(torch.Generator(), 5, 1), PreparedConverted()
    for batch in (1, 2, 3) * 3:
        scan(torch.zeros(1, batch, 5), None, kind)
    assert made == [1, 2, 3]


def test_large_inputs_run_it_unless_gradients_watch() -> None:
    """`auto` picks it; what would need a gradient through the threshold falls back to the reference."""
    generator = torch.Generator().manual_seed(0)
    kind, current = neurons(generator, 16, 2), torch.randn(2, 2, 16, 9, 9, generator=generator)
    auto = kernels.converted_scan(current, None, *kind)
    assert_equal(auto, dynamics.converted_scan(current, None, *kind))
    trained = kind._replace(threshold=kind.threshold.clone().requires_grad_())
    sent, _ = kernels.converted_scan(current, None, *trained)
    assert torch.equal(torch.autograd.grad(sent.sum(), trained.threshold)[0], (auto[0] != 0).sum((0, 1, 3, 4)).float())
    with pytest.raises(RuntimeError, match="its kernel has no gradient"):
        kernels.converted_scan(current, None, *trained, implementation="native")
    with torch.no_grad():
        kernels.converted_scan(current, None, *trained, implementation="native")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"current": torch.zeros(2, 2, 5, dtype=torch.float16)}, "its kernel takes torch.float32, torch.bfloat16"),
        ({"state": ConvertedState(torch.zeros(2, 5).double(), torch.zeros(0), 0)}, "state.v has dtype torch.float64"),
        (
            {"state": ConvertedState(torch.zeros(2, 5), torch.zeros(2, 5).double(), 0), "signed": True},
            "state.emitted has dtype torch.float64",
        ),
        ({"threshold": torch.ones(5).double()}, "threshold has dtype torch.float64"),
        ({"threshold": torch.ones(5, device="meta")}, "threshold is on meta, but current on cpu"),
        ({"surrogate": Triangle(1.0)}, "converted neurons that train have no native scan"),
        ({"current": torch.zeros(2, 2, 5, device="meta")}, "its kernels run on CPUs"),
    ],
)
def test_what_it_cannot_run_is_named(change: dict[str, Any], message: str) -> None:
    kind = neurons(torch.Generator(), 5, 1)
    arguments: dict[str, Any] = {"current": torch.zeros(2, 2, 5), "state": None, **kind._asdict()} | change
    with pytest.raises(RuntimeError, match=message):
        kernels.converted_scan(**arguments, implementation="native")


@pytest.mark.parametrize(
    ("current", "state", "message"),
    [
        (torch.zeros(9, 2, 5), None, "step 9 was asked for, but the biases were calibrated for steps 1 to 4"),
        (torch.zeros(2, 2, 4), None, "bias is for 5 channels"),
        (torch.zeros(2, 2, 5), ConvertedState(torch.zeros(3, 5), torch.zeros(0), 0), r"state.v has shape \[3, 5\]"),
        (torch.zeros(2, 2, 5), ConvertedState(torch.zeros(2, 5), torch.zeros(0), 3), "step 5 was asked for"),
    ],
)
def test_input_that_does_not_fit_raises_and_reads_no_foreign_memory(
    current: Tensor, state: ConvertedState | None, message: str
) -> None:
    kind = neurons(torch.Generator(), 5, 4)
    with pytest.raises(ValueError, match=message):
        kernels.converted_scan(current, state, *kind, implementation="native")
