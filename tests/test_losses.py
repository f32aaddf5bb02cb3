"""Losses on logits over time against their definitions written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranvier.losses import cross_entropy, temporal_consistency, tet


def random_logits(steps: int = 4, batch: int = 3, classes: int = 5, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(steps, batch, classes, dtype=torch.float64, generator=generator)).requires_grad_()


LABELS = torch.tensor([4, 0, 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_the_mean_logits(smoothing: float) -> None:
    logits = random_logits()
    expected = F.cross_entropy(logits.mean(0), LABELS, label_smoothing=smoothing)
    assert cross_entropy(logits, LABELS, label_smoothing=smoothing).item() == expected.item()


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[[2.0, 0.0]], [[0.0, 4.0]]])  # mean [1, 2]
    assert cross_entropy(logits, torch.tensor([0])).item() == pytest.approx(math.log(1 + math.e), rel=1e-6)  # float32


@pytest.mark.parametrize("weight", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_tet_is_its_formula(weight: float, smoothing: float) -> None:
    logits = random_logits()
    each = [F.cross_entropy(step, LABELS, label_smoothing=smoothing) for step in logits]
    expected = (1 - weight) * sum(each) / len(each) + weight * (logits - 0.7).square().mean()
    got = tet(logits, LABELS, label_smoothing=smoothing, mean=0.7, weight=weight)
    assert got.item() == pytest.approx(expected.item(), rel=1e-13)  # float64, other order of sums


def test_tet_by_hand() -> None:
    logits = torch.zeros(2, 1, 2)
    # Cross-entropy log 2 at both steps; distance to the mean 1 is 1.
    assert tet(logits, torch.tensor([0])).item() == pytest.approx(0.95 * math.log(2) + 0.05, rel=1e-6)  # float32


def test_tet_scores_every_step_where_cross_entropy_scores_the_mean() -> None:
    logits = torch.tensor([[[8.0, 0.0]], [[0.0, 8.0]]])
    assert cross_entropy(logits, torch.tensor([0])).item() == pytest.approx(math.log(2), rel=1e-6)
    assert tet(logits, torch.tensor([0]), weight=0.0).item() == pytest.approx(4, rel=1e-3)  # (0 + 8) / 2, nearly


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_tet_weight_outside_the_unit_interval_raises(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weight is .* must lie in \[0, 1\]"):
        tet(random_logits(), LABELS, weight=weight)


def all_pairs(logits: Tensor, temperature: float) -> Tensor:
    """Temporal consistency as the paper writes it: each step teaches each other one, teachers detached."""
    steps, batch, _ = logits.shape
    total = torch.zeros((), dtype=logits.dtype)
    for t in range(steps):
        student = torch.log_softmax(logits[t] / temperature, dim=-1)
        for m in range(steps):
            if m != t:
                teacher = torch.softmax(logits[m].detach() / temperature, dim=-1)
                total = total + (teacher * (teacher.log() - student)).sum() / batch
    return temperature**2 / (steps * (steps - 1)) * total


def value_and_gradient(loss: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@given(
    steps=st.integers(2, 7),
    batch=st.integers(1, 4),
    classes=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([0.5, 1.0, 4.0, 16.0]),
)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_consistency_equals_all_pairs(steps: int, batch: int, classes: int, seed: int, temperature: float) -> None:
    logits = random_logits(steps, batch, classes, seed)
    got = value_and_gradient(temporal_consistency(logits, temperature=temperature), logits)
    expected = value_and_gradient(all_pairs(logits, temperature), logits)
    for mine, theirs in zip(got, expected, strict=True):
        # Float64: entropies of order 1 to 10 cancel, times temperature^2 up to 256 over a few hundred terms.
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("steps", "batch"), [(2, 1), (4, 3), (9, 2)])
def test_consistency_gradient_in_closed_form(steps: int, batch: int, temperature: float) -> None:
    """temperature / ((T - 1) B) (P[t] - mean P): the paper prints temperature^2."""
    logits = random_logits(steps, batch)
    _, gradient = value_and_gradient(temporal_consistency(logits, temperature=temperature), logits)
    p = torch.softmax(logits.detach() / temperature, dim=-1)
    expected = temperature / ((steps - 1) * batch) * (p - p.mean(0))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)  # float64
    assert gradient.sum(0).abs().max() < 1e-15  # never moves the mean logit
    assert gradient.abs().max() > 1e-3


def test_consistency_does_not_reach_the_teachers() -> None:
    """Hold all steps but one constant: the gradient of that one is the same, so it learns as a student only."""
    logits = random_logits()
    _, whole = value_and_gradient(temporal_consistency(logits), logits)
    student = logits[1].detach().clone().requires_grad_()
    mixed = torch.cat([logits[:1].detach(), student[None], logits[2:].detach()])
    _, alone = value_and_gradient(temporal_consistency(mixed), student)
    torch.testing.assert_close(alone, whole[1], rtol=1e-13, atol=1e-16)  # float64
    # Were teachers differentiated, the gradient would be that of the value, by finite differences.
    step = 1e-5
    bumped = logits.detach().clone()
    bumped[1, 0, 0] += step
    slope = (temporal_consistency(bumped) - temporal_consistency(logits.detach())).item() / step
    assert abs(slope - whole[1, 0, 0].item()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [2, 3, 10])
def test_steps_that_agree_cost_nothing(steps: int, dtype: torch.dtype) -> None:
    one = random_logits(1, 64, 10, seed=3).detach().to(dtype)
    logits = one.expand(steps, -1, -1).clone().requires_grad_()
    value, gradient = value_and_gradient(temporal_consistency(logits), logits)
    eps = torch.finfo(dtype).eps
    assert abs(value.item()) < 16 * 10 * eps  # temperature^2 times an entropy of at most log 10, some roundings
    assert gradient.abs().max().item() < 4 * eps


@pytest.mark.parametrize("seed", range(3))
def test_consistency_is_a_divergence(seed: int) -> None:
    assert temporal_consistency(random_logits(seed=seed)).item() > 0


def test_consistency_by_hand() -> None:
    """Two steps with P = (1/2, 1/2) and (3/4, 1/4): the mean of both KL divergences."""
    logits = torch.tensor([[[0.0, 0.0]], [[math.log(3), 0.0]]], dtype=torch.float64)
    there = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    back = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert temporal_consistency(logits, temperature=1.0).item() == pytest.approx((there + back) / 2, rel=1e-13)


def test_consistency_of_one_step_raises() -> None:
    with pytest.raises(ValueError, match=r"logits have T = 1.*at least two steps"):
        temporal_consistency(random_logits(1))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_consistency_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature is .* greater than 0"):
        temporal_consistency(random_logits(), temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits_stay_finite(dtype: torch.dtype, scale: float) -> None:
    logits = (torch.tensor([1.0, -1.0, 0.5]) * scale).repeat(4, 2, 1).to(dtype)
    logits[1] = -logits[1]
    labels = torch.tensor([0, 1])
    for loss in (cross_entropy, lambda z, _: temporal_consistency(z)):
        z = logits.clone().requires_grad_()
        value, gradient = value_and_gradient(loss(z, labels), z)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_bfloat16_logits_are_computed_in_float32() -> None:
    """Small differences between steps are what the loss is about: at bfloat16 they would be rounded away."""
    logits = random_logits(4, 64, 10).detach().bfloat16().requires_grad_()
    value, gradient = value_and_gradient(temporal_consistency(logits), logits)
    exact = logits.detach().double().requires_grad_()
    exact_value, exact_gradient = value_and_gradient(temporal_consistency(exact), exact)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact_value.item(), rel=1e-5)  # float32 sum of 2560 terms
    # The gradient is rounded to bfloat16 once, at the end: 2^-9 relative.
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2**-8, atol=1e-9)
    assert cross_entropy(logits, torch.arange(64) % 10).dtype == torch.float32
    assert tet(logits, torch.arange(64) % 10).dtype == torch.float32


# --------------------------------------------------------------------------------------------------- probabilities


def test_cross_entropy_of_probabilities_by_hand() -> None:
    """Mean logits [0, log 3]: softmax [1/4, 3/4], so L = -(0.3 log 1/4 + 0.7 log 3/4)."""
    logits = torch.tensor([[[1.0, 0.0]], [[-1.0, 2 * math.log(3)]]])
    expected = -(0.3 * math.log(0.25) + 0.7 * math.log(0.75))
    assert cross_entropy(logits, torch.tensor([[0.3, 0.7]])).item() == pytest.approx(expected, rel=1e-6)  # float32


def test_tet_of_probabilities_by_hand() -> None:
    """Softmax [1/2, 1/2], then [1/4, 3/4]; distances to the mean 0 are 0, 0 and 0, log 3."""
    logits = torch.tensor([[[0.0, 0.0]], [[0.0, math.log(3)]]])
    steps = math.log(2), -(0.3 * math.log(0.25) + 0.7 * math.log(0.75))
    expected = 0.8 * sum(steps) / 2 + 0.2 * math.log(3) ** 2 / 4
    got = tet(logits, torch.tensor([[0.3, 0.7]]), mean=0.0, weight=0.2)
    assert got.item() == pytest.approx(expected, rel=1e-6)  # float32


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("loss", [cross_entropy, tet])
@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=20, derandomize=True)
def test_the_loss_is_linear_in_the_probabilities(loss: type, smoothing: float, seed: int) -> None:
    """That of shares of two classes is the shares of the losses of either; the gradient too."""
    logits = random_logits(seed=seed)
    other, share = (LABELS + 1) % 5, 0.3
    own, others = (F.one_hot(labels, 5).double() for labels in (LABELS, other))
    mixed = value_and_gradient(loss(logits, (1 - share) * own + share * others, label_smoothing=smoothing), logits)
    parts = [value_and_gradient(loss(logits, labels, label_smoothing=smoothing), logits) for labels in (LABELS, other)]
    for got, one, two in zip(mixed, *parts, strict=True):
        torch.testing.assert_close(got, (1 - share) * one + share * two, rtol=1e-12, atol=1e-14)  # float64


@pytest.mark.parametrize("loss", [cross_entropy, tet])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_of_any_float_give_a_loss_in_that_of_the_logits(loss: type, dtype: torch.dtype) -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])  # exact in all
    logits = random_logits(4, 2, 3).detach().float()
    value = loss(logits, probabilities.to(dtype))
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(logits, probabilities))
    assert loss(logits.bfloat16(), probabilities.to(dtype)).dtype == torch.float32


@pytest.mark.parametrize("loss", [cross_entropy, tet])
@pytest.mark.parametrize("soft", [False, True])
def test_losses_compile_without_a_graph_break(loss: type, soft: bool) -> None:
    logits = random_logits().detach().float()
    labels = F.one_hot(LABELS, 5).float() if soft else LABELS
    assert torch.equal(torch.compile(loss, fullgraph=True, backend="eager")(logits, labels), loss(logits, labels))


LABELLED = {"cross_entropy": cross_entropy, "tet": tet}


@pytest.mark.parametrize("name", [*LABELLED, "temporal_consistency"])
@pytest.mark.parametrize("shape", [(3, 5), (4,), (2, 4, 3, 5), (0, 3, 5)])
def test_wrong_logits_raise_with_their_shape(name: str, shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"logits have shape \[{', '.join(map(str, shape))}\]"):
        LABELLED[name](logits, LABELS) if name in LABELLED else temporal_consistency(logits)


@pytest.mark.parametrize("loss", LABELLED.values())
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), r"labels have shape \[4\].*logits \[4, 3, 5\] need \[3\] class indices"),
        (torch.zeros(3, 4), r"labels have shape \[3, 4\] and dtype torch\.float32.*or floating probabilities \[3, 5\]"),
        (torch.zeros(3, 5, dtype=torch.int64), r"labels have shape \[3, 5\] and dtype torch\.int64"),
        (torch.zeros(3, 5), r"probabilities at index 0 .* sum to 0; 3 of 3 rows are not distributions"),
        (torch.zeros(3), r"labels have shape \[3\] and dtype torch\.float32.*labels\.long\(\)"),
        (torch.zeros(3, dtype=torch.int32), r"dtype torch\.int32.*labels\.long\(\)"),
        (torch.tensor([0, 5, 1]), "label 5 at index 1 is out of range for 5 classes"),
        (torch.tensor([0, 1, -1]), "label -1 at index 2 is out of range for 5 classes"),
    ],
)
def test_wrong_labels_raise(loss: type, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(4, 3, 5), labels)
