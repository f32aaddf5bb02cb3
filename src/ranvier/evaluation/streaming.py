"""One step at a time: a network runs on each sample only until it is sure of its answer.

Means of logits are taken here in one way for all callers, so that a network that is streamed step by step stops where
its recorded logits say.
"""

import inspect
import math
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ranvier.checks import check_choice, check_count, check_positive, shape_of
from ranvier.evaluation.mode import device_of, evaluating
from ranvier.nn.time import steps_of

Measure = Literal["probability", "margin", "entropy"]
"""How sure an answer is, in [0, 1]: the largest probability, its lead over the second, or 1 - entropy / log K."""


class Answers(NamedTuple):
    """What a network answered, each sample after as many steps as it took to be sure."""

    logits: Tensor
    """Mean of the logits of the steps that were run, float64 `[B, K]`."""
    steps: Tensor
    """Steps that were run, int64 `[B]`, in 1 .. T."""

    @property
    def predictions(self) -> Tensor:
        """Class of the largest logit, int64 `[B]`; the first of several."""
        return self.logits.argmax(-1)


def run_until_confident(
    model: nn.Module,
    images: Tensor,
    steps: int | None,
    threshold: float,
    *,
    measure: Measure = "probability",
    temperature: float = 1.0,
) -> Answers:
    """Run a network one step at a time, each sample only until it is sure of its answer.

    Samples that have stopped leave the batch: their rows are taken out of the images and of every state that the
    network carries, and the next step runs on what is left. Answers and steps are those of the rule on the logits of
    one call of T steps; where the batch sizes make a layer round otherwise, up to that rounding. The device is waited
    for once a step, to learn how many samples are left.

    Layers before the first neuron run again at every step, which one call of T steps on constant images saves.

    Args:
        model: Called as `model(images [B, ...], 1, state=state, return_state=True)`, with None for the first state;
            returns logits `[1, B, K]` and its state: numbers, and tensors whose first axis is the batch, in tuples,
            lists, dictionaries or dataclasses. Evaluated in eval mode and put back. Compiled networks work, but may
            compile again for batch sizes that are left.
        images: A constant input `[B, ...]`, or a sequence `[T, B, ...]`, told apart by the `frame_dims` of the
            network; one that has none takes a sequence where `steps` is None. Moved to the model's device.
        steps: T, the most that are run; None for all of a sequence. Of a longer sequence the first are used.
        threshold: Confidence at which a sample stops; from `early_exit`. Infinity runs all steps.
        measure: What confidence is; as the threshold was chosen for.
        temperature: By which logits are divided; likewise.

    Returns:
        For each sample, in order, the mean of its logits, and the number of its steps.

    Raises:
        TypeError: The model does not stream, or its state holds something else.
        ValueError: No samples, images or logits that are not finite, a sequence shorter than `steps`, or a state
            without a batch axis.

    >>> from ranvier.models import mlp
    >>> logits, steps = run_until_confident(mlp([4, 8, 3]), torch.rand(2, 4), 4, threshold=0.0)
    >>> steps.tolist()
    [1, 1]
    """
    check_choice("measure", measure, get_args(Measure))
    check_temperature(temperature)
    if math.isnan(threshold):
        raise ValueError("threshold is NaN, at which no sample would ever stop. Pass one that early_exit chose.")
    _check_streams(model)
    frames = frames_of(model, images, steps, device_of(model))
    batch = frames.images.shape[1]
    if batch == 0:
        raise ValueError(f"images have shape {shape_of(images)}: no samples. Skip empty batches.")
    with evaluating(model), torch.inference_mode():
        state: Any = None
        rows = torch.arange(batch, device=frames.images.device)  # of those that go on
        steps_run = torch.ones_like(rows)
        total = answer = torch.empty(0)
        for t in range(1, frames.steps + 1):
            logits, state = _one_step(model, frames.at(t, rows), state)
            total = logits.double() if t == 1 else total + logits.double()
            mean = mean_of(total, t, logits.dtype)
            # Whoever goes on is overwritten at the next step: to tell both apart here would wait for the device.
            answer = mean if t == 1 else answer.index_copy_(0, rows, mean)
            steps_run.index_fill_(0, rows, t)
            if t == frames.steps:
                break
            # Written so that NaN, which compares as False, goes on: it is reported at the end.
            going = (~(confidence(mean, measure, temperature) >= threshold)).nonzero().squeeze(1)
            if len(going) == 0:
                break
            if len(going) < len(rows):
                state, total, rows = _take(state, going, len(rows)), total[going], rows[going]
        check_finite(frames.images, answer, "these images")
    return Answers(answer, steps_run)


class Frames(NamedTuple):
    """An input as `[T, B, ...]`, or `[1, B, ...]` where it is the same at all steps."""

    images: Tensor
    steps: int

    def at(self, t: int, rows: Tensor) -> Tensor:
        """Frame of step t = 1 .. T for some samples, in order."""
        frame = self.images[min(t, len(self.images)) - 1]
        return frame if len(rows) == len(frame) else frame[rows]


