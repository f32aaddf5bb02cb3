"""Peak memory of a piece of work, for benchmarks, and processes to measure it in."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RETURNS_MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}
"""Environment in which glibc returns freed memory at once."""


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


def in_a_process_of_its_own(script: str, given: Any, **environment: str) -> Any:
    """What `script --child GIVEN` prints as its last line, both as json: it has not held the memory of other work."""
    done = subprocess.run(
        [sys.executable, script, "--child", json.dumps(given)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{given} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
