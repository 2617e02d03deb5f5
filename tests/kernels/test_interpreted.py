"""Runs the kernels themselves on a CPU."""

from pathlib import Path

import pytest

from tests.tools.interpreted import run_interpreted


@pytest.mark.timeout(1000)
def test_kernels_under_the_interpreter():
    run_interpreted(Path(__file__).parent / "interpreted")
