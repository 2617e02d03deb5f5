"""One server for the tests that leave it as they found it."""

from collections.abc import Iterator

import pytest

from tests.tools.server_process import ServerProcess


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    with ServerProcess(log) as running:
        yield running
