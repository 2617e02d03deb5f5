"""Thousands of calls at once: each is answered, or refused in words, and counted."""

import asyncio
from collections import Counter
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from fusewire.v1 import generation_pb2 as pb
from fusewire.v1 import generation_pb2_grpc
from tests.tools.server_process import ServerProcess

pytestmark = pytest.mark.faults

OWN_POOL = [("grpc.use_local_subchannel_pool", 1)]
CALL_SECONDS = 60
BURSTS = [(2000, 20), (5000, 1), (5000, 20)]
"""Calls, and over how many connections."""


def test_every_call_of_a_burst_is_answered_or_refused_in_words(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log") as server:
        total: Counter[str] = Counter()
        for calls, connections in BURSTS:
            ends = asyncio.run(burst(server.port, calls, connections))
            assert ends.keys() <= {"OK", "RESOURCE_EXHAUSTED with RetryInfo"}
            assert ends["OK"] > 0
            total += ends
        counted = {"grpc_method": "Generate", "grpc_type": "unary"}
        for code, end in (("OK", "OK"), ("ResourceExhausted", "RESOURCE_EXHAUSTED with RetryInfo")):
            assert server.metric("grpc_server_handled_total", grpc_code=code, **counted) == total[end]
        assert server.metric("grpc_server_started_total", **counted) == total.total()


async def burst(port: int, calls: int, connections: int) -> Counter[str]:
    """Begin all calls at once; returns how they ended."""
    target = f"127.0.0.1:{port}"
    channels = [grpc.aio.insecure_channel(target, options=OWN_POOL) for _ in range(connections)]
    stubs = [generation_pb2_grpc.GenerationServiceStub(channel) for channel in channels]
    ends = await asyncio.gather(*(end_of_call(stubs[number % connections]) for number in range(calls)))
    for channel in channels:
        await channel.close()
    return Counter(ends)


async def end_of_call(stub: generation_pb2_grpc.GenerationServiceStub) -> str:
    request = pb.GenerateRequest(text="x", stopping={"max_tokens": 1})
    try:
        await stub.Generate(request, timeout=CALL_SECONDS)
    except grpc.aio.AioRpcError as error:
        return error.code().name + (" with RetryInfo" if tells_when_to_retry(error) else "")
    return "OK"


def tells_when_to_retry(error: grpc.aio.AioRpcError) -> bool:
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin":
            details = status_pb2.Status.FromString(value).details
            return any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in details)
    return False
