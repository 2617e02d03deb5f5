"""Compiling of kernels: by who launches them first or, before that, by several threads at once.

Nobody lists what is to be compiled. In a rehearsal launches ask for their kernels as ever, which sets
threads to work, and then launch nothing. What they would have written stays as it was, so nothing may
index by it. Afterwards a launch waits for its kernel only; what was forgotten, or failed in a thread, is
compiled by its first launch.

Most of Triton's work is done without the interpreter's lock, so threads get far. Knows no kernel.
"""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch

from fusewire.kernels.launch import INTERPRETED, on_device

log = logging.getLogger("fusewire.compiling")

MOST_THREADS = 16
"""More would wait for the interpreter's lock, in which a kernel's source is read."""

_rehearsing: ContextVar[ThreadPoolExecutor | None] = ContextVar("rehearsing", default=None)
"""Where the rehearsal that goes on in this thread has its kernels compiled."""


def compile_kernel(kernel: Any, device: torch.device, *args: Any, **options: Any) -> Any:
    """Compile a Triton kernel for a device and for arguments; in a rehearsal, have it compiled.

    Args:
        args: what the kernel's parameters are specialised on: a dtype for an aligned tensor of it, a
            number for a number.
        options: the compile-time arguments by name, and Triton's own, as `num_warps`.

    Returns:
        What is launched by `[grid](*args)`; under the interpreter the kernel itself.
    """

    def compile_now() -> Any:
        if INTERPRETED:
            return kernel
        with on_device(device):
            return kernel.warmup(*args, grid=(1,), **options)

    pool = _rehearsing.get()
    return compile_now() if pool is None else _Ahead(kernel, device, compile_now, pool)


class CompileThreads:
    """Threads that compile what rehearsals ask for; leaving waits for them, or stops them if it fails.

    They load what they have compiled, so leave before a CUDA graph is captured.
    """

    def __init__(self) -> None:
        threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="compile")

    def __enter__(self) -> "CompileThreads":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=error is not None)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Let kernels that this thread has not launched yet be compiled, and not launched, in the block.

        Kernels that were launched before, and those that do not come from `compile_kernel`, run.
        """
        token = _rehearsing.set(self._pool)
        try:
            yield
        finally:
            _rehearsing.reset(token)


class _Ahead:
    """A kernel on its way, silent until the rehearsal ends."""

    def __init__(
        self, kernel: Any, device: torch.device, compile_now: Callable[[], Any], pool: ThreadPoolExecutor
    ) -> None:
        self._name = getattr(kernel, "__name__", str(kernel))
        self._device = device
        self._compile_now = compile_now
        self._future: Future[Any] = pool.submit(self._made_ready)
        self._compiled: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        if self._compiled is None:
            if _rehearsing.get() is not None:
                return _launch_nothing
            self._compiled = self._awaited()
        launcher: Callable[..., Any] = self._compiled[grid]
        return launcher

    def _made_ready(self) -> Any:
        """Compile the kernel and load it, with what hands it arguments: some Tritons compile that as C."""
        compiled = self._compile_now()
        with on_device(self._device):
            _ = compiled[1, 1, 1]
        return compiled

    def _awaited(self) -> Any:
        """Wait for the kernel, or compile it here, where what is wrong with it may be raised."""
        if not self._future.cancelled():
            error = self._future.exception()
            if error is None:
                return self._future.result()
            log.warning("%s: compiling ahead failed, compiling again: %r", self._name, error)
        return self._compile_now()


def _launch_nothing(*_: Any) -> None:
    """Stand in for a launch."""
