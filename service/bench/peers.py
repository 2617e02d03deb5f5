"""The same step by other libraries, where they can be imported: vLLM, FlashInfer and Liger.

Each is called as its own documentation says, on the cache layout it uses itself.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusewire.kernels.packed import split_heads, write_kv
from fusewire.service.bench.contenders import Absent, Call, Contender
from fusewire.service.bench.exactness import Work
from fusewire.service.bench.inputs import BLOCK_SIZE, Buffers, Site


def peer_contenders() -> Mapping[str, Contender]:
    """List the contenders of other libraries, by name; whether they are there shows when they are bound."""
    made = [
        Contender("vllm", Work.STEP, "vllm", _vllm, joined_cache=True),
        Contender("flashinfer", Work.STEP, "flashinfer", _flashinfer),
        Contender("liger", Work.STEP, "liger", _liger),
    ]
    return {contender.name: contender for contender in made}


def _vllm(site: Site) -> Call:
    """`fused_qk_norm_rope` in place on packed qkv, then `reshape_and_cache_flash`."""
    ops = _import("vllm._custom_ops", site)
    shape = site.shape
    heads = (shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads, shape.head_dim)
    cos_sin = site.rope_table.to(site.q_weight.dtype)  # its kernel wants the table in qkv's dtype
    one = torch.ones((), device=site.q_weight.device)

    def call(buffers: Buffers) -> Tensor:
        ops.fused_qk_norm_rope(
            buffers.qkv, *heads, shape.eps, site.q_weight, site.k_weight, cos_sin, True, site.positions
        )
        q, k, v = split_heads(buffers.qkv, shape)
        caches = (buffers.k_cache, buffers.v_cache)
        ops.reshape_and_cache_flash(k, v, *caches, site.slots, "auto", one, one)
        return q

    return call


def _flashinfer(site: Site) -> Call:
    """`rmsnorm` of q and of k, RoPE in place, and `append_paged_kv_cache`.

    One sequence that owns every block in order makes a position of it the same as a slot.
    """
    norm, rope, page = (_import(f"flashinfer.{name}", site) for name in ("norm", "rope", "page"))
    shape, device = site.shape, site.q_weight.device
    slots = site.slots.to(torch.int32)
    sequence = torch.zeros_like(slots)
    blocks = torch.arange(site.num_blocks, dtype=torch.int32, device=device)
    bounds = torch.tensor((0, site.num_blocks), dtype=torch.int32, device=device)
    last_page = torch.tensor((BLOCK_SIZE,), dtype=torch.int32, device=device)

    def call(buffers: Buffers) -> Tensor:
        q, k, v = split_heads(buffers.qkv, shape)
        q, k = norm.rmsnorm(q, site.q_weight, shape.eps), norm.rmsnorm(k, site.k_weight, shape.eps)
        rope.apply_rope_with_cos_sin_cache_inplace(
            site.positions, q.flatten(1), k.flatten(1), shape.head_dim, site.rope_table, is_neox=True
        )
        caches = (buffers.k_cache, buffers.v_cache)
        page.append_paged_kv_cache(k, v, sequence, slots, caches, blocks, bounds, last_page, "NHD")
        return q

    return call


def _liger(site: Site) -> Call:
    """Liger's RMSNorm of q and of k and its RoPE, which are made for training; an indexed write."""
    norm = _import("liger_kernel.ops.rms_norm", site).LigerRMSNormFunction
    rope = _import("liger_kernel.ops.rope", site).LigerRopeFunction
    shape = site.shape
    rows = site.rope_table[site.positions].to(site.q_weight.dtype)[None]  # [1, T, d]
    cos, sin = (part.repeat(1, 1, 2) for part in rows.chunk(2, dim=-1))

    def call(buffers: Buffers) -> Tensor:
        q, k, v = split_heads(buffers.qkv, shape)
        q = norm.apply(q.contiguous(), site.q_weight, shape.eps, 0.0, "llama", False)
        k = norm.apply(k.contiguous(), site.k_weight, shape.eps, 0.0, "llama", False)
        heads_first = (q[None].transpose(1, 2), k[None].transpose(1, 2))  # [1, heads, T, d]
        q, k = (x.transpose(1, 2)[0] for x in rope.apply(*heads_first, cos, sin))
        write_kv(k, v, buffers.k_cache, buffers.v_cache, site.slots)
        return q

    return call


def _import(name: str, site: Site) -> Any:
    """Import a module of an optional library."""
    if site.q_weight.device.type != "cuda":
        raise Absent(f"its kernels do not run on {site.q_weight.device.type}")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"cannot be imported: {error}") from error
