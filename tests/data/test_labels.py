"""Class labels: what is refused, and what a stratified split keeps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ranvier.data.labels import check_labels, stratified_split

CLASSES = ("zero", "one")


@pytest.mark.parametrize(
    ("labels", "count", "error", "message"),
    [
        (
            torch.zeros(2),
            2,
            TypeError,
            r"set: labels have dtype torch.float32, expected torch.int64. .* labels.long\(\)",
        ),
        (torch.zeros(2).long(), 3, ValueError, r"shape \[2\] but there are 3 pictures; expected \[3\]"),
        (torch.zeros(2, 1).long(), 2, ValueError, r"shape \[2, 1\] but there are 2 pictures"),
        (torch.zeros(0).long(), 0, ValueError, "set: the set is empty. Pass at least one picture"),
        (torch.tensor([0, 2]), 2, ValueError, r"label 2 at index 1 is outside 0\.\.1 \(2 classes\)"),
        (torch.tensor([-1, 0]), 2, ValueError, "label -1 at index 0"),
    ],
)
def test_refused(labels: torch.Tensor, count: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_labels(labels, count, CLASSES, "set", of="picture")


@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.data())
def test_a_split_is_a_partition_in_proportion(numbers: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(numbers) - 1))
    labels = torch.tensor(numbers)
    rest, held_out = stratified_split(labels, count, data.draw(st.integers(0, 9)), "set", of="picture")
    assert len(held_out) == count
    assert torch.cat((rest, held_out)).sort().values.tolist() == list(range(len(numbers)))
    assert rest.tolist() == sorted(rest.tolist())
    assert held_out.tolist() == sorted(held_out.tolist())
    for label in set(numbers):
        share = numbers.count(label) * count / len(numbers)
        assert abs(int((labels[held_out] == label).sum()) - share) < 1
