# ruff: noqa: N803
"""What each token of a step is and where it goes, looked up on the device; its torch twin beside it.

A step says of a token only whose it is and its position. The id comes from the sequence's own record,
where the step before may just have written it, and the slot from its block table. Knows nothing of
layers, phases or requests.
"""

import triton
import triton.language as tl
from torch import Tensor

from fusewire.kernels.launch import on_device, runs_triton

_TOKENS = 128
"""Tokens of a program."""


def expand_inputs(
    seats: Tensor,
    positions: Tensor,
    new_blocks: Tensor,
    tokens: Tensor,
    block_tables: Tensor,
    block_size: int,
    ids_out: Tensor,
    positions_out: Tensor,
    slots_out: Tensor,
) -> None:
    """Fill ids, positions and slots of T tokens, and add blocks that are new to their tables.

    Args:
        seats: int32 `[T]`, rows of the tables; the last one is for tokens that pad a batch.
        positions: int32 `[T]`, within each sequence.
        new_blocks: int32 `[T]`, the block that a token is the first to use, or -1.
        tokens: int32 `[seats, length]`, rows may be strided.
        block_tables: int32 `[seats, blocks]`, rows may be strided; gets the new blocks.
        ids_out: int32 `[T]`.
        positions_out: int64 `[T]`.
        slots_out: int64 `[T]`, `block * block_size + offset`; -1 for the last seat.
    """
    if not runs_triton(seats.device):
        _expand_inputs_reference(
            seats, positions, new_blocks, tokens, block_tables, block_size, ids_out, positions_out, slots_out
        )
        return
    count = len(seats)
    with on_device(seats.device):
        expand_inputs_kernel[(triton.cdiv(count, _TOKENS),)](
            seats, positions, new_blocks, tokens, block_tables, ids_out, positions_out, slots_out,
            count, tokens.stride(0), block_tables.stride(0), len(tokens) - 1,
            BLOCK_SIZE=block_size, TOKENS=_TOKENS, num_warps=4,
        )  # fmt: skip


def _expand_inputs_reference(
    seats: Tensor,
    positions: Tensor,
    new_blocks: Tensor,
    tokens: Tensor,
    block_tables: Tensor,
    block_size: int,
    ids_out: Tensor,
    positions_out: Tensor,
    slots_out: Tensor,
) -> None:
    """Do the kernel's work in torch, on a CPU."""
    seats, columns = seats.long(), positions.long() // block_size
    grown = (new_blocks >= 0).nonzero().flatten()
    block_tables[seats[grown], columns[grown]] = new_blocks[grown]
    ids_out.copy_(tokens[seats, positions.long()])
    positions_out.copy_(positions)
    slots = block_tables[seats, columns].long() * block_size + positions % block_size
    slots_out.copy_(slots.masked_fill_(seats == len(tokens) - 1, -1))


@triton.jit(do_not_specialize=["count", "pad_seat"])
def expand_inputs_kernel(
    seats: tl.tensor,
    positions: tl.tensor,
    new_blocks: tl.tensor,
    tokens: tl.tensor,
    block_tables: tl.tensor,
    ids_out: tl.tensor,
    positions_out: tl.tensor,
    slots_out: tl.tensor,
    count: tl.tensor,
    token_stride: tl.tensor,
    table_stride: tl.tensor,
    pad_seat: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Handle TOKENS tokens."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live = token < count
    seat = tl.load(seats + token, mask=live, other=0).to(tl.int64)
    position = tl.load(positions + token, mask=live, other=0)
    new_block = tl.load(new_blocks + token, mask=live, other=-1)
    tl.store(ids_out + token, tl.load(tokens + seat * token_stride + position, mask=live), mask=live)
    tl.store(positions_out + token, position.to(tl.int64), mask=live)
    entry = block_tables + seat * table_stride + position // BLOCK_SIZE
    grows = live & (new_block >= 0)
    block = tl.where(grows, new_block, tl.load(entry, mask=live & (new_block < 0), other=0)).to(tl.int64)
    tl.store(entry, new_block, mask=grows)
    slot = tl.where(seat == pad_seat, -1, block * BLOCK_SIZE + position % BLOCK_SIZE)
    tl.store(slots_out + token, slot, mask=live)
