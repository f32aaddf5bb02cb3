"""Calibration images: what is wrong with them is said, and how they are split is settled."""

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ranvier.conversion import calibration
from ranvier.conversion.calibration import CalibrationImages, check_classes, gather

NAN, INFINITY = float("nan"), float("inf")


def numbered(count: int) -> Tensor:
    """Images `[N, 1, 2, 2]` that can be told apart by their values."""
    return torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def read(
    calibration: Any, *, batch_size: int = 4, held_out: float = 0.4, fit_at_most: int = 600, seed: int = 0
) -> CalibrationImages:
    return gather(
        calibration,
        batch_size=batch_size,
        held_out=held_out,
        fit_at_most=fit_at_most,
        seed=seed,
        device=torch.device("cpu"),
    )


def numbers(batches: tuple[Tensor, ...]) -> list[int]:
    return [int(image[0, 0, 0]) for batch in batches for image in batch]


# --- what is refused


def used_up() -> Iterator[Tensor]:
    batches = iter([numbered(3)])
    list(batches)
    return batches


def classes(*labels: int) -> Tensor:
    return torch.tensor(labels)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "labels only": (
        lambda: [classes(1, 2, 3)],
        TypeError,
        r"batch 0 is a tensor of torch.int64 and shape \[3\], but must be images.*Labels alone tell nothing",
    ),
    "labels only, one tensor": (lambda: classes(1, 2, 3), TypeError, "Labels alone tell nothing"),
    "a pair, not in a list": (
        lambda: (numbered(3), classes(1, 2, 3)),
        TypeError,
        r"batch 1 is a tensor of torch.int64.*a single pair goes into a list, \[\(images, labels\)\]",
    ),
    "integer images": (lambda: numbered(3).byte(), TypeError, r"torch.uint8 and shape \[3, 1, 2, 2\].*floating tensor"),
    "one number per image": (lambda: torch.rand(5), TypeError, r"torch.float32 and shape \[5\]"),
    "no tensor": (lambda: [{"image": numbered(3)}], TypeError, "batch 0 is a dict"),
    "array": (lambda: [numbered(3).numpy()], TypeError, "batch 0 is a ndarray"),
    "triple": (lambda: [(numbered(3), classes(1, 2, 3), 0)], TypeError, "batch 0 is a tuple"),
    "path": (lambda: "images/", TypeError, "batch 0 is a str"),
    "nothing": (lambda: None, TypeError, "calibration is a NoneType, but must be images"),
    "a number": (lambda: 1000, TypeError, "calibration is a int"),
    "empty list": (list, ValueError, "calibration is empty. Pass images"),
    "empty iterator": (lambda: iter([]), ValueError, "calibration is empty"),
    "used-up iterator": (used_up, ValueError, "an iterator that was used up before gives nothing"),
    "no images": (lambda: numbered(0), ValueError, "calibration is empty"),
    "empty batches": (lambda: [numbered(0), numbered(0)], ValueError, "calibration is empty"),
    "one image": (lambda: numbered(1), ValueError, r"holds 1 image,.*few hundred.*Settings\(held_out=0\)"),
    "NaN": (lambda: [numbered(3), numbered(2) * NAN], ValueError, "image 3 holds NaN or infinity. Mend the data"),
    "infinity": (lambda: numbered(3) * INFINITY, ValueError, "image 0 holds NaN or infinity"),
    "sizes": (
        lambda: [numbered(3), torch.rand(3, 1, 2, 3)],
        ValueError,
        r"batch 1 has images of shape \[1, 2, 3\], but the first had \[1, 2, 2\]. Resize",
    ),
    "some labels": (
        lambda: [(numbered(2), classes(0, 1)), numbered(2), numbered(2)],
        ValueError,
        "only 1 of 3 calibration batches have labels. Pass all or none",
    ),
    "too few labels": (
        lambda: [(numbered(3), classes(0, 1))],
        ValueError,
        r"labels of calibration batch 0 are a tensor of torch.int64 and shape \[2\], but 3 images need .* \[3\]",
    ),
    "labels one-hot": (lambda: [(numbered(3), torch.eye(3))], ValueError, r"torch.float32 and shape \[3, 3\]"),
    "labels of 32 bits": (lambda: [(numbered(2), classes(0, 1).int())], ValueError, "torch.int32.*need torch.int64"),
    "labels in a list": (lambda: [(numbered(2), [0, 1])], ValueError, "are a list, but 2 images need"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calibrations(name: str) -> None:
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        read(make())


def test_labels_out_of_range() -> None:
    images = read([(numbered(6), classes(0, 1, 2, 0, 1, 7))], held_out=0.0)
    check_classes(images, 8)
    with pytest.raises(ValueError, match=r"label 7 at index \d is out of range for 3 classes \(0 to 2\)"):
        check_classes(images, 3)
    with pytest.raises(ValueError, match="label -1"):
        check_classes(read([(numbered(2), classes(0, -1))], held_out=0.0), 3)
    check_classes(read(numbered(6)), 1)  # without labels there is nothing to check


# --- what is accepted


def test_one_image_is_enough_where_nothing_is_held_out() -> None:
    images = read(numbered(1), held_out=0.0)
    assert numbers(images.fitting) == numbers(images.choosing) == [0]
    assert (images.fitted, images.held_out) == (1, 0)


def test_constant_images_are_accepted_with_a_warning() -> None:
    for value in (0.0, 3.5):
        with pytest.warns(UserWarning, match="all 5 calibration images are the same"):
            images = read(torch.full((5, 3, 4, 4), value))
        assert images.fitted == 3
        assert all((batch == value).all() for batch in (*images.fitting, *images.choosing))


@pytest.mark.parametrize(
    "calibration",
    [
        pytest.param(lambda: numbered(10), id="tensor"),
        pytest.param(lambda: [numbered(10)[:7], numbered(10)[7:]], id="batches"),
        pytest.param(lambda: (x for x in numbered(10).split(3)), id="generator"),
        pytest.param(lambda: [[numbered(10), None]], id="labels that are None"),
        pytest.param(lambda: DataLoader(TensorDataset(numbered(10)), 4), id="a loader without labels"),
        pytest.param(lambda: [(x,) for x in numbered(10).split(3)], id="tuples of one"),
        pytest.param(lambda: [numbered(10), numbered(0)], id="an empty batch among others"),
    ],
)
def test_images_come_as_a_tensor_or_in_batches(calibration: Callable[[], Any]) -> None:
    images = read(calibration())
    assert sorted(numbers(images.fitting) + numbers(images.choosing)) == list(range(10))
    assert images.labels is None


def test_images_may_be_rows_of_features() -> None:
    assert read(torch.rand(10, 7)).fitting[0].shape[1:] == (7,)


def test_labels_stay_with_their_images() -> None:
    def pairs() -> Iterator[list[Tensor]]:
        for images in numbered(20).split(6):
            yield [images, images[:, 0, 0, 0].long() % 3]  # lists of two, as a data loader gives them

    for held_out in (0.0, 0.4):
        read_ = read(pairs(), held_out=held_out)
        assert read_.labels is not None
        assert [len(batch) for batch in read_.labels] == [len(batch) for batch in read_.choosing]
        assert torch.cat(read_.labels).tolist() == [number % 3 for number in numbers(read_.choosing)]


def test_the_callers_images_are_neither_changed_nor_kept() -> None:
    mine = numbered(10).requires_grad_()
    images = read(mine)
    assert not images.fitting[0].requires_grad
    images.fitting[0].fill_(-1.0)
    assert torch.equal(mine, numbered(10))


# --- the split


@pytest.mark.parametrize("count", [2, 3, 10, 41])
@pytest.mark.parametrize("held_out", [0.01, 0.4, 0.5, 0.99])
def test_the_split_is_disjoint_and_complete(count: int, held_out: float) -> None:
    """Neither part is ever empty, however small the share or what it leaves."""
    images = read(numbered(count), held_out=held_out)
    fitting, choosing = numbers(images.fitting), numbers(images.choosing)
    assert sorted(fitting + choosing) == list(range(count))
    assert len(choosing) == images.held_out == min(max(round(held_out * count), 1), count - 1)
    assert len(fitting) == images.fitted > 0


def test_with_nothing_held_out_all_images_serve_twice() -> None:
    images = read(numbered(10), held_out=0.0)
    assert numbers(images.fitting) == numbers(images.choosing)
    assert sorted(numbers(images.fitting)) == list(range(10))
    assert images.held_out == 0


def test_the_seed_decides() -> None:
    first, again, other = (read(numbered(50), seed=seed) for seed in (0, 0, 1))
    assert numbers(first.fitting) == numbers(again.fitting)
    assert numbers(first.choosing) == numbers(again.choosing)
    assert set(numbers(first.choosing)) != set(numbers(other.choosing))
    torch.manual_seed(123)
    assert numbers(read(numbered(50)).fitting) == numbers(first.fitting)  # whatever torch drew before
    assert torch.initial_seed() == 123


def test_images_are_shuffled() -> None:
    """Data sets are often sorted by class: a part of each must be held out, and batches be alike."""
    images = read(numbered(50), held_out=0.4)
    assert numbers(images.fitting) != sorted(numbers(images.fitting))
    assert len({number // 10 for number in numbers(images.choosing)}) > 3


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(10, 4, [4, 3, 3]), (8, 4, [4, 4]), (9, 8, [5, 4]), (3, 100, [3]), (5, 1, [1] * 5)],
)
def test_batches_are_even(count: int, batch_size: int, sizes: list[int]) -> None:
    """A correction is computed from one batch: a last one of a single image would undo the others."""
    images = read(numbered(count), held_out=0.0, batch_size=batch_size)
    assert [len(batch) for batch in images.fitting] == sizes


@pytest.mark.parametrize("first_look", [1, 8, 10, 99])
@pytest.mark.parametrize("batch", [1, 3, 4, 20])
@pytest.mark.parametrize("fastest", [2, 500])
def test_a_first_look_sees_the_same_images_whatever_the_batch(
    first_look: int, batch: int, fastest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best batch depends on the processor, and what is chosen should not."""
    images = numbered(25)
    whole = read(images)
    monkeypatch.setattr(calibration, "evaluation_batch_size", lambda *arguments, **named: fastest)
    found = gather(
        images,
        batch_size=batch,
        held_out=0.4,
        fit_at_most=600,
        seed=0,
        device=torch.device("cpu"),
        first_look=first_look,
    )
    assert numbers(found.choosing) == numbers(whole.choosing)
    assert numbers(found.fitting) == numbers(whole.fitting)
    ends = list(accumulate(map(len, found.choosing)))
    assert min(first_look, 10) in ends
    assert max(map(len, found.choosing)) <= min(batch, fastest)
    assert max(map(len, found.fitting)) <= batch
