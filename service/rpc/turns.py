"""Waiting for a turn: for a slot, for room or for a thread."""

import asyncio
from collections.abc import Callable


async def wait_for_turn(turn: "asyncio.Future[None]", pass_on: Callable[[], None]) -> None:
    """Wait until a turn comes.

    Args:
        turn: is done when it comes.
        pass_on: gives the turn to another; called if the caller is cancelled when it has just come.
    """
    try:
        await turn
    except asyncio.CancelledError:
        if turn.done() and not turn.cancelled():
            pass_on()
        raise
