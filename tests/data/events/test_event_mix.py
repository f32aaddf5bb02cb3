from dataclasses import fields, replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranvier.data.events import EventMix, event_mix, mix_frames
from ranvier.data.events.event_mix import MixDraws

DTYPES = [torch.uint8, torch.int16, torch.float16, torch.float32]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _batch(count: int = 6, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Time-first; recording i holds i + 1 in every cell."""
    values = torch.arange(1, count + 1, dtype=dtype)
    return values[None, :, None, None, None].expand(steps, -1, 2, 12, 12).contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_cell_comes_from_one_of_two_and_targets_are_shares_of_events(dtype: torch.dtype) -> None:
    """Where events are everywhere, shares of events are shares of cells."""
    frames = _batch(dtype=dtype)
    mixed, targets = mix_frames(frames, torch.arange(6), 8, _generator())
    assert (mixed.dtype, mixed.shape, targets.shape, targets.dtype) == (dtype, frames.shape, (6, 8), torch.float32)
    shares = torch.stack([(mixed == value + 1).float().mean((0, 2, 3, 4)) for value in range(8)], 1)
    assert ((shares > 0).sum(1) <= 2).all()
    assert ((shares > 0).sum(1) == 2).sum() >= 3
    torch.testing.assert_close(targets, shares, rtol=0, atol=1e-6)  # float32
    assert torch.equal(frames, _batch(dtype=dtype))


def test_polarities_are_mixed_alike_and_frames_are_not() -> None:
    mixed, _ = mix_frames(_batch(), torch.arange(6), 6, _generator())
    assert torch.equal(mixed[:, :, 0], mixed[:, :, 1])
    assert not torch.equal(mixed[0], mixed[4])


def test_targets_computed_by_hand() -> None:
    """Of a, 3 of 4 cells with events are kept; of b, 2 of 8 are put in: w = 0.75 / (0.75 + 0.25) = 0.75."""
    for seed in range(50):
        mixed, targets = mix_frames(_batch(2), torch.tensor([0, 1]), 2, _generator(seed))
        region = mixed[:, 0, 0] == 2  # a is recording 0
        if 20 < int(region.sum()) < 700:
            break
    inside, outside = region.nonzero(), (~region).nonzero()
    frames = torch.zeros(5, 2, 2, 12, 12)
    for t, y, x in [*inside[:1].tolist(), *outside[:3].tolist()]:
        frames[t, 0, 0, y, x] = 5
    for t, y, x in [*inside[1:3].tolist(), *outside[3:9].tolist()]:
        frames[t, 1, 1, y, x] = 7
    mixed, targets = mix_frames(frames, torch.tensor([0, 1]), 2, _generator(seed))
    assert mixed[:, 0].sum() == 3 * 5 + 2 * 7
    torch.testing.assert_close(targets[0], torch.tensor([0.75, 0.25]))


def test_recordings_without_events_keep_their_label() -> None:
    mixed, targets = mix_frames(torch.zeros(3, 4, 2, 6, 6), torch.arange(4), 4, _generator())
    assert torch.equal(targets, torch.eye(4))
    assert not mixed.any()


def test_a_probability_of_zero_changes_nothing() -> None:
    mixed, targets = mix_frames(_batch(), torch.arange(6), 6, _generator(), probability=0.0)
    assert torch.equal(mixed, _batch())
    assert torch.equal(targets, torch.eye(6))


def test_the_probability_is_of_each_recording() -> None:
    _, targets = mix_frames(_batch(400, 2), torch.arange(400), 400, _generator(), probability=0.5)
    assert 150 < int((targets.amax(1) < 1).sum()) < 250  # five standard deviations


def test_beta_gathers_shares_at_one_half() -> None:
    spreads = [
        (mix_frames(_batch(200, 2), torch.arange(200), 200, _generator(), beta=beta)[1].amax(1) - 0.5).mean()
        for beta in (0.2, 2.0, 50.0)
    ]
    assert spreads[0] > 1.5 * spreads[1] > 3 * spreads[2]


@given(seed=st.integers(0, 200))
def test_regions_have_the_share_that_is_asked_for(seed: int) -> None:
    shares = torch.tensor([0.0, 0.01, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    draws = replace(EventMix().draw(6, (5, 12, 13), _generator(seed)), share=shares)
    region = event_mix._region(draws, torch.arange(6), torch.device("cpu"))
    # Cells of equal density, and those far below every Gaussian, can be told apart only together: two in a hundred.
    assert region.shape == (6, 5, 12, 13)
    assert (region.float().mean((1, 2, 3)) - shares).abs().max() < 0.02
    assert not region[0].any()


def test_the_layout_stays() -> None:
    frames = _batch().permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    mixed, _ = mix_frames(frames, torch.arange(6), 6, _generator())
    assert mixed.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(mixed, mix_frames(_batch(), torch.arange(6), 6, _generator())[0])


def test_the_generator_decides() -> None:
    first, again, other = (mix_frames(_batch(), torch.arange(6), 6, _generator(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_global_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    mix_frames(_batch(), torch.arange(6), 6, _generator())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        (torch.arange(5), {}, r"frames have shape \[5, 6, 2, 12, 12\] and labels \[5\], expected \[T, B, C, H, W\]"),
        (torch.arange(6), {"beta": 0.0}, "beta is 0.0, but must be greater than 0"),
        (torch.arange(6), {"probability": 1.5}, "probability is 1.5, expected 0 to 1"),
    ],
)
def test_what_mixing_refuses(labels: Tensor, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mix_frames(_batch(), labels, 6, _generator(), **arguments)


@pytest.mark.parametrize("wrong", [{"probability": -0.1}, {"probability": float("nan")}, {"beta": 0.0}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EventMix(**wrong)


# ------------------------------------------------------------------------------------------------- draws and parts


def _recordings(count: int = 7, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Counts, or in floats what resizing makes of counts; with the channels last in memory."""
    frames = torch.rand(count, 4, 6, 7, 2, generator=_generator()) * 9
    return (frames if dtype.is_floating_point else frames.floor()).to(dtype).permute(0, 1, 4, 2, 3)


def _drawn(count: int = 7, seed: int = 0, probability: float = 0.7) -> MixDraws:
    return EventMix(probability).draw(count, (4, 6, 7), _generator(seed))


def test_a_mix_computed_by_hand() -> None:
    """Density, t = 0: 1 and 0.1, t = 1: 0.5 and 0.05. Half of the four cells are the first of each step.

    Of a 6 + 2 of 10 events are kept, 0.8; of b 1 + 3 of 20 are put in, 0.2: w = 0.8 / (0.8 + 0.2).
    """
    a = torch.tensor([[1, 6], [1, 2]], dtype=torch.int16)
    b = torch.tensor([[1, 9], [3, 7]], dtype=torch.int16)
    frames = torch.stack([b, a])[:, :, None, None, :]  # [B = 2, T = 2, C = 1, H = 1, W = 2]
    one = torch.tensor([[[1.0]]])
    draws = MixDraws(
        own=torch.tensor([1]),
        partner=torch.tensor([0]),
        share=torch.tensor([0.5], dtype=torch.float64),
        over_time=torch.tensor([[[1.0, 0.5]]]),
        over_rows=one,
        over_columns=torch.tensor([[[1.0, 0.1]]]),
    )
    mixed, targets = EventMix().apply(frames, torch.tensor([3, 1]), 4, draws)
    assert mixed.flatten().tolist() == [1, 6, 3, 2]
    torch.testing.assert_close(targets, torch.tensor([[0.0, 0.8, 0.0, 0.2]]))


@given(seed=st.integers(0, 99))
@settings(max_examples=50)
def test_a_region_holds_the_densest_cells_and_as_many_as_fit(seed: int) -> None:
    """By the formula in float64. A level is at most 1/8192 of a density wide; the rest of 1/8000 is for rounding."""
    draws = EventMix(1.0).draw(4, (8, 30, 31), _generator(seed))
    regions = event_mix._region(draws, torch.arange(4), torch.device("cpu")).flatten(1)
    profiles = (draws.over_time.double(), draws.over_rows.double(), draws.over_columns.double())
    densities = torch.einsum("bgt,bgh,bgw->bthw", *profiles).flatten(1).clamp(min=1e-37)
    for region, density, share in zip(regions, densities, draws.share.tolist(), strict=True):
        cells = round(share * 8 * 30 * 31)
        next_level = density[~region].max() * (1 - 1 / 8000)
        assert bool((density[region] > next_level).all())
        assert int(region.sum()) <= cells < int((density >= next_level).sum())


def test_events_are_summed_exactly_in_any_order() -> None:
    frames = torch.rand(3, 6, 2, 20, 21, generator=_generator()).mul(50).half()
    shuffled = frames.flatten(1)[:, torch.randperm(5040, generator=_generator())].view_as(frames)
    exact = [sum(map(Fraction, row)) for row in frames.flatten(1).tolist()]
    for events in (event_mix._events(frames), event_mix._events(shuffled), event_mix._events(frames.transpose(1, 4))):
        assert events.tolist() == torch.tensor([float(one) for one in exact]).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
def test_rows_do_not_see_each_other(dtype: torch.dtype, last: bool) -> None:
    """Each result, computed from its own two recordings alone, equals that of the whole batch bit for bit."""
    frames, labels, draws = _recordings(dtype=dtype), torch.arange(7) % 3, _drawn(seed=2)
    frames = frames if last else frames.contiguous()
    whole, targets = EventMix().apply(frames, labels, 3, draws)
    assert 2 < int((draws.share > 0).sum()) < 7
    assert int((targets.amax(1) < 1).sum()) > 1
    for row in range(7):
        part, needed = draws.part(slice(row, row + 1))
        assert len(needed) == (2 if part.own != part.partner else 1)
        one, target = EventMix().apply(frames[needed], labels[needed], 3, part)
        assert torch.equal(one[0], whole[row])
        assert torch.equal(target[0], targets[row])


@given(first=st.integers(0, 7), count=st.integers(0, 7), seed=st.integers(0, 99))
def test_a_part_needs_its_rows_and_their_partners_once(first: int, count: int, seed: int) -> None:
    draws, rows = _drawn(seed=seed), slice(first, min(first + count, 7))
    part, needed = draws.part(rows)
    assert set(needed.tolist()) == {*draws.own[rows].tolist(), *draws.partner[rows].tolist()}
    assert needed.tolist() == sorted(set(needed.tolist()))
    assert torch.equal(needed[part.own], draws.own[rows])
    assert torch.equal(needed[part.partner], draws.partner[rows])
    frames, labels = _recordings(), torch.arange(7)
    whole = EventMix().apply(frames, labels, 7, draws)
    for ours, theirs in zip(EventMix().apply(frames[needed], labels[needed], 7, part), whole, strict=True):
        assert torch.equal(ours, theirs[rows])


def test_all_results_need_all_recordings_in_their_order() -> None:
    draws = _drawn()
    part, needed = draws.part(slice(None))
    assert torch.equal(needed, torch.arange(7))
    for field in fields(MixDraws):
        assert torch.equal(getattr(part, field.name), getattr(draws, field.name))
    assert (len(draws), draws.shape) == (7, (4, 6, 7))


def test_who_is_not_mixed_needs_nobody() -> None:
    draws = _drawn(200, probability=0.3)
    mixed = draws.share > 0
    assert 30 < int(mixed.sum()) < 90  # five standard deviations
    assert torch.equal(draws.partner[~mixed], draws.own[~mixed])
    assert int((draws.partner[mixed] != draws.own[mixed]).sum()) >= int(mixed.sum()) - 6  # a permutation's fixed points


def test_partners_are_a_permutation() -> None:
    draws = _drawn(probability=1.0)
    assert sorted(draws.partner.tolist()) == draws.own.tolist() == list(range(7))


def test_called_it_draws_and_applies() -> None:
    frames, labels = _recordings(), torch.arange(7)
    mix = EventMix(0.7)
    expected = mix.apply(frames, labels, 7, _drawn())
    for ours, theirs in zip(mix(frames, labels, 7, _generator()), expected, strict=True):
        assert torch.equal(ours, theirs)
    timed, targets = mix_frames(frames.transpose(0, 1), labels, 7, _generator(), probability=0.7)
    assert torch.equal(timed.transpose(0, 1), expected[0])
    assert torch.equal(targets, expected[1])


@pytest.mark.parametrize("last", [False, True])
def test_the_layout_of_recordings_stays_and_they_are_not_modified(last: bool) -> None:
    frames = _recordings() if last else _recordings().contiguous()
    before = frames.clone()
    mixed, _ = EventMix(1.0)(frames, torch.arange(7), 7, _generator())
    assert mixed.stride() == frames.stride()
    assert torch.equal(frames, before)
    assert not torch.equal(mixed, before)


def test_randomness_never_changes() -> None:
    """Runs are comparable over versions only while this stays what it is."""
    mixed, targets = EventMix(0.7)(_recordings(), torch.arange(7), 7, _generator(3))
    assert int((mixed.long() * torch.arange(mixed.numel()).view_as(mixed)).sum()) == 11088206
    assert targets.amax(1).sum().item() == pytest.approx(5.743996, abs=1e-5)  # float32


def test_no_recordings_make_no_results() -> None:
    part, needed = _drawn().part(slice(0, 0))
    mixed, targets = EventMix().apply(_recordings()[needed], torch.arange(7)[needed], 3, part)
    assert mixed.shape == (0, 4, 2, 6, 7)
    assert targets.shape == (0, 3)


@pytest.mark.parametrize(
    ("frames", "labels", "message"),
    [
        (
            _recordings()[0],
            torch.arange(7),
            r"frames have shape \[4, 2, 6, 7\] and labels \[7\], expected \[B, T, C, H",
        ),
        (_recordings(), torch.arange(6), r"labels \[6\].*frames\.transpose\(0, 1\)"),
        (
            _recordings()[:, 1:],
            torch.arange(7),
            r"\[7, 3, 2, 6, 7\], but the draws are for 7 recordings or more with T",
        ),
        (_recordings(6), torch.arange(6), r"frames have shape \[6, 4, 2, 6, 7\], but the draws are for 7 recordings"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(frames: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EventMix().apply(frames, labels, 7, _drawn(probability=1.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_device_does_not_matter(dtype: torch.dtype) -> None:
    frames, labels = _recordings(40, dtype), torch.arange(40) % 3
    mixed, targets = EventMix(0.7)(frames.cuda(), labels.cuda(), 3, _generator())
    expected, expected_targets = EventMix(0.7)(frames, labels, 3, _generator())
    assert torch.equal(mixed.cpu(), expected)
    torch.testing.assert_close(targets.cpu(), expected_targets)  # multiply-add may be fused


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_generator_on_the_device_is_refused() -> None:
    with pytest.raises(ValueError, match="generator is on cuda"):
        EventMix().draw(1, (4, 6, 7), torch.Generator("cuda"))
