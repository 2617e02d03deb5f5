"""The dashboards of deploy/grafana: made by their source, well-formed, and every query of them answered."""

import math
import re
from typing import Any

import pytest
import yaml

from tests.tools import promql
from tests.tools.prometheus_process import CONFIG, PrometheusProcess
from tests.tools.promql import DEPLOY, LABEL_VALUES, Expression

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


@pytest.mark.parametrize("expression", promql.everything(), ids=str)
def test_every_expression_is_answered(seen: PrometheusProcess, expression: Expression) -> None:
    """Beside a server that has worked, with numbers: a mean of nothing is NaN, and no answer."""
    for text in {expression.filled(path=path) for path in ("fused", "fused_norm")}:
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