def frames_of(model: nn.Module, images: Tensor, steps: int | None, device: torch.device) -> Frames:
    """Tell a constant input from a sequence, cut to the steps that are run."""
    if steps is not None:
        steps = check_count("steps", steps)
    dims: tuple[int, ...] = getattr(model, "frame_dims", (images.ndim - (steps is None),))
    if steps is not None and images.ndim - 1 in dims and images.ndim not in dims:
        if len(images) < steps:
            raise ValueError(
                f"images have shape {shape_of(images)}, a sequence of {len(images)} steps, but steps={steps}. "
                f"Pass longer sequences, or steps={len(images)}."
            )
        images = images[:steps]
    x, steps = steps_of(images, dims, steps)
    return Frames(x.to(device), steps)


def _check_streams(model: nn.Module) -> None:
    forward = getattr(model, "_orig_mod", model).forward  # torch.compile hides the signature
    parameters = inspect.signature(forward).parameters
    any_keyword = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if not any_keyword and not {"state", "return_state"} <= parameters.keys():
        raise _does_not_stream(model, f"takes ({', '.join(parameters)})")


def _does_not_stream(model: nn.Module, came: str) -> TypeError:
    return TypeError(
        f"{type(model).__name__}.forward {came}, but a network that stops early is run one step at a time: "
        "model(images, 1, state=state, return_state=True) must return logits [1, B, K] and the state. "
        "Networks of ranvier.models and of ranvier.conversion do."
    )


def _one_step(model: nn.Module, frame: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Logits `[B, K]` of the next step, and the state after it."""
    output = model(frame, 1, state=state, return_state=True)
    if not (isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], Tensor)):
        raise _does_not_stream(model, f"returned a {type(output).__name__}")
    logits, state = output
    check_streamed_logits(logits, 1, len(frame))
    return logits[0], state


def _take(state: Any, rows: Tensor, batch: int) -> Any:
    """The state of some samples; whatever is not per sample stays as it is."""
    if isinstance(state, Tensor):
        if state.ndim == 0 or state.numel() == 0:  # a counter, or the counts that unsigned neurons do not keep
            return state
        if len(state) != batch:
            raise ValueError(
                f"the state of the network holds a tensor of shape {shape_of(state)}, but the batch has {batch} "
                "samples. Each tensor of a state must have the batch as its first axis."
            )
        return state[rows]
    if state is None or isinstance(state, int | float | str):
        return state
    if isinstance(state, dict):
        return {key: _take(value, rows, batch) for key, value in state.items()}
    if isinstance(state, list | tuple):
        parts = [_take(part, rows, batch) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    if is_dataclass(state) and not isinstance(state, type):
        return replace(state, **{each.name: _take(getattr(state, each.name), rows, batch) for each in fields(state)})
    raise TypeError(
        f"the state of the network holds a {type(state).__name__}, of which samples cannot be taken. "
        "Use tensors and numbers in tuples, lists, dictionaries or dataclasses."
    )


def mean_of(total: Tensor, t: int, dtype: torch.dtype) -> Tensor:
    """Mean of t logits from their sum in float64, which is rounded first as `accuracy_by_step` rounds it.

    Ties are then the same in both; and float64 tells 1 - 1e-10 from 1 - 1e-12, where float32 would be sure of both.
    """
    return total.to(torch.promote_types(dtype, torch.float32)).double() / t


def confidence(means: Tensor, measure: Measure, temperature: float) -> Tensor:
    """How sure the network is, in [0, 1]: `[..., K]` to `[...]`."""
    probability = (means / temperature).softmax(-1)
    if measure == "probability":
        return probability.amax(-1)
    if measure == "margin":
        first, second = probability.topk(2).values.unbind(-1)
        return first - second
    # Rounding may leave the entropy of equal probabilities above its maximum.
    return (1 - torch.special.entr(probability).sum(-1) / math.log(means.shape[-1])).clamp_min(0)


def check_streamed_logits(logits: Tensor, steps: int, batch: int) -> None:
    """Raise unless logits are `[T, B, K]` of at least two classes."""
    if logits.ndim != 3 or logits.shape[:2] != (steps, batch) or logits.shape[2] < 2:
        raise ValueError(
            f"the model returned logits of shape {shape_of(logits)}, but {steps} steps of {batch} samples must give "
            f"[{steps}, {batch}, K] with at least K = 2 classes: with one class there is nothing to be sure of."
        )


def check_finite(images: Tensor, logits: Tensor, what: str) -> None:
    """Raise if either holds NaN or infinity; waits for the device once."""
    # Neurons answer a NaN with silence, so images are looked at, too.
    flags = torch.stack([images.sum(dtype=torch.float64).isfinite(), logits.isfinite().all()])
    images_are, logits_are = flags.tolist()
    if not images_are:
        raise ValueError(f"{what} hold NaN or infinity. Mend the data.")
    if not logits_are:
        raise ValueError(
            f"the logits of {what} hold NaN or infinity, so no answer can be sure. Training may have diverged: check "
            "the parameters, or run in float32."
        )


def check_temperature(temperature: float) -> None:
    """Raise unless a temperature is positive and finite."""
    check_positive("temperature", temperature)
    if temperature == math.inf:
        raise ValueError("temperature is infinity, at which all classes are equally probable. Pass 1, or 'fit'.")
