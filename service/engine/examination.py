"""Computes how two kernel paths differ on one sequence, in parts that steps of others run between.

Takes blocks of the KV cache for it and gives them back, whatever happens.
"""

import logging
from collections import deque
from collections.abc import Collection, Generator, Sequence
from typing import NamedTuple, Protocol

from fusewire.kernels.modes import KernelMode
from fusewire.model.observations import LogitDrift
from fusewire.service.engine.block_pool import BlockPool
from fusewire.service.engine.channel import Connection
from fusewire.service.messages import Examine, ExamineReply, QKSeconds, Refusal

log = logging.getLogger(__name__)


class Examiner(Protocol):
    """Compares paths; `fusewire.model.runner.ModelRunner` is one."""

    def compare_logits(
        self,
        token_ids: Sequence[int],
        first: int,
        left: KernelMode,
        right: KernelMode,
        blocks: Sequence[int],
    ) -> Generator[None, None, Sequence[LogitDrift]]:
        """Run a sequence on both paths and compare the logits of the positions from `first` on."""
        ...

    def qk_seconds(self, mode: KernelMode, num_tokens: int) -> float:
        """Time the QK step of one layer, and wait for it."""
        ...


def examine(examiner: Examiner, wish: Examine, pool: BlockPool, spare: int) -> Generator[ExamineReply | None]:
    """Do what is wished for in parts: None after each, and the reply at the end.

    Args:
        examiner: does the work.
        wish: on which modes, of which sequence.
        pool: where the sequence's blocks come from; closing the iterator gives them back too.
        spare: how many blocks others may have need of.
    """
    needed = pool.blocks_for(len(wish.token_ids))
    if needed > pool.num_free - spare:
        yield ExamineReply(wish.call_id, "no_room")
        return
    blocks = pool.allocate(needed)
    try:
        positions: Sequence[LogitDrift] = ()
        if wish.token_ids:
            positions = yield from examiner.compare_logits(
                wish.token_ids, wish.prompt_len - 1, wish.left, wish.right, blocks
            )
    finally:
        pool.free(blocks)
    qk = []
    for tokens in wish.qk_tokens:
        left, right = (examiner.qk_seconds(mode, tokens) for mode in (wish.left, wish.right))
        qk.append(QKSeconds(tokens, left, right))
        yield None
    yield ExamineReply(wish.call_id, "", list(positions), qk)


class _Examination(NamedTuple):
    """A comparison of two paths that is under way."""

    owner: Connection
    call_id: int
    parts: Generator[ExamineReply | None]


class Examinations:
    """The comparisons that front ends have asked for, one after the other.

    Args:
        examiner: compares paths; without one that is not available.
        modes: the paths that there are.
        pool: see `examine`.
    """

    def __init__(self, examiner: Examiner | None, modes: Collection[KernelMode], pool: BlockPool) -> None:
        self._examiner = examiner
        self._modes = modes
        self._pool = pool
        self._queue: deque[_Examination] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def begin(self, owner: Connection, wish: Examine, spare: int) -> Refusal:
        """Queue a comparison, or say why not; `spare` is that of `examine`."""
        if self._examiner is None or wish.left not in self._modes or wish.right not in self._modes:
            return "not_available"
        parts = examine(self._examiner, wish, self._pool, spare)
        self._queue.append(_Examination(owner, wish.call_id, parts))
        return ""

    def advance(self) -> tuple[Connection, ExamineReply] | None:
        """Do a part of the first comparison; returns whose it is and the reply, if that was the last part."""
        owner, call_id, parts = self._queue[0]
        try:
            reply = next(parts)
        except Exception:
            log.exception("a comparison of logits failed")
            reply = ExamineReply(call_id, "failed")
        if reply is None:
            return None
        self._queue.popleft()
        return owner, reply

    def end(self, owner: Connection, call_id: int | None = None) -> bool:
        """Give up an owner's comparison, or all of them; whether there was one."""
        given_up = [each for each in self._queue if each.owner is owner and call_id in (None, each.call_id)]
        for each in given_up:
            each.parts.close()
            self._queue.remove(each)
        return bool(given_up)
