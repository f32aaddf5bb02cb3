"""Time: stateless layers run on it folded into the batch, neurons run over it, and state crosses from call to call."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ranvier.checks import check_sequence
from ranvier.nn.convolution import run_layer
from ranvier.nn.neurons import Neuron


def fold_time(x: Tensor) -> Tensor:
    """View `[T, B, ...]` as `[T * B, ...]`."""
    return x.flatten(0, 1)


def unfold_time(x: Tensor, steps: int) -> Tensor:
    """View `[T * B, ...]` as `[T, B, ...]`."""
    return x.unflatten(0, (steps, -1))


class TimeFolded(nn.Sequential):
    """Stateless layers applied to every time step at once.

        y[t] = layers(x[t]),    computed as one call on [T * B, ...]

    Layers without memory give the same result whether time is looped over or folded; folded, a convolution sees one
    large batch. Normalisation is not stateless in this sense: see `ranvier.nn.BatchNorm`.

    >>> import torch
    >>> TimeFolded(nn.Conv2d(1, 8, 3), nn.AvgPool2d(2))(torch.zeros(4, 2, 1, 8, 8)).shape
    torch.Size([4, 2, 8, 3, 3])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map `[T, B, ...]` to `[T, B, ...]`."""
        check_sequence("input", x)
        y = fold_time(x)
        for layer in self:
            y = run_layer(layer, y)
        return unfold_time(y, x.shape[0])


class Carry:
    """Neuron states on their way through a network, in the order in which the neurons run.

    A network makes one per call when the caller streams, and hands it to each block. `run` gives a neuron the state
    that it left behind in the call before, and keeps the new one. Without streaming, networks pass None and
    nothing is kept.

    Args:
        before: States that an earlier call returned, whatever their kind, or None to start from rest.
    """

    def __init__(self, before: Iterable[Any] | None = None) -> None:
        self.before = None if before is None else list(before)
        self.after: list[Any] = []

    def run(self, neuron: Neuron, current: Tensor) -> Tensor:
        """Run `neuron` on `[T, B, ...]` from its carried state, and carry its new one."""
        return self.through(lambda state: neuron(current, state, return_state=True))

    def through(self, advance: Callable[[Any], tuple[Tensor, Any]]) -> Tensor:
        """What `advance(state) -> (result, state)` gives, from the next carried state; the new one is carried on."""
        state = None
        if self.before is not None:
            if len(self.after) >= len(self.before):
                raise ValueError(
                    f"state holds {len(self.before)} neuron states, but the network has more neurons. "
                    "Pass the state that this very network returned, or None to start from rest."
                )
            state = self.before[len(self.after)]
        result, state = advance(state)
        self.after.append(state)
        return result

    def finish(self) -> tuple[Any, ...]:
        """All new states, once every neuron has run."""
        if self.before is not None and len(self.before) != len(self.after):
            raise ValueError(
                f"state holds {len(self.before)} neuron states, but the network has {len(self.after)} neurons. "
                "Pass the state that this very network returned, or None to start from rest."
            )
        return tuple(self.after)


def fire(neuron: nn.Module, current: Tensor, carry: Carry | None) -> Tensor:
    """Run an activation inside a network: with its carried state when streaming, from rest otherwise.

    An activation that is no `Neuron`, such as `nn.ReLU`, has no state to carry.
    """
    if carry is None or not isinstance(neuron, Neuron):
        return neuron(current)
    return carry.run(neuron, current)


def repeat(x: Tensor, steps: int) -> Tensor:
    """View one step `[1, B, ...]` as the same input at `steps` steps, `[steps, B, ...]`, without copying it."""
    return x.expand(steps, *x.shape[1:]) if steps != 1 else x


def steps_of(images: Tensor, frame_dims: tuple[int, ...], steps: int | None) -> tuple[Tensor, int]:
    """Bring an input to time-first form and settle the number of steps.

    Args:
        images: A constant input `[B, ...]`, or a sequence `[T, B, ...]`.
        frame_dims: Ranks that one step of input may have, `[B, ...]`; a sequence has one more.
        steps: Steps to run; needed for a constant input, and equal to T (or None) for a sequence.

    Returns:
        The input as `[1, B, ...]` (constant) or `[T, B, ...]`, and the number of steps.

    Raises:
        ValueError: Wrong rank, no or zero steps, or `steps` unlike the length of the sequence.
        TypeError: Not a floating tensor.
    """
    if not isinstance(images, Tensor) or not images.dtype.is_floating_point:
        came = f"a tensor of {images.dtype}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise TypeError(
            f"images are {came}, but a network takes a floating torch.Tensor. Convert them: bytes with images / 255, "
            "numpy arrays with torch.from_numpy(images)."
        )
    constant = images.ndim in frame_dims
    if not constant and images.ndim - 1 not in frame_dims:
        ranks = " or ".join(str(dims) for dims in frame_dims)
        raise ValueError(
            f"images have shape {list(images.shape)} ({images.ndim} dimensions), but this network takes a constant "
            f"input of {ranks} dimensions ([B, ...]) or a sequence with one more ([T, B, ...])."
        )
    if isinstance(steps, bool | float | str):
        raise TypeError(f"steps is {steps!r}, a {type(steps).__name__}, but must be a whole number of time steps.")
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}, but a network needs at least one time step.")
    if constant:
        if steps is None:
            raise ValueError(
                f"images have shape {list(images.shape)}, a constant input, so the number of time steps is open. "
                "Pass it: model(images, steps=4)."
            )
        return images.unsqueeze(0), steps
    check_sequence("images", images)
    if steps is not None and steps != images.shape[0]:
        raise ValueError(
            f"images have shape {list(images.shape)}: {images.shape[0]} steps, but steps={steps}. "
            f"Leave steps out, or pass the first ones only: images[:{steps}]."
        )
    return images, images.shape[0]
