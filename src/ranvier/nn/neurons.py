"""Neurons as activations: parameters in, a scan called, spikes out.

Every neuron takes the channel count first, so that a model can build it from its class alone (`neuron=LIF`), and is
stateless: a call starts from rest unless the caller passes the state that an earlier call returned.
"""

import math
from typing import Literal, overload

import torch
from torch import Tensor, nn

from ranvier import kernels
from ranvier.checks import check_channels, check_choice, check_number
from ranvier.dynamics import (
    AffineParams,
    IFParams,
    LIFBParams,
    LIFPairParams,
    LIFParams,
    NeuronState,
    PLIFParams,
    Reset,
    Surrogate,
    Triangle,
)
from ranvier.dynamics.burst import pair_of
from ranvier.kernels.dispatch import IMPLEMENTATIONS, Implementation


class Neuron(nn.Module):
    """What the neurons below share: the call, with or without state.

    For a neuron of your own, write its step as a pure function, build `params` (a frozen dataclass) in `__init__`, and
    let `scan` pass both to `ranvier.kernels.scan`: it then compiles and streams like the others.
    """

    params: IFParams | LIFParams | PLIFParams | LIFBParams | AffineParams

    def __init__(self, implementation: Implementation = "auto", num_channels: int | None = None) -> None:
        super().__init__()
        check_channels(num_channels)
        check_choice("implementation", implementation, IMPLEMENTATIONS)
        self.implementation: Implementation = implementation

    @property
    def fires(self) -> bool:
        """Whether it sends spikes. False for a neuron that sends its potential, in which there is nothing to count."""
        return True

    def scan(self, current: Tensor, state: NeuronState | None) -> tuple[Tensor, NeuronState]:
        """Run all steps: the kernel of this neuron with its parameters."""
        raise NotImplementedError

    @overload
    def forward(
        self, current: Tensor, state: NeuronState | None = ..., *, return_state: Literal[False] = ...
    ) -> Tensor: ...
    @overload
    def forward(
        self, current: Tensor, state: NeuronState | None = ..., *, return_state: Literal[True]
    ) -> tuple[Tensor, NeuronState]: ...
    def forward(
        self, current: Tensor, state: NeuronState | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, NeuronState]:
        """Spikes `[T, B, ...]` for `current` `[T, B, ...]`; with `return_state` also the state for the next call."""
        spikes, after = self.scan(current, state)
        return (spikes, after) if return_state else spikes

    def extra_repr(self) -> str:
        """Parameters, as printed."""
        return ", ".join(f"{name}={value}" for name, value in vars(self.params).items())


