"""Convolution and neurons in one kernel, on numbers of few bits, whose sums are exact in any order."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as with_settings
from hypothesis import strategies as st
from torch import Tensor

from ranvier import dynamics
from ranvier.dynamics import ConvertedState, IFParams, LIFBParams, LIFParams, NeuronState, PLIFParams
from ranvier.kernels import native_convolved_scan, native_tiles
from ranvier.kernels.converted import Converted
from ranvier.kernels.fused_scan import Kind
from ranvier.kernels.native_convolution import Geometry
from ranvier.kernels.native_convolved_scan import (
    Filters,
    PreparedConvolvedConverted,
    PreparedConvolvedScan,
    pays,
)

needs_unit = pytest.mark.skipif(
    native_convolved_scan.obstacle() is not None, reason=str(native_convolved_scan.obstacle())
)
ONE = Geometry((1, 1), (1, 1), (1, 1))


def images(*shape: int, most: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Whole numbers `[T, B, C, H, W]`, whose channels lie side by side."""
    frames, count, channels, height, width = shape
    made = torch.randint(most + 1, (frames, count, height, width, channels), generator=generator)
    return made.to(dtype).movedim(-1, 2)


def currents(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    bias = None if bias is None else bias.double()
    y = F.conv2d(x.flatten(0, 1).double(), weight.double(), bias, *geometry)
    return y.unflatten(0, x.shape[:2]).float()


def reference(neuron: str, params: Any, current: Tensor, state: NeuronState | None, learned: Tensor | None) -> Any:
    if neuron == "if":
        return dynamics.if_scan(current, state, params)
    if neuron == "lif":
        return dynamics.lif_scan(current, state, params)
    if neuron == "plif":
        return dynamics.plif_scan(current, state, params, learned)
    return dynamics.lifb_scan(current, state, params, learned)


PARAMS: dict[str, Any] = {"if": IFParams, "lif": LIFParams, "plif": PLIFParams, "lifb": LIFBParams}
STEP = {"if": dynamics.if_step, "lif": dynamics.lif_step, "plif": dynamics.plif_step, "lifb": dynamics.lifb_step}


class Drawn(NamedTuple):
    """A convolution whose sums are exact, and what it is given."""

    x: Tensor
    filters: Filters
    geometry: Geometry
    currents: Tensor
    joined: Tensor | None
    generator: torch.Generator

    def fractions(self, *shape: int, most: int = 8) -> Tensor:
        """Numbers of few bits, for each channel or neuron."""
        return torch.randint(-most, most + 1, shape, generator=self.generator) / 8


@st.composite
def convolutions(draw: st.DrawFn) -> Drawn:
    channels, out_channels = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    size = draw(st.integers(1, 20)), draw(st.sampled_from([1, 3, 4, 7, 15, 16, 17, 31, 32, 33, 40, 67]))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    reach = [min(4, (n + 2 * p - 1) // d + 1) for n, p, d in zip(size, padding, dilation, strict=True)]
    kernel = draw(st.tuples(*(st.integers(1, most) for most in reach)))
    geometry = Geometry(draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), padding, dilation)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    takes_bytes, steps, count = draw(st.booleans()), draw(st.integers(1, 5)), draw(st.integers(1, 9))
    dtype = torch.uint8 if takes_bytes else torch.bfloat16
    x = images(steps, count, channels, *size, most=3, dtype=dtype, generator=generator)
    weight = torch.randint(-9, 10, (out_channels, channels, *kernel), generator=generator)
    bias = torch.randint(-8, 9, (out_channels,), generator=generator) / 16 if draw(st.booleans()) else None
    if takes_bytes:
        scale = 2.0 ** torch.randint(-5, -3, (out_channels,), generator=generator)
        filters = Filters.of(weight.to(torch.int8), bias, scale)
        weight = weight * scale.view(-1, 1, 1, 1)
    else:
        weight = weight / 16
        filters = Filters.of(weight.bfloat16(), bias)
    given, joined = currents(x, weight, bias, geometry), None
    if draw(st.booleans()):
        beside = images(*given.shape, most=5, dtype=torch.bfloat16, generator=generator)
        joined = (beside - 2) / 4
        given = given + joined.float()
    return Drawn(x, filters, geometry, given, joined, generator)


@needs_unit
@given(
    drawn=convolutions(),
    neuron=st.sampled_from(list(STEP)),
    reset=st.sampled_from(["hard", "soft"]),
    tau=st.sampled_from([2.0, 3.0]),
    sends_bytes=st.booleans(),
    carried=st.booleans(),
    adds=st.booleans(),
)
@with_settings(max_examples=150, deadline=None)
def test_spikes_and_states_are_those_of_one_after_the_other(
    drawn: Drawn, neuron: str, reset: str, tau: float, sends_bytes: bool, carried: bool, adds: bool
) -> None:
    x, filters, geometry, current, joined, generator = drawn
    leaks = {"tau": tau} if neuron in ("lif", "lifb") else {}
    params: Any = PARAMS[neuron](reset=reset, **leaks)
    learned, rate, excess = None, None, None
    if neuron == "plif":
        learned, rate = torch.zeros(()), torch.full((1,), 0.5)
    if neuron == "lifb":
        learned = 1 + torch.randint(0, 8, (current.shape[2],), generator=generator) / 4
        excess, sends_bytes = learned - 1, False
    scan = PreparedConvolvedScan(Kind.of(STEP[neuron], params), geometry, sends_bytes)
    v = drawn.fractions(*current.shape[1:]) if carried else None
    dtype = torch.uint8 if sends_bytes else torch.bfloat16
    added = images(*current.shape, most=5, dtype=dtype, generator=generator) if adds else None

    spikes, end = scan(x, filters, v, rate, excess, added, joined)

    wanted, after = reference(neuron, params, current, None if v is None else NeuronState(v), learned)
    assert spikes.dtype == dtype
    assert torch.equal(spikes.float(), wanted if added is None else wanted + added.float())
    assert end is not None
    assert torch.equal(end, after.v)
    alone, nothing = scan(x, filters, v, rate, excess, None, joined, return_end=False)
    assert torch.equal(alone.float(), wanted)
    assert nothing is None
    assert spikes.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@needs_unit
@given(
    drawn=convolutions(),
    signed=st.booleans(),
    binary=st.booleans(),
    sends_bytes=st.booleans(),
    carried=st.booleans(),
    each=st.sampled_from(["one", "channel", "neuron"]),
    later=st.integers(0, 2),
)
@with_settings(max_examples=150, deadline=None)
def test_converted_neurons_are_those_of_one_after_the_other(
    drawn: Drawn, signed: bool, binary: bool, sends_bytes: bool, carried: bool, each: str, later: int
) -> None:
    """With a bias for each step or one for all, and initial potentials for all, for each channel or each neuron."""
    x, filters, geometry, current, joined, _ = drawn
    sends_bytes = sends_bytes and not signed
    binary = binary or sends_bytes
    channels = 1 if each == "one" else current.shape[2]
    neurons = Converted(
        threshold=drawn.fractions(channels).abs() + 0.5,
        bias=drawn.fractions(len(x) + later, channels) if later else drawn.fractions(1, channels),
        v_init=drawn.fractions(*current.shape[2:]) if each == "neuron" else drawn.fractions(channels),
        signed=signed,
        binary=binary,
    )
    state = None
    if carried:
        emitted = drawn.fractions(*current.shape[1:]).round() if signed else torch.empty(0)
        state = ConvertedState(drawn.fractions(*current.shape[1:]), emitted, later)
    scan = PreparedConvolvedConverted(signed, binary, geometry, sends_bytes)

    sent, after = scan(x, filters, state, neurons, joined)

    wanted, end = dynamics.converted_scan(current, state, *neurons)
    assert sent.dtype == (torch.uint8 if sends_bytes else torch.bfloat16)
    assert torch.equal(sent.float(), wanted)
    assert after is not None
    assert torch.equal(after.v, end.v)
    assert torch.equal(after.emitted, end.emitted)
    assert after.step == end.step
    alone, nothing = scan(x, filters, state, neurons, joined, return_state=False)
    assert torch.equal(alone, sent)
    assert nothing is None


@needs_unit
def test_what_converted_neurons_have_may_be_written_to() -> None:
    x = torch.ones(2, 1, 2, 1, 1, dtype=torch.bfloat16)
    filters = Filters.of(torch.ones(1, 2, 1, 1, dtype=torch.bfloat16), None)
    neurons = Converted(torch.ones(1), torch.zeros(1, 1), torch.zeros(1), signed=False, binary=False)
    scan = PreparedConvolvedConverted(False, False, ONE._replace(padding=(0, 0)))
    assert scan(x, filters, None, neurons)[0].flatten().tolist() == [1, 1]
    neurons.threshold.fill_(4)
    assert scan(x, filters, None, neurons)[0].flatten().tolist() == [0, 4]
    neurons.bias.fill_(1)
    neurons.v_init.fill_(3)
    assert scan(x, filters, None, neurons)[0].flatten().tolist() == [4, 0]


@needs_unit
def test_one_number_for_all_channels_serves_convolutions_of_any_width() -> None:
    x = torch.ones(1, 1, 2, 1, 1, dtype=torch.bfloat16)
    neurons = Converted(torch.ones(1), torch.zeros(1, 1), torch.full((1,), 0.5), signed=False, binary=False)
    scan = PreparedConvolvedConverted(False, False, ONE._replace(padding=(0, 0)))
    for outs in (32, 512, 40):
        sent, _ = scan(x, Filters.of(torch.ones(outs, 2, 1, 1, dtype=torch.bfloat16), None), None, neurons)
        assert sent.flatten().tolist() == [1] * outs


@needs_unit
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("count", "side", "channels"), [(1, 8, 96), (7, 32, 64), (40, 4, 256), (3, 16, 320)])
def test_groups_of_images_and_threads_change_nothing(threads: int, count: int, side: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = images(4, count, channels, side, side, most=1, dtype=torch.bfloat16, generator=generator)
    weight = torch.randint(-4, 5, (64, channels, 3, 3), generator=generator) / 32
    scan = PreparedConvolvedScan(Kind.of(dynamics.lif_step, LIFParams()), ONE)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        spikes, _ = scan(x, Filters.of(weight.bfloat16(), None))
    finally:
        torch.set_num_threads(before)
    wanted, _ = dynamics.lif_scan(currents(x, weight, None, ONE), None, LIFParams())
    assert 0.01 < wanted.mean() < 0.9
    assert torch.equal(spikes.float(), wanted)


@needs_unit
def test_currents_are_not_rounded() -> None:
    """1 - 2^-12 is no bfloat16: neurons that get it stay silent, and would fire if it were rounded to 1."""
    x = torch.ones(1, 1, 2, 1, 1, dtype=torch.bfloat16)
    weight = torch.tensor([[1.0, -(2.0**-12)], [1.0, 2.0**-12]]).view(2, 2, 1, 1)
    scan = PreparedConvolvedScan(Kind.of(dynamics.if_step, IFParams(v_threshold=1.0)), ONE._replace(padding=(0, 0)))
    spikes, end = scan(x, Filters.of(weight.bfloat16(), None))
    assert spikes.flatten().tolist() == [0, 1]
    assert end is not None
    assert end.flatten().tolist() == [1 - 2.0**-12, 0]


@needs_unit
def test_other_layouts_are_copied() -> None:
    generator = torch.Generator().manual_seed(1)
    x = images(2, 3, 40, 5, 6, most=1, dtype=torch.uint8, generator=generator)
    filters = Filters.of(torch.ones(33, 40, 3, 3, dtype=torch.int8), None, torch.full((33,), 0.125))
    scan = PreparedConvolvedScan(Kind.of(dynamics.lif_step, LIFParams()), ONE, sends_bytes=True)
    v = torch.rand(3, 33, 5, 6, generator=generator)
    wanted = scan(x, filters, v.to(memory_format=torch.channels_last), added=x[:, :, :33])
    found = scan(x.contiguous(), filters, v, added=x[:, :, :33].contiguous())
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))  # type: ignore[arg-type]


