"""Rules and runbooks of deploy/prometheus: promtool's own checks, and what promtool cannot know."""

import itertools
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric

from fusewire.service.metrics import Metrics
from tests.tools import promql
from tests.tools.prometheus_process import PrometheusProcess, missing_tools
from tests.tools.promql import DEPLOY, Expression

FOLDER = DEPLOY / "prometheus"
UNIT_TESTS = sorted((FOLDER / "tests").glob("*.yaml"))
needs_promtool = pytest.mark.skipif(bool(missing_tools()), reason="no promtool (Debian's package prometheus)")
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def metrics() -> list[Metric]:
    """Every metric that a server has, with TLS, before anything has happened."""
    made = Metrics("demo")
    made.observe_certificate(0.0)
    return list(made.registry.collect())


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in promql.load_rules() if "alert" in rule}


@needs_promtool
def test_promtool_accepts_the_configuration_and_its_rules() -> None:
    promtool("check", "config", FOLDER / "prometheus.yaml")
    promtool("check", "rules", *sorted(promql.RULES.glob("*.yaml")))


@needs_promtool
@pytest.mark.parametrize("file", UNIT_TESTS, ids=lambda file: file.stem)
def test_the_unit_tests_of_the_rules_pass(file: Path) -> None:
    promtool("test", "rules", file)


@pytest.mark.parametrize("name", alerts())
def test_every_alert_is_seen_to_fire_and_later_to_clear(name: str) -> None:
    cases = [case for file in UNIT_TESTS for case in yaml.safe_load(file.read_text())["tests"]]
    for case in cases:
        checks = [check for check in case["alert_rule_test"] if check["alertname"] == name]
        checks.sort(key=lambda check: _seconds(check["eval_time"]))
        fires = [bool(check.get("exp_alerts")) for check in checks]
        if [now for now, _ in itertools.groupby(fires)] == [False, True, False]:
            return
    raise AssertionError("no case in which it is silent, fires and is silent again")


def _seconds(duration: str) -> int:
    """A duration as Prometheus writes it."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([smhd])", duration))


@pytest.mark.parametrize(("name", "rule"), alerts().items(), ids=alerts())
def test_every_alert_says_how_bad_it_is_and_has_a_runbook(name: str, rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"].keys() == {"summary", "runbook_url"}
    page, _, anchor = rule["annotations"]["runbook_url"].rpartition("#")
    assert (
        page == "{{ with $externalLabels.runbooks }}{{ . }}{{ else }}deploy/prometheus/runbooks.md{{ end }}"
    )
    assert (DEPLOY.parent / "deploy/prometheus/runbooks.md").is_file()
    assert anchor == name.lower(), "as Markdown makes anchors"


def test_the_runbooks_are_of_alerts_that_there_are() -> None:
    headings = re.findall(r"^## (Fusewire\w+)$", (FOLDER / "runbooks.md").read_text(), re.MULTILINE)
    assert headings == list(alerts()), "the same, in the same order"


def test_the_commands_in_the_runbooks_exist() -> None:
    from fusewire.service.cli import build_parser

    commands = re.findall(r"`(fusewire [^`]+)`", (FOLDER / "runbooks.md").read_text())
    assert commands
    for command in commands:
        build_parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize("expression", promql.everything(), ids=str)
def test_every_metric_of_an_expression_exists(expression: Expression) -> None:
    known = {family.name + suffix for family in metrics() for suffix in SUFFIXES[family.type]}
    known |= {rule["record"] for rule in promql.load_rules() if "record" in rule}
    used = set(re.findall(r"(?:fusewire:[\w:]+|(?:fusewire|grpc_server)_\w+)", expression.text))
    assert used - known == set()


@pytest.mark.parametrize(
    ("name", "histogram"), [("ttft", "time_to_first_token"), ("itl", "inter_token_latency")]
)
def test_a_latency_objective_is_the_bound_of_a_bucket(name: str, histogram: str) -> None:
    (rule,) = (r for r in promql.load_rules() if r.get("record") == f"fusewire:{name}_objective:seconds")
    found = re.fullmatch(r'label_replace\(vector\((.+)\), "le", "(.+)", "", ""\)', rule["expr"])
    assert found is not None
    value, label = found.groups()
    bounds = {
        sample.labels["le"]
        for family in metrics()
        if family.name == f"fusewire_{histogram}_seconds"
        for sample in family.samples
        if "le" in sample.labels
    }
    assert label in bounds
    assert float(value) == float(label)


def test_bounds_stand_nowhere_else() -> None:
    assert [str(e) for e in promql.everything() if re.search(r"\ble\s*=", e.text)] == []


def test_nothing_fires_on_a_sound_server_under_load(seen: PrometheusProcess) -> None:
    """Of those that fire at once; the others would need minutes."""
    assert seen.alerts() == []
