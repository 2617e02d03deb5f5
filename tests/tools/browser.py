"""A headless Chromium and one page in it, told what to do over the DevTools protocol.

Keeps what the page reports as an error: an exception, a console error, a refused resource. Knows no
page in particular.
"""

import asyncio
import base64
import itertools
import json
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--no-first-run",
    "--remote-debugging-port=0",
)
START_SECONDS = 60


def find_chromium() -> str | None:
    """The browser's program; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page; an async context manager.

    Args:
        width: of the page, in CSS pixels.
        height: likewise.
    """

    def __init__(self, width: int = 1240, height: int = 900) -> None:
        self.errors: list[str] = []
        self._size = f"--window-size={width},{height}"
        self._width = width
        self._numbers = itertools.count(1)
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def __aenter__(self) -> Self:
        program = find_chromium()
        assert program is not None, "no Chromium is installed"
        self._folder = TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        self._process = await asyncio.create_subprocess_exec(
            program,
            *OPTIONS,
            self._size,
            f"--user-data-dir={self._folder.name}",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(await self._page_address(), max_msg_size=0)
        self._reading = asyncio.create_task(self._read())
        for domain in ("Page", "Runtime", "Log"):
            await self._ask(f"{domain}.enable")
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._reading.cancel()
        with suppress(asyncio.CancelledError):
            await self._reading
        await self._socket.close()
        await self._session.close()
        self._process.terminate()
        await self._process.wait()
        self._folder.cleanup()

    async def open(self, address: str) -> None:
        """Go to a page and wait until its script can run."""
        await self._ask("Page.navigate", url=address)
        await self.until("document.readyState === 'complete'")

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited. Fails if it throws."""
        reply = await self._ask(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    async def text(self, element_id: str) -> str:
        """What an element shows."""
        return await self.evaluate(f"document.getElementById({json.dumps(element_id)}).textContent")

    async def click(self, selector: str) -> None:
        """Click the first element that a CSS selector finds."""
        await self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    async def enter(self, element_id: str, value: str) -> None:
        """Put a value into a field, as typing would."""
        found = f"document.getElementById({json.dumps(element_id)})"
        await self.evaluate(
            f"{found}.value = {json.dumps(value)}, {found}.dispatchEvent(new Event('change')), null"
        )

    async def until(self, condition: str, seconds: float = 20) -> None:
        """Wait until a JavaScript expression is true."""
        try:
            async with asyncio.timeout(seconds):
                while not await self.evaluate(f"Boolean({condition})"):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            text = await self.evaluate("document.body.innerText")
            raise AssertionError(
                f"{condition} did not come; errors {self.errors}; the page:\n{text}"
            ) from None

    async def screenshot(self, file: Path) -> None:
        """Write the whole page as a PNG."""
        height = await self.evaluate("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": self._width, "height": height, "scale": 1}
        reply = await self._ask("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(reply["data"]))

    async def _page_address(self) -> str:
        """Where the first page's DevTools listen, once the browser has said so."""
        port_file = Path(self._folder.name, "DevToolsActivePort")
        async with asyncio.timeout(START_SECONDS):
            while not port_file.exists() or "\n" not in port_file.read_text():
                await asyncio.sleep(0.05)
            port = port_file.read_text().splitlines()[0]
            while True:
                async with self._session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                    pages = [target for target in await reply.json() if target["type"] == "page"]
                if pages:
                    return pages[0]["webSocketDebuggerUrl"]
                await asyncio.sleep(0.05)

    async def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        answer = await asyncio.wait_for(reply, START_SECONDS)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    async def _read(self) -> None:
        async for message in self._socket:
            content = json.loads(message.data)
            if "id" in content:
                self._replies.pop(content["id"]).set_result(content)
            else:
                self._note(content["method"], content["params"])

    def _note(self, method: str, params: dict[str, Any]) -> None:
        """Keep what the page did wrong."""
        match method:
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.errors.append(details.get("exception", details).get("description", details["text"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            case "Runtime.consoleAPICalled" if params["type"] == "error":
                self.errors.append(str(params["args"]))
