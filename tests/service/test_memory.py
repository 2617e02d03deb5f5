"""Freed memory goes back to the system, also what lies below something that is still in use."""

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, ctypes, os, time
from fusewire.service.memory import keep_giving_back
from tests.faults.trial import resident_bytes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def fill_and_free():
    blocks = [libc.malloc(1000) for _ in range(200_000)]
    for block in blocks:
        ctypes.memset(block, 1, 1000)
    for block in blocks[:-1]:
        libc.free(block)

async def main():
    task = asyncio.create_task(keep_giving_back(0.2))
    await asyncio.sleep(0)
    before = resident_bytes(os.getpid())
    keep = b"x" * 100_000_000
    await asyncio.sleep(1)  # looks at memory that is in use
    del keep
    fill_and_free()
    freed = resident_bytes(os.getpid())
    end = time.monotonic() + 20
    while (left := resident_bytes(os.getpid())) > before + 50_000_000 and time.monotonic() < end:
        await asyncio.sleep(0.1)
    task.cancel()
    print(freed - before, left - before)

asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_freed_memory_goes_back_although_something_above_it_is_in_use() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    freed, left = map(int, done.stdout.split())
    assert freed > 150_000_000
    assert left < 50_000_000
