"""The account of KV cache blocks never loses, doubles or invents one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fusewire.service.engine.block_pool import BlockPool

NUM_BLOCKS = 12


class PoolMachine(RuleBasedStateMachine):
    """Allocates, shares, frees and names at random, beside a plain model of holders, keys and age."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 4)
        self.holders = dict.fromkeys(range(NUM_BLOCKS), 0)
        self.keys: dict[int, bytes] = {}
        self.oldest_first: list[int] = []
        """Free blocks with a key."""

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
        num_blank = len(free) - len(self.oldest_first)
        assert set(blocks[:num_blank]).isdisjoint(self.keys), "blank blocks go first"
        reused = blocks[num_blank:]
        assert reused == self.oldest_first[: len(reused)], "then the least recently used"
        for block in blocks:
            self.holders[block] = 1
            self.keys.pop(block, None)
        self.oldest_first = self.oldest_first[len(reused) :]

    @precondition(lambda self: any(self.holders.values()) or self.keys)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([b for b, n in self.holders.items() if n or b in self.keys]))
        self.pool.share(block)
        self.holders[block] += 1
        self.oldest_first = [other for other in self.oldest_first if other != block]

    @precondition(lambda self: any(self.holders.values()))
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        held = [b for b, n in self.holders.items() if n]
        blocks = data.draw(st.lists(st.sampled_from(held), unique=True, min_size=1))
        self.pool.free(blocks)
        for block in reversed(blocks):
            self.holders[block] -= 1
            if not self.holders[block] and block in self.keys:
                self.oldest_first.append(block)

    @precondition(lambda self: any(n and b not in self.keys for b, n in self.holders.items()))
    @rule(data=st.data(), key=st.binary(min_size=1, max_size=1))
    def assign(self, data: st.DataObject, key: bytes) -> None:
        block = data.draw(st.sampled_from([b for b, n in self.holders.items() if n and b not in self.keys]))
        self.pool.assign(block, key)
        if key not in self.keys.values():
            self.keys[block] = key

    @invariant()
    def account_agrees(self) -> None:
        free = sum(not holders for holders in self.holders.values())
        assert self.pool.num_free == free
        assert self.pool.usage == pytest.approx(1 - free / NUM_BLOCKS)
        assert self.pool.num_keyed == len(self.keys)
        assert {self.pool.find(key) for key in self.keys.values()} == set(self.keys)
        assert [self.pool.is_held(block) for block in self.holders] == [n > 0 for n in self.holders.values()]


TestPool = PoolMachine.TestCase


def test_freeing_twice_is_refused() -> None:
    pool = BlockPool(2, 16)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(ValueError, match="freed twice"):
        pool.free(blocks)
    with pytest.raises(ValueError, match="cannot be shared"):
        pool.share(blocks[0])


def test_keys_are_for_held_blocks_and_are_given_once() -> None:
    pool = BlockPool(2, 16)
    with pytest.raises(ValueError, match="is free"):
        pool.assign(0, b"key")
    (block,) = pool.allocate(1)
    pool.assign(block, b"key")
    with pytest.raises(ValueError, match="has a key"):
        pool.assign(block, b"other")


@given(tokens=st.integers(0, 1000), block_size=st.integers(1, 64))
def test_blocks_for_covers_without_waste(tokens: int, block_size: int) -> None:
    blocks = BlockPool(1, block_size).blocks_for(tokens)
    assert blocks * block_size >= tokens > (blocks - 1) * block_size or tokens == blocks == 0


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0)])
def test_empty_pools_are_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        BlockPool(num_blocks, block_size)
