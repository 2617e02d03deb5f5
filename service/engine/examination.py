"""Computes how two kernel paths differ on one sequence, in parts that steps of others run between.

Takes blocks of the KV cache for it and gives them back, whatever happens. Knows nothing of who asked.
"""

from collections.abc import Generator, Sequence
from typing import Protocol

from fusewire.kernels.modes import KernelMode
from fusewire.model.observations import LogitDrift
from fusewire.service.engine.block_pool import BlockPool
from fusewire.service.messages import Examine, ExamineReply, QKSeconds


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
