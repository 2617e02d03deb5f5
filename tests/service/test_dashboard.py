"""The dashboard over HTTP: what it tells and does, and whom it refuses."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from fusewire.service.auth import CredentialError
from fusewire.service.connection_limits import DASHBOARD
from fusewire.service.dashboard import Dashboard
from fusewire.service.dashboard.errors import HTTP_STATUSES
from fusewire.service.rpc.front_end import ListenError
from fusewire.v1 import generation_pb2
from tests.tools.front_end_rig import MODEL_NAME, Rig, rig, until

STEPS = "fusewire_engine_step_duration_seconds"
JSON = "application/json"
COMPARISON = {
    "left": {"text": "Left or right", "kernel_mode": "KERNEL_MODE_UNFUSED"},
    "right": {"text": "Left or right", "kernel_mode": "KERNEL_MODE_FUSED"},
    "repetitions": 1,
}


class Page:
    """A dashboard over a rig, and a client of it."""

    def __init__(self, server: Rig, dashboard: Dashboard, session: aiohttp.ClientSession) -> None:
        self.server = server
        self.origin = f"http://127.0.0.1:{dashboard.port}"
        self.session = session

    async def get(self, path: str, **headers: str) -> tuple[int, Any]:
        async with self.session.get(self.origin + path, headers=headers) as reply:
            return reply.status, await reply.json()

    async def post(self, path: str, message: Any, **headers: str) -> tuple[int, Any]:
        text = message if isinstance(message, str) else json.dumps(message)
        sent = {"Content-Type": JSON} | {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.post(
            self.origin + path, data=text.encode(errors="surrogateescape"), headers=sent
        ) as reply:
            return reply.status, await reply.json()

    def compare(self, message: Any) -> Any:
        """The response, to be awaited or used as a context manager."""
        return self.session.post(f"{self.origin}/api/compare", json=message)


@asynccontextmanager
async def page(tmp_path: Path, loaded: bool = True, **config: Any) -> AsyncIterator[Page]:
    async with rig(tmp_path, loaded, dashboard_port=0, **config) as server:
        dashboard = Dashboard(server.serving, server.serving.metrics.registry)
        await dashboard.start()
        try:
            async with aiohttp.ClientSession() as session:
                yield Page(server, dashboard, session)
        finally:
            await dashboard.stop()


def run(tmp_path: Path, body: Callable[[Page], Awaitable[None]], **config: Any) -> None:
    async def with_page() -> None:
        async with page(tmp_path, **config) as running:
            await body(running)

    asyncio.run(with_page())


def token_file(tmp_path: Path, *tokens: str) -> str:
    file = tmp_path / f"tokens-{tokens[0]}"
    file.write_text("\n".join(tokens))
    return str(file)


async def generate(server: Rig, mode: str) -> None:
    request = generation_pb2.GenerateRequest(text="Once", kernel_mode=f"KERNEL_MODE_{mode}")
    request.stopping.max_tokens = 4
    await server.generation.Generate(request, timeout=10)


async def events_of(reply: aiohttp.ClientResponse) -> list[tuple[str, dict[str, Any]]]:
    events = []
    for block in (await reply.text()).split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


# ---- what it shows ----


@pytest.mark.parametrize(
    ("path", "content_type"), [("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")]
)
def test_the_page_loads_nothing_from_elsewhere(tmp_path: Path, path: str, content_type: str) -> None:
    async def body(client: Page) -> None:
        async with client.session.get(client.origin + path) as reply:
            assert (reply.status, reply.content_type) == (200, content_type)
            policy = reply.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            text = (await reply.text()).replace("http://www.w3.org/2000/svg", "")  # a name, not an address
            assert "://" not in text
            assert "<script>" not in text
            assert "style=" not in text

    run(tmp_path, body)


def test_the_state_tells_path_load_and_the_sums_of_each_path(tmp_path: Path) -> None:
    async def body(client: Page) -> None:
        await generate(client.server, "UNFUSED")
        status, state = await client.get("/api/state")
        assert (status, state["model"], state["unavailable"]) == (200, MODEL_NAME, None)
        assert state["kernel"]["mode"] == "KERNEL_MODE_FUSED"
        assert state["kernel"]["available"] == ["KERNEL_MODE_UNFUSED", "KERNEL_MODE_FUSED"]
        assert state["load"]["running_requests"] == 0
        assert state["needs_token"] == {"admin": False, "public": False}
        decode = {
            series["labels"]["kernel_mode"]: series
            for series in state["histograms"][STEPS]
            if series["labels"]["phase"] == "decode"
        }
        assert decode["unfused"]["count"] == 3  # of four tokens the first is the prefill's
        assert decode["unfused"]["sum"] > 0
        assert decode["fused"] == {
            "labels": {"phase": "decode", "kernel_mode": "fused"},
            "sum": 0.0,
            "count": 0.0,
        }
        assert "fusewire_qk_norm_kernel_duration_seconds" in state["histograms"]
        assert {g["labels"]["phase"] for g in state["gauges"]["fusewire_shadow_max_relative_error"]} == {
            "prefill",
            "decode",
        }

    run(tmp_path, body)


def test_the_state_says_why_there_is_no_path_while_the_engine_loads(tmp_path: Path) -> None:
    async def body(client: Page) -> None:
        status, state = await client.get("/api/state")
        assert status == 200
        assert state["kernel"] is None
        assert "loading" in state["unavailable"]
        status, refusal = await client.post("/api/mode", {"mode": "KERNEL_MODE_UNFUSED"})
        assert (status, refusal["code"]) == (503, "UNAVAILABLE")

    run(tmp_path, body, loaded=False)


# ---- what it does ----


def test_a_switch_is_the_admin_services(tmp_path: Path) -> None:
    async def body(client: Page) -> None:
        status, reply = await client.post(
            "/api/mode", {"mode": "KERNEL_MODE_UNFUSED", "expected_generation": 1}
        )
        assert (status, reply["previous"], reply["current"], reply["generation"]) == (
            200,
            "KERNEL_MODE_FUSED",
            "KERNEL_MODE_UNFUSED",
            "2",
        )
        _, state = await client.get("/api/state")
        assert state["kernel"]["mode"] == "KERNEL_MODE_UNFUSED"
        status, refusal = await client.post(
            "/api/mode", {"mode": "KERNEL_MODE_FUSED", "expected_generation": 1}
        )
        assert (status, refusal["code"]) == (409, "ABORTED")
        assert refusal["message"].startswith("expected_generation: ")

    run(tmp_path, body)


def test_a_split_is_started_and_shown(tmp_path: Path) -> None:
    async def body(client: Page) -> None:
        shares = [
            {"mode": "KERNEL_MODE_UNFUSED", "percent": 30},
            {"mode": "KERNEL_MODE_FUSED", "percent": 70},
        ]
        message = {"split": shares, "split_kind": "SPLIT_KIND_TIME_SLICE", "slice_seconds": 20}
        status, _ = await client.post("/api/mode", message)
        assert status == 200
        _, state = await client.get("/api/state")
        assert state["kernel"]["split"] == shares
        assert state["kernel"]["split_kind"] == "SPLIT_KIND_TIME_SLICE"
        assert state["kernel"]["slice_seconds"] == 20

    run(tmp_path, body)


def test_rearming_without_a_fallback_is_refused(tmp_path: Path) -> None:
    async def body(client: Page) -> None:
        status, refusal = await client.post("/api/rearm", {})
        assert (status, refusal["code"]) == (400, "FAILED_PRECONDITION")

    run(tmp_path, body)


@pytest.mark.parametrize(
    "body", ["", "{", "7", "[" * 9999, "\udcff", '{"mode": "KERNEL_MODE_MAGIC"}', '{"modus": 1}']
)
def test_a_body_that_is_no_such_message_is_refused(tmp_path: Path, body: str) -> None:
    async def ask(client: Page) -> None:
        status, refusal = await client.post("/api/mode", body)
        assert (status, refusal["code"]) == (400, "INVALID_ARGUMENT")
        _, state = await client.get("/api/state")
        assert state["kernel"]["generation"] == "1"

    run(tmp_path, ask)


# ---- whom it refuses ----


def test_a_foreign_host_gets_nothing(tmp_path: Path) -> None:
    """A name of another's that resolves to loopback, as in DNS rebinding."""

    async def body(client: Page) -> None:
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil:80", "[::1", "", "10.0.0.1"):
            for path in ("/", "/api/state"):
                status, refusal = await client.get(path, Host=host)
                assert (status, refusal["code"]) == (421, "PERMISSION_DENIED"), host
            status, _ = await client.post("/api/mode", {"mode": "KERNEL_MODE_UNFUSED"}, Host=host)
            assert status == 421
        for host in ("localhost", "127.0.0.1:8080", "[::1]:9465"):  # a forwarded port is the operator's own
            status, _ = await client.get("/api/state", Host=host)
            assert status == 200, host

    run(tmp_path, body)


@pytest.mark.parametrize("path", ["/api/mode", "/api/rearm", "/api/compare"])
def test_another_page_or_form_changes_nothing(tmp_path: Path, path: str) -> None:
    async def body(client: Page) -> None:
        port = client.origin.rpartition(":")[2]
        for origin in ("http://evil.example", "null", f"https://127.0.0.1:{port}", "http://127.0.0.1:1"):
            status, refusal = await client.post(path, {"mode": "KERNEL_MODE_UNFUSED"}, Origin=origin)
            assert (status, refusal["code"]) == (403, "PERMISSION_DENIED"), origin
        for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            status, refusal = await client.post(
                path, {"mode": "KERNEL_MODE_UNFUSED"}, Content_Type=content_type
            )
            assert (status, refusal["code"]) == (415, "INVALID_ARGUMENT"), content_type
        _, state = await client.get("/api/state")
        assert state["kernel"]["generation"] == "1"
        status, _ = await client.post("/api/mode", {"mode": "KERNEL_MODE_UNFUSED"}, Origin=client.origin)
        assert status == 200

    run(tmp_path, body)


def test_a_switch_needs_the_admin_credential(tmp_path: Path) -> None:
    async def body(client: Page) -> None:
        message = {"mode": "KERNEL_MODE_UNFUSED"}
        for path in ("/api/mode", "/api/rearm"):
            status, refusal = await client.post(path, message)
            assert (status, refusal["code"]) == (401, "UNAUTHENTICATED")
            for wrong in ("Bearer guess", "Bearer public", "Basic admin", "Bearer"):
                status, refusal = await client.post(path, message, Authorization=wrong)
                assert (status, refusal["code"]) == (403, "PERMISSION_DENIED"), wrong
        _, state = await client.get("/api/state")
        assert state["needs_token"] == {"admin": True, "public": True}
        assert state["kernel"]["generation"] == "1"
        status, _ = await client.post("/api/mode", message, Authorization="Bearer admin")
        assert status == 200

    tokens = {
        "admin_token_file": token_file(tmp_path, "admin"),
        "auth_token_file": token_file(tmp_path, "public"),
    }
    run(tmp_path, body, **tokens)


def test_a_comparison_needs_the_public_credential(tmp_path: Path) -> None:
    async def body(client: Page) -> None:
        assert (await client.post("/api/compare", COMPARISON))[0] == 401
        assert (await client.post("/api/compare", COMPARISON, Authorization="Bearer guess"))[0] == 403
        status, refusal = await client.post("/api/compare", {"left": {}}, Authorization="Bearer public")
        assert (status, refusal["code"]) == (400, "INVALID_ARGUMENT")

    run(tmp_path, body, auth_token_file=token_file(tmp_path, "public"))


def test_a_port_for_certificates_alone_is_no_open_door(tmp_path: Path) -> None:
    """Where gRPC clients must show a certificate, a page without one may not do what they may."""

    async def body(client: Page) -> None:
        for path in ("/api/mode", "/api/rearm", "/api/compare"):
            status, refusal = await client.post(path, {"mode": "KERNEL_MODE_UNFUSED"})
            assert (status, refusal["code"]) == (403, "PERMISSION_DENIED")
            assert "certificate" in refusal["message"]

    async def shut() -> None:
        async with rig(tmp_path, dashboard_port=0) as server:
            config = {"tls_cert": "cert", "tls_key": "key", "tls_client_ca": "ca", "dashboard_port": 0}
            server.serving.config = type(server.config)(**config)  # gRPC itself stays plain in the rig
            dashboard = Dashboard(server.serving, server.serving.metrics.registry)
            await dashboard.start()
            async with aiohttp.ClientSession() as session:
                await body(Page(server, dashboard, session))
            await dashboard.stop()

    asyncio.run(shut())


def test_what_is_not_there_is_said_in_json(tmp_path: Path) -> None:
    async def body(client: Page) -> None:
        assert await client.get("/api/secrets") == (404, {"code": "NOT_FOUND", "message": "Not Found"})
        for method, path, allowed in (("GET", "/api/mode", "POST"), ("PUT", "/api/state", "GET,HEAD")):
            async with client.session.request(method, client.origin + path) as reply:
                assert (reply.status, reply.headers["Allow"]) == (405, allowed)
                assert (await reply.json())["code"] == "UNIMPLEMENTED"
        assert (await client.post("/api/compare", {"left": {"text": "x" * 9000}}))[0] == 413

    run(tmp_path, body, max_request_bytes=8192)


def test_head_is_answered_as_get_without_the_body(tmp_path: Path) -> None:
    async def body(client: Page) -> None:
        for path, status in (("/", 200), ("/page.js", 200), ("/api/state", 200), ("/api/secrets", 404)):
            async with client.session.head(client.origin + path) as reply:
                assert (reply.status, await reply.read()) == (status, b"")
                assert int(reply.headers["Content-Length"]) > 0

    run(tmp_path, body)


def test_connections_beyond_those_it_takes_are_closed(tmp_path: Path) -> None:
    async def body(client: Page) -> None:
        port = int(client.origin.rsplit(":", 1)[1])
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(DASHBOARD)]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await asyncio.wait_for(reader.read(), 10) == b""
        for _, each in (*silent, (reader, writer)):
            each.close()
        await until(lambda: silent[0][0].at_eof() or silent[0][1].is_closing())
        for _ in range(100):  # the server notices soon that there is room again
            try:
                status, _ = await client.get("/api/state")
                break
            except aiohttp.ClientError:
                await asyncio.sleep(0.05)
        assert status == 200

    run(tmp_path, body)


