"""Free ports of the loopback interface, for a server that a command starts for itself.

It knows nothing of who will listen there, and holds no port: between the choice and the
server's start another process may take one, which the choice makes as unlikely as it can.
"""

import socket
from random import SystemRandom

CHOICE = range(20_000, 32_000)  # below the ports that Linux and macOS give to outgoing connections
TRIES = 1000


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, all different.

    A port that the kernel picks (port 0) lies where outgoing connections get theirs, so that
    any connection of the next seconds may take it before the server does; these don't.

    Raises:
        OSError: if so many cannot be found.
    """
    found: list[socket.socket] = []
    try:
        for port in SystemRandom().sample(CHOICE, TRIES):
            if len(found) == count:
                break
            try:
                found.append(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        if len(found) < count:
            raise OSError(f"not {count} free ports among {TRIES} tried on 127.0.0.1")
        return [sock.getsockname()[1] for sock in found]
    finally:
        for sock in found:
            sock.close()
