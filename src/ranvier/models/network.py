"""What all networks share: how they are called, and the shape of those that are built here."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ranvier.checks import shape_of
from ranvier.nn import Carry, repeat
from ranvier.nn.structure import Block
from ranvier.nn.time import steps_of


class SpikingNetwork(nn.Module, ABC):
    """A network over time: images in, logits at every time step out, state kept by whoever streams.

    Args:
        frame_dims: Ranks that one step of input may have; `(4,)` for `[B, C, H, W]`.
        image_size: Height and width that images must have, one number if they are equal, or None where the network
            takes any.
    """

    def __init__(self, frame_dims: tuple[int, ...], image_size: int | tuple[int, int] | None = None) -> None:
        super().__init__()
        self.frame_dims = frame_dims
        self.image_size = image_size

    @abstractmethod
    def run(self, x: Tensor, steps: int, carry: Carry | None) -> Tensor:
        """Logits `[T, B, K]` of an input `[1, B, ...]`, the same at all steps, or `[T, B, ...]`."""

    @overload
    def forward(
        self,
        images: Tensor,
        steps: int | None = ...,
        *,
        state: Iterable[Any] | None = ...,
        return_state: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        images: Tensor,
        steps: int | None = ...,
        *,
        state: Iterable[Any] | None = ...,
        return_state: Literal[True],
    ) -> tuple[Tensor, tuple[Any, ...]]: ...
    def forward(
        self,
        images: Tensor,
        steps: int | None = None,
        *,
        state: Iterable[Any] | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Any, ...]]:
        """Logits at every time step.

        Args:
            images: A constant input `[B, C, H, W]`, or a sequence `[T, B, C, H, W]`.
            steps: T, for a constant input.
            state: Neuron states that an earlier call returned, to stream: T calls of one step give the logits of one
                call of T steps, but for the order in which a convolution of another batch size adds up. None starts
                from rest, or from the initial potentials of converted neurons.
            return_state: Whether to return the states for the next call.

        Returns:
            Logits `[T, B, K]`; with `return_state` also the state of every neuron, in the order in which they run.

        Raises:
            ValueError: Wrong rank, channels or image size, missing or zero steps, more steps than converted neurons
                have biases for, or a state of another network or batch size.
        """
        x, steps = steps_of(images, self.frame_dims, steps)
        if self.image_size is not None:
            self._check_size(x, self.image_size)
        carry = Carry(state) if return_state or state is not None else None
        logits = self.run(x, steps, carry)
        if carry is None:
            return logits
        after = carry.finish()  # also where nobody wants it: it tells whether the state was of this network
        return (logits, after) if return_state else logits

    @staticmethod
    def _check_size(x: Tensor, image_size: int | tuple[int, int]) -> None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if x.shape[-2:] != (height, width):
            raise ValueError(
                f"images have shape {shape_of(x[0])}, {x.shape[-2]}x{x.shape[-1]} pixels, but this network was built "
                f"for {height}x{width}. Resize them, or build it with their image_size."
            )


class Network(SpikingNetwork):
    """A spiking network of three parts.

        logits = readout(body(encoder(images)))

    The encoder holds the layers before the first neuron. They have no memory, so a constant input (direct coding)
    passes them once, whatever the number of steps, and the first neurons receive the same current at every step. In
    training, a normalisation in the encoder then updates its running averages once for the batch, not for each step.

    Args:
        encoder: Stateless layers on `[T, B, ...]`.
        body: Everything with neurons, `[T, B, ...]` to features `[T, B, ...]`.
        readout: Features to logits `[T, B, K]`.
        frame_dims: Ranks that one step of input may have; `(4,)` for `[B, C, H, W]`.
        image_size: Height and width that images must have, or None where the network takes any.
    """

    image_size: int | None

    def __init__(
        self,
        encoder: nn.Module,
        body: Block,
        readout: nn.Module,
        frame_dims: tuple[int, ...] = (4,),
        image_size: int | None = None,
    ) -> None:
        super().__init__(frame_dims, image_size)
        self.encoder = encoder
        self.body = body
        self.readout = readout

    def run(self, x: Tensor, steps: int, carry: Carry | None) -> Tensor:
        """Encoder, body and readout."""
        current = self._encoded(x)
        if len(x) != steps:
            current = repeat(current, steps)
        return self.readout(self.body(current, carry))

    def _encoded(self, x: Tensor) -> Tensor:
        """What the encoder gives; where it fails on images of other channels, or features, than it has, it says so."""
        encoded: Tensor
        if torch.compiler.is_compiling():
            encoded = self.encoder(x)
            return encoded
        try:
            encoded = self.encoder(x)
        except RuntimeError as error:
            first = next((part for part in self.encoder.modules() if isinstance(part, nn.Conv2d | nn.Linear)), None)
            if isinstance(first, nn.Conv2d) and x.ndim == 5 and x.shape[2] != first.in_channels:
                raise ValueError(
                    f"images have shape {shape_of(x[0])}, {x.shape[2]} channels, but this network was built for "
                    f"{first.in_channels}. Convert them, or build it with in_channels={x.shape[2]}."
                ) from error
            if isinstance(first, nn.Linear) and math.prod(x.shape[2:]) != first.in_features:
                raise ValueError(
                    f"images have shape {shape_of(x[0])}, {math.prod(x.shape[2:])} values each, but this network was "
                    f"built for {first.in_features}. Resize them, or build it for as many."
                ) from error
            raise
        return encoded
