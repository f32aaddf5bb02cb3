"""What the kernels for CPUs share: compiling C++ once, and what every call hands over.

A source is compiled for the definitions that it is given, when they first run (half a second), and kept in the cache
folder. They include the headers beside them.
"""

import ctypes
import functools
import hashlib
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ranvier import provenance

HEADERS = tuple(Path(__file__).with_name(f"native_{name}.h") for name in ("lines", "neuron", "tiles"))
"""What sources include."""

FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wno-psabi",
    "-fopenmp",
    "-shared",
    "-fPIC",
)
"""No fused multiply-adds, and nothing else that changes a result: spikes are compared bit for bit."""

CHUNKS = 256
"""Parts that threads take in turn. Sums over each are added in one order, however many threads there are."""

LINE = 16
"""Neurons that the sources take at once."""

PAST_CACHES = 2**25
"""Bytes of an output from which it is written past the caches: none of it would be left there to be read."""

HUGE = 2**25
"""Bytes of an output from which huge pages are asked for. glibc takes fresh memory for what is larger than this."""

UNROLLED = 32
"""Steps up to which each T has loops of its own, which hold all potentials in registers."""

ALONE = 2**15
"""Values below which a second thread costs more than it saves."""


def definitions(dtype: torch.dtype, steps: int, sends_bytes: bool, **numbers: int) -> tuple[str, ...]:
    """What a source is compiled with: `native_lines.h` says what the first three are.

    >>> definitions(torch.bfloat16, 4, False, SOFT=1)
    ('-DSOFT=1', '-DBFLOAT16=1', '-DBYTES=0', '-DSTEPS=4')
    """
    numbers |= {
        "BFLOAT16": int(dtype == torch.bfloat16),
        "BYTES": int(sends_bytes),
        "STEPS": steps if steps <= UNROLLED else 0,
    }
    return tuple(f"-D{name}={number}" for name, number in numbers.items())


@functools.cache
def load(source: Path, defined: tuple[str, ...]) -> ctypes.CDLL:
    """A source compiled with these definitions, from the cache folder if it was compiled before.

    Raises:
        RuntimeError: the compiler failed, or the cache folder cannot be written.
    """
    command = [str(provenance.cpp_compiler()), *FLAGS, *defined]
    texts = [each.read_text() for each in (*HEADERS, source)]
    made_of = [*texts, *command, _compiler_version(), provenance.processor_features()]
    key = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:24]
    path = provenance.cache_folder() / "kernels" / f"{source.stem}-{key}.so"
    try:
        if not path.exists():
            _compile(command, source, path)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # cut off, as when the machine lost power
            path.unlink(missing_ok=True)
            _compile(command, source, path)
            return ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"{path} cannot be written or read: {error}. Set RANVIER_CACHE to another folder") from error


def obstacle_of(needed: Sequence[str], library: Callable[[], object]) -> str | None:
    """What keeps a library from running here: a feature of the processor, or compiling it; None if nothing does."""
    features = provenance.processor_features().split()
    missing = [feature for feature in needed if feature not in features]
    if missing:
        return f"this processor lacks {', '.join(missing)}."
    if provenance.cpp_compiler() is None:
        return "it needs a C++ compiler and found none. Install one (Debian: apt-get install g++) or set CXX."
    try:
        library()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"{error}."
    return None


def _compile(command: list[str], source: Path, path: Path) -> None:
    """Run the compiler beside `path` and move what it made there: another process finds all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        done = subprocess.run(
            [*command, "-o", str(made), str(source)], capture_output=True, text=True, timeout=300, check=False
        )
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), f"exit {done.returncode}")
            raise RuntimeError(f"compiling them failed: {reason}")
        os.replace(made, path)


@functools.cache
def _compiler_version() -> str:
    return subprocess.run(
        [str(provenance.cpp_compiler()), "--version"], capture_output=True, text=True, check=True
    ).stdout


def address(tensor: Tensor | None) -> int | None:
    """Where the elements of a tensor lie."""
    return None if tensor is None else tensor.data_ptr()


def threads_for(values: int) -> int:
    """How many threads so many values are worth."""
    return 1 if values < ALONE else torch.get_num_threads()


def by_column(values: Tensor, columns: int) -> Tensor:
    """Values of channels, `[..., C]`, for each column of a view and, beginning anew, for those of a line more.

    >>> by_column(torch.tensor([1.0, 2.0]), 4)[:8].tolist()
    [1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 2.0]
    """
    if columns != values.shape[-1]:
        values = values.repeat_interleave(columns // values.shape[-1], -1)
    rounds = (1,) * (values.ndim - 1) + (1 + -(-LINE // columns),)
    return values.repeat(rounds)[..., : columns + LINE].contiguous()


def ask_for_huge_pages(tensor: Tensor) -> None:
    """Ask Linux to back new memory with pages of 2 MiB: to hand out small ones takes longer than to fill them."""
    size = tensor.numel() * tensor.element_size()
    if size < HUGE or not sys.platform.startswith("linux"):
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + size - first) // mmap.PAGESIZE * mmap.PAGESIZE
    _libc().madvise(first, length, mmap.MADV_HUGEPAGE)  # where the kernel will not, nothing is lost


@functools.cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library
