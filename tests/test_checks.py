"""Errors say what came, what was expected, and what to do."""

import numpy as np
import pytest
import torch

from ranvier import checks


@pytest.mark.parametrize("value", [1e-9, 1, float("inf")])
def test_positive_passes(value: float) -> None:
    checks.check_positive("tau", value)


@pytest.mark.parametrize("value", [0, -1.5, float("nan"), float("-inf")])
def test_not_positive_raises(value: float) -> None:
    with pytest.raises(ValueError, match=r"^tau is .*, but must be greater than 0\.$"):
        checks.check_positive("tau", value)


@pytest.mark.parametrize("value", [1, 4, np.int64(4), np.uint8(4), np.array(4), torch.tensor(4)])
def test_counts_come_as_any_whole_number(value: int) -> None:
    found = checks.check_count("levels", value)
    assert type(found) is int
    assert found == value


@pytest.mark.parametrize("value", [0, -3, 0.5, 2.0, float("nan"), True, False, np.int64(0), np.float64(2), "4", None])
def test_no_count_raises(value: float) -> None:
    with pytest.raises(ValueError, match=r"^levels is .*, but must be a whole number of at least 1\.$"):
        checks.check_count("levels", value)  # type: ignore[arg-type]


def test_choice() -> None:
    checks.check_choice("reset", "soft", ("hard", "soft"))
    with pytest.raises(ValueError, match=r"^reset is 'none', but must be one of 'hard', 'soft'\.$"):
        checks.check_choice("reset", "none", ("hard", "soft"))


@pytest.mark.parametrize("shape", [(1, 1), (4, 0), (4, 2, 3)])
def test_sequence_passes(shape: tuple[int, ...]) -> None:
    checks.check_sequence("x", torch.zeros(shape))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((), r"x has shape \[\], but must be time-first, \[T, B, \.\.\.\].*x\.unsqueeze\(0\)"),
        ((5,), r"x has shape \[5\], but must be time-first"),
        ((0, 5), r"x has shape \[0, 5\]: T = 0 steps"),
    ],
)
def test_no_sequence_raises(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checks.check_sequence("x", torch.zeros(shape))


def test_logits_pass() -> None:
    checks.check_logits(torch.zeros(4, 3, 5))
    checks.check_logits(torch.zeros(4, 3, 5), torch.tensor([0, 4, 2]))


def test_probabilities_pass_only_where_they_may() -> None:
    logits, probabilities = torch.zeros(4, 3, 5), torch.full((3, 5), 0.2)
    checks.check_logits(logits, probabilities, soft=True)
    checks.check_logits(logits, torch.tensor([0, 4, 2]), soft=True)
    with pytest.raises(ValueError, match=r"labels have shape \[3, 5\] and dtype torch\.float32.*labels\.long\(\)\.$"):
        checks.check_logits(logits, probabilities)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_probabilities_may_be_rounded(dtype: torch.dtype) -> None:
    checks.check_probabilities(torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)).softmax(1).to(dtype))
    checks.check_probabilities(torch.tensor([[0.5, 0.5009]], dtype=dtype))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0.5, 0.502], r"probabilities at index 1 have a least value of 0\.5 and sum to 1\.002; 1 of 3 rows"),
        ([0.5, 0.498], r"sum to 0\.998"),
        ([1.1, -0.1], r"index 1 have a least value of -0\.1 and sum to 1;"),
        ([float("nan"), 1.0], r"index 1 have a least value of nan"),
        ([float("inf"), 0.0], r"sum to inf.*values >= 0 that sum to 1"),
    ],
)
def test_no_probabilities_raise(row: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checks.check_probabilities(torch.tensor([[0.0, 1.0], row, [0.3, 0.7]]))


def test_an_empty_batch_has_no_loss() -> None:
    with pytest.raises(ValueError, match="no samples"):
        checks.check_logits(torch.zeros(4, 0, 5), torch.zeros(0, dtype=torch.int64))


def test_labels_name_the_first_offender() -> None:
    checks.check_labels(torch.tensor([0, 9]), 10)
    with pytest.raises(
        ValueError, match=r"label 12 at index 1 is out of range for 10 classes \(0 to 9\); 2 of 4 labels"
    ):
        checks.check_labels(torch.tensor([0, 12, -1, 9]), 10)


def test_shape_of() -> None:
    assert checks.shape_of(torch.zeros(4, 16, 10)) == "[4, 16, 10]"
    assert checks.shape_of(torch.zeros(())) == "[]"
