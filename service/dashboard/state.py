"""What the page shows, as JSON: the answers of the services that say it over gRPC, and sums of metrics.

Of a histogram only sum and count are told: the mean over any time is the difference of the sums over
that of the counts, and the page takes it.
"""

import asyncio
import math
import time
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from prometheus_client import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from fusewire.service.rpc.admin import AdminService
from fusewire.service.rpc.call import Call
from fusewire.service.rpc.errors import StatusError
from fusewire.service.rpc.model import ModelService
from fusewire.service.rpc.serving import Serving
from fusewire.v1 import admin_pb2, model_pb2

HISTOGRAMS = frozenset(
    {
        "fusewire_engine_step_duration_seconds",
        "fusewire_time_to_first_token_seconds",
        "fusewire_inter_token_latency_seconds",
        "fusewire_request_time_per_output_token_seconds",
        "fusewire_qk_norm_kernel_duration_seconds",
    }
)
GAUGES = frozenset({"fusewire_shadow_max_relative_error"})


class State:
    """Everything that the page shows.

    Args:
        serving: what the services share.
        registry: the metrics, as they are scraped.
    """

    def __init__(self, serving: Serving, registry: Collector) -> None:
        self._serving = serving
        self._registry = registry
        self._admin = AdminService(serving)
        self._model = ModelService(serving)

    async def read(self, call: Call) -> dict[str, Any]:
        """Return it, ready for JSON. `kernel` and `unavailable` tell why one is null when the other is not.

        Messages have the fields of the proto by their proto names: `kernel` is a GetKernelModeResponse,
        `server` a GetServerInfoResponse, `load` a GetLoadResponse. `time` is in seconds, from any start;
        `histograms` has by name a list of {labels, sum, count}, `gauges` one of {labels, value},
        whose value is null where it is no finite number.
        """
        kernel: dict[str, Any] | None = None
        unavailable: str | None = None
        try:
            kernel = plain(await self._admin.GetKernelMode(admin_pb2.GetKernelModeRequest(), call))
        except StatusError as error:
            unavailable = error.message
        server = await self._model.GetServerInfo(model_pb2.GetServerInfoRequest(), call)
        load = await self._model.GetLoad(model_pb2.GetLoadRequest(), call)
        metrics = await asyncio.to_thread(
            read_metrics, self._registry
        )  # reads files, with several front ends
        return {
            "model": self._serving.model_name,
            "kernel": kernel,
            "unavailable": unavailable,
            "server": plain(server),
            "load": plain(load),
            "time": time.monotonic(),
            **metrics,
        }


def read_metrics(registry: Collector) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Read the histograms and gauges that the page shows; safe from any thread."""
    families = list(registry.collect())
    return {
        "histograms": {family.name: _sums(family) for family in families if family.name in HISTOGRAMS},
        "gauges": {
            family.name: [_value(sample) for sample in family.samples]
            for family in families
            if family.name in GAUGES
        },
    }


def _sums(family: Metric) -> list[dict[str, Any]]:
    """Sum and count of each combination of labels of a histogram."""
    series: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
    for sample in family.samples:
        part = sample.name.removeprefix(f"{family.name}_")
        if part in ("sum", "count"):
            key = tuple(sorted(sample.labels.items()))
            series.setdefault(key, {"labels": sample.labels, "sum": 0.0, "count": 0.0})[part] = sample.value
    return list(series.values())


def _value(sample: Sample) -> dict[str, Any]:
    return {"labels": sample.labels, "value": sample.value if math.isfinite(sample.value) else None}


def plain(message: Message) -> dict[str, Any]:
    """A message as protobuf's JSON has it, by its proto names; fields at their default are there too."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
