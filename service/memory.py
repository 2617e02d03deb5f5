"""Memory that this process no longer uses, back to the system.

The C library keeps what was freed below something that is still in use. After a flood of connections or of
long texts that is most of what they took, and Python has no say in it.
"""

import asyncio
import ctypes
from pathlib import Path

GROWTH = 1.1
"""How many times the least that was ever left the memory must be, to be worth a trim."""
WORTH = 0.95
"""A trim was of use if at most this share of the memory is left. After one that was not, because the memory
is still in use, the pause until the next one doubles: during a trim other threads may wait for memory."""
LONGEST_PAUSE = 320.0
"""Seconds that the pause grows to."""

LARGE_BYTES = 1 << 20
"""A block of this size is the system's again as soon as it is freed, and no thread keeps more for later. By
itself glibc raises the former to the largest block that was ever freed, up to 32 MB, and the latter to twice
that, for each thread."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""

_libc = ctypes.CDLL(None)
_is_glibc = hasattr(_libc, "malloc_trim")
"""Other libraries give back by themselves."""


async def keep_giving_back(look_seconds: float = 5.0) -> None:
    """Look at this process's memory now and then and, where it has grown, return what is free.

    Never ends, but where the C library gives back by itself.
    """
    if not _is_glibc:
        return
    for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        _libc.mallopt(parameter, LARGE_BYTES)
    least = left = _resident_pages()
    pause = since = 0.0
    while True:
        await asyncio.sleep(look_seconds)
        since += look_seconds
        before = _resident_pages()
        if before <= GROWTH * least or (since < pause and before <= GROWTH * left):
            continue
        await asyncio.to_thread(_libc.malloc_trim, 0)
        left, since = _resident_pages(), 0.0
        least = min(least, left)
        pause = look_seconds if left <= WORTH * before else min(max(2 * pause, look_seconds), LONGEST_PAUSE)


def _resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])