def test_every_code_has_a_status() -> None:
    assert set(HTTP_STATUSES) == set(grpc.StatusCode) - {grpc.StatusCode.OK}


def test_it_listens_on_one_loopback_address_alone(tmp_path: Path) -> None:
    async def body(client: Page) -> None:
        port = int(client.origin.rpartition(":")[2])
        with pytest.raises(ConnectionRefusedError):  # which a socket bound to every address would accept
            await asyncio.open_connection("127.0.0.2", port)

    run(tmp_path, body)


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    async def body() -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            async with rig(tmp_path, dashboard_port=port) as server:
                with pytest.raises(ListenError, match=f"127.0.0.1:{port}"):
                    await Dashboard(server.serving, server.serving.metrics.registry).start()

    asyncio.run(body())


def test_a_token_file_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    async def body() -> None:
        async with rig(tmp_path, dashboard_port=0) as server:
            server.serving.config = type(server.config)(admin_token_file=str(tmp_path / "absent"))
            with pytest.raises(CredentialError, match="absent"):
                await Dashboard(server.serving, server.serving.metrics.registry).start()

    asyncio.run(body())


# ---- comparing ----


def test_a_comparison_streams_both_sides_then_the_report(tmp_path: Path) -> None:
    async def body(client: Page) -> None:
        client.server.script("Left or right", "the same on both sides", 4095)
        async with client.compare(COMPARISON) as reply:
            assert (reply.status, reply.content_type) == (200, "text/event-stream")
            events = await events_of(reply)
        texts = {False: "", True: ""}
        for name, content in events:
            if name == "delta":
                texts[content["delta"]["right"]] += content["delta"]["delta"]["text"]
        assert texts[False] == texts[True] == "the same on both sides"
        assert [content["progress"]["finished_runs"] for name, content in events if name == "progress"][
            -1
        ] == 2
        name, content = events[-1]
        assert name == "report"
        report = content["report"]
        assert report["agreeing_tokens"] == report["compared_tokens"] > 0
        assert (report["left_timings"]["mode"], report["right_timings"]["mode"]) == (
            "KERNEL_MODE_UNFUSED",
            "KERNEL_MODE_FUSED",
        )
        assert report["verdict"]

    run(tmp_path, body)


