"""Runs the kernels themselves on a CPU, in a process of its own.

Triton decides at import whether kernels are interpreted, and the other tests of this process import
the same modules to have the torch twins.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = Path(__file__).parent / "interpreted"
ROOT = Path(__file__).parents[2]


def test_kernels_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(INTERPRETED)]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    if run.returncode != 0:
        pytest.fail(
            f"interpreted kernels (exit code {run.returncode}):\n{run.stdout}{run.stderr}", pytrace=False
        )
