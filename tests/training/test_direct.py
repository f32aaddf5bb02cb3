import pytest
import torch

from ranvier import losses
from ranvier.training import DirectLoss
from ranvier.training.direct import Method

LOGITS = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DirectLoss("direct"), losses.cross_entropy(LOGITS, LABELS)),
        (DirectLoss("direct", label_smoothing=0.1), losses.cross_entropy(LOGITS, LABELS, label_smoothing=0.1)),
        (
            DirectLoss("etc", consistency_weight=2.0, temperature=3.0),
            losses.cross_entropy(LOGITS, LABELS) + 2 * losses.temporal_consistency(LOGITS, temperature=3.0),
        ),
        (DirectLoss("tet", tet_weight=0.2), losses.tet(LOGITS, LABELS, weight=0.2)),
    ],
)
def test_methods_are_the_documented_sums(loss: DirectLoss, expected: torch.Tensor) -> None:
    value, logits = loss(lambda images, steps: LOGITS, torch.empty(0), LABELS, 3)
    assert torch.equal(value, expected)
    assert torch.equal(logits, LOGITS)


def test_loss_is_taken_in_float32() -> None:
    value, logits = DirectLoss("etc")(lambda images, steps: LOGITS.bfloat16(), torch.empty(0), LABELS, 3)
    assert value.dtype == logits.dtype == torch.float32


@pytest.mark.parametrize("method", ["direct", "etc", "tet"])
def test_labels_may_be_probabilities(method: Method) -> None:
    """One-hot ones mean the same; of two classes the loss lies between, as their shares do."""
    loss, other = DirectLoss(method, label_smoothing=0.1), (LABELS + 1) % 4
    own, others = (torch.nn.functional.one_hot(labels, 4).float() for labels in (LABELS, other))
    torch.testing.assert_close(loss.of_logits(LOGITS, own), loss.of_logits(LOGITS, LABELS))  # float32
    value, _ = loss(lambda images, steps: LOGITS, torch.empty(0), 0.75 * own + 0.25 * others, 3)
    expected = 0.75 * loss.of_logits(LOGITS, LABELS) + 0.25 * loss.of_logits(LOGITS, other)
    torch.testing.assert_close(value, expected)  # float32


def test_consistency_needs_two_steps() -> None:
    with pytest.raises(ValueError, match="--steps 2 or more"):
        DirectLoss("etc").check_steps(1)
    DirectLoss("direct").check_steps(1)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -3.0}, {"tet_weight": 2.0}, {"label_smoothing": 2.0}, {"consistency_weight": -1.0}]
)
def test_wrong_numbers_are_refused_before_any_work(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DirectLoss(**wrong)


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="'etc'"):
        DirectLoss("ect")  # type: ignore[arg-type]
