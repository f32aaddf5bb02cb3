from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ranvier.data.events import FrameAugmentation, frame_augment, mix_frames

ALL = FrameAugmentation(crop_padding=2, flip=True, shift=1, drop=0.7)
DTYPES = [torch.uint8, torch.int16, torch.float16, torch.float32]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _frames(count: int = 5, steps: int = 4, dtype: torch.dtype = torch.int16) -> Tensor:
    """No two cells of one recording are the same, and none is 0."""
    return (
        (torch.randperm(count * steps * 2 * 6 * 7, generator=_generator()) % 251 + 1).view(-1, steps, 2, 6, 7).to(dtype)
    )


def _draws(count: int, **columns: float) -> Tensor:
    """0.99 does nothing but crop and roll to the end; `columns` are by name, without the underscore."""
    draws = torch.full((count, frame_augment._NUM_DRAWS), 0.99, dtype=torch.float64)
    for name, value in columns.items():
        draws[:, getattr(frame_augment, f"_{name.upper()}")] = value
    return draws


# --------------------------------------------------------------------------------------------- one after the other


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_do(dtype: torch.dtype) -> None:
    frames = _frames(dtype=dtype)
    assert torch.equal(FrameAugmentation()(frames, _generator()), frames)


@pytest.mark.parametrize(("y", "x"), [(0.0, 0.0), (0.5, 0.5), (0.99, 0.3)])
def test_a_crop_is_a_window_of_the_padded_frames(y: float, x: float) -> None:
    frames = _frames()
    cropped = FrameAugmentation(crop_padding=2).apply(frames, _draws(5, crop_y=y, crop_x=x))
    top, left = int(5 * y), int(5 * x)
    padded = torch.zeros(5, 4, 2, 10, 11, dtype=torch.int16)
    padded[..., 2:8, 2:9] = frames
    assert torch.equal(cropped, padded[..., top : top + 6, left : left + 7])


def test_a_roll_loses_nothing() -> None:
    frames = _frames()
    rolled = FrameAugmentation(shift=2).apply(
        frames, _draws(5, shift_y=0.0, shift_x=0.7)
    )  # 4 = 3 of 0..4: 1 to the left
    assert torch.equal(rolled, frames.roll((2, -1), (3, 4)))


def test_a_flip_mirrors_columns() -> None:
    frames = _frames()
    draws = _draws(5)
    draws[1:3, frame_augment._FLIP] = 0.49
    flipped = FrameAugmentation(flip=True).apply(frames, draws)
    assert torch.equal(flipped[1:3], frames[1:3].flip(4))
    assert torch.equal(flipped[[0, 3, 4]], frames[[0, 3, 4]])


def test_an_interval_is_dropped() -> None:
    """Middles of 4 frames: 0.125, 0.375, 0.625, 0.875. Share 0.5 from 0.2 covers the second and the third."""
    draws = _draws(1, drop=0.0, drop_kind=0.0, drop_share=4.5 / 9, drop_first=0.2)
    frames = _frames(1)
    dropped = FrameAugmentation(drop=0.1).apply(frames, draws)
    assert torch.equal(dropped[:, [0, 3]], frames[:, [0, 3]])
    assert not dropped[:, 1:3].any()


def test_a_recording_keeps_a_frame() -> None:
    frames = _frames(1, steps=2)
    draws = _draws(1, drop=0.0, drop_kind=0.0, drop_share=0.99, drop_first=0.0)  # 0.9 from 0: both middles
    assert torch.equal(FrameAugmentation(drop=1.0).apply(frames, draws), frames)


def test_a_box_is_dropped() -> None:
    """0.25 of 6 x 7 pixels: round(1.5) = 2 rows, round(1.75) = 2 columns; first row 2 of 0..4, column 5 of 0..5."""
    draws = _draws(1, drop=0.0, drop_kind=0.5, drop_share=0.99, drop_first=0.5, drop_second=0.99)
    frames = _frames(1)
    dropped = FrameAugmentation(drop=0.1).apply(frames, draws)
    expected = frames.clone()
    expected[..., 2:4, 5:7] = 0
    assert torch.equal(dropped, expected)


