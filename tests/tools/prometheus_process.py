"""A real Prometheus in a process of its own, with the configuration and the rules of deploy/prometheus.

Only what must differ does: whom it scrapes and how often. Knows nothing of Fusewire's metrics.
"""

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from tests.tools.server_process import free_port, stop

CONFIG = Path(__file__).parents[2] / "deploy" / "prometheus" / "prometheus.yaml"
START_SECONDS = 30


def missing_tools() -> list[str]:
    """Which of the programs that Debian's package `prometheus` brings are not installed."""
    return [name for name in ("prometheus", "promtool") if shutil.which(name) is None]


@dataclass(frozen=True)
class Series:
    """One series of an answer: its labels, and its values over time as (Unix time, value)."""

    labels: dict[str, str]
    values: list[tuple[float, float]]

    @property
    def last(self) -> float:
        """The latest value."""
        return self.values[-1][1]


class PrometheusProcess:
    """Prometheus on a free loopback port; a context manager that waits until it answers.

    Args:
        folder: for its configuration, its data and its log.
        targets: what to scrape, as host:port.
        seconds: from one scrape, and one evaluation of the rules, to the next.
    """

    def __init__(self, folder: Path, targets: Sequence[str], seconds: int = 1) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._folder = folder
        self._targets = list(targets)
        self._interval = f"{seconds}s"

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / "prometheus.yaml"
        config.write_text(yaml.safe_dump(self._config()))
        self._log = (self._folder / "log").open("w")
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={self._folder / 'data'}",
                f"--web.listen-address={self.url.removeprefix('http://')}",
                "--log.level=warn",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        stop(self._process, 30)
        self._log.close()

    def query(self, expression: str) -> list[Series]:
        """Evaluate an expression at this moment; a scalar is a series without labels.

        Raises:
            ValueError: if it cannot be evaluated; it says why.
        """
        data = self._get("query", query=expression)
        if data["resultType"] == "scalar":
            return [_series({"metric": {}, "value": data["result"]})]
        return [_series(each) for each in data["result"]]

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[Series]:
        """Evaluate an expression every `step` seconds from `start` to `end`, both in Unix time."""
        data = self._get("query_range", query=expression, start=start, end=end, step=step)
        return [_series(each) for each in data["result"]]

    def label_values(self, label: str, selector: str) -> list[str]:
        """The values that a label has in the series of a selector."""
        return self._get(f"label/{label}/values", **{"match[]": selector})

    def alerts(self) -> list[str]:
        """The names of the alerts that fire."""
        return [a["labels"]["alertname"] for a in self._get("alerts")["alerts"] if a["state"] == "firing"]

    def wait_for(self, expression: str, seconds: float = 30) -> None:
        """Wait until an expression has an answer."""
        end = time.monotonic() + seconds
        while not self.query(expression):
            assert time.monotonic() < end, f"no answer to {expression}"
            time.sleep(0.1)

    def _config(self) -> dict[str, Any]:
        config = yaml.safe_load(CONFIG.read_text())
        config["global"] = {"scrape_interval": self._interval, "evaluation_interval": self._interval}
        config["rule_files"] = [str(CONFIG.parent / pattern) for pattern in config["rule_files"]]
        (job,) = config["scrape_configs"]
        job["static_configs"] = [{"targets": self._targets}]
        return config

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5):
                    return
            except OSError:
                gone = self._process.poll() is not None
                if gone or time.monotonic() > end:
                    log = (self._folder / "log").read_text()
                    raise AssertionError(f"Prometheus does not start:\n{log}") from None
            time.sleep(0.05)

    def _get(self, path: str, **parameters: str | float) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{parameters}: {json.load(error)['error']}") from error


def _series(result: dict[str, Any]) -> Series:
    values = result["values"] if "values" in result else [result["value"]]
    return Series(result["metric"], [(float(at), float(value)) for at, value in values])
