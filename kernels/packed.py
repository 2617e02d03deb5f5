"""Packed qkv and the paged cache as the kernels see them: heads, and slots.

The sink: a token whose slot is -1 (a row that pads a graph bucket) must leave no trace in any slot
that is ever read. A kernel can skip such a write; a torch index cannot without a sync, and wraps to
the cache's last slot instead. So whoever allocates a paged cache adds one block at its end that no
block table names, and every path, on every device, is free to write there.
"""

from torch import Tensor

from fusewire.kernels.shape import QKNormShape


def split_heads(qkv: Tensor, shape: QKNormShape) -> tuple[Tensor, Tensor, Tensor]:
    """View packed qkv `[T, qkv_width]` as q `[T, nq, d]`, k `[T, nk, d]` and v `[T, nk, d]`."""
    q, k, v = qkv.split((shape.q_width, shape.kv_width, shape.kv_width), dim=-1)
    kv_heads = (len(qkv), shape.num_kv_heads, shape.head_dim)
    return q.view(len(qkv), shape.num_q_heads, shape.head_dim), k.view(kv_heads), v.view(kv_heads)


def normed_heads(qkv: Tensor, shape: QKNormShape) -> Tensor:
    """View the heads of packed qkv that are normalised, q then k, as `[T, nq + nk, d]`."""
    heads = qkv[:, : shape.q_width + shape.kv_width]
    return heads.view(len(qkv), shape.num_normed_heads, shape.head_dim)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write k and v `[T, nk, d]` into the paged caches `[num_blocks, block_size, nk, d]`.

    Args:
        slots: int64 `[T]`, `block * block_size + offset`; -1 writes to the sink.

    Raises:
        RuntimeError: if a cache's slots are not evenly spaced in memory.
    """
    k_cache.view(-1, *k_cache.shape[2:])[slots] = k
    v_cache.view(-1, *v_cache.shape[2:])[slots] = v
