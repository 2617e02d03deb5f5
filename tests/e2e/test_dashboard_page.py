"""The dashboard's page in a headless Chromium, over a front end whose tokens are made up."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fusewire.kernels.modes import KernelMode
from fusewire.service.dashboard import Dashboard
from fusewire.service.messages import GuardState, Routing
from fusewire.v1 import admin_pb2, generation_pb2
from fusewire.v1.kernel_pb2 import KERNEL_MODE_FUSED, KERNEL_MODE_UNFUSED, TrafficShare
from tests.tools.browser import Browser, find_chromium
from tests.tools.front_end_rig import EOS, Rig, rig, until

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium or Chrome is installed")


@asynccontextmanager
async def shown(tmp_path: Path, **config: Any) -> AsyncIterator[tuple[Rig, Browser]]:
    """A dashboard, open in a browser; fails if the page reported an error."""
    async with rig(tmp_path, dashboard_port=0, **config) as server:
        dashboard = Dashboard(server.serving, server.serving.metrics.registry)
        await dashboard.start()
        try:
            async with Browser() as browser:
                await browser.open(f"http://127.0.0.1:{dashboard.port}/")
                await browser.until("document.getElementById('health').textContent === 'serving'")
                yield server, browser
        finally:
            await dashboard.stop()


def run(tmp_path: Path, body: Callable[[Rig, Browser], Awaitable[None]], **config: Any) -> None:
    async def with_page() -> None:
        async with shown(tmp_path, **config) as (server, browser):
            await body(server, browser)

    asyncio.run(with_page())


async def generate(server: Rig, mode: str, tokens: int) -> None:
    request = generation_pb2.GenerateRequest(text="Once", kernel_mode=f"KERNEL_MODE_{mode}")
    request.stopping.max_tokens = tokens
    await server.generation.Generate(request, timeout=10)


def cell(row: str, mode: str) -> str:
    """JavaScript for the text of a cell of the table of latencies."""
    return f"""document.querySelector('[data-row="{row}"] [data-mode="{mode}"]').innerText"""


def test_it_shows_the_path_and_the_latencies_of_each(tmp_path: Path) -> None:
    async def body(server: Rig, browser: Browser) -> None:
        assert await browser.text("mode") == "fused"
        assert await browser.text("backend") == "fake-fused"
        assert await browser.text("generation") == "1"
        assert await browser.evaluate(cell("Step, decode only", "unfused")) == "–"
        server.runner.pause = 0.02
        await generate(server, "UNFUSED", 4)
        server.runner.pause = 0.0
        await generate(server, "FUSED", 6)
        await browser.until(cell("Step, decode only", "fused") + ".includes('5 of them')")
        unfused = await browser.evaluate(cell("Step, decode only", "unfused"))
        assert "3 of them" in unfused
        assert "ms" in unfused
        assert "×" not in await browser.evaluate(cell("Step, decode only", "fused"))
        width = "document.querySelector('[data-row=\"Step, decode only\"] .bar.{}').offsetWidth"
        assert await browser.evaluate(f"{width.format('fused')} < {width.format('unfused')}")
        lines = "[...document.querySelectorAll('.spark path')].filter((line) => line.getAttribute('d'))"
        assert await browser.evaluate(f"{lines}.length") > 0
        assert browser.errors == []

    run(tmp_path, body)


def test_a_ratio_is_of_thirty_samples_and_no_verdict_without_time_slices(tmp_path: Path) -> None:
    async def body(server: Rig, browser: Browser) -> None:
        for tokens, counted in ((30, 29), (2, 30)):
            for mode in ("UNFUSED", "FUSED"):
                await generate(server, mode, tokens)
            await browser.until(cell("Step, decode only", "fused") + f".includes('{counted} of them')")
            told = await browser.evaluate(cell("Step, decode only", "fused"))
            assert ("× as fast, not time-sliced" in told) == (counted == 30)
        assert not await browser.evaluate("document.getElementById('unfair').hidden")
        halves = [TrafficShare(mode=mode, percent=50) for mode in (KERNEL_MODE_UNFUSED, KERNEL_MODE_FUSED)]
        request = admin_pb2.SetKernelModeRequest(split=halves, split_kind=admin_pb2.SPLIT_KIND_TIME_SLICE)
        await server.admin.SetKernelMode(request, timeout=10)
        await browser.open(await browser.evaluate("location.origin") + "/?anew")
        await browser.until("location.search && document.getElementById('health').textContent === 'serving'")
        for mode in ("UNFUSED", "FUSED"):
            await generate(server, mode, 32)
        await browser.until(cell("Step, decode only", "fused") + ".includes('31 of them')")
        assert "× as fast · 31" in await browser.evaluate(cell("Step, decode only", "fused"))
        assert await browser.evaluate("document.getElementById('unfair').hidden")
        assert browser.errors == []

    run(tmp_path, body)


def test_its_buttons_switch_the_path(tmp_path: Path) -> None:
    async def body(server: Rig, browser: Browser) -> None:
        await browser.click("#mode-buttons [data-mode=unfused]")
        await browser.until("document.getElementById('mode').textContent === 'unfused'")
        assert server.serving.engine.routing.mode is KernelMode.UNFUSED
        assert "fused → unfused, no split, generation 2" in await browser.text("answer")
        pressed = "document.querySelector('[aria-pressed=true]').textContent"
        assert await browser.evaluate(pressed) == "unfused"
        assert browser.errors == []

    run(tmp_path, body)


def test_it_starts_and_ends_a_split_and_warns_of_coupled_latencies(tmp_path: Path) -> None:
    async def body(server: Rig, browser: Browser) -> None:
        await browser.enter("split-kind", "SPLIT_KIND_REQUEST")
        await browser.evaluate("document.getElementById('split-form').requestSubmit()")
        await browser.until("document.getElementById('split').textContent.includes('by request')")
        assert await browser.text("split") == "unfused 50 %, fused 50 %, by request"
        await browser.until("document.getElementById('answer').textContent.includes('generation')")
        assert "split unfused 50 %, fused 50 %, by request, generation 2" in await browser.text("answer")
        assert (await browser.text("mode"), await browser.text("backend")) == ("split", "")
        pressed = "document.querySelectorAll('[aria-pressed=true]').length"
        assert await browser.evaluate(pressed) == 0
        assert not await browser.evaluate("document.getElementById('coupled').hidden")
        await browser.click("#end-split")
        await browser.until("document.getElementById('split').textContent === 'none'")
        await browser.until("document.getElementById('answer').textContent.includes('generation')")
        assert "fused, no split, generation 3" in await browser.text("answer")
        assert (await browser.text("mode"), await browser.evaluate(pressed)) == ("fused", 1)
        assert await browser.evaluate("document.getElementById('coupled').hidden")
        assert browser.errors == []

    run(tmp_path, body)


def test_it_shows_a_fallback_of_the_guard_and_offers_to_rearm(tmp_path: Path) -> None:
    async def body(server: Rig, browser: Browser) -> None:
        assert await browser.evaluate("document.getElementById('rearm').hidden")
        fallen = GuardState(100, 1e-3, left_modes=(KernelMode.FUSED,), relative_error=0.01)
        server.serving.engine.routing = Routing(KernelMode.UNFUSED, 2, guard=fallen)
        await browser.until("!document.getElementById('rearm').hidden")
        assert (await browser.text("guard")).startswith("fell back from fused: relative error 1.00e-2")
        assert "the shadow guard left fused" in await browser.text("degradations")
        await browser.click("#rearm")  # which the engine refuses, for it knows of no fallback
        await browser.until("document.getElementById('answer').textContent.startsWith('FAILED_PRECONDITION')")

    run(tmp_path, body)


def test_the_credential_goes_into_the_header_and_is_kept_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("open sesame\n")

    async def body(server: Rig, browser: Browser) -> None:
        assert not await browser.evaluate("document.getElementById('admin-field').hidden")
        await browser.click("#mode-buttons [data-mode=unfused]")
        await browser.until("document.getElementById('answer').textContent.startsWith('UNAUTHENTICATED')")
        assert server.serving.engine.routing.mode is KernelMode.FUSED
        await browser.enter("admin-token", "open sesame")
        await browser.click("#mode-buttons [data-mode=unfused]")
        await browser.until("document.getElementById('mode').textContent === 'unfused'")
        kept = "localStorage.length + sessionStorage.length + document.cookie.length + location.search.length"
        assert await browser.evaluate(kept) == 0

    run(tmp_path, body, admin_token_file=str(file))


def test_it_compares_two_paths(tmp_path: Path) -> None:
    async def body(server: Rig, browser: Browser) -> None:
        server.script("Left or right", "the same <b>on both</b> sides", EOS)
        await browser.enter("left-prompt", "Left or right")
        await browser.enter("repetitions", "1")
        await browser.click("#compare-start")
        await browser.until("!document.getElementById('report').hidden")
        assert await browser.text("left-text") == await browser.text("right-text")
        assert await browser.text("left-text") == "the same <b>on both</b> sides"  # text, never markup
        assert (await browser.text("left-title")).startswith("unfused · ")
        assert (await browser.text("right-title")).startswith("fused · ")
        assert await browser.text("verdict")
        assert "Time to first token" in await browser.text("report-body")
        await browser.until("!document.getElementById('compare-start').disabled")
        assert browser.errors == []

    run(tmp_path, body)


def test_a_comparison_can_be_stopped(tmp_path: Path) -> None:
    async def body(server: Rig, browser: Browser) -> None:
        server.runner.pause = 0.02
        await browser.click("#compare-start")
        await browser.until("document.getElementById('left-text').textContent")
        assert server.serving.live > 0
        await browser.click("#compare-stop")
        await until(lambda: server.serving.live == 0)
        await browser.until("document.getElementById('compare-status').textContent === 'stopped'")
        assert browser.errors == []

    run(tmp_path, body)


def test_it_says_that_the_engine_is_gone_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    async def body(server: Rig, browser: Browser) -> None:
        await server.kill_engine()
        await browser.until("document.getElementById('health').textContent.includes('restarting')")
        await server.start_engine()
        await browser.until("document.getElementById('health').textContent === 'serving'")
        assert browser.errors == []

    run(tmp_path, body)
