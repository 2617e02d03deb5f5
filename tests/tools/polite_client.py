"""A client that behaves well while others do not, and measures what it gets.

A process of its own, so that a test's own work does not slow it: it streams greedy answers one after the
other, checks the health of the server every 50 ms, and now and then over a new connection.
"""

import json
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import NamedTuple, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fusewire.v1 import generation_pb2 as pb
from fusewire.v1 import generation_pb2_grpc

CALL_SECONDS = 30.0
HEALTH_EVERY = 0.05
NEW_CONNECTION_EVERY = 0.5
TOKENS = 64
OWN_POOL = [("grpc.use_local_subchannel_pool", 1)]


class Experience(NamedTuple):
    """What the client has met since it was asked last. Seconds."""

    tokens: int
    gap_p99: float
    """Between two messages of a stream."""
    health_p99: float
    """Of a health check over the connection that is there."""
    new_connection_worst: float
    """Of a connection and its first health check."""
    errors: list[str]
    """Every call that failed, and every health check that did not say SERVING."""


class PoliteClient:
    """Runs the client beside a server for the length of a `with` block."""

    def __init__(self, port: int) -> None:
        self._command = [sys.executable, "-m", "tests.tools.polite_client", str(port)]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.experience()  # without the start
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(2 * CALL_SECONDS)
        self._process.stdout.close()

    def experience(self, seconds: float = 0.0) -> Experience:
        """Wait for so many seconds, and tell what the client has met since the last call."""
        time.sleep(seconds)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Experience(**json.loads(self._process.stdout.readline()))


class _Session:
    """What the process itself does."""

    def __init__(self, port: int) -> None:
        self._target = f"127.0.0.1:{port}"
        self._stop = Event()
        self._lock = Lock()
        self._forget()

    def run(self) -> None:
        """Answer every line of the standard input by what was met since the last one."""
        threads = [Thread(target=each) for each in (self._stream, self._check, self._connect)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        for _ in sys.stdin:
            print(json.dumps(self._take()._asdict()), flush=True)
        self._stop.set()
        for thread in threads:
            thread.join()

    def _forget(self) -> None:
        self._tokens = 0
        self._gaps: list[float] = []
        self._checks: list[float] = []
        self._connections: list[float] = []
        self._errors: list[str] = []

    def _take(self) -> Experience:
        with self._lock:
            taken = Experience(
                self._tokens,
                _p99(self._gaps),
                _p99(self._checks),
                max(self._connections, default=0.0),
                self._errors,
            )
            self._forget()
        return taken

    def _stream(self) -> None:
        request = pb.GenerateRequest(
            text="Once upon a time", stopping={"max_tokens": TOKENS, "ignore_eos": True}
        )
        with grpc.insecure_channel(self._target, OWN_POOL) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            while not self._stop.is_set():
                try:
                    last = None
                    for message in stub.StreamGenerate(request, timeout=CALL_SECONDS):
                        now = time.monotonic()
                        if message.HasField("delta"):
                            self._note_token(0.0 if last is None else now - last)
                            last = now
                except grpc.RpcError as error:
                    self._note_error("StreamGenerate", error)

    def _note_token(self, gap: float) -> None:
        with self._lock:
            self._tokens += 1
            self._gaps.append(gap)

    def _check(self) -> None:
        with grpc.insecure_channel(self._target, OWN_POOL) as channel:
            while not self._stop.wait(HEALTH_EVERY):
                self._time_check(channel, self._checks)

    def _connect(self) -> None:
        while not self._stop.wait(NEW_CONNECTION_EVERY):
            with grpc.insecure_channel(self._target, OWN_POOL) as channel:
                self._time_check(channel, self._connections)

    def _time_check(self, channel: grpc.Channel, times: list[float]) -> None:
        began = time.monotonic()
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS
            )
        except grpc.RpcError as error:
            self._note_error("Check", error)
            return
        with self._lock:
            times.append(time.monotonic() - began)
            if reply.status != health_pb2.HealthCheckResponse.SERVING:
                self._errors.append("Check: NOT_SERVING")

    def _note_error(self, method: str, error: grpc.RpcError) -> None:
        with self._lock:
            self._errors.append(f"{method}: {error.code().name} {error.details()}")
        self._stop.wait(HEALTH_EVERY)


def _p99(values: list[float]) -> float:
    """The 99th percentile, 0 where there is nothing."""
    return statistics.quantiles(values, n=100, method="inclusive")[-1] if len(values) > 1 else 0.0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        _Session(int(sys.argv[1])).run()
