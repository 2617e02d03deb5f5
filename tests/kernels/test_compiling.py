"""Kernels are compiled by several threads ahead of their launches, and no launch is lost to that."""

import logging
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from fusewire.kernels import paged_decode, rms_norm, sampling, silu_mul, skinny_linear
from fusewire.kernels.compiling import CompileThreads, compile_kernel
from fusewire.kernels.linear_plans import LinearKind, plan_for

CPU = torch.device("cpu")


class Kernel:
    """Notes how it is compiled and launched."""

    def __init__(self, failures=0, meanwhile=lambda: None):
        self.failures = failures
        self.meanwhile = meanwhile
        self.compiled, self.launched = [], []

    def warmup(self, *args, **options):
        self.meanwhile()
        self.compiled.append((threading.current_thread(), args, options))
        if len(self.compiled) <= self.failures:
            raise OSError("no room for the cache")
        return self

    def __getitem__(self, grid):
        return lambda *args: self.launched.append((grid, args))


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})


def test_a_launch_without_rehearsal_compiles_at_once():
    kernel = Kernel()
    compile_kernel(kernel, CPU, torch.float32, 16, num_warps=4)[3, 1, 1]("x", 16)
    assert kernel.compiled == [
        (threading.current_thread(), (torch.float32, 16), {"grid": (1,), "num_warps": 4})
    ]
    assert kernel.launched == [((3, 1, 1), ("x", 16))]


def test_a_rehearsal_compiles_elsewhere_and_launches_nothing():
    kernel = Kernel()
    with CompileThreads() as threads:
        with threads.rehearsal():
            ready = compile_kernel(kernel, CPU, torch.float32)
            ready[1, 1, 1]("rehearsed")
        ready[2, 1, 1]("first")
    ready[3, 1, 1]("second")
    assert kernel.launched == [((2, 1, 1), ("first",)), ((3, 1, 1), ("second",))]
    assert [thread for thread, *_ in kernel.compiled] != [threading.current_thread()]
    assert len(kernel.compiled) == 1


def test_kernels_are_compiled_at_the_same_time():
    both = threading.Barrier(2)
    kernels = [Kernel(meanwhile=lambda: both.wait(timeout=60)) for _ in range(2)]
    with CompileThreads() as threads, threads.rehearsal():
        for kernel in kernels:
            compile_kernel(kernel, CPU)
    assert not both.broken
    assert [len(kernel.compiled) for kernel in kernels] == [1, 1]


def test_what_a_thread_failed_at_is_compiled_by_the_launch(caplog):
    kernel = Kernel(failures=1)
    with CompileThreads() as threads, threads.rehearsal():
        ready = compile_kernel(kernel, CPU)
    with caplog.at_level(logging.WARNING, "fusewire.compiling"):
        ready[1, 1, 1]()
    assert "no room for the cache" in caplog.text
    assert kernel.launched == [((1, 1, 1), ())]


def test_a_kernel_that_cannot_be_compiled_is_the_launch_s_error():
    with CompileThreads() as threads, threads.rehearsal():
        ready = compile_kernel(Kernel(failures=2), CPU)
    with pytest.raises(OSError, match="no room"):
        ready[1, 1, 1]()


def test_a_start_that_fails_does_not_wait_for_what_has_not_begun():
    begun, go_on = threading.Semaphore(0), threading.Event()

    def wait():
        begun.release()
        assert go_on.wait(timeout=60)

    def let_go():
        while not all(each._future.cancelled() for each in ready[len(busy) :]):
            time.sleep(0.001)
        go_on.set()

    busy, waiting = [Kernel(meanwhile=wait) for _ in range(2)], [Kernel() for _ in range(3)]

    def fail():
        with CompileThreads() as threads:
            with threads.rehearsal():
                ready.extend(compile_kernel(kernel, CPU) for kernel in (*busy, *waiting))
            for _ in busy:
                assert begun.acquire(timeout=60)
            threading.Thread(target=let_go, daemon=True).start()
            raise ValueError("the weights are damaged")

    ready = []
    with pytest.raises(ValueError, match="damaged"):
        fail()
    assert [len(kernel.compiled) for kernel in waiting] == [0, 0, 0]
    ready[-1][1, 1, 1]("later")
    assert waiting[-1].launched == [((1, 1, 1), ("later",))]


class H100:
    """What Triton asks a driver while it compiles and loads."""

    utils = SimpleNamespace(
        get_device_properties=lambda _: {"max_shared_mem": 227 << 10},
        load_binary=lambda name, *_: (
            name,
            name,
            32,
            0,
            1024,
        ),  # module, function, registers, spills, threads
    )

    def launcher_cls(self, src, metadata):
        return None

    def get_current_device(self):
        return "a device that no other test compiles for"

    def get_current_stream(self, _):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Pretend that there is an H100 and nothing in the caches; collects names of what is compiled."""
    caches = (
        paged_decode._compile, rms_norm._compile, silu_mul._compile, skinny_linear.compile_launch,
        sampling._compile,
    )  # fmt: skip
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = []
    hook = lambda **seen: names.append(seen["fn"].name)  # noqa: E731
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", hook)
    monkeypatch.setattr(triton.runtime.driver, "_active", H100())
    for cache in caches:
        cache.cache_clear()
    yield names
    for cache in caches:
        cache.cache_clear()


def test_threads_compile_what_a_launch_looks_up(compiled):
    """Of Qwen3-8B, one kernel of each family; what is asked for again is there."""
    dtype = torch.bfloat16
    plan = plan_for(90, LinearKind.LINEAR_ADD, 4096, 4096, 8, 2)
    extras = skinny_linear.Extras(residual=True)
    decode = paged_decode.decode_plan(4, 8, 128, dtype)
    drawing = (dtype, *(torch.int32,) * 2, torch.int64, torch.float32, *(torch.int32,) * 3,
               torch.float32, *(torch.int32,) * 2, 4096, 2576, 2576)  # fmt: skip
    vocabulary = (("VOCAB", 4096), ("PARTS", 1), ("PART", 4096), ("INDEXED", True), ("FLOORED", False))

    def ask():
        return [
            rms_norm._compile(CPU, dtype, 4096, 4096, True)[0],
            silu_mul._compile(CPU, dtype, 12288, 24576, True)[0],
            skinny_linear.compile_launch(CPU, dtype, 8, 4096, 4096, 4096, 4096, extras, plan, True).kernel,
            paged_decode._compile(CPU, dtype, 32, 8, 128, 16, decode, True).kernel,
            sampling._compile(sampling.draw_kernel, CPU, drawing, vocabulary, 4),
        ]

    with CompileThreads() as threads, threads.rehearsal():
        ahead = ask()
        for kernel in ahead:
            kernel[1, 1, 1]("a launch of these on a CPU would fail")
    assert sorted(compiled) == [
        "draw_kernel", "paged_decode_kernel", "rms_norm_kernel", "silu_mul_kernel", "skinny_linear_kernel"
    ]  # fmt: skip
    assert all(asked is kernel for asked, kernel in zip(ask(), ahead, strict=True))
    for cache in (rms_norm._compile, skinny_linear.compile_launch):
        cache.cache_clear()
    assert all(kernel.function for kernel in (ask()[0], ask()[2]))
    assert len(compiled) == 5
