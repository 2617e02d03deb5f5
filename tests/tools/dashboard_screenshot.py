"""`python -m tests.tools.dashboard_screenshot`: the dashboard as a picture, over a real server.

Starts `fusewire serve --dashboard`, keeps some streams running while time slices take turns between the
paths, runs a comparison from the page, and writes what a headless Chromium shows then.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc

from fusewire.v1 import generation_pb2, generation_pb2_grpc
from tests.tools.browser import Browser, find_chromium
from tests.tools.server_process import ServerProcess, free_port

OUT = Path(__file__).parents[1] / "benchmarks" / "results" / "dashboard.png"
STREAMS = 3
TOKENS = 64
SLICE_SECONDS = 2
PROMPTS = ("Once upon a time", "It is a truth universally acknowledged", "In the beginning")
COMPARE_SECONDS = 300


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the picture; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="file to write (default: %(default)s)")
    parser.add_argument("--model", default="", help="folder or hub id; empty for the embedded model")
    parser.add_argument("--device", default="cpu", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=30.0, help="of traffic before the comparison")
    options = parser.parse_args(arguments)
    if find_chromium() is None:
        print("no Chromium or Chrome is installed", file=sys.stderr)
        return 1
    port = free_port()
    with TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with ServerProcess(log, *_serve_options(options, port)) as server:
            asyncio.run(_take_picture(server, port, options.seconds, options.out))
    return 0


def _serve_options(options: argparse.Namespace, port: int) -> list[str]:
    """What the server is started with; samples are taken often, so that each row has some."""
    return [
        *("--dashboard", "--dashboard-port", str(port)),
        *("--model", options.model, "--device", options.device),
        *("--shadow-every", "50", "--qk-timing-every", "20"),
    ]


async def _take_picture(server: ServerProcess, port: int, seconds: float, file: Path) -> None:
    async with Browser() as browser:
        await browser.open(f"http://127.0.0.1:{port}/")
        await browser.until("document.getElementById('health').textContent === 'serving'")
        await browser.enter("slice-seconds", str(SLICE_SECONDS))
        await browser.evaluate("document.getElementById('split-form').requestSubmit()")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            streams = [asyncio.create_task(_keep_busy(stub, number)) for number in range(STREAMS)]
            await asyncio.sleep(seconds)
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
        await browser.click("#compare-start")
        await browser.until("!document.getElementById('report').hidden", COMPARE_SECONDS)
        await browser.until("document.getElementById('running').textContent === '0'")
        await browser.screenshot(file)
        assert browser.errors == [], browser.errors


async def _keep_busy(stub: generation_pb2_grpc.GenerationServiceStub, number: int) -> None:
    """Ask for one answer after the other."""
    while True:
        for prompt in PROMPTS[number:] + PROMPTS[:number]:
            request = generation_pb2.GenerateRequest(text=prompt)
            request.cache.disabled = True  # or there would be no prefill to show
            request.stopping.max_tokens, request.stopping.ignore_eos = TOKENS, True
            async for _ in stub.StreamGenerate(request):
                pass


if __name__ == "__main__":
    sys.exit(main())
