import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from fusewire.service import loopback
from fusewire.service.loopback import free_ports

GIVEN_TO_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")
DEFAULT_LOWEST = 32_768


def test_the_ports_differ_and_can_be_listened_on() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    with ExitStack() as listening:
        for port in ports:
            listening.enter_context(socket.create_server(("127.0.0.1", port)))


def test_a_port_in_use_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *free = free_ports(3)
    monkeypatch.setattr(loopback, "CHOICE", [first, *free])
    monkeypatch.setattr(loopback, "TRIES", 3)
    with socket.create_server(("127.0.0.1", first)):
        assert set(free_ports(2)) == set(free)
        with pytest.raises(OSError, match="not 3 free ports among 3 tried"):
            free_ports(3)


def test_no_connection_that_goes_out_takes_one_where_the_kernel_keeps_its_default() -> None:
    if not GIVEN_TO_CONNECTIONS.exists():
        pytest.skip("this kernel does not say which ports it gives to connections")
    lowest = int(GIVEN_TO_CONNECTIONS.read_text().split()[0])
    if lowest < DEFAULT_LOWEST:
        pytest.skip(f"this machine gives ports from {lowest} on to connections")
    assert max(loopback.CHOICE) < lowest
