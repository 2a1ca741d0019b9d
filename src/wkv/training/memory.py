"""Freed memory that is kept for the next step.

A training step on the CPU asks for the same gigabytes as the step before. The C library hands large blocks
back to the kernel as soon as they are free, and the kernel clears every page of them when they are asked
for again: on tensors of a few megabytes that costs more than the arithmetic of an elementwise operation.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

# Of glibc's mallopt(3). What is set once stays set, so `_AFTERWARDS` is where glibc's own adjustment ends
# when blocks of 32 MiB come and go.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEEPING = {_TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20, _MMAP_THRESHOLD: 32 << 20}
_AFTERWARDS = {_TRIM_THRESHOLD: 64 << 20, _TOP_PAD: 128 << 10, _MMAP_THRESHOLD: 32 << 20}


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Keep what is freed inside, and give it back at the end. Without glibc nothing changes."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    for what, value in _KEEPING.items():
        libc.mallopt(what, value)
    try:
        yield
    finally:
        for what, value in _AFTERWARDS.items():
            libc.mallopt(what, value)
        libc.malloc_trim(0)
