"""Losses on logits over time, `[T, B, K]`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ranvier.checks import check_logits, check_positive


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the mean logits.

        L = -log softmax(1/T sum_t logits[t])[label],    mean over the batch
        L = -sum_k p[k] log softmax(1/T sum_t logits[t])[k]    where labels are probabilities p

    Args:
        logits: `[T, B, K]`.
        labels: Class indices, int64 `[B]`, or probabilities of the classes, floating `[B, K]`.
        label_smoothing: Share of the target that is spread over all classes.

    Returns:
        Scalar.

    Raises:
        ValueError: Wrong shapes or dtype; on a CPU also labels out of range, or probabilities that do not sum to 1.

    >>> round(cross_entropy(torch.zeros(4, 1, 10), torch.tensor([3])).item(), 4)  # log 10
    2.3026
    """
    check_logits(logits, labels, soft=True)
    logits = _at_least_float32(logits)
    return F.cross_entropy(logits.mean(0), _target(labels, logits), label_smoothing=label_smoothing)


def tet(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, mean: float = 1.0, weight: float = 0.05
) -> Tensor:
    """Temporal efficient training: cross-entropy at every step, and a pull of all logits to a common mean.

        L = (1 - weight) 1/T sum_t CE(logits[t], label) + weight MSE(logits, mean)

    Args:
        logits: `[T, B, K]`.
        labels: Class indices, int64 `[B]`, or probabilities of the classes, floating `[B, K]`.
        label_smoothing: Share of the target that is spread over all classes.
        mean: Value that logits are pulled to (in the paper, the threshold of the output).
        weight: Share of the pull, in [0, 1].

    Returns:
        Scalar.

    Raises:
        ValueError: Wrong shapes or dtype, or `weight` outside [0, 1]; on a CPU also labels out of range, or
            probabilities that do not sum to 1.

    Source: Deng et al. 2022, "Temporal Efficient Training of Spiking Neural Network via Gradient Re-weighting" (TET).
    """
    check_logits(logits, labels, soft=True)
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is {weight}, but must lie in [0, 1].")
    logits, steps = _at_least_float32(logits), logits.shape[0]
    target = _target(labels, logits)
    target = target.repeat(steps) if target.ndim == 1 else target.repeat(steps, 1)
    each_step = F.cross_entropy(logits.flatten(0, 1), target, label_smoothing=label_smoothing)
    return (1 - weight) * each_step + weight * (logits - mean).square().mean()


def temporal_consistency(logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Temporal consistency (ETC): every step teaches every other step.

        P[t] = softmax(logits[t] / temperature)
        L    = temperature^2 / (T (T - 1)) sum_t sum_{m != t} KL(P[m] || P[t]),   P[m] as teacher detached

    It is computed in O(T): for each student t all teachers together act as their mean,
    Q[t] = (sum_m P[m] - P[t]) / (T - 1). The gradient is that of the all-pairs form,

        dL/dlogits[t] = temperature / ((T - 1) B) (P[t] - mean_m P[m]),

    which sums to zero over t: the loss never moves the mean logit, it only draws the steps together.

    Args:
        logits: `[T, B, K]` with T >= 2.
        temperature: Softens the distributions.

    Returns:
        Scalar: sum over classes, mean over the batch. Zero if all steps agree.

    Raises:
        ValueError: Fewer than two steps, a wrong shape, or a temperature that is not positive.

    Source: Zhao et al. 2025, "Improving Stability and Performance of Spiking Neural Networks through Enhancing Temporal
    Consistency", Pattern Recognition 159, 111094. Differs from it in: O(T) instead of all pairs; the gradient that the
    paper prints carries temperature^2, the true factor is temperature.

    >>> temporal_consistency(torch.ones(4, 2, 10)).item()
    0.0
    """
    check_logits(logits)
    check_positive("temperature", temperature)
    steps, batch, _ = logits.shape
    if steps < 2:
        raise ValueError(
            "temporal consistency compares time steps, but the logits have T = 1. "
            "Train with at least two steps (the network may be run with one afterwards), or leave this loss out."
        )
    student = F.log_softmax(_at_least_float32(logits) / temperature, dim=-1)
    p = student.detach().exp()
    teacher = (p.sum(0, keepdim=True) - p) / (steps - 1)
    # KL(P_m || P_t) = entropy part of the teachers - cross part; the teachers' part carries no gradient but makes the
    # value a divergence: zero when all steps agree.
    entropy = (p * student.detach()).sum()
    divergence = entropy - (teacher * student).sum()
    return temperature**2 / (steps * batch) * divergence


def _at_least_float32(logits: Tensor) -> Tensor:
    """At bfloat16, which an autocast model may return, the differences between steps would be mostly rounding."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _target(labels: Tensor, logits: Tensor) -> Tensor:
    """Class indices as they are; probabilities in the precision that the loss is taken in."""
    return labels.to(logits.dtype) if labels.is_floating_point() else labels