def test_a_comparison_that_cannot_begin_is_refused_by_status(tmp_path: Path) -> None:
    async def body(client: Page) -> None:
        status, refusal = await client.post("/api/compare", {"left": {"text": "a"}, "right": {"text": "a"}})
        assert (status, refusal["code"]) == (400, "INVALID_ARGUMENT")
        assert "kernel_mode" in refusal["message"]

    run(tmp_path, body)


def test_a_comparison_that_fails_amid_ends_with_an_error_event(tmp_path: Path) -> None:
    async def body(client: Page) -> None:
        client.server.runner.pause = 0.02
        async with client.compare(COMPARISON) as reply:
            assert reply.status == 200
            killing = asyncio.create_task(client.server.kill_engine())
            name, content = (await events_of(reply))[-1]
            await killing
        assert (name, content["code"]) == ("error", "UNAVAILABLE")

    run(tmp_path, body)


def test_a_comparison_ends_when_nobody_reads_it_any_more(tmp_path: Path) -> None:
    async def body(client: Page) -> None:
        server = client.server
        server.runner.pause = 0.01
        reply = await client.compare(COMPARISON)
        await reply.content.readline()
        server.runner.gate.clear()  # so that nothing is sent, which would show that the reader is gone
        await asyncio.sleep(0.2)  # for the step that was running
        assert server.serving.live > 0
        reply.close()
        await until(lambda: server.serving.live == 0)
        server.runner.gate.set()
        assert server.engine is not None
        pool = server.engine.pool
        await until(lambda: pool.usage == 0)

    run(tmp_path, body)


def test_stopping_ends_a_comparison_that_runs(tmp_path: Path) -> None:
    async def body() -> None:
        async with rig(tmp_path, dashboard_port=0) as server:
            dashboard = Dashboard(server.serving, server.serving.metrics.registry)
            await dashboard.start()
            server.runner.pause = 0.05
            async with aiohttp.ClientSession() as session:
                reply = await Page(server, dashboard, session).compare({**COMPARISON, "repetitions": 100})
                await reply.content.readline()
                await dashboard.stop()
                await until(lambda: server.serving.live == 0)
                reply.close()

    asyncio.run(body())
