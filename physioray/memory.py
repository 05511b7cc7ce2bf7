"""What memory this process holds for itself, and giving back what it no longer uses."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress


def measure_own_memory() -> int:
    """Bytes that would be free if this process ended; neither shared libraries nor files that others map; 0 if unknown.

    Linux alone tells it (the private pages of `/proc/self/smaps_rollup`).
    """
    with suppress(OSError), open("/proc/self/smaps_rollup") as source:
        parts = [line.split() for line in source]
        return 1024 * sum(int(words[1]) for words in parts if words[0] in ("Private_Clean:", "Private_Dirty:"))
    return 0


def give_back_memory() -> None:
    """Hand freed memory back to the system, where the C library can be told to (glibc).

    glibc keeps what was freed for later requests, apart for different threads. A process that has run some trials of
    the preset `small` so held 1.1 to 4 GB, of which 0.36 GB were in use (LOG.md).
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
