"""The three QK-norm paths behind one signature, and the names of what runs them.

A path takes packed qkv, normalises q and k per head, rotates them, writes k and v into the paged
cache and returns q. It knows nothing of prefill or decode, of layers or of batches.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from fusewire.kernels.modes import KernelMode
from fusewire.kernels.ops import qk_norm_op, qk_norm_rope_cache_op
from fusewire.kernels.packed import split_heads, write_kv
from fusewire.kernels.qk_norm import qk_norm
from fusewire.kernels.qk_norm_rope_cache import qk_norm_rope_cache
from fusewire.kernels.rope import apply_rope, rope_rows
from fusewire.kernels.shape import QKNormShape


class QKNormPath(Protocol):
    """One implementation of norm, RoPE and KV write."""

    def __call__(
        self,
        qkv: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        rope_table: Tensor,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
        shape: QKNormShape,
        *,
        overlap: bool = False,
    ) -> Tensor:
        """Run the path on T tokens.

        Args:
            qkv: `[T, qkv_width]`, fp16, bf16 or fp32, rows may be strided; may be overwritten.
            q_weight: `[head_dim]` in qkv's dtype.
            k_weight: likewise.
            rope_table: fp32 `[max_positions, rotary_dim]`, see `fusewire.kernels.rope.rope_table`.
            positions: int64 `[T]`; with mRoPE sections `[3, T]`: time, height and width.
            k_cache: `[num_blocks, block_size, num_kv_heads, head_dim]` in qkv's dtype; its last
                block is the sink, see `fusewire.kernels.packed`.
            v_cache: likewise.
            slots: int64 `[T]`, `block * block_size + offset`; -1 for a token that is not kept.
            shape: heads, widths and rotation.
            overlap: start while the launch before still runs, where the path can; see
                `fusewire.kernels.qk_norm_rope_cache`.

        Returns:
            q `[T, num_q_heads, head_dim]`, normed and rotated; may share memory with qkv.
        """
        ...


def unfused(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    shape: QKNormShape,
    *,
    overlap: bool = False,
) -> Tensor:
    """Run the chain as separate torch operations; see `QKNormPath`.

    The spelling, and every rounding, is that of transformers' `modeling_qwen3.py`.
    """
    q, k, v = split_heads(qkv, shape)
    q = chain_rms_norm(q, q_weight, shape.eps)
    k = chain_rms_norm(k, k_weight, shape.eps)
    return _rotate_and_write(q, k, v, rope_table, positions, k_cache, v_cache, slots, shape)


def fused_norm(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    shape: QKNormShape,
    *,
    overlap: bool = False,
) -> Tensor:
    """Normalise q and k in one launch, then go on as `unfused` does; see `QKNormPath`."""
    if torch.compiler.is_compiling():
        heads = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim)
        qk_norm_op(qkv, q_weight, k_weight, *heads, shape.eps)
    else:
        qk_norm(qkv, q_weight, k_weight, shape)
    q, k, v = split_heads(qkv, shape)
    return _rotate_and_write(q, k, v, rope_table, positions, k_cache, v_cache, slots, shape)


def fused(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    shape: QKNormShape,
    *,
    overlap: bool = False,
) -> Tensor:
    """Run norm, RoPE and the KV write in one launch, on a CPU in few torch passes; see `QKNormPath`."""
    if torch.compiler.is_compiling():
        fields = shape.fields
        return qk_norm_rope_cache_op(
            qkv, q_weight, k_weight, rope_table, positions, k_cache, v_cache, slots, *fields
        )
    return qk_norm_rope_cache(
        qkv, q_weight, k_weight, rope_table, positions, k_cache, v_cache, slots, shape, overlap=overlap
    )


PATHS: Mapping[KernelMode, QKNormPath] = MappingProxyType(
    {KernelMode.UNFUSED: unfused, KernelMode.FUSED_NORM: fused_norm, KernelMode.FUSED: fused}
)

_CUDA_BACKENDS = MappingProxyType(
    {
        KernelMode.UNFUSED: "torch-cuda",
        KernelMode.FUSED_NORM: "triton-cuda",
        KernelMode.FUSED: "triton-cuda",
    }
)


EPILOGUE_BACKEND = "triton-cuda-epilogue"
"""What runs `fused` where the projection's epilogue does the step: `fusewire.kernels.qkv_epilogue`."""


def backend_name(mode: KernelMode, device: torch.device) -> str:
    """Name what runs a path on a device, as reports and metrics spell it."""
    return _CUDA_BACKENDS[mode] if device.type == "cuda" else f"torch-{device.type}"


def chain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension as `Qwen3RMSNorm`: rounded to x's dtype before the weight."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _rotate_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    shape: QKNormShape,
) -> Tensor:
    """Rotate normed q and k, write k and v to their slots, return q."""
    cos_sin = rope_rows(rope_table, positions, shape).to(q.dtype)
    write_kv(apply_rope(k, cos_sin, shape.interleaved), v, k_cache, v_cache, slots)
    return apply_rope(q, cos_sin, shape.interleaved)
