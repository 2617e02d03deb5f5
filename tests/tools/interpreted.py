"""Runs tests under Triton's interpreter, in a process of their own.

Triton decides at import whether kernels are interpreted, and other tests of a process import the same
modules to have the torch twins.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_interpreted(folder: Path) -> None:
    """Run a folder's tests with TRITON_INTERPRET=1; fail with their output if one fails."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(folder)]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    if run.returncode != 0:
        pytest.fail(f"{folder} (exit code {run.returncode}):\n{run.stdout}{run.stderr}", pytrace=False)
