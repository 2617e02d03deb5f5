"""`python -m deploy.grafana.build`: writes the dashboards as JSON for Grafana, beside this file.

Needs grafana-foundation-sdk. What is on the dashboards is in `deploy.grafana.boards`.
"""

import json
from collections.abc import Callable
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.boards.engine import engine
from deploy.grafana.boards.fused_vs_unfused import fused_vs_unfused
from deploy.grafana.boards.overview import overview

FOLDER = Path(__file__).parent / "dashboards"
DASHBOARDS: dict[str, Callable[[], Dashboard]] = {
    "overview": overview,
    "fused-vs-unfused": fused_vs_unfused,
    "engine": engine,
}


def render(make: Callable[[], Dashboard]) -> str:
    """Spell a dashboard as Grafana loads it."""
    return json.dumps(make().build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def main() -> None:
    """Write every dashboard."""
    for name, make in DASHBOARDS.items():
        FOLDER.joinpath(f"{name}.json").write_text(render(make))


if __name__ == "__main__":
    main()
