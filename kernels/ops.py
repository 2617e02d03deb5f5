"""The kernels as operators of `torch.ops.fusewire`, for `torch.compile` and `torch.export`.

Each has a schema with its mutations declared and a fake implementation, so tracers see what it does
without running it. Eager code calls the functions themselves, which costs the host less.
"""

import torch
from torch import Tensor

from fusewire.kernels.qk_norm import qk_norm
from fusewire.kernels.qk_norm_rope_cache import qk_norm_rope_cache
from fusewire.kernels.shape import QKNormShape


@torch.library.custom_op("fusewire::qk_norm", mutates_args=("qkv",))
def qk_norm_op(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
) -> None:
    """Run `fusewire.kernels.qk_norm.qk_norm`; the fields of its shape are arguments."""
    shape = QKNormShape(num_q_heads, num_kv_heads, head_dim, eps, rotary_dim=2)
    qk_norm(qkv, q_weight, k_weight, shape)


@torch.library.custom_op("fusewire::qk_norm_rope_cache", mutates_args=("k_cache", "v_cache"))
def qk_norm_rope_cache_op(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
    rotary_dim: int,
    interleaved: bool = False,
    mrope_section: list[int] | None = None,
    mrope_interleaved: bool = False,
) -> Tensor:
    """Run `fusewire.kernels.qk_norm_rope_cache`; the fields of its shape are arguments."""
    shape = QKNormShape(
        num_q_heads,
        num_kv_heads,
        head_dim,
        eps,
        rotary_dim,
        interleaved,
        None if mrope_section is None else (mrope_section[0], mrope_section[1], mrope_section[2]),
        mrope_interleaved,
    )
    return qk_norm_rope_cache(qkv, q_weight, k_weight, rope_table, positions, k_cache, v_cache, slots, shape)


@qk_norm_rope_cache_op.register_fake
def _(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *shape: object,
) -> Tensor:
    return qkv.new_empty((qkv.shape[0], num_q_heads, head_dim))
