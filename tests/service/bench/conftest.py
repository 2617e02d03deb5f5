"""Saved runs for the tests of what reads them."""

import pytest

from fusewire.service.bench.results import Cell, Environment, Forward, Run, Spread, Timed


def spread(median: float) -> Spread:
    return Spread(median=median, low=median, high=median, samples=3, calls=20)


def timed(name: str, gpu: float | None, eager: float, work: str = "step", **values) -> Timed:
    gpu_us = None if gpu is None else spread(gpu)
    return Timed(
        name=name,
        work=work,
        backend="x",
        minimal_bytes=64,
        buffer_sets=20,
        error=1e-3,
        gpu_us=gpu_us,
        eager_us=spread(eager),
        **values,
    )


def cell(tokens: int, *contenders: Timed) -> Cell:
    return Cell(
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        tokens=tokens,
        pattern="decode",
        contenders=list(contenders),
    )


def forward(mode: str, eager: float, gpu: float, step: float) -> Forward:
    return Forward(
        model="qwen3-0.6b",
        layers=10,
        tokens=16,
        mode=mode,
        backend="x",
        eager_us=spread(eager),
        gpu_us=spread(gpu),
        step_eager_us=spread(step),
        step_gpu_us=spread(step),
        logit_difference=1e-3,
    )


@pytest.fixture
def environment() -> Environment:
    return Environment(
        command="fusewire bench kernels --heads 32/8",
        started="2026-01-01T00:00:00+00:00",
        device="A GPU",
        device_type="cuda",
        backends={"fused": "triton-cuda"},
        dtype="bfloat16",
        l2_bytes=50 << 20,
        cpu_threads=4,
        python="3.12.0",
        torch="2.11.0",
        triton="3.6.0",
        fusewire="0.1.0",
    )


@pytest.fixture
def run(environment: Environment) -> Run:
    """Two sizes of three contenders, of which one fails and one is absent."""
    small = cell(
        1, timed("unfused", 30.0, 300.0), timed("fused", 2.0, 30.0), timed("copy", 1.5, 20.0, "copy")
    )
    failed = Timed(
        name="unfused", work="step", backend="x", minimal_bytes=64, buffer_sets=20, failure="RuntimeError: no"
    )
    large = cell(4096, failed, timed("fused", 40.0, 50.0, share_of_copy=0.9))
    return Run(environment=environment, absent={"vllm": "cannot be imported"}, cells=[small, large])
