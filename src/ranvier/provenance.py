"""Where a number comes from: versions, device, commit. The one module that reads the environment."""

import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("ranvier", "torch", "numpy", "accelerate", "datasets", "safetensors")


def versions(*more: str) -> dict[str, str]:
    """Versions of Python, ranvier and the packages that can change a result, and of `more` packages."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    # The wheel's metadata drops the build tag that tells a CPU from a CUDA build.
    found["torch"] = torch.__version__
    return found


def device_name(device: torch.device | str = "cpu") -> str:
    """Name of the hardware behind `device`, as it is stated beside results."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor_name()}, {torch.get_num_threads()} threads"


def check_device(device: torch.device | str) -> None:
    """Raise if `device` asks for a GPU that torch does not find."""
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError(
            f"device is {device}, but torch {torch.__version__} finds no GPU. "
            "Use --device cpu, or install a CUDA build of torch."
        )


def commit() -> str | None:
    """Commit of the checkout that ranvier runs from, with `+changes` if it was edited; None for an installed wheel."""
    folder = Path(__file__).parent
    if shutil.which("git") is None:
        return None
    git = ["git", "-C", str(folder)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=False)
    if head.returncode or tracked.returncode:
        return None
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def cpp_compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would use on the CPU: `$CXX`, or the one it looks for by default."""
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX", default))


def processor_features() -> str:
    """What this processor can do, as far as the system says: code compiled for one may not run on another."""
    return f"{platform.machine()} {_cpuinfo('flags') or _cpuinfo('Features') or _processor_name()}"


def process_rank() -> int:
    """Number of this process among those that torchrun or `accelerate launch` started; 0 alone."""
    return int(os.environ.get("RANK", "0"))


def cache_folder() -> Path:
    """Folder for decoded data sets and compiled kernels.

    It is `$RANVIER_CACHE`, else `$XDG_CACHE_HOME/ranvier`, else `~/.cache/ranvier`.
    """
    if own := os.environ.get("RANVIER_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ranvier"


def ask_for_large_pages() -> None:
    """Have torch ask the system for pages of 2 MiB, unless `$THP_MEM_ALLOC_ENABLE` says otherwise: see docs/speed.md.

    torch reads the variable when it makes its first tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def is_crowded(seconds: float = 0.2) -> bool:
    """Whether threads of this process would wait for cores that other programs keep busy; sleeps for `seconds`.

    Threads of OpenMP spin while they wait, which a machine with fewer free cores than threads makes many times slower:
    see docs/speed.md. False where `$OMP_WAIT_POLICY` says how they wait, where the system does not say, and where
    there is a GPU, as the work is done there.
    """
    threads = torch.get_num_threads()
    if threads == 1 or "OMP_WAIT_POLICY" in os.environ or torch.cuda.is_available():
        return False
    before = _core_times()
    time.sleep(seconds)
    after = _core_times()
    if before is None or after is None or sum(after) <= sum(before):
        return False
    idle, total = after[0] - before[0], sum(after) - sum(before)
    return (os.cpu_count() or 1) * idle / total < threads - 0.5


def _core_times() -> tuple[int, int] | None:
    """Time that all cores together have been idle and busy, in ticks; None where the system does not say."""
    try:
        user, nice, system, idle, waiting, *more = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    except (OSError, ValueError):
        return None
    return idle + waiting, user + nice + system + sum(more[:3])  # guests, which come last, are in user already


def _processor_name() -> str:
    """Processor model, from /proc/cpuinfo where there is one."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str | None:
    """A field of the first processor in /proc/cpuinfo; None where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":", 1)[0].strip() == field), None)
