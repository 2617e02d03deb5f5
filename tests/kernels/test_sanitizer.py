"""compute-sanitizer on the kernels: no stray access, no race, no read of what nothing wrote."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZER = shutil.which("compute-sanitizer")
FOUND = 97

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer (a part of the CUDA toolkit)"),
    pytest.mark.timeout(600),
]


def watch(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the launches under a tool that looks at our kernels alone; exit code FOUND is a finding."""
    command = [
        str(SANITIZER), "--tool", tool, "--error-exitcode", str(FOUND),
        "--kernel-name", "kernel_substring=qk_norm",
        sys.executable, "-m", "tests.tools.launch_kernels", *arguments,
    ]  # fmt: skip
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=590)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_the_kernels_are_clean(tool):
    run = watch(tool)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "launched" in run.stdout


def test_a_launch_past_the_end_is_found():
    run = watch("memcheck", "--plant")
    assert run.returncode != 0
    assert "Invalid __global__ read" in run.stdout
