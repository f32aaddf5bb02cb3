"""Peak memory of a piece of work, for benchmarks."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def extra_bytes(work: Callable[[], Any], device: torch.device) -> int | None:
    """What `work` adds to the memory in use, at its peak: allocated on a GPU, resident elsewhere; None if unknown."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    peak = Path("/proc/self/clear_refs")
    try:
        peak.write_text("5")  # the peak begins anew
    except OSError:
        return None
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