@needs_unit
def test_others_may_use_the_unit_in_between() -> None:
    generator = torch.Generator().manual_seed(4)
    x = images(2, 4, 64, 8, 8, most=1, dtype=torch.bfloat16, generator=generator)
    weight = (torch.randint(-4, 5, (64, 64, 3, 3), generator=generator) / 32).bfloat16()
    matrix = torch.randn(96, 200, generator=generator).bfloat16()
    scan, filters = PreparedConvolvedScan(Kind.of(dynamics.lif_step, LIFParams()), ONE), Filters.of(weight, None)
    wanted, ours = matrix @ matrix.T, scan(x, filters)[0]
    for _ in range(3):
        assert torch.equal(matrix @ matrix.T, wanted)
        assert torch.equal(scan(x, filters)[0], ours)


def test_filters_lie_as_they_are_read() -> None:
    """The weight of output 17, channel 35, row 1, column 0 of a 2x1 kernel: by hand."""
    weight = torch.zeros(20, 40, 2, 1, dtype=torch.bfloat16)
    weight[17, 35, 1, 0] = 3
    filters = Filters.of(weight, torch.arange(20.0))
    assert filters.weights.shape == (1, 2, 2, 2, 16, 16, 2)
    assert filters.weights.nonzero().tolist() == [[0, 1, 1, 1, 1, 1, 1]]
    assert filters.bias.tolist() == [*range(20), *[0] * 12]
    bytes_of = Filters.of(weight.to(torch.int8), None, torch.ones(20))
    assert bytes_of.weights.shape == (1, 2, 1, 2, 16, 16, 4)
    assert bytes_of.weights.nonzero().tolist() == [[0, 1, 0, 1, 8, 1, 3]]
    assert bytes_of.bias.tolist() == [0] * 32


