"""Runs the kernels themselves on a CPU."""

from pathlib import Path

from tests.tools.interpreted import run_interpreted


def test_kernels_under_the_interpreter():
    run_interpreted(Path(__file__).parent / "interpreted")
