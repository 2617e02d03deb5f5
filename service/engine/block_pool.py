"""The host-side account of the paged KV cache: which blocks are free, who holds the rest, what they hold.

Blocks are numbers; the tensors behind them are `fusewire.model.kv_cache`'s. A block may carry a key
that says what was computed into it, and keeps it after the last holder lets go, until the block is
given to somebody else. Knows nothing of requests or of what a key stands for: that is
`fusewire.service.engine.prefix_cache`.
"""

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """Ref-counted KV cache blocks `0 … num_blocks − 1` of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks, block_size: must be positive, got {num_blocks}, {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._keyed: OrderedDict[int, None] = OrderedDict()
        """Free blocks that carry a key, least recently used first."""
        self._holders = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self.gains = 0
        """Counts what may let a request fit that did not: holders that let go, and blocks that got a key."""

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, those that carry a key included."""
        return len(self._blank) + len(self._keyed)

    @property
    def num_keyed(self) -> int:
        """Blocks that carry a key, held or not."""
        return len(self._block_of)

    @property
    def usage(self) -> float:
        """The share of blocks that are held, 0 to 1."""
        return 1 - self.num_free / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    # ---- holding ----

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each held once and without a key: blank ones, then the least recently used.

        Raises:
            MemoryError: if fewer are free; then nothing is taken.
        """
        if count > self.num_free:
            raise MemoryError(f"{count} KV cache blocks asked for, {self.num_free} free")
        return [self._take() for _ in range(count)]

    def share(self, block: int) -> None:
        """Hold a block once more, or again if it is free but still carries a key.

        Raises:
            ValueError: if it is free and blank.
        """
        if not self._holders[block]:
            if block not in self._keyed:
                raise ValueError(f"block {block} is free and cannot be shared")
            del self._keyed[block]
        self._holders[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Let go of each block once; one that nobody holds any more can be allocated again.

        The last of `blocks` are reused first: a sequence loses its end before its beginning.

        Raises:
            ValueError: if a block is free already.
        """
        self.gains += 1
        for block in reversed(blocks):
            if not self._holders[block]:
                raise ValueError(f"block {block} is freed twice")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._key_of[block] is None:
                self._blank.append(block)
            else:
                self._keyed[block] = None

    def is_held(self, block: int) -> bool:
        """Whether anybody holds the block."""
        return self._holders[block] > 0

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._keyed.popitem(last=False)
            self._forget(block)
        self._holders[block] = 1
        return block

    # ---- keys ----

    def assign(self, block: int, key: bytes) -> None:
        """Let a held block carry a key, unless another block does: the first one computed is kept.

        Raises:
            ValueError: if the block is free or carries a key already.
        """
        if not self._holders[block] or self._key_of[block] is not None:
            raise ValueError(f"block {block} is free or has a key")
        if self._block_of.setdefault(key, block) == block:
            self._key_of[block] = key
            self.gains += 1

    def find(self, key: bytes) -> int | None:
        """The block that carries a key, held or free; None if there is none."""
        return self._block_of.get(key)

    def _forget(self, block: int) -> None:
        key = self._key_of[block]
        assert key is not None
        del self._block_of[key]
        self._key_of[block] = None
