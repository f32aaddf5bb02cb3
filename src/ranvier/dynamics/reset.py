"""What a spike does to the membrane potential."""

from typing import Literal

from torch import Tensor

from ranvier.checks import check_choice

Reset = Literal["hard", "soft"]
"""`hard` sets the potential to 0 (direct training); `soft` subtracts the threshold (conversion)."""


def check_reset(mode: str) -> None:
    """Raise unless `mode` is a known reset."""
    check_choice("reset", mode, ("hard", "soft"))


def reset(v: Tensor, s: Tensor, v_threshold: float, mode: Reset, detach: bool) -> Tensor:
    """Potential after the neurons in `s` have fired.

        hard:  v (1 - s)
        soft:  v - v_threshold s

    Args:
        v: Potential before the reset, `[B, ...]`.
        s: Fired or not, in {0, 1}, `[B, ...]`: the binary event, also where the neuron transmits a graded value.
        v_threshold: Amount that a soft reset subtracts.
        mode: `hard` or `soft`.
        detach: Whether the gradient ignores the reset. Then the only path through time is the charge, times
            `1 - s` under a hard reset.

    Returns:
        Potential carried to the next step, `[B, ...]`.
    """
    if detach:
        s = s.detach()
    return v * (1 - s) if mode == "hard" else v - v_threshold * s
