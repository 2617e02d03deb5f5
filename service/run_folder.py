"""The private folder of a server that runs, and the removal of those that killed servers have left.

A server holds a lock on a file in its folder as long as it lives, and the kernel takes that lock from it
however it ends. So a folder whose lock can be had belongs to nobody.
"""

import fcntl
import logging
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

from fusewire.service.shared_metrics import make_count_files

log = logging.getLogger(__name__)

PREFIX = "fusewire-"
LOCK = "server.lock"
MAX_SOCKET_PATH_BYTES = 107
"""Linux has no room for more in the address of a unix socket."""


class FolderError(RuntimeError):
    """There is no room for the folder; the message is for the operator."""


class RunFolder:
    """A folder under TMPDIR, 0700, that is this process's until `remove` or its end.

    Everything that its processes will write there has its room from the start: they would end over and over
    again without it.

    Args:
        workers: how many front ends count in files; 0 where the server answers by itself.
        model_name: the name in their metrics.

    Raises:
        FolderError: if it cannot be made, or holds less than is needed.
    """

    def __init__(self, workers: int, model_name: str) -> None:
        try:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        except OSError as error:
            raise FolderError(f"cannot make a folder for the engine's socket: {error}") from error
        self.socket_path = self.path / "engine.sock"
        with ExitStack() as undo:
            undo.callback(shutil.rmtree, self.path)
            self._check_socket_path()
            try:
                self._lock = _make_lock(self.path)
                undo.callback(os.close, self._lock)
                self.count_files = make_count_files(self.path, workers, model_name)
            except OSError as error:
                raise FolderError(
                    f"no room for the server's files in {self.path}: {error.strerror}"
                ) from error
            undo.pop_all()

    def _check_socket_path(self) -> None:
        if len(os.fsencode(self.socket_path)) > MAX_SOCKET_PATH_BYTES:
            raise FolderError(
                f"the engine's socket would be {self.socket_path}, and the path of a socket has at most "
                f"{MAX_SOCKET_PATH_BYTES} bytes"
            )

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_abandoned() -> None:
    """Remove this user's folders under TMPDIR whose servers are dead.

    A folder without a lock is left alone: its server may be of a version that made none, or just be
    starting. Symbolic links are never followed.
    """
    try:
        parent = tempfile.gettempdir()
        names = [entry.name for entry in os.scandir(parent) if entry.name.startswith(PREFIX)]
    except OSError:  # making a folder there will fail too, and says why
        return
    removed = [name for name in names if _remove_if_abandoned(parent, name)]
    if removed:
        log.info("removed from %s what %d killed servers had left", parent, len(removed))


def _make_lock(folder: Path) -> int:
    """Make the file and lock it; it gets its name once it is locked, so nobody ever sees it without."""
    unnamed = folder / f"{LOCK}.new"
    lock = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(folder / LOCK)
    except OSError:
        os.close(lock)
        raise
    return lock


def _remove_if_abandoned(parent: str, name: str) -> bool:
    """Remove a folder if it is this user's and its lock can be had; tells whether it did."""
    path = os.path.join(parent, name)
    try:
        lock = _take_lock(path)
    except OSError:  # no folder, another user's, without a lock, or its server lives
        return False
    try:
        shutil.rmtree(path)
    except FileNotFoundError:  # another server that starts was faster
        return False
    except OSError as error:
        log.warning("cannot remove %s, which a killed server has left: %s", path, error)
        return False
    finally:
        os.close(lock)
    return True


def _take_lock(path: str) -> int:
    """Lock a folder whose server is dead; raises OSError for any other."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(folder).st_uid != os.geteuid():
            raise PermissionError(f"{path} is another user's")
        lock = os.open(LOCK, os.O_RDWR | os.O_NOFOLLOW, dir_fd=folder)
    finally:
        os.close(folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock
