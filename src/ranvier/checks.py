"""The wording of errors that several parts share: what came, what was expected, what to do."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor


def shape_of(tensor: Tensor) -> str:
    """Shape as it is written in messages, `[4, 16, 10]`."""
    return str(list(tensor.shape))


def check_number(name: str, value: object) -> None:
    """Raise where `value` is text, as from a file or a command line, or None."""
    if value is None or isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, but must be a number.")


def check_positive(name: str, value: float) -> None:
    """Raise unless `value` is greater than zero."""
    check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name} is {value}, but must be greater than 0.")


def check_count(name: str, value: int) -> int:
    """`value` as an int, which may come as one of numpy; raises unless it is a whole number of at least 1."""
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name} is {value}, but must be a whole number of at least 1.")
    return count


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, choices))}.")


def check_channels(num_channels: int | None) -> None:
    """Raise unless the first argument of a neuron is a channel count or None."""
    if num_channels is None or (isinstance(num_channels, int) and num_channels >= 1):
        return
    raise TypeError(
        f"the first argument of a neuron is its channel count, an int of at least 1, but {num_channels!r} came. "
        "Pass the numbers of the neuron by keyword: LIF(tau=2.0, v_threshold=0.5)."
    )


def check_sequence(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is a time-first sequence `[T, B, ...]` with at least one step."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, but must be a torch.Tensor [T, B, ...]; torch.as_tensor makes one."
        )
    if tensor.ndim < 2:
        raise ValueError(
            f"{name} has shape {shape_of(tensor)}, but must be time-first, [T, B, ...]. "
            f"For a single step add the time axis: {name}.unsqueeze(0)."
        )
    if tensor.shape[0] == 0:
        raise ValueError(f"{name} has shape {shape_of(tensor)}: T = 0 steps. Pass at least one step.")


def check_logits(logits: Tensor, labels: Tensor | None = None, *, soft: bool = False) -> None:
    """Raise unless `logits` is `[T, B, K]` and `labels`, if given, is `[B]` of torch.int64, in range (on a CPU).

    With `soft`, labels may also be probabilities `[B, K]` of any float: not negative, with sums of 1 (on a CPU).
    """
    if logits.ndim != 3:
        raise ValueError(
            f"logits have shape {shape_of(logits)}, but must be [T, B, K]: class scores per step and sample. "
            "A model of ranvier.models returns this; for the output of a single step use logits.unsqueeze(0)."
        )
    if logits.shape[1] == 0:
        raise ValueError(f"logits have shape {shape_of(logits)}: no samples. Skip empty batches.")
    if logits.shape[0] == 0:
        raise ValueError(f"logits have shape {shape_of(logits)}: T = 0 steps. Run the model for at least one step.")
    if labels is None:
        return
    probabilities = soft and labels.is_floating_point() and labels.shape == logits.shape[1:]
    if not probabilities and (labels.shape != logits.shape[1:2] or labels.dtype != torch.int64):
        raise ValueError(
            f"labels have shape {shape_of(labels)} and dtype {labels.dtype}, but logits {shape_of(logits)} need "
            f"[{logits.shape[1]}] class indices of dtype torch.int64: labels.long()"
            + (f"; or floating probabilities {shape_of(logits[0])}." if soft else ".")
        )
    # On a GPU reading the labels would wait for the device, in a compiled graph it would break the graph.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        if probabilities:
            check_probabilities(labels)
        else:
            check_labels(labels, logits.shape[2])


def check_probabilities(probabilities: Tensor) -> None:
    """Raise, naming the first offender, unless each row of `[B, K]` has no negative and sums to 1, within 0.001.

    Reads the values, which waits for the device.
    """
    sums = probabilities.sum(1, dtype=torch.promote_types(probabilities.dtype, torch.float32))
    right = (probabilities >= 0).all(1) & ((sums - 1).abs() <= 1e-3)  # a NaN is not right
    if not bool(right.all()):
        index = int((~right).nonzero()[0, 0])
        raise ValueError(
            f"the probabilities at index {index} have a least value of {float(probabilities[index].min()):.4g} and sum "
            f"to {float(sums[index]):.4g}; {int((~right).sum())} of {len(right)} rows are not distributions. Pass "
            "values >= 0 that sum to 1 over the classes, such as labels.softmax(1)."
        )


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise, naming the first offender, unless every label lies in `0 .. num_classes - 1`.

    Reads the values, which waits for the device.
    """
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(wrong):
        index = int(wrong[0, 0])
        raise ValueError(
            f"label {int(labels[index])} at index {index} is out of range for {num_classes} classes (0 to "
            f"{num_classes - 1}); {len(wrong)} of {len(labels)} labels are. Fix the labels or num_classes."
        )
