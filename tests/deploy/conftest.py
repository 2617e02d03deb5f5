"""One Prometheus that has watched a server under load, for the tests that ask it something."""

import shutil
from collections.abc import Iterator

import pytest

from tests.tools.prometheus_process import PrometheusProcess, missing_tools
from tests.tools.watched_server import watched_server

LOAD_SECONDS = 12


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusProcess]:
    missing = [*missing_tools(), *(["openssl"] if shutil.which("openssl") is None else [])]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian's packages prometheus and openssl)")
    with watched_server(tmp_path_factory.mktemp("watched"), LOAD_SECONDS) as watched:
        yield watched.prometheus
