"""The host-side account of the paged KV cache: which blocks are free and who holds the rest.

Blocks are numbers; the tensors behind them are `fusewire.model.kv_cache`'s. Knows nothing of
requests or tokens' values.
"""


class BlockPool:
    """Ref-counted KV cache blocks `0 … num_blocks − 1` of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks, block_size: must be positive, got {num_blocks}, {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """The share of blocks that are held, 0 to 1."""
        return 1 - self.num_free / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each held once.

        Raises:
            MemoryError: if fewer are free; then nothing is taken.
        """
        if count > len(self._free):
            raise MemoryError(f"{count} KV cache blocks asked for, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def share(self, block: int) -> None:
        """Hold a block once more.

        Raises:
            ValueError: if nobody holds it.
        """
        if not self._holders[block]:
            raise ValueError(f"block {block} is free and cannot be shared")
        self._holders[block] += 1

    def free(self, blocks: list[int]) -> None:
        """Let go of each block once; one that nobody holds any more can be allocated again.

        Raises:
            ValueError: if a block is free already.
        """
        for block in reversed(blocks):
            if not self._holders[block]:
                raise ValueError(f"block {block} is freed twice")
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)
