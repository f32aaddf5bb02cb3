from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ranvier.data.events import FrameAugmentation, frame_augment

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


def test_the_global_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    ALL(_frames(), _generator())
    assert torch.equal(torch.get_rng_state(), state)
