"""Memory that this process no longer uses, back to the system.

The C library keeps what was freed below something that is still in use. After a flood of connections or of
long texts that is most of what they took, and Python has no say in it.
"""

import asyncio
import ctypes
from pathlib import Path

GROWTH = 1.1
"""How many times the least that was ever left the memory must be, to be worth another time.

Not what was left the last time: that may have been in the middle of a flood, whose memory was still in use.
"""

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""Of glibc; other libraries give back by themselves."""


async def keep_giving_back(look_seconds: float = 5.0) -> None:
    """Look at this process's memory now and then and, where it has grown, return what is free.

    Never ends, but where the C library gives back by itself.
    """
    if _trim is None:
        return
    left = _resident_pages()
    while True:
        await asyncio.sleep(look_seconds)
        if _resident_pages() > GROWTH * left:
            await asyncio.to_thread(_trim, 0)
            left = min(left, _resident_pages())


def _resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])
