"""Panels, rows and what all dashboards have in common; how Grafana spells them is its SDK's business."""

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, text, timeseries
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    ScaleDistribution,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DynamicConfigValue,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
)

from deploy.grafana.boards.queries import SERVER, WINDOW, Query

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
COLUMNS = 24
LINES_HEIGHT, FIGURE_HEIGHT, NOTE_HEIGHT = 8, 4, 5
PATH_COLOURS = {
    "/unfused$/": "orange",
    "/fused_norm$/": "blue",
    "/(^| )fused$/": "green",
    "/mixed$/": "gray",
}
DASHED = "/^prefill /"

Panel = timeseries.Panel | stat.Panel | text.Panel


@dataclass(frozen=True)
class Row:
    """Panels under a heading, from left to right."""

    title: str
    panels: Sequence[Panel]


def lines(
    title: str,
    unit: str,
    *queries: Query,
    about: str = "",
    width: int = 8,
    stacked: bool = False,
    logarithmic: bool = False,
) -> timeseries.Panel:
    """Curves over time; those of a kernel path have its colour everywhere, and of prefill are dashed."""
    stacking = StackingMode.NORMAL if stacked else StackingMode.NONE
    legend = common.VizLegendOptions().show_legend(True)
    legend.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    panel = timeseries.Panel().title(title).description(about).unit(unit).datasource(SOURCE)
    panel.height(LINES_HEIGHT).span(width).fill_opacity(40 if stacked else 0).legend(legend)
    if logarithmic:
        panel.scale_distribution(common.ScaleDistributionConfig().type(ScaleDistribution.LOG).log(10))
    else:
        panel.min(0)
    panel.stacking(common.StackingConfig().mode(stacking))
    panel.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    for pattern, colour in PATH_COLOURS.items():
        fixed = DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": colour})
        panel.override_by_regexp(pattern, [fixed])
    dashes = DynamicConfigValue(id_val="custom.lineStyle", value={"fill": "dash", "dash": [8, 8]})
    panel.override_by_regexp(DASHED, [dashes])
    for target in _targets(queries):
        panel.with_target(target.range())
    return panel


def figure(
    title: str, unit: str, *queries: Query, about: str = "", width: int = 4, alarm: float | None = None
) -> stat.Panel:
    """One number for each series, red from `alarm` on."""
    steps = [Threshold(color="green", value=None)]
    if alarm is not None:
        steps.append(Threshold(color="red", value=alarm))
    panel = stat.Panel().title(title).description(about).unit(unit).datasource(SOURCE)
    panel.height(FIGURE_HEIGHT).span(width).graph_mode(BigValueGraphMode.NONE)
    panel.color_mode(BigValueColorMode.VALUE if alarm is not None else BigValueColorMode.NONE)
    panel.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    for target in _targets(queries):
        panel.with_target(target.instant())
    return panel


def note(words: str) -> text.Panel:
    """A text as wide as the dashboard."""
    return text.Panel().title("").content(words).height(NOTE_HEIGHT).span(COLUMNS).transparent(True)


def _targets(queries: Sequence[Query]) -> list[prometheus.Dataquery]:
    """The queries, named A, B, ... within their panel."""
    return [
        prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + number))
        for number, (legend, expression) in enumerate(queries)
    ]


def board(
    uid: str, title: str, *rows: Row, extra_variables: Sequence[dashboard.CustomVariable] = ()
) -> dashboard.Dashboard:
    """A dashboard of rows of panels, with the variables, marks and links that all of them have."""
    made = dashboard.Dashboard(title).uid(f"fusewire-{uid}").tags(["fusewire"]).timezone("browser").readonly()
    made.time("now-30m", "now").refresh("10s").tooltip(DashboardCursorSync.CROSSHAIR)
    made.link(
        dashboard.DashboardLink("Fusewire")
        .type(DashboardLinkType.DASHBOARDS)
        .tags(["fusewire"])
        .include_vars(True)
        .keep_time(True)
    )
    for variable in (*_variables(), *extra_variables):
        made.with_variable(variable)
    made.annotation(_switches())
    number = 0
    for row in rows:
        made.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            made.with_panel(panel.id(number := number + 1))
    return made


def _variables() -> list[dashboard.DatasourceVariable | dashboard.QueryVariable]:
    """Datasource, model and instance; a server has one model, so its instance follows from the model."""
    series = "fusewire_time_to_first_token_seconds_count"
    queries = {
        "model": f"label_values({series}, model_name)",
        "instance": f'label_values({series}{{model_name=~"$model"}}, instance)',
    }
    everything = VariableOption(selected=True, text="All", value="$__all")
    return [
        dashboard.DatasourceVariable("datasource").label("Datasource").type("prometheus"),
        *(
            dashboard.QueryVariable(name)
            .label(name.capitalize())
            .datasource(SOURCE)
            .query(query)
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(everything)
            for name, query in queries.items()
        ),
    ]


def path_variable() -> dashboard.CustomVariable:
    """The path that the ratios hold against unfused."""
    paths = ("fused", "fused_norm")
    options = [VariableOption(selected=path == "fused", text=path, value=path) for path in paths]
    chosen = dashboard.CustomVariable("path").label("Compared with unfused").values(",".join(paths))
    return chosen.options(options).current(options[0])


def _switches() -> dashboard.AnnotationQuery:
    """Marks each change of the default kernel path."""
    last = f"fusewire_kernel_mode_last_switch_timestamp_seconds{{{SERVER}}}"
    query = dashboard.AnnotationQuery().name("Kernel path switched").datasource(SOURCE).enable(True)
    return query.icon_color("purple").expr(f"changes({last}[{WINDOW}]) > 0")
