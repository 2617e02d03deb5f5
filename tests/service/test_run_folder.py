"""Folders of servers that were killed go, those of servers that live stay, and so does what is not ours."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fusewire.service.run_folder import FolderError, RunFolder, remove_abandoned

HOLDER = """
import sys
from fusewire.service.run_folder import RunFolder
folder = RunFolder(2, "m")
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TMPDIR, for this process and its children."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


@contextmanager
def holder() -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """A process that has a folder, and the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())


def test_the_folder_of_a_killed_server_goes_and_that_of_a_live_one_stays() -> None:
    with holder() as (killed, abandoned), holder() as (_, kept):
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert (abandoned / "counter_1.db").exists()
        remove_abandoned()
        assert not abandoned.exists()
        assert sorted(path.name for path in kept.iterdir()) == [
            *("counter_1.db", "counter_2.db", "histogram_1.db", "histogram_2.db", "server.lock")
        ]


def test_a_folder_is_private_and_gone_when_it_is_removed(parent: Path) -> None:
    folder = RunFolder(0, "m")
    assert folder.path.stat().st_mode & 0o777 == 0o700
    remove_abandoned()
    assert folder.path.exists()
    folder.remove()
    assert list(parent.iterdir()) == []


def test_what_is_not_certainly_a_dead_servers_stays(parent: Path, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "server.lock").touch()
    (parent / "fusewire-link").symlink_to(elsewhere)
    (parent / "fusewire-old").mkdir()
    (parent / "fusewire-file").touch()
    (parent / "fusewire-linked-lock").mkdir()
    (parent / "fusewire-linked-lock" / "server.lock").symlink_to(elsewhere / "server.lock")
    (parent / "other").mkdir()
    (parent / "other" / "server.lock").touch()
    before = sorted(parent.rglob("*"))
    remove_abandoned()
    assert sorted(parent.rglob("*")) == before
    assert (elsewhere / "server.lock").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of another user's")
def test_another_users_folder_stays(parent: Path) -> None:
    folder = parent / "fusewire-theirs"
    folder.mkdir()
    (folder / "server.lock").touch()
    os.chown(folder, 12345, 12345)
    remove_abandoned()
    assert (folder / "server.lock").exists()


def test_a_folder_that_is_too_small_is_refused_and_leaves_nothing(parent: Path) -> None:
    """A bound on the size of files stands for a disk that is full."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    open_before = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            FolderError, match=rf"^no room for the server's files in {parent}/fusewire-.*: File"
        ):
            RunFolder(1, "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert list(parent.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == open_before
