"""The shape that all networks share: encoder, body, readout."""

from collections.abc import Iterable
from typing import Literal, overload

from torch import Tensor, nn

from ranvier.dynamics import NeuronState
from ranvier.nn import Carry, repeat
from ranvier.nn.structure import Block
from ranvier.nn.time import steps_of


class Network(nn.Module):
    """A spiking network: images in, logits at every time step out.

        logits = readout(body(encoder(images)))

    The encoder holds the layers before the first neuron. They have no memory, so a constant input (direct coding) passes
    them once, whatever the number of steps, and the first neurons receive the same current at every step.

    Args:
        encoder: Stateless layers on `[T, B, ...]`.
        body: Everything with neurons, `[T, B, ...]` to features `[T, B, ...]`.
        readout: Features to logits `[T, B, K]`.
        frame_dims: Ranks that one step of input may have; `(4,)` for `[B, C, H, W]`.
    """

    def __init__(
        self, encoder: nn.Module, body: Block, readout: nn.Module, frame_dims: tuple[int, ...] = (4,)
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.body = body
        self.readout = readout
        self.frame_dims = frame_dims

    @overload
    def forward(
        self,
        images: Tensor,
        steps: int | None = ...,
        *,
        state: Iterable[NeuronState] | None = ...,
        return_state: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        images: Tensor,
        steps: int | None = ...,
        *,
        state: Iterable[NeuronState] | None = ...,
        return_state: Literal[True],
    ) -> tuple[Tensor, tuple[NeuronState, ...]]: ...
    def forward(
        self,
        images: Tensor,
        steps: int | None = None,
        *,
        state: Iterable[NeuronState] | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[NeuronState, ...]]:
        """Logits at every time step.

        Args:
            images: A constant input `[B, C, H, W]`, or a sequence `[T, B, C, H, W]`.
            steps: T, for a constant input.
            state: Neuron states that an earlier call returned, to stream: T calls of one step give the logits of one
                call of T steps. None starts from rest.
            return_state: Whether to return the states for the next call.

        Returns:
            Logits `[T, B, K]`; with `return_state` also the state of every neuron, in the order in which they run.

        Raises:
            ValueError: Wrong rank, missing or zero steps, or a state of another network or batch size.
        """
        x, steps = steps_of(images, self.frame_dims, steps)
        current = self.encoder(x)
        if len(x) != steps:
            current = repeat(current, steps)
        carry = Carry(state) if return_state or state is not None else None
        logits = self.readout(self.body(current, carry))
        return (logits, carry.finish()) if carry is not None and return_state else logits
