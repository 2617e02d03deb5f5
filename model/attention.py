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

from fusewire.kernels.paged_decode import DecodeWorkspace, decode_workspace, paged_decode
from fusewire.kernels.paged_prefill import (
    PrefillWorkspace,
    paged_prefill,
    prefill_workspace,
    split_places_for,
    tile_tokens_for,
)
from fusewire.model.config import ModelConfig, ModelError
from fusewire.model.cuda_graphs import PREFILL_TOKENS
from fusewire.model.device import to_device
from fusewire.model.forward_batch import ForwardBatch, StepShape
from fusewire.model.kv_cache import LayerCache

LONG_PROMPT = PREFILL_TOKENS[-1] + 1
"""Tokens from which on a whole prompt is cuDNN's; a step of fewer is captured in a graph."""
SHORT_CONTEXT = 1024
"""Tokens of contexts up to which the paged kernel takes them as short."""
GATHER_TOKENS = 1 << 17
"""Cached tokens that `sdpa` gathers at once for decode rows; bounds its working memory."""


class StepAttention(Protocol):
    """Attention of one step, prepared once and called by every layer."""

    def __call__(self, q: Tensor, cache: LayerCache) -> Tensor:
        """Attend with q `[T, num_q_heads, head_dim]` causally over each row's context; same shape."""
        ...

    def of_samples(self, q: Tensor, cache: LayerCache) -> Tensor:
        """Attend with the tokens of q that yield logits alone: `[S, num_q_heads, head_dim]`."""
        ...


class AttentionBackend(Protocol):
    """A named way to attend over the paged cache."""

    @property
    def name(self) -> str:
        """The name under which it is chosen and reported."""
        ...

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph of a step serves every step of its shape."""
        ...

    def chunk_shape(self, num_tokens: int, num_rows: int) -> StepShape:
        """The shape of a step of rows of any lengths, with as many tiles as they could need."""
        ...

    def begin(self, batch: ForwardBatch) -> StepAttention:
        """Prepare what all layers of a step share."""
        ...

    def warm_up(self, lengths: Sequence[int], cache: LayerCache) -> None:
        """Prepare for whole prompts of so many tokens; writes nothing."""
        ...


def select_backend(
    name: str, config: ModelConfig, max_rows: int, dtype: torch.dtype, device: torch.device
) -> AttentionBackend:
    """Pick a backend by name; "auto" takes the best one for the device.

    Raises:
        ModelError: for a name that does not exist there, listing those that do.
    """
    names = ("triton", "sdpa") if device.type == "cuda" else ("sdpa",)
    if name == "auto":
        name = names[0]
    if name not in names:
        raise ModelError(
            f"attention_backend: {name!r} does not exist for {device.type}; there is {' and '.join(names)}"
        )
    if name == "sdpa":
        return SdpaAttention()
    return TritonAttention(config, max_rows, dtype, device)


class TritonAttention:
    """Paged Triton kernels for decode and for chunks, and cuDNN's where one long prompt is all there is.

    Every step but such a prompt can be captured in a CUDA graph.
    """

    name = "triton"
    capturable = True

    def __init__(self, config: ModelConfig, max_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self._scale = config.head_dim**-0.5
        self._heads = config.num_heads, config.num_kv_heads
        self._dtype = dtype
        self._cudnn = dtype.itemsize == 2 and config.head_dim % 8 == 0 and config.head_dim <= 128
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        self._decode_workspace = decode_workspace(max_rows, *heads, device)
        self._prefill_workspace = prefill_workspace(*heads, dtype, device)

    def chunk_shape(self, num_tokens: int, num_rows: int) -> StepShape:
        """Tiles large enough to work well and small enough to be many."""
        num_q_heads, num_kv_heads = self._heads
        tile = tile_tokens_for(num_q_heads, num_kv_heads, num_tokens, self._dtype)
        places = split_places_for(tile, num_q_heads // num_kv_heads)
        return StepShape(num_tokens, num_rows, num_tokens // tile + num_rows + places, tile, places)

    def begin(self, batch: ForwardBatch) -> StepAttention:
        """Choose the kernel by the step's shape."""
        workspaces = self._decode_workspace, self._prefill_workspace
        return _TritonStep(batch, self._scale, *workspaces, self._takes_whole(batch))

    def warm_up(self, lengths: Sequence[int], cache: LayerCache) -> None:
        """Let cuDNN build its plans for whole prompts of so many tokens, which takes 50 ms each."""
        for length in lengths if self._cudnn else ():
            q = torch.zeros(
                length, self._heads[0], cache.k.shape[3], dtype=self._dtype, device=cache.k.device
            )
            slots = torch.zeros(length, dtype=torch.int64, device=cache.k.device)
            _attend_whole(q, cache, slots, self._scale)

    def _takes_whole(self, batch: ForwardBatch) -> bool:
        """Whether the step is one whole prompt that cuDNN knows and is faster with."""
        whole = len(batch.query_lens) == 1 and batch.query_lens == batch.context_lens
        return whole and batch.query_lens[0] >= LONG_PROMPT and self._cudnn