def test_drop_takes_place_with_its_probability() -> None:
    frames = torch.ones(2000, 3, 2, 4, 4)
    changed = (FrameAugmentation(drop=0.3)(frames, _generator()) == 0).flatten(1).any(1).float().mean()
    assert 0.2 < changed < 0.3  # some intervals lie between two middles; six standard deviations are 0.06


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_frames_of_a_recording_change_alike(dtype: torch.dtype) -> None:
    frames = _frames(8, 1, dtype).expand(-1, 5, -1, -1, -1)
    changed = FrameAugmentation(crop_padding=2, flip=True, shift=2)(frames, _generator())
    assert changed.dtype == dtype
    assert torch.equal(changed, changed[:, :1].expand(-1, 5, -1, -1, -1))
    assert not torch.equal(changed, frames)


# -------------------------------------------------------------------------------------------------------- protocol


@given(cut=st.integers(0, 5), seed=st.integers(0, 99))
def test_rows_do_not_see_each_other(cut: int, seed: int) -> None:
    frames, draws = _frames(), ALL.draw(5, _generator(seed))
    whole = ALL.apply(frames, draws)
    parts = [ALL.apply(frames[rows], draws[rows]) for rows in (slice(cut), slice(cut, None))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("last", [False, True])
def test_the_layout_in_memory_does_not_matter(last: bool) -> None:
    frames = _frames()
    laid_out = frames.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) if last else frames.contiguous()
    before = laid_out.clone()
    changed = ALL(laid_out, _generator())
    assert torch.equal(changed, ALL(frames.clone(), _generator()))
    assert torch.equal(laid_out, before)
    if last:
        assert changed.permute(0, 1, 3, 4, 2).is_contiguous()


def test_switching_one_off_leaves_the_others() -> None:
    frames = _frames()
    flipped = FrameAugmentation(flip=True)(frames, _generator())
    both = FrameAugmentation(flip=True, drop=1.0)(frames, _generator())
    assert torch.equal(torch.where(both == 0, 0, flipped), both)


def test_randomness_never_changes() -> None:
    """Runs are comparable over versions only while this stays what it is."""
    changed = ALL(_frames(), _generator(3)).long()
    assert int((changed * torch.arange(changed.numel()).view_as(changed)).sum()) == 104995156


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_device_does_not_matter(dtype: torch.dtype) -> None:
    frames = _frames(dtype=dtype)
    assert torch.equal(ALL(frames.cuda(), _generator()).cpu(), ALL(frames, _generator()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_padding": -1}, "crop_padding is -1, expected pixels >= 0"),
        ({"shift": -1}, "shift is -1, expected pixels >= 0"),
        ({"drop": 1.1}, "drop is 1.1, expected a probability"),
        ({"drop": -0.1}, "drop is -0.1, expected a probability"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrameAugmentation(**arguments)


def test_shapes_that_do_not_fit_are_refused() -> None:
    frames = _frames()
    with pytest.raises(ValueError, match=r"frames have shape \[4, 2, 6, 7\] and draws \[4, 10\], expected \[B, T, C"):
        ALL.apply(frames[0], _draws(4))
    with pytest.raises(ValueError, match=r"draws \[4, 10\]"):
        ALL.apply(frames, _draws(4))
    with pytest.raises(ValueError, match="shift is 6, but the frames have 6x7 pixels. Pass at most 5"):
        FrameAugmentation(shift=6).apply(frames, _draws(5))
    assert FrameAugmentation(shift=5)(frames, _generator()).sum() == frames.sum()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_generator_on_the_device_is_refused() -> None:
    with pytest.raises(ValueError, match="generator is on cuda"):
        ALL.draw(1, torch.Generator("cuda"))


# -------------------------------------------------------------------------------------------------------- EventMix


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
    region = frame_augment._region((5, 12, 13), shares, _generator(seed), torch.device("cpu"))
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


def test_global_random_states_are_left_alone() -> None:
    state = torch.get_rng_state()
    mix_frames(_batch(), torch.arange(6), 6, _generator())
    ALL(_frames(), _generator())
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
