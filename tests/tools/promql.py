"""Every PromQL expression under deploy/: of the dashboards' panels, variables and marks, and of the rules.

Reads files only; whoever asks fills in what Grafana would.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARDS = DEPLOY / "grafana" / "dashboards"
RULES = DEPLOY / "prometheus" / "rules"
VARIABLES = {"model": ".*", "instance": ".*", "__rate_interval": "1m", "__range": "1h", "path": "fused"}
"""What a dashboard asks with, as it opens."""
LABEL_VALUES = re.compile(r"label_values\((.*), (\w+)\)")
COMPARISON = re.compile(r"\s*(==|!=|<=|>=|<|>)\s*[\d.]+( \* [\d.]+)?")


@dataclass(frozen=True)
class Expression:
    """One expression and where it stands."""

    place: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.title}"

    def filled(self, **values: str) -> str:
        """The expression with its variables replaced; those that are not given have their defaults."""
        text = self.text
        for name, value in (VARIABLES | values).items():
            text = re.sub(rf"\$(?:{name}\b|\{{{name}\}})", lambda _, value=value: value, text)
        return text


def load_dashboards() -> dict[str, dict[str, Any]]:
    """Every dashboard by its file's name."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(DASHBOARDS.glob("*.json"))}


def of_panels(dashboards: Mapping[str, Mapping[str, Any]]) -> Iterator[Expression]:
    """What the panels ask, in the order of the pages."""
    for name, dashboard in dashboards.items():
        row = ""
        for panel in dashboard["panels"]:
            row = panel["title"] if panel["type"] == "row" else row
            for target in panel.get("targets", ()):
                legend = f" [{target['legendFormat']}]" if target["legendFormat"] else ""
                yield Expression(name, f"{row} / {panel['title']}{legend}", target["expr"])


def of_marks(dashboards: Mapping[str, Mapping[str, Any]]) -> Iterator[Expression]:
    """What the annotations ask."""
    for name, dashboard in dashboards.items():
        for mark in dashboard["annotations"]["list"]:
            yield Expression(name, mark["name"], mark["expr"])


def of_variables(dashboards: Mapping[str, Mapping[str, Any]]) -> Iterator[Expression]:
    """What the variables ask, in Grafana's words: label_values(selector, label)."""
    for name, dashboard in dashboards.items():
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                yield Expression(name, variable["name"], variable["query"])


def load_rules() -> list[dict[str, Any]]:
    """Every rule, in the order of the files and groups."""
    files = [yaml.safe_load(file.read_text()) for file in sorted(RULES.glob("*.yaml"))]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def of_records() -> Iterator[Expression]:
    """What the recording rules record."""
    for rule in load_rules():
        if "record" in rule:
            yield Expression("recording rules", rule["record"], rule["expr"])


def of_alerts() -> Iterator[Expression]:
    """What the alerts look at, without what they hold it against: of a sound server, too, there is some."""
    for rule in load_rules():
        if "alert" in rule:
            yield Expression("alerts", rule["alert"], COMPARISON.sub("", rule["expr"]))


def everything() -> list[Expression]:
    """All of them but the variables', which are no PromQL."""
    boards = load_dashboards()
    return [*of_panels(boards), *of_marks(boards), *of_records(), *of_alerts()]
