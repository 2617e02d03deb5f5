"""Attention over the paged KV cache: a seam with named backends.

A backend sees queries that are already normed and rotated, and a cache that already holds this
step's keys and values. It knows nothing of kernel modes or weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from fusewire.model.config import ModelError
from fusewire.model.device import to_device
from fusewire.model.forward_batch import ForwardBatch
from fusewire.model.kv_cache import LayerCache

GATHER_TOKENS = 1 << 17
"""Cached tokens that `sdpa` gathers at once for decode rows; bounds its working memory."""


class StepAttention(Protocol):
    """Attention of one step, prepared once and called by every layer."""

    def __call__(self, q: Tensor, cache: LayerCache) -> Tensor:
        """Attend with q `[T, num_q_heads, head_dim]` causally over each row's context; same shape."""
        ...


class AttentionBackend(Protocol):
    """A named way to attend over the paged cache."""

    @property
    def name(self) -> str:
        """The name under which it is chosen and reported."""
        ...

    def begin(self, batch: ForwardBatch) -> StepAttention:
        """Prepare what all layers of a step share."""
        ...


def select_backend(name: str, device: torch.device) -> AttentionBackend:
    """Pick a backend by name; "auto" takes the best one for the device.

    Raises:
        ModelError: for a name that does not exist, listing those that do.
    """
    if name not in ("auto", SdpaAttention.name):
        raise ModelError(
            f"attention_backend: {name!r} does not exist for {device.type}; there is {SdpaAttention.name}"
        )
    return SdpaAttention()


class SdpaAttention:
    """`scaled_dot_product_attention` on keys and values gathered from the cache, on any device.

    Rows of one token are attended together, padded to the longest of their group; every other row
    by itself. Masked positions point at their own row's first token, so one sequence's values,
    NaN included, never enter another's sums.
    """

    name = "sdpa"

    def __init__(self) -> None:
        torch.backends.cuda.enable_cudnn_sdp(False)  # it builds a plan for every new context length
        self._scratch = _Scratch()

    def begin(self, batch: ForwardBatch) -> StepAttention:
        """Index the cache slots of every row's context."""
        single = [row for row, length in enumerate(batch.query_lens) if length == 1]
        parts: list[_Part] = [_gather_singles(batch, group) for group in _groups(single, batch.context_lens)]
        first_token = 0
        for row, length in enumerate(batch.query_lens):
            if length > 1:
                parts.append(_gather_chunk(batch, row, first_token))
            first_token += length
        return _SdpaStep(parts, self._scratch)


def _groups(rows: Sequence[int], context_lens: Sequence[int]) -> list[list[int]]:
    """Split rows, longest context first, so that each group padded stays within GATHER_TOKENS."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda row: -context_lens[row]):
        if not groups or (len(groups[-1]) + 1) * context_lens[groups[-1][0]] > GATHER_TOKENS:
            groups.append([])
        groups[-1].append(row)
    return groups


def _gather_singles(batch: ForwardBatch, rows: list[int]) -> "_SinglesPart":
    """Index the context of rows of one token, padded to the first, longest one."""
    lengths = [batch.context_lens[row] for row in rows]
    device = batch.positions.device
    first_tokens = np.cumsum((0, *batch.query_lens))
    index = to_device(np.stack([rows, first_tokens[rows]]), device)  # [2, R]
    positions = torch.arange(lengths[0], device=device)  # [L]
    valid = positions < batch.context_lens_tensor[index[0], None]  # [R, L]
    slots = _slots(batch.block_tables[index[0]], torch.where(valid, positions, 0), batch.block_size)
    return _SinglesPart(index[1], slots, None if lengths[0] == lengths[-1] else valid[:, None, None])


def _gather_chunk(batch: ForwardBatch, row: int, first_token: int) -> "_ChunkPart":
    """Index the context of one row of several tokens."""
    positions = torch.arange(batch.context_lens[row], device=batch.positions.device)
    slots = _slots(batch.block_tables[row], positions, batch.block_size)
    count = batch.query_lens[row]
    tokens = slice(first_token, first_token + count)
    return _ChunkPart(tokens, slots, causal_lower_right(count, batch.context_lens[row]))


def _slots(tables: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Find the slots of positions `[..., L]` by block tables `[..., blocks]`."""
    return tables.gather(-1, positions // block_size) * block_size + positions % block_size


@dataclass(frozen=True, slots=True)
class _SinglesPart:
    """R rows of one token."""

    tokens: Tensor
    """[R], indices into the step's tokens."""
    slots: Tensor
    """[R, L], the cache slots of each context."""
    mask: Tensor | None
    """[R, 1, 1, L], True where the position is the row's own; None if all are."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with q `[R, nq, d]` over k and v `[R, L, nk, d]`; the heads of a group act as queries."""
        grouped = q.reshape(q.shape[0], k.shape[2], -1, q.shape[2])  # [R, nk, nq / nk, d]
        out = F.scaled_dot_product_attention(
            grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=self.mask
        )
        return out.reshape(q.shape)


@dataclass(frozen=True, slots=True)
class _ChunkPart:
    """One row of t tokens at the end of a context of L."""

    tokens: slice
    slots: Tensor
    """[L], the cache slots of the context."""
    mask: Tensor
    """[t, L], causal from the lower right corner; made only where a kernel needs it spelled out."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with q `[t, nq, d]` causally over k and v `[L, nk, d]`."""
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=self.mask,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)


_Part = _SinglesPart | _ChunkPart


class _Scratch:
    """Memory for gathered keys and values, kept between layers and steps.

    On a CPU, large fresh allocations are given back to the system and faulted in again page by page,
    which costs several times the copy itself.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def gather(self, name: str, cache: Tensor, slots: Tensor) -> Tensor:
        """Copy slots `[...]` of a cache `[blocks, block_size, nk, d]` to the named buffer: `[..., nk, d]`."""
        heads = cache.shape[2:]
        rows = cache.view(-1, heads.numel())
        count = slots.numel()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < count:
            buffer = self._buffers[name] = rows.new_empty(1 << (count - 1).bit_length(), heads.numel())
        out = torch.index_select(rows, 0, slots.flatten(), out=buffer[:count])
        return out.view(*slots.shape, *heads)


@dataclass(frozen=True, slots=True)
class _SdpaStep:
    parts: list[_Part]
    scratch: _Scratch

    def __call__(self, q: Tensor, cache: LayerCache) -> Tensor:
        out = torch.empty_like(q)
        for part in self.parts:
            k = self.scratch.gather("k", cache.k, part.slots)
            v = self.scratch.gather("v", cache.v, part.slots)
            out[part.tokens] = part.attend(q[part.tokens], k, v)
        return out
