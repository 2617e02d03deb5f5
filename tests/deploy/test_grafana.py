"""The dashboards of deploy/grafana: made by their source, well-formed, and every query of them answered."""

import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tools import promql
from tests.tools.prometheus_process import CONFIG, PrometheusProcess, missing_tools
from tests.tools.promql import DEPLOY, LABEL_VALUES, Expression

needs_promtool = pytest.mark.skipif(bool(missing_tools()), reason="no promtool (Debian's package prometheus)")
BOARDS = promql.load_dashboards()
PROVISIONING = DEPLOY / "grafana" / "provisioning"


@pytest.mark.parametrize("name", BOARDS)
def test_the_json_is_what_its_source_makes(name: str) -> None:
    pytest.importorskip("grafana_foundation_sdk")
    from deploy.grafana.build import DASHBOARDS, FOLDER, render

    assert DASHBOARDS.keys() == BOARDS.keys()
    made = render(DASHBOARDS[name])
    assert (FOLDER / f"{name}.json").read_text() == made, "run python -m deploy.grafana.build"


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_a_dashboard_can_be_pointed_at_any_datasource_model_and_instance(board: dict[str, Any]) -> None:
    assert {"datasource", "model", "instance"} <= {each["name"] for each in board["templating"]["list"]}
    for panel in board["panels"]:
        if panel["type"] not in ("row", "text"):
            assert panel["datasource"]["uid"] == "${datasource}"


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_panels_do_not_overlap(board: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in board["panels"]):
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells


@pytest.mark.parametrize("expression", [*promql.of_panels(BOARDS), *promql.of_marks(BOARDS)], ids=str)
def test_a_query_goes_by_the_window_of_the_page_and_the_servers_chosen(expression: Expression) -> None:
    windows = set(re.findall(r"\[([^]]+)\]", expression.text))
    assert windows <= {"$__rate_interval", "$__range", "15m"}
    for selector in re.findall(r"\b(?:fusewire|grpc_server)_\w+(\{[^}]*\})?", expression.text):
        assert 'instance=~"$instance"' in selector
    assert "$" not in expression.filled(), "a variable that no dashboard has"


def test_grafana_knows_how_often_prometheus_scrapes() -> None:
    (source,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yaml").read_text())["datasources"]
    scraped = yaml.safe_load(CONFIG.read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped, "or $__rate_interval is too short"


RATIOS = [each for each in promql.of_panels(BOARDS) if 'kernel_mode="$path"' in each.text]
STEPS = 'fusewire_engine_step_duration_seconds_{}{{instance="a", phase="decode", kernel_mode="{}"}}'


def test_there_are_ratios_in_figures_and_in_curves() -> None:
    assert len(RATIOS) == 8


@needs_promtool
@pytest.mark.parametrize(
    ("samples", "slice_seconds", "answer"),
    [
        (25, "2x40", []),
        (35, "2x40", [{"labels": "{phase='decode'}", "value": 2}]),
        (35, "0x40", [{"labels": "{note='not time-sliced', phase='decode'}", "value": 2}]),
        (35, "0x10 2x29", [{"labels": "{note='not time-sliced', phase='decode'}", "value": 2}]),
    ],
)
def test_a_ratio_stands_on_thirty_samples_and_says_if_time_was_not_sliced(
    tmp_path: Path, samples: int, slice_seconds: str, answer: list[dict[str, Any]]
) -> None:
    """Of steps of 2 s on one path and of 1 s on the other, one of which has few samples."""
    (ratio,) = [each for each in RATIOS if "/ Time of a step" in each.title]
    series = {"fusewire_time_slice_seconds{instance='a'}": slice_seconds}
    for mode, count, seconds in (("unfused", 100, 2), ("fused", samples, 1)):
        series[STEPS.format("count", mode)] = f"0+{count / 40}x40"
        series[STEPS.format("sum", mode)] = f"0+{count * seconds / 40}x40"
    case = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": ratio.filled(__range="10m"), "eval_time": "10m", "exp_samples": answer},
        ],
    }
    file = tmp_path / "ratio.yaml"
    file.write_text(yaml.safe_dump({"evaluation_interval": "15s", "tests": [case]}))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("expression", RATIOS, ids=str)
def test_every_ratio_is_held_back_and_marked(expression: Expression) -> None:
    assert len(re.findall(r"_count\{[^}]*\}\[[^]]+\]\)\) >= 30", expression.text)) == 2
    assert "min_over_time(fusewire_time_slice_seconds" in expression.text
    (panel,) = [
        panel
        for panel in BOARDS[expression.place]["panels"]
        if expression.text in [target["expr"] for target in panel.get("targets", ())]
    ]
    assert all("{{note}}" in target["legendFormat"] for target in panel["targets"])


@pytest.mark.parametrize("expression", promql.everything(), ids=str)
def test_every_expression_is_answered(seen: PrometheusProcess, expression: Expression) -> None:
    """Beside a server that has worked, with numbers: a mean of nothing is NaN, and no answer.

    A short load has few samples, so ratios stand on any number of them here.
    """
    filled = {expression.filled(path=path) for path in ("fused", "fused_norm")}
    for text in {re.sub(r">= 30\b", "> 0", each) for each in filled}:
        assert [series for series in seen.query(text) if math.isfinite(series.last)], text


@pytest.mark.parametrize("expression", list(promql.of_variables(BOARDS)), ids=str)
def test_every_variable_has_values(seen: PrometheusProcess, expression: Expression) -> None:
    found = LABEL_VALUES.fullmatch(expression.filled())
    assert found is not None
    selector, label = found.groups()
    assert seen.label_values(label, selector)


def test_both_paths_are_seen_by_phase(seen: PrometheusProcess) -> None:
    answer = seen.query("sum by (phase, kernel_mode) (fusewire_engine_step_duration_seconds_count) > 0")
    kinds = {(series.labels["phase"], series.labels["kernel_mode"]) for series in answer}
    assert kinds >= {(phase, mode) for phase in ("prefill", "decode") for mode in ("fused", "unfused")}
