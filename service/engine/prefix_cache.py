"""Finds KV that an earlier request has computed: full blocks, by a hash chain over their tokens.

A block's key hashes the key of the block before it and the block's own tokens, so it stands for the
whole prefix; the first key's parent hashes kernel mode and salt, so that neither modes nor salts ever
share. Keys are 128 bits of BLAKE2b over fields of fixed width: two prefixes that differ have keys that
differ. Knows nothing of requests; who holds a block is `BlockPool`'s affair.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from fusewire.kernels.modes import KernelMode
from fusewire.service.engine.block_pool import BlockPool

KEY_BYTES = 16


class PrefixChain:
    """The keys of one sequence's full blocks, on one kernel mode. Computed when asked for, then kept."""

    __slots__ = ("_keys", "_seed", "block_size", "mode", "registered")

    def __init__(self, mode: KernelMode, salt: str, block_size: int) -> None:
        self.mode = mode
        self.block_size = block_size
        self.registered = 0
        """How many of the sequence's blocks are known to the cache, counted from its start."""
        self._seed = blake2b(f"{mode}\0{salt}".encode(), digest_size=KEY_BYTES).digest()
        self._keys: list[bytes] = []

    def key(self, index: int, tokens: "array[int]") -> bytes:
        """The key of block `index`; `tokens` is the sequence, which only ever grows at its end."""
        keys, size = self._keys, self.block_size
        while len(keys) <= index:
            start = len(keys) * size
            parent = keys[-1] if keys else self._seed
            own = tokens[start : start + size].tobytes()
            keys.append(blake2b(parent + own, digest_size=KEY_BYTES).digest())
        return keys[index]


class PrefixCache:
    """Looks prefixes up in a pool's blocks and makes new ones known."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool

    def match(self, chain: PrefixChain, tokens: "array[int]") -> list[int]:
        """The blocks of the longest prefix that is cached; not held yet. Leaves the last token out,
        which must be computed for its logits.
        """
        blocks: list[int] = []
        for index in range((len(tokens) - 1) // chain.block_size):
            block = self._pool.find(chain.key(index, tokens))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def register(
        self, chain: PrefixChain, tokens: "array[int]", blocks: Sequence[int], num_computed: int
    ) -> None:
        """Make known the full blocks among the first `num_computed` tokens, whose KV is in `blocks`."""
        for index in range(chain.registered, num_computed // chain.block_size):
            self._pool.assign(blocks[index], chain.key(index, tokens))
            chain.registered = index + 1