class IF(Neuron):
    """Integrate-and-fire neuron without leak: `ranvier.dynamics.if_scan` as a module.

        h = v + x;  s = (h >= v_threshold);  v = h (1 - s)

    Args:
        num_channels: Not used; accepted so that models can build any neuron alike.
        v_threshold: Firing threshold.
        reset: `hard` or `soft`.
        detach_reset: Whether the gradient ignores the reset.
        surrogate: Gradient of the spike.
        implementation: `auto`, `reference`, `compiled`, `native` or `triton`; see `ranvier.explain`.

    >>> IF()(torch.full((4, 1, 1), 0.25)).flatten().tolist()
    [0.0, 1.0, 0.0, 1.0]
    """

    params: IFParams

    def __init__(
        self,
        num_channels: int | None = None,
        *,
        v_threshold: float = 0.5,
        reset: Reset = "hard",
        detach_reset: bool = True,
        surrogate: Surrogate | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__(implementation, num_channels)
        self.params = IFParams(v_threshold, reset, detach_reset, surrogate or Triangle())

    def scan(self, current: Tensor, state: NeuronState | None) -> tuple[Tensor, NeuronState]:
        """Run `if_scan`."""
        return kernels.if_scan(current, state, self.params, implementation=self.implementation)


class LIF(Neuron):
    """Leaky integrate-and-fire neuron: `ranvier.dynamics.lif_scan` as a module.

        h = v + (x - v) / tau;  s = (h >= v_threshold);  v = h (1 - s)

    Args:
        num_channels: Not used; accepted so that models can build any neuron alike.
        tau: Membrane time constant [steps, >= 1].
        v_threshold: Firing threshold.
        reset: `hard` or `soft`.
        detach_reset: Whether the gradient ignores the reset.
        surrogate: Gradient of the spike.
        implementation: `auto`, `reference`, `compiled`, `native` or `triton`; see `ranvier.explain`.

    >>> lif = LIF(tau=2.0, v_threshold=0.5)
    >>> lif(torch.full((3, 1, 1), 0.6)).flatten().tolist()
    [0.0, 0.0, 1.0]
    """

    params: LIFParams

    def __init__(
        self,
        num_channels: int | None = None,
        *,
        tau: float = 2.0,
        v_threshold: float = 0.5,
        reset: Reset = "hard",
        detach_reset: bool = True,
        surrogate: Surrogate | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__(implementation, num_channels)
        self.params = LIFParams(v_threshold, reset, detach_reset, surrogate or Triangle(), tau)

    def scan(self, current: Tensor, state: NeuronState | None) -> tuple[Tensor, NeuronState]:
        """Run `lif_scan`."""
        return kernels.lif_scan(current, state, self.params, implementation=self.implementation)


class PLIF(Neuron):
    """Leaky integrate-and-fire neuron with a learned time constant, one per layer: `ranvier.dynamics.plif_scan`.

        h = v + (x - v) / tau,  tau = 1 + exp(-decay);  s = (h >= v_threshold);  v = h (1 - s)

    Args:
        num_channels: Not used; accepted so that models can build any neuron alike.
        tau: Initial membrane time constant [steps, > 1].
        v_threshold: Firing threshold.
        reset: `hard` or `soft`.
        detach_reset: Whether the gradient ignores the reset.
        surrogate: Gradient of the spike.
        implementation: `auto`, `reference`, `compiled`, `native` or `triton`; see `ranvier.explain`.

    Raises:
        ValueError: `tau` is not greater than 1, where its parameter would be infinite.
    """

    params: PLIFParams

    def __init__(
        self,
        num_channels: int | None = None,
        *,
        tau: float = 2.0,
        v_threshold: float = 0.5,
        reset: Reset = "hard",
        detach_reset: bool = True,
        surrogate: Surrogate | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__(implementation, num_channels)
        check_number("tau", tau)
        if not tau > 1:
            raise ValueError(f"tau is {tau}, but a learned time constant must start above 1 step; the default is 2.")
        self.params = PLIFParams(v_threshold, reset, detach_reset, surrogate or Triangle())
        self.decay = nn.Parameter(torch.tensor(-math.log(tau - 1)))

    def extra_repr(self) -> str:
        """Parameters, as printed; tau as it is now."""
        return f"tau={self.tau:.3g}, {super().extra_repr()}"

    @property
    def tau(self) -> float:
        """Present membrane time constant [steps]."""
        return 1 + math.exp(-self.decay.item())

    def scan(self, current: Tensor, state: NeuronState | None) -> tuple[Tensor, NeuronState]:
        """Run `plif_scan`."""
        return kernels.plif_scan(current, state, self.params, self.decay, implementation=self.implementation)


class LIFB(Neuron):
    """Burst neuron with a learned burst strength per channel: `ranvier.dynamics.lifb_scan` as a module.

        h = v + (x - v) / tau
        s = 0 below v_threshold,  1 from v_threshold,  strength[c] from 2 v_threshold
        v = 0 after a spike or a burst

    Args:
        num_channels: Channels C of the input `[T, B, C, ...]`.
        burst_init: Initial strength of every channel. At 1 the neuron starts as a LIF neuron, as the paper prints; 2 is
            what its published numbers suggest.
        tau: Membrane time constant [steps, >= 1].
        v_threshold: Firing threshold; the burst threshold is twice that.
        reset: `hard` or `soft`.
        detach_reset: Whether the gradient ignores the reset.
        surrogate: Gradient of either comparator.
        implementation: `auto`, `reference`, `compiled`, `native` or `triton`; see `ranvier.explain`.

    >>> LIFB(1, burst_init=1.5)(torch.tensor([0.6, 1.2, 2.4]).view(3, 1, 1)).flatten().tolist()
    [0.0, 1.0, 1.5]
    """

    params: LIFBParams

    def __init__(
        self,
        num_channels: int,
        *,
        burst_init: float = 2.0,
        tau: float = 2.0,
        v_threshold: float = 0.5,
        reset: Reset = "hard",
        detach_reset: bool = True,
        surrogate: Surrogate | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__(implementation, num_channels)
        self.params = LIFBParams(v_threshold, reset, detach_reset, surrogate or Triangle(), tau)
        self.strength = nn.Parameter(torch.full((num_channels,), float(burst_init)))

    def extra_repr(self) -> str:
        """Channels and parameters, as printed."""
        return f"{len(self.strength)}, {super().extra_repr()}"

    def scan(self, current: Tensor, state: NeuronState | None) -> tuple[Tensor, NeuronState]:
        """Run `lifb_scan`."""
        return kernels.lifb_scan(current, state, self.params, self.strength, implementation=self.implementation)


class LIFPair(Neuron):
    """Two LIF neurons on one current, the second of twice the threshold: `ranvier.dynamics.lif_pair_scan` as a module.

        f = (h >= v_threshold);  b = (h >= 2 v_threshold);  both reset when the first fires

    What `ranvier.conversion.decouple` puts in the place of a burst neuron.

    Args:
        num_channels: Not used; accepted so that models can build any neuron alike.
        tau: Membrane time constant [steps, >= 1].
        v_threshold: Firing threshold of the first neuron; that of the second is twice as high.
        reset: `hard` or `soft`.
        coupled: Whether the first neuron's spike resets the second, as losslessness needs.
        detach_reset: Whether the gradient ignores the reset.
        surrogate: Gradient of the spikes.
        implementation: `auto`, `reference` or `compiled`.

    Shape: `[T, B, C, ...]` to `[T, B, 2 C, ...]`, the first neurons, then the second.

    >>> LIFPair()(torch.tensor([0.6, 1.2, 2.4]).view(3, 1, 1)).flatten(1).tolist()
    [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
    """

    params: LIFPairParams

    def __init__(
        self,
        num_channels: int | None = None,
        *,
        tau: float = 2.0,
        v_threshold: float = 0.5,
        reset: Reset = "hard",
        coupled: bool = True,
        detach_reset: bool = True,
        surrogate: Surrogate | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__(implementation, num_channels)
        self.params = LIFPairParams(v_threshold, reset, detach_reset, surrogate or Triangle(), tau, coupled)

    def scan(self, current: Tensor, state: NeuronState | None) -> tuple[Tensor, NeuronState]:
        """Run `lif_pair_step` over time."""
        step, current = pair_of(self.params, current)
        return kernels.scan(step, current, state, self.params, implementation=self.implementation)
