"""Inputs of a QK-norm site, what a path must make of them in float64, and memory that shows strays."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusewire.kernels.rope import rope_frequencies, rope_table
from fusewire.kernels.shape import QKNormShape

POISON = -77.0
"""Exact in every dtype, and far from anything a path computes."""

ROUNDED_ONCE = {
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.float16: {"rtol": 2**-11, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2**-8, "atol": 2e-6},
}
"""Half a unit in the last place, and what fp32 arithmetic leaves where a rotation cancels."""


def site_shape(
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    *,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    mrope_section: tuple[int, int, int] | None = None,
    mrope_interleaved: bool = False,
) -> QKNormShape:
    """A shape whose rotation covers the whole head unless said otherwise."""
    return QKNormShape(
        num_q_heads, num_kv_heads, head_dim, 1e-6, rotary_dim or head_dim, interleaved,
        mrope_section, mrope_interleaved,
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The arguments of a path, in the order of its signature."""

    qkv: Tensor
    q_weight: Tensor
    k_weight: Tensor
    rope_table: Tensor
    positions: Tensor
    k_cache: Tensor
    v_cache: Tensor
    slots: Tensor
    shape: QKNormShape

    def args(self) -> tuple:
        """The arguments, to be given to a path."""
        return tuple(vars(self).values())

    def copy(self) -> Case:
        """The same, strides too, with qkv and caches of its own, for a path overwrites them."""
        return replace(
            self,
            qkv=torch.empty_strided(
                self.qkv.shape, self.qkv.stride(), dtype=self.qkv.dtype, device=self.qkv.device
            ).copy_(self.qkv),
            k_cache=self.k_cache.clone(),
            v_cache=self.v_cache.clone(),
        )

    def cached(self) -> tuple[Tensor, Tensor]:
        """k and v as the cache holds them at the slots that are kept."""
        kept = self.slots[self.slots >= 0]
        return self.k_cache.flatten(0, 1)[kept], self.v_cache.flatten(0, 1)[kept]

    def unnamed(self) -> tuple[Tensor, Tensor]:
        """What the caches hold at slots that no token names, but the sink, where a path may write."""
        block_size = self.k_cache.shape[1]
        free = torch.ones(self.k_cache.shape[0] * block_size, dtype=torch.bool)
        free[self.slots[self.slots >= 0].cpu()] = False
        free[-block_size:] = False
        free = free.to(self.slots.device)
        return self.k_cache.flatten(0, 1)[free], self.v_cache.flatten(0, 1)[free]


def make_case(
    shape: QKNormShape,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    seed: int = 0,
    row_padding: int = 0,
    dropped: tuple[int, ...] = (),
    block_size: int = 4,
    max_positions: int = 100,
) -> Case:
    """Draw a case on the CPU, so that devices agree; caches start as poison.

    Args:
        row_padding: poisoned elements after each row of qkv.
        dropped: tokens whose slot is -1.
    """
    generator = torch.Generator().manual_seed(seed)
    num_blocks = tokens // block_size + 3  # at least one block is unnamed, the last is the sink
    storage = torch.full((tokens, shape.qkv_width + row_padding), POISON, dtype=dtype)
    magnitude = torch.rand(tokens, 1, generator=generator) * 4 + 0.1
    storage[:, : shape.qkv_width] = torch.randn(tokens, shape.qkv_width, generator=generator) * magnitude
    slots = torch.randperm((num_blocks - 1) * block_size, generator=generator)[:tokens]
    slots[list(dropped)] = -1
    q_weight, k_weight = (torch.rand(2, shape.head_dim, generator=generator) + 0.5).to(dtype)
    positions_shape = (tokens,) if shape.mrope_section is None else (3, tokens)
    cache = torch.full((num_blocks, block_size, shape.num_kv_heads, shape.head_dim), POISON, dtype=dtype)
    return Case(
        storage.to(device)[:, : shape.qkv_width],
        q_weight.to(device),
        k_weight.to(device),
        rope_table(rope_frequencies(1e4, shape.rotary_dim), max_positions).to(device),
        torch.randint(max_positions, positions_shape, generator=generator).to(device),
        cache.to(device, copy=True),
        cache.to(device, copy=True),
        slots.to(device),
        shape,
    )


@dataclass(frozen=True)
class Expected:
    """q of every token, and k and v of those that are kept, in float64."""

    q: Tensor
    k: Tensor
    v: Tensor


def expected(case: Case) -> Expected:
    """Work a case out in float64, rotating by complex multiplication; call it before the path runs."""
    shape = case.shape
    heads = case.qkv.double().unflatten(-1, (-1, shape.head_dim))
    q, k, v = heads.split((shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads), dim=1)
    turns = torch.complex(*case.rope_table.double().chunk(2, dim=-1))[case.positions]
    if shape.mrope_section is not None:
        turns = torch.stack([turns[axis, :, pair] for pair, axis in enumerate(axes(shape))], dim=-1)
    turn = turns[:, None]  # [T, 1, rotary_dim / 2]
    kept = case.slots >= 0
    q = _turn(normed(q, case.q_weight, shape.eps), turn, shape)
    k = _turn(normed(k, case.k_weight, shape.eps), turn, shape)
    return Expected(q, k[kept], v[kept])


def axes(shape: QKNormShape) -> list[int]:
    """Which of a token's three positions turns each pair, spelled out one pair after the other."""
    time, height, width = shape.mrope_section
    if not shape.mrope_interleaved:
        return [0] * time + [1] * height + [2] * width
    left = {1: height, 2: width}
    order = []
    for pair in range(sum(shape.mrope_section)):
        axis = pair % 3 if left.get(pair % 3, 0) > 0 else 0
        left[axis] = left.get(axis, 0) - 1
        order.append(axis)
    return order


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension in float64."""
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def _turn(x: Tensor, turn: Tensor, shape: QKNormShape) -> Tensor:
    """Multiply each pair, taken as a complex number, by cos + i sin."""
    rotary, rest = x.split((shape.rotary_dim, shape.head_dim - shape.rotary_dim), dim=-1)
    if shape.interleaved:
        pairs = torch.view_as_complex(rotary.unflatten(-1, (-1, 2)).contiguous())
        return torch.cat((torch.view_as_real(pairs * turn).flatten(-2), rest), dim=-1)
    turned = torch.complex(*rotary.chunk(2, dim=-1)) * turn
    return torch.cat((turned.real, turned.imag, rest), dim=-1)


def rms_relative_error(got: Tensor, exact: Tensor) -> float:
    """‖got − exact‖ / ‖exact‖ over all elements."""
    return float((got.double() - exact).norm() / exact.norm())


def sparse_zeros(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are written, for strides past 32 bits."""
    no_reserve = 0x4000  # MAP_NORESERVE on Linux; the mmap module names it only in some versions
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)
