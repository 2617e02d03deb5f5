"""What the kinds of work must produce, in float64, and how far off a result is.

Works through the tokens in chunks, so that a long prefill's float64 twin never lies in memory whole.
Knows nothing of contenders.
"""

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor

from fusewire.kernels.packed import split_heads
from fusewire.kernels.shape import QKNormShape
from fusewire.service.bench.inputs import Buffers, Site

CHUNK_TOKENS = 2048
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}
"""RMS relative error that several roundings to a dtype stay below."""


class Work(StrEnum):
    """What a contender does, and so what it returns and which bytes it cannot avoid."""

    STEP = "step"
    """Norm, RoPE and KV write; returns q `[T, nq, d]`."""
    NORM = "norm"
    """The norm of q and k; returns both."""
    ROPE = "rope"
    """The rotation of q and k; returns both."""
    WRITE = "write"
    """The KV write; returns nothing."""
    COPY = "copy"
    """A copy of qkv; returns it."""


def minimal_bytes(work: Work, site: Site) -> int:
    """Bytes read and written if every input is read once and every output written once."""
    shape, token_bytes = site.shape, site.tokens * site.q_weight.itemsize
    if work in (Work.NORM, Work.ROPE):
        return 2 * token_bytes * (shape.q_width + shape.kv_width)
    if work is Work.WRITE:
        return 4 * token_bytes * shape.kv_width
    return site.step_bytes


def rms_relative_error(work: Work, site: Site, qkv: Tensor, buffers: Buffers, result: object) -> float:
    """Take ‖got − exact‖ / ‖exact‖ of each output and return the largest; NaN anywhere gives NaN.

    Args:
        qkv: `[T, qkv_width]`, what the call was given.
        buffers: what it worked on, after the call.
        result: what it returned.
    """
    got = _outputs(work, site, buffers, result)
    squares = torch.zeros(len(got), 2, dtype=torch.float64, device=qkv.device)
    for start in range(0, site.tokens, CHUNK_TOKENS):
        tokens = slice(start, start + CHUNK_TOKENS)
        for row, output, exact in zip(squares, got, _exact(work, site, qkv, tokens), strict=True):
            row[0] += (output[tokens].double() - exact).square().sum()
            row[1] += exact.square().sum()
    return float((squares[:, 0] / squares[:, 1]).sqrt().max())


def _outputs(work: Work, site: Site, buffers: Buffers, result: object) -> Sequence[Tensor]:
    """Collect the outputs as `[T, ...]`: those returned, and k and v as the caches hold them."""
    returned = () if result is None else (result,) if isinstance(result, Tensor) else tuple(_tensors(result))
    if work not in (Work.STEP, Work.WRITE):
        return returned
    caches = (buffers.k_cache, buffers.v_cache)
    return *returned, *(cache.flatten(0, 1)[site.slots] for cache in caches)


def _tensors(result: object) -> Sequence[Tensor]:
    assert isinstance(result, tuple)
    return result


def _exact(work: Work, site: Site, qkv: Tensor, tokens: slice) -> Sequence[Tensor]:
    """Work some tokens out in float64."""
    chunk = qkv[tokens].double()
    if work is Work.COPY:
        return (chunk,)
    q, k, v = split_heads(chunk, site.shape)
    if work in (Work.STEP, Work.NORM):
        q, k = _normed(q, site.q_weight, site.shape), _normed(k, site.k_weight, site.shape)
    if work in (Work.STEP, Work.ROPE):
        rows = site.rope_table[site.positions[tokens]].double()
        q, k = _rotated(q, rows), _rotated(k, rows)
    if work is Work.WRITE:
        return k, v
    return (q, k, v) if work is Work.STEP else (q, k)


def _normed(x: Tensor, weight: Tensor, shape: QKNormShape) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + shape.eps).rsqrt() * weight.double()


def _rotated(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate `[t, heads, d]`, pairing i with i + d/2, by rows `[t, d]` of cos and sin."""
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
