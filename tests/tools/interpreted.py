"""Runs tests under Triton's interpreter, in a process of their own.

Triton decides at import whether kernels are interpreted, and other tests of a process import the same
modules to have the torch twins.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_interpreted(folder: Path) -> None:
    """Run a folder's tests with TRITON_INTERPRET=1, half of its files beside the others; fail as they do."""
    files = sorted(map(str, folder.glob("test_*.py")))
    middle = (len(files) + 1) // 2
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

    def run(half: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *half], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900
        )

    with ThreadPoolExecutor(2) as beside:
        runs = list(beside.map(run, filter(None, (files[:middle], files[middle:]))))
    said = [f"exit code {each.returncode}:\n{each.stdout}{each.stderr}" for each in runs if each.returncode]
    if said:
        pytest.fail("\n".join([str(folder), *said]), pytrace=False)
