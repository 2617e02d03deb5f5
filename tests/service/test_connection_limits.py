"""How a limit of open files is divided, raised where that is possible, and refused where it is too low."""

import subprocess
import sys
from pathlib import Path

import pytest

from fusewire.service.connection_limits import MAX_PUBLIC, ConnectionLimits, TooFewFilesError
from tests.tools.server_process import PacedServer

LIMIT = """
import logging
import resource
import sys
from fusewire.service.connection_limits import file_limit, limit_connections
logging.basicConfig(format="%(message)s")
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
print(limit_connections(1).public, file_limit())
"""


def limit_under(soft: int, hard: int) -> subprocess.CompletedProcess[str]:
    """What a process with these limits comes to."""
    command = [sys.executable, "-c", LIMIT, str(soft), str(hard)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_the_soft_limit_is_raised_as_far_as_the_hard_one_allows() -> None:
    for soft, hard, raised, public in ((256, 10_000, 4096, MAX_PUBLIC), (256, 1024, 1024, 860)):
        done = limit_under(soft, hard)
        assert done.stdout == f"{public} {raised}\n"
        assert done.stderr == ""


def test_few_files_are_enough_for_few_connections_and_the_log_says_so() -> None:
    done = limit_under(128, 256)
    assert done.stdout == "92 256\n"
    assert "takes at most 92 connections, since only 256 files may be open" in done.stderr


def test_every_front_end_more_costs_the_server_some_files() -> None:
    assert ConnectionLimits.within(1024, 8).public == ConnectionLimits.within(1024, 1).public - 28
    assert ConnectionLimits.within(2**31, 8).public == MAX_PUBLIC


def test_too_few_files_are_refused_with_what_is_needed() -> None:
    assert ConnectionLimits.within(180, 1).public == 16
    with pytest.raises(TooFewFilesError, match=r"^only 179 files may be open, and at least 180 are needed"):
        ConnectionLimits.within(179, 1)


def test_a_server_with_too_few_files_says_so_and_ends(tmp_path: Path) -> None:
    with PacedServer(tmp_path / "log", wait=False, most_files=(100, 179)) as server:
        assert server.process.wait(20) == 1
    (line,) = server.log.read_text().splitlines()
    assert "only 179 files may be open, and at least 180 are needed" in line
