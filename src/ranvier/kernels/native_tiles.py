"""Whether the matrix unit of x86 processors, AMX, may be used here: see `native_tiles.h`."""

import ctypes
import functools
import sys

from ranvier import provenance

NEEDED = ("amx_tile", "amx_bf16", "amx_int8", "avx512f", "avx512bw", "avx512vl", "avx512_bf16")
"""Features of the processor, of the unit and of the vectors that go with it. All that have the unit have them."""

ARCH_PRCTL = 158
"""Number of the system call."""

ASK_FOR_TILES = (0x1023, 18)
"""ARCH_REQ_XCOMP_PERM, and the number of the tiles' state: Linux saves them for processes that asked, and no other."""


@functools.cache
def obstacle() -> str | None:
    """What keeps kernels from using the unit; None if nothing does."""
    if not sys.platform.startswith("linux"):
        return "the use of AMX is asked of Linux."
    features = provenance.processor_features().split()
    missing = [feature for feature in NEEDED if feature not in features]
    if missing:
        return f"this processor lacks {', '.join(missing)}."
    if provenance.cpp_compiler() is None:
        return "they need a C++ compiler and found none. Install one (Debian: apt-get install g++) or set CXX."
    refused = ctypes.CDLL(None).syscall(ARCH_PRCTL, *ASK_FOR_TILES)
    return "Linux does not grant the use of AMX to this process." if refused else None
