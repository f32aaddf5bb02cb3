from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ranvier.data.events import FrameSet


def _set(count: int = 12, num_classes: int = 3) -> FrameSet:
    """Recording i has i everywhere."""
    frames = torch.arange(count, dtype=torch.int16)[:, None, None, None, None].expand(-1, 4, 2, 3, 5)
    return FrameSet(frames, torch.arange(count) % num_classes, tuple("abcdefgh"[:num_classes]), "numbers")


def _numbers(part: FrameSet) -> list[int]:
    """Which recordings are in `part`."""
    return part.read(torch.arange(len(part)))[:, 0, 0, 0, 0].tolist()


def test_what_it_says_of_itself() -> None:
    numbers = _set()
    assert (len(numbers), numbers.num_classes, numbers.steps, numbers.shape) == (12, 3, 4, (2, 3, 5))
    assert numbers.num_bytes == 12 * 4 * 2 * 3 * 5 * 2
    assert numbers.first(5).num_bytes == 5 * 4 * 2 * 3 * 5 * 2


def test_reading_in_any_order_gives_copies() -> None:
    frames = torch.arange(12.0).view(3, 2, 2, 1, 1)
    numbers = FrameSet(frames, torch.zeros(3).long(), ("a",), "numbers")
    read = numbers.read(torch.tensor([2, 0, 2]))
    assert torch.equal(read, frames[[2, 0, 2]])
    read.zero_()
    assert frames.sum() == 66


def test_parts_share_the_frames() -> None:
    numbers = _set()
    rest, held_out = numbers.hold_out(3, seed=0)
    for part in (rest, held_out, numbers.first(2), held_out.first(1), next(iter(rest.folds(3, 0)))[0]):
        assert part.frames is numbers.frames


def test_holding_out_keeps_proportions_order_and_labels() -> None:
    rest, held_out = _set().hold_out(6, seed=0)
    assert sorted(_numbers(rest) + _numbers(held_out)) == list(range(12))
    for part in (rest, held_out):
        assert _numbers(part) == sorted(_numbers(part))
        assert part.labels.bincount().tolist() == [2, 2, 2]
        assert [number % 3 for number in _numbers(part)] == part.labels.tolist()


def test_a_part_of_a_part() -> None:
    rest, _ = _set().hold_out(3, seed=0)
    again, held_out = rest.hold_out(3, seed=1)
    assert sorted(_numbers(again) + _numbers(held_out)) == _numbers(rest)
    assert [number % 3 for number in _numbers(held_out)] == held_out.labels.tolist()
    assert _numbers(rest.take(torch.tensor([4, 0]))) == [_numbers(rest)[4], _numbers(rest)[0]]


def test_the_seed_decides() -> None:
    assert _numbers(_set().hold_out(3, 1)[1]) == _numbers(_set().hold_out(3, 1)[1])
    assert len({tuple(_numbers(_set().hold_out(3, seed)[1])) for seed in range(8)}) > 1
    assert len({tuple(_numbers(next(_set().folds(3, seed))[1])) for seed in range(8)}) > 1


def test_splits_never_change() -> None:
    """Runs are comparable over versions only while these stay what they are."""
    assert _numbers(_set().hold_out(3, seed=7)[1]) == [6, 10, 11]
    assert [_numbers(test) for _, test in _set().folds(3, seed=7)] == [[0, 1, 5, 9], [3, 4, 7, 11], [2, 6, 8, 10]]


@given(count=st.integers(2, 30), num_classes=st.integers(1, 5), k=st.integers(2, 6), seed=st.integers(0, 3))
def test_folds_test_each_recording_once_in_proportion(count: int, num_classes: int, k: int, seed: int) -> None:
    numbers, k = _set(count, num_classes), min(k, count)
    tested: list[int] = []
    by_class: list[Tensor] = []
    for train, test in numbers.folds(k, seed):
        assert sorted(_numbers(train) + _numbers(test)) == list(range(count))
        assert _numbers(train) == sorted(_numbers(train))
        tested += _numbers(test)
        by_class.append(test.labels.bincount(minlength=num_classes))
    assert sorted(tested) == list(range(count))
    counts = torch.stack(by_class)
    assert len(counts) == k
    assert int((counts.amax(0) - counts.amin(0)).max()) <= 1
    assert int(counts.sum(1).max() - counts.sum(1).min()) <= 1


