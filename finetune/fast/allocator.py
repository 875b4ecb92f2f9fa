"""glibc's allocator on a CPU: memory that a step freed is kept for the next one.

By default glibc maps large blocks anew and gives them back when they are freed, so that each step
pays for the same pages again. Kept, they cost nothing. What was freed before is given back once.
Source of the names: mallopt(3), malloc_trim(3).
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = 2**31 - 1  # mallopt takes an int
# The larger first: glibc before 2.36 refuses more than half of a heap.
_SMALLER_THAN = (1 << 30, 32 << 20)
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed; its own settings in the environment stand.

    Returns:
        Whether it does now: not where the allocator is another one, or was chosen by the user.
    """
    if sys.platform != "linux" or any(os.environ.get(name) for name in VARIABLES):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):  # another C library
        return False
    trim(0)
    if not any(mallopt(_MMAP_THRESHOLD, size) for size in _SMALLER_THAN):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _KEPT))
