"""What servers leave in TMPDIR, and a TMPDIR without room."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.server_process import PacedServer
from tests.tools.waiting import wait_for

pytestmark = pytest.mark.faults

FRONT_ENDS = ("--frontends", "2")


def test_a_start_clears_up_after_a_killed_server_and_not_after_a_live_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    with PacedServer(tmp_path / "live", *FRONT_ENDS) as live:
        (kept,) = folder.iterdir()
        with PacedServer(tmp_path / "killed", *FRONT_ENDS) as killed:
            os.kill(killed.process.pid, signal.SIGKILL)
            killed.process.wait()
        (abandoned,) = set(folder.iterdir()) - {kept}
        with PacedServer(tmp_path / "next") as following:
            assert not abandoned.exists()
            assert kept in folder.iterdir()
            assert live.is_serving()
            assert following.is_serving()
            live.metric("fusewire_engine_up")
    assert list(folder.iterdir()) == []


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A TMPDIR with room for the files of two front ends."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, left: int = 0) -> None:
    """Leave so many bytes of room on a disk."""
    disk = os.statvfs(folder)
    with (folder / "filling").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - left)


def test_a_disk_that_is_almost_full_is_refused_at_the_start(tmp_path: Path, small: Path) -> None:
    fill(small, left=100_000)
    with PacedServer(tmp_path / "log", *FRONT_ENDS, wait=False) as server:
        assert server.process.wait(20) == 1
    (line,) = server.log.read_text().splitlines()
    assert "TMPDIR: no room for the server's files in" in line
    assert line.endswith("No space left on device")
    assert [path.name for path in small.iterdir()] == ["filling"]


def test_a_disk_that_fills_later_disturbs_neither_counts_nor_a_restart(tmp_path: Path, small: Path) -> None:
    with PacedServer(tmp_path / "log", *FRONT_ENDS) as server:
        fill(small)
        for _ in range(2):
            files = set(small.rglob("*"))
            before = server.metric("grpc_server_started_total", grpc_method="Check")
            for pid in server.worker_pids():
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda: len(server.worker_pids()) == 2 and server.is_serving())
            assert server.metric("grpc_server_started_total", grpc_method="Check") > before > 0
            assert set(small.rglob("*")) == files
        (small / "filling").unlink()
    assert list(small.iterdir()) == []
