"""The account of KV cache blocks never loses, doubles or invents one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from fusewire.service.engine.block_pool import BlockPool

NUM_BLOCKS = 12


class PoolMachine(RuleBasedStateMachine):
    """Allocates, shares and frees at random, beside a plain count of holders."""

    taken = Bundle("taken")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 4)
        self.holders = dict.fromkeys(range(NUM_BLOCKS), 0)

    @rule(count=st.integers(0, NUM_BLOCKS + 2))
    def allocate(self, count: int) -> None:
        free = [block for block, holders in self.holders.items() if not holders]
        if count > len(free):
            with pytest.raises(MemoryError):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert set(blocks) <= set(free)
        for block in blocks:
            self.holders[block] = 1

    @precondition(lambda self: any(self.holders.values()))
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([b for b, n in self.holders.items() if n]))
        self.pool.share(block)
        self.holders[block] += 1

    @precondition(lambda self: any(self.holders.values()))
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([b for b, n in self.holders.items() if n]))
        self.pool.free([block])
        self.holders[block] -= 1

    @invariant()
    def count_agrees(self) -> None:
        free = sum(not holders for holders in self.holders.values())
        assert self.pool.num_free == free
        assert self.pool.usage == pytest.approx(1 - free / NUM_BLOCKS)


TestPool = PoolMachine.TestCase


def test_freeing_twice_is_refused() -> None:
    pool = BlockPool(2, 16)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(ValueError, match="freed twice"):
        pool.free(blocks)
    with pytest.raises(ValueError, match="cannot be shared"):
        pool.share(blocks[0])


@given(tokens=st.integers(0, 1000), block_size=st.integers(1, 64))
def test_blocks_for_covers_without_waste(tokens: int, block_size: int) -> None:
    blocks = BlockPool(1, block_size).blocks_for(tokens)
    assert blocks * block_size >= tokens > (blocks - 1) * block_size or tokens == blocks == 0


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0)])
def test_empty_pools_are_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        BlockPool(num_blocks, block_size)