class _TritonStep:
    """One step's attention by the paged kernels, or by cuDNN for a whole prompt."""

    def __init__(
        self,
        batch: ForwardBatch,
        scale: float,
        decode_workspace: DecodeWorkspace,
        prefill_workspace: PrefillWorkspace,
        takes_whole: bool,
    ) -> None:
        self._batch = batch
        self._scale = scale
        self._decode_workspace = decode_workspace
        self._prefill_workspace = prefill_workspace
        self._whole_slots = None
        if takes_whole:  # tokens that pad the prompt are behind all others, where none looks
            self._whole_slots = torch.where(batch.slots < 0, batch.slots[0], batch.slots)

    def __call__(self, q: Tensor, cache: LayerCache) -> Tensor:
        """Attend with every token; see `StepAttention`."""
        batch = self._batch
        if batch.shape.is_decode:
            return self._decode(q, cache, batch.row_seats, batch.row_contexts)
        if self._whole_slots is not None:
            return _attend_whole(q, cache, self._whole_slots, self._scale)
        return paged_prefill(
            q,
            cache.k,
            cache.v,
            batch.block_tables,
            batch.row_seats,
            batch.row_ends,
            batch.row_contexts,
            batch.tiles,
            self._scale,
            self._prefill_workspace,
            tile_tokens=batch.shape.tile_tokens,
            short=bool(batch.context_lens) and max(batch.context_lens) <= SHORT_CONTEXT,
            overlap=True,
        )

    def of_samples(self, q: Tensor, cache: LayerCache) -> Tensor:
        """Attend as decode rows do: each of these tokens is its context's last."""
        batch = self._batch
        return self._decode(q[batch.logit_rows], cache, batch.sample_seats, batch.sample_lengths)

    def _decode(self, q: Tensor, cache: LayerCache, seats: Tensor, contexts: Tensor) -> Tensor:
        return paged_decode(
            q,
            cache.k,
            cache.v,
            self._batch.block_tables,
            seats,
            contexts,
            self._scale,
            self._decode_workspace,
            overlap=True,
        )


def _attend_whole(q: Tensor, cache: LayerCache, slots: Tensor, scale: float) -> Tensor:
    """Attend causally with q `[T, nq, d]` of one whole prompt, whose k and v are in slots `[T]`."""
    k, v = (tensor.view(-1, *tensor.shape[2:])[slots] for tensor in cache)  # [T, nk, d]
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(heads.transpose(0, 1)[None] for heads in (q, k, v)),
        None,
        compute_log_sumexp=False,
        is_causal=True,
        scale=scale,
    )
    return out[0][0].transpose(0, 1)


class SdpaAttention:
    """`scaled_dot_product_attention` on keys and values gathered from the cache, on any device.

    Rows of one token are attended together, padded to the longest of their group; every other row
    by itself. Masked positions point at their own row's first token, so one sequence's values,
    NaN included, never enter another's sums.
    """

    name = "sdpa"
    capturable = False

    def __init__(self) -> None:
        torch.backends.cuda.enable_cudnn_sdp(False)  # it builds a plan for every new context length
        self._scratch = _Scratch()

    def chunk_shape(self, num_tokens: int, num_rows: int) -> StepShape:
        """A tile a row: this backend does not look at them."""
        return StepShape(num_tokens, num_rows, num_rows, max(1, num_tokens))

    def warm_up(self, lengths: Sequence[int], cache: LayerCache) -> None:
        """Nothing: torch's kernels are there."""

    def begin(self, batch: ForwardBatch) -> StepAttention:
        """Index the cache slots of every row's context."""
        single = [row for row, length in enumerate(batch.query_lens) if length == 1]
        parts: list[_Part] = [_gather_singles(batch, group) for group in _groups(single, batch.context_lens)]
        first_token = 0
        for row, length in enumerate(batch.query_lens):
            if length > 1:
                parts.append(_gather_chunk(batch, row, first_token))
            first_token += length
        return _SdpaStep(parts, self._scratch, batch.logit_rows)


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
    valid = positions < batch.row_contexts[index[0], None]  # [R, L]
    tables = _tables(batch, index[0], lengths[0])
    slots = _slots(tables, torch.where(valid, positions, 0), batch.block_size)
    return _SinglesPart(index[1], slots, None if lengths[0] == lengths[-1] else valid[:, None, None])


def _gather_chunk(batch: ForwardBatch, row: int, first_token: int) -> "_ChunkPart":
    """Index the context of one row of several tokens."""
    positions = torch.arange(batch.context_lens[row], device=batch.positions.device)
    tables = _tables(batch, torch.tensor([row], device=batch.positions.device), batch.context_lens[row])
    slots = _slots(tables[0], positions, batch.block_size)
    count = batch.query_lens[row]
    tokens = slice(first_token, first_token + count)
    return _ChunkPart(tokens, slots, _lower_right(count, batch.context_lens[row], positions.device))


def _lower_right(count: int, context: int, device: torch.device) -> Tensor | None:
    """Let the t last of L positions attend causally: a mask [t, L], or None if they are all there are."""
    if count == context:
        return None
    if device.type == "cpu":
        return torch.ones(count, context, dtype=torch.bool).tril_(context - count)
    from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler, for seconds

    return causal_lower_right(count, context)


def _tables(batch: ForwardBatch, rows: Tensor, context: int) -> Tensor:
    """Block tables [R, blocks] int64 of rows whose contexts are no longer than `context`."""
    blocks = -(-context // batch.block_size)
    return batch.block_tables[batch.row_seats[rows].long(), :blocks].long()


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
    mask: Tensor | None
    """[t, L], causal from the lower right corner; None for a whole prompt. On a GPU it is made only where a
    kernel needs it spelled out."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with q `[t, nq, d]` causally over k and v `[L, nk, d]`."""
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=self.mask,
            is_causal=self.mask is None,
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
    logit_rows: Tensor

    def of_samples(self, q: Tensor, cache: LayerCache) -> Tensor:
        return self(q, cache)[self.logit_rows]

    def __call__(self, q: Tensor, cache: LayerCache) -> Tensor:
        out = torch.empty_like(q)
        for part in self.parts:
            k = self.scratch.gather("k", cache.k, part.slots)
            v = self.scratch.gather("v", cache.v, part.slots)
            out[part.tokens] = part.attend(q[part.tokens], k, v)
        return out
