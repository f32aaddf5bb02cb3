"""In which precision a device multiplies fast."""

from dataclasses import dataclass
from typing import Literal

import torch

from ranvier.checks import check_choice

Precision = Literal["auto", "bfloat16", "float32"]
"""Of convolutions and linear layers; `auto` takes bfloat16 where the device has instructions for it."""

PRECISIONS = ("auto", "bfloat16", "float32")


@dataclass(frozen=True)
class PrecisionChoice:
    """The precision in which a network runs and the reason for it."""

    precision: Literal["bfloat16", "float32"]
    reason: str


def choose_precision(precision: Precision, device: torch.device | str) -> PrecisionChoice:
    """Decide in which precision a network runs on this device.

    Where a processor has no instructions for bfloat16 a convolution in it takes longer than in float32: 2.5 times as
    long forward, and 7 times forward and backward, on one with AVX2.

    Args:
        precision: `auto`, or the one that is asked for.
        device: Where the network runs.

    Raises:
        ValueError: Unknown name.
    """
    check_choice("precision", precision, PRECISIONS)
    if precision != "auto":
        return PrecisionChoice(precision, "asked for")
    device = torch.device(device)
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        has = _cpu_has_bfloat16()
    else:
        return PrecisionChoice("float32", f"bfloat16 has not been tested on {device.type}")
    which = "this processor" if device.type == "cpu" else "this GPU"
    if has:
        return PrecisionChoice("bfloat16", f"{which} has instructions for it")
    return PrecisionChoice("float32", f"{which} has no instructions for bfloat16, which would be slower")


def _cpu_has_bfloat16() -> bool:
    if torch.backends.cpu.get_cpu_capability().startswith("AVX") or not torch.backends.mkldnn.is_available():
        # oneDNN takes bfloat16 on all that have AVX-512, but not each of them multiplies it.
        return bool(torch.cpu._is_avx512_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