def test_pays_where_blocks_are_full_and_images_fit() -> None:
    image, shape = (64, 32, 32), (64, 64, 3, 3)
    assert pays(image, shape, ONE)
    assert not pays(image, (8, 64, 3, 3), ONE)  # a fourth of a block
    assert not pays(image, (64, 32, 3, 3), ONE)  # other channels
    assert not pays((64, 2, 2), (64, 64, 5, 5), ONE)
    assert not pays((64, 0, 2), shape, ONE)
    assert not pays((64, 512, 512), shape, ONE)  # larger than caches
    assert not pays(image, (64, 64, 40, 40), ONE._replace(padding=(20, 20)))  # too many weights of a channel


@pytest.mark.parametrize("wrong", [{"stride": (0, 1)}, {"padding": (1, -1)}, {"dilation": (1, 0)}], ids=str)
def test_what_no_convolution_can_be_made_of_does_not_pay(wrong: dict[str, Any]) -> None:
    assert not pays((64, 32, 32), (64, 64, 3, 3), ONE._replace(**wrong))


def test_obstacles_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_tiles, "obstacle", lambda: "no unit.")
    assert native_convolved_scan.obstacle.__wrapped__() == "no unit."

    def load(*_: object) -> None:
        raise RuntimeError("compiling them failed: no space")

    monkeypatch.setattr(native_tiles, "obstacle", lambda: None)
    monkeypatch.setattr(native_convolved_scan, "load", load)
    assert native_convolved_scan.obstacle.__wrapped__() == "compiling them failed: no space."