@pytest.mark.parametrize(("count", "length"), [(0, 1), (1, 1), (5, 5), (99, 12)])
def test_first(count: int, length: int) -> None:
    assert _numbers(_set().first(count)) == list(range(length))


def test_moving_to_where_it_is_copies_nothing() -> None:
    part = _set().take(torch.tensor([7, 2]))
    assert part.to("cpu") is part


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_moving_takes_the_rows_of_the_set_only() -> None:
    moved = _set().take(torch.tensor([7, 2])).to("cuda")
    assert moved.frames.shape == (2, 4, 2, 3, 5)
    assert moved.labels.device.type == moved.frames.device.type == "cuda"
    assert moved.to("cuda") is moved
    assert moved.read(torch.tensor([1, 0], device="cuda"))[:, 0, 0, 0, 0].tolist() == [2, 7]
    assert moved.hold_out(1, seed=0)[0].frames is moved.frames


GOOD: dict[str, Any] = {
    "frames": torch.zeros(3, 4, 2, 5, 5),
    "labels": torch.tensor([0, 1, 1]),
    "classes": ("a", "b"),
    "name": "set",
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"frames": torch.zeros(3, 4, 2, 5, 5).double()},
            TypeError,
            "frames have dtype torch.float64, expected one of",
        ),
        (
            {"frames": torch.zeros(3, 2, 5, 5)},
            ValueError,
            r"frames have shape \[3, 2, 5, 5\], expected \[N, T, C, H, W",
        ),
        ({"frames": torch.zeros(3, 0, 2, 5, 5)}, ValueError, r"frames have shape \[3, 0, 2, 5, 5\]"),
        ({"labels": torch.tensor([0.0, 1.0, 1.0])}, TypeError, "labels have dtype torch.float32, expected torch.int64"),
        ({"labels": torch.tensor([0, 1])}, ValueError, r"shape \[2\] but there are 3 recordings"),
        ({"labels": torch.tensor([0, 1, 2])}, ValueError, r"label 2 at index 2 is outside 0\.\.1"),
        ({"labels": torch.tensor([0, -1, 1])}, ValueError, r"label -1 at index 1 is outside 0\.\.1"),
        ({"frames": torch.zeros(0, 4, 2, 5, 5), "labels": torch.zeros(0).long()}, ValueError, "the set is empty"),
        ({"rows": torch.tensor([0, 1])}, ValueError, "there are 2 recordings"),
        ({"rows": torch.tensor([0, 3, 1])}, ValueError, r"row 3 at index 1 is outside 0\.\.2"),
        ({"rows": torch.tensor([0, -1, 1])}, ValueError, r"row -1 at index 1 is outside 0\.\.2"),
        ({"rows": torch.tensor([0, 2, 1]).int()}, TypeError, "rows have dtype torch.int32"),
        ({"rows": torch.tensor([[0, 2, 1]])}, ValueError, r"rows have shape \[1, 3\]"),
    ],
)
def test_what_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"set: .*{message}"):
        FrameSet(**GOOD | change)


def test_what_is_accepted() -> None:
    assert len(FrameSet(**GOOD)) == 3
    assert len(FrameSet(**GOOD | {"rows": torch.tensor([2, 2, 0])})) == 3


@pytest.mark.parametrize("count", [0, 12])
def test_holding_out_all_or_nothing_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"numbers: cannot hold out {count} of 12 recordings. Pass 1\.\.11"):
        _set().hold_out(count, seed=0)


@pytest.mark.parametrize("k", [1, 13])
def test_folds_that_cannot_be_are_refused_at_the_call(k: int) -> None:
    with pytest.raises(ValueError, match=rf"numbers: cannot make {k} folds of 12 recordings. Pass 2\.\.12"):
        _set().folds(k, seed=0)
