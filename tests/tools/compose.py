"""deploy/compose.yaml as Compose itself reads it, and the services that it starts.

Asks `docker-compose`, the program; reading needs no engine.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
FILE = REPOSITORY / "deploy" / "compose.yaml"
PROFILES = ("cpu", "gpu")
OUTSIDE = ("PATH", "HOME", "DOCKER_HOST")


def program() -> str | None:
    """Where `docker-compose` is: beside this Python, or on the path; None if it is nowhere."""
    return shutil.which("docker-compose", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def compose(
    *arguments: str, variables: Mapping[str, str] | None = None, folder: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """Run `docker-compose` from a folder, with no variables of this process but the few that it needs."""
    kept = {name: os.environ[name] for name in OUTSIDE if name in os.environ}
    line = [program() or "docker-compose", "--file", os.path.relpath(FILE, folder), *arguments]
    return subprocess.run(
        line, cwd=folder, env={**kept, **(variables or {})}, capture_output=True, text=True, check=False
    )


@functools.cache
def read(*arguments: str) -> dict[str, Any]:
    """The whole model that `docker-compose ARGUMENTS config` prints: variables put in, anchors merged.

    Raises:
        AssertionError: if Compose refuses the file.
    """
    done = compose(*arguments, "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def services(*arguments: str) -> dict[str, dict[str, Any]]:
    """The services that `docker-compose ARGUMENTS up` would start, by name."""
    return read(*arguments)["services"]
