"""compute-sanitizer on the kernels: no stray access, no race, no read of what nothing wrote."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZER = shutil.which("compute-sanitizer")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer (a part of the CUDA toolkit)"),
    pytest.mark.timeout(600),
]


def findings(tool: str, *arguments: str) -> list[str]:
    """Run the launches under a tool and return the lines that put a finding inside one of our kernels.

    Findings inside torch's own kernels are torch's: of reads past what it has initialised there are many.
    """
    command = [
        str(SANITIZER), "--tool", tool, "--print-limit", "100000", "--show-backtrace", "no",
        sys.executable, "-m", "tests.tools.launch_kernels", *arguments,
    ]  # fmt: skip
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=590)
    assert "COMPUTE-SANITIZER" in run.stdout, run.stderr
    assert arguments or "launched" in run.stdout, run.stdout[-4000:] + run.stderr[-2000:]
    return [line for line in run.stdout.splitlines() if re.search(r"\bat .*(qk_norm|qkv_epilogue)", line)]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_the_kernels_are_clean(tool):
    assert findings(tool) == []


def test_a_launch_past_the_end_is_found():
    assert findings("memcheck", "--plant")
