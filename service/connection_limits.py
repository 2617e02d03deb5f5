"""How many connections each port takes, by the number of files that a process may have open.

Each connection takes a file descriptor. The public port gets what is left once the server's own files and
the other ports are served: however many clients come, there are descriptors left to restart the engine, to
answer a scrape and to answer the operator. Knows no gRPC.
"""

import logging
import resource
from dataclasses import dataclass
from typing import Self

log = logging.getLogger(__name__)

MAX_PUBLIC = 2048
"""An idle connection costs a process 16 KB; with TLS 46 KB, and 72 KB when all are closed at once."""
MIN_PUBLIC = 16
FEW_PUBLIC = 512
"""Fewer than these are worth a warning."""
ADMIN = 32
METRICS = 32
DASHBOARD = 32
OWN_FILES = 64
"""What a process has open beside connections is about 30, and more for a moment while it starts a child."""
FILES_PER_FRONT_END = 4
"""The server's pipes to and from a front end's process, and its handle of that process."""
WANTED_FILES = 4096
"""More than all of these; a limit that is higher already stays."""


class TooFewFilesError(RuntimeError):
    """The limit of open files leaves too few connections to serve; the message is for the operator."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How many connections the gRPC ports of one process take, and how long an idle one stays.

    Attributes:
        public: most connections of the public port.
        admin: most connections of the admin port.
        idle_seconds: a connection without a call is closed after these.
        age_seconds: a connection takes new calls for so long, and is closed after as long again. Nothing
            else ends a call whose client does not read and answers pings.
        handshake_seconds: what a connection may take until TLS and HTTP/2 are agreed upon.
    """

    public: int = MAX_PUBLIC
    admin: int = ADMIN
    idle_seconds: float = 300.0
    age_seconds: float = 3600.0
    handshake_seconds: float = 10.0

    @classmethod
    def within(cls, files: int, front_ends: int) -> Self:
        """Divide the files that one process may have open.

        Args:
            files: the limit.
            front_ends: how many processes share the public port; each has a limit of its own.

        Raises:
            TooFewFilesError: if fewer than `MIN_PUBLIC` connections are left for the public port.
        """
        reserve = OWN_FILES + FILES_PER_FRONT_END * front_ends + ADMIN + METRICS + DASHBOARD
        if files < reserve + MIN_PUBLIC:
            raise TooFewFilesError(
                f"only {files} files may be open, and at least {reserve + MIN_PUBLIC} are needed: raise the "
                "limit (RLIMIT_NOFILE; ulimit -n, LimitNOFILE)"
            )
        return cls(public=min(MAX_PUBLIC, files - reserve))


def limit_connections(front_ends: int) -> ConnectionLimits:
    """Let this process and its children have as many files open as they need, and divide them.

    The hard limit may allow fewer than they need, which is logged.

    Raises:
        TooFewFilesError: see `ConnectionLimits.within`.
    """
    _raise_file_limit()
    files = file_limit()
    limits = ConnectionLimits.within(files, front_ends)
    if limits.public < FEW_PUBLIC:
        log.warning(
            "the public port takes at most %d connections, since only %d files may be open: raise the limit "
            "(RLIMIT_NOFILE; ulimit -n, LimitNOFILE)",
            limits.public,
            files,
        )
    return limits


def file_limit() -> int:
    """How many files this process may have open."""
    return _bounded(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(WANTED_FILES, _bounded(hard))
    if _bounded(soft) < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _bounded(limit: int) -> int:
    """A limit as a number that can be compared; RLIM_INFINITY is -1."""
    return 2**31 if limit == resource.RLIM_INFINITY else limit
