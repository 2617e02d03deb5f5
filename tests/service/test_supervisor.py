"""A child is kept alive whatever happens around its start, and never silently given up."""

import asyncio
from typing import Any

from fusewire.service.supervisor import ChildSupervisor

HARMLESS = ("platform",)
"""A module that prints a line and ends."""


class Dead:
    """A child that has ended, which nobody has noticed yet."""

    class Pipe:
        def is_closing(self) -> bool:
            return True

        def write(self, line: bytes) -> None:
            raise RuntimeError("the handler is closed")

    stdin = Pipe()

    def kill(self) -> None:
        raise ProcessLookupError


def test_what_a_child_is_told_just_after_its_end_is_lost_and_to_kill_it_changes_nothing() -> None:
    child = ChildSupervisor("child", HARMLESS)
    child._process = Dead()  # type: ignore[assignment]
    child.tell(b"line\n")
    child.kill()


def test_a_child_that_ends_is_started_again() -> None:
    async def body() -> None:
        codes: list[int] = []
        child = ChildSupervisor("child", HARMLESS, has_output=False, on_exit=codes.append)
        await child.start()
        async with asyncio.timeout(60):
            while len(codes) < 3:
                await asyncio.sleep(0.01)
        await child.stop()
        assert set(codes) == {0}

    asyncio.run(body())


def test_a_child_that_cannot_be_watched_any_more_is_a_failure_with_a_reason(caplog: Any) -> None:
    class Unwatchable(ChildSupervisor):
        def first_line(self) -> bytes:
            raise ValueError("planted")

    async def body() -> str:
        failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        child = Unwatchable("child", HARMLESS, on_failure=failed.set_result)
        await child.start()
        reason = await asyncio.wait_for(failed, 30)
        await child.stop()
        return reason

    assert "the child is not watched any more" in asyncio.run(body())
    assert "planted" in caplog.text
