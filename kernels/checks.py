"""What a Triton launcher verifies before it hands raw pointers to a kernel.

Every message names the argument, what it must be and what it is. A launcher that is called over and
over checks `Layout`s, which are equal for equal tensors, so that what was checked once is only looked up.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fusewire.kernels.shape import QKNormShape

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ALIGNMENT = 16
"""Bytes: kernels load and store vectors of this size, so tensors must start at a multiple of it."""


Fields: TypeAlias = tuple[torch.dtype, torch.device, tuple[int, ...], tuple[int, ...]]


def fields_of(tensor: Tensor) -> Fields:
    """Read dtype, device, shape and strides: what `Layout` is made of."""
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor without its memory; answers as far as the checks ask."""

    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def dim(self) -> int:
        """Count the dimensions."""
        return len(self.shape)

    def stride(self, dim: int | None = None) -> Any:
        """Stride of one dimension in elements, or of all."""
        return self.strides if dim is None else self.strides[dim]

    def is_contiguous(self) -> bool:
        """Tell whether elements lie row after row without gaps; the stride of one or no entry is free."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True

    def __len__(self) -> int:
        return self.shape[0]


Checked: TypeAlias = Tensor | Layout


def check_qkv(qkv: Checked, shape: QKNormShape) -> None:
    """Check that qkv is `[T, qkv_width]` of a float type, its rows contiguous and not overlapping.

    Raises:
        TypeError: for another dtype than fp16, bf16 and fp32.
        ValueError: for another shape or stride.
    """
    check_float("qkv", qkv)
    if qkv.dim() != 2 or qkv.shape[1] != shape.qkv_width:
        raise ValueError(f"qkv: shape must be (T, {shape.qkv_width}), got {tuple(qkv.shape)}")
    if qkv.stride(1) != 1:
        raise ValueError(f"qkv: stride of the last dimension must be 1, got {qkv.stride(1)}")
    if len(qkv) > 1 and qkv.stride(0) < shape.qkv_width:
        raise ValueError(f"qkv: row stride must be at least {shape.qkv_width}, got {qkv.stride(0)}")


def check_float(name: str, tensor: Checked) -> None:
    """Check that a tensor is of a type that kernels compute with.

    Raises:
        TypeError: for another dtype than fp16, bf16 and fp32.
    """
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name}: dtype must be one of float16, bfloat16 and float32, got {tensor.dtype}")


def check_site(
    rows: Checked,
    q_weight: Checked,
    k_weight: Checked,
    rope_table: Checked,
    positions: Checked,
    k_cache: Checked,
    v_cache: Checked,
    slots: Checked,
    shape: QKNormShape,
) -> None:
    """Check what a QK-norm step needs besides its rows `[T, ...]`, which say T, dtype and device.

    Raises:
        TypeError: for a dtype that does not fit the rows'.
        ValueError: for another shape, stride or device.
    """
    tokens, dtype, device = len(rows), rows.dtype, rows.device
    check_tensor("q_weight", q_weight, (shape.head_dim,), dtype, device)
    check_tensor("k_weight", k_weight, (shape.head_dim,), dtype, device)
    check_tensor("rope_table", rope_table, (len(rope_table), shape.rotary_dim), torch.float32, device)
    positions_shape = (tokens,) if shape.mrope_section is None else (3, tokens)
    check_tensor("positions", positions, positions_shape, torch.int64, device)
    check_cache("k_cache", k_cache, shape, dtype, device)
    check_cache("v_cache", v_cache, shape, dtype, device)
    check_tensor("slots", slots, (tokens,), torch.int64, device)


def check_tensor(
    name: str, tensor: Checked, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Check that an argument is a contiguous tensor of this shape and dtype on qkv's device.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape or device, or strides that are not contiguous.
    """
    _check_kind(name, tensor, dtype, device)
    if tensor.shape != shape:
        raise ValueError(f"{name}: shape must be {shape}, got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: must be contiguous, got strides {tensor.stride()}")


def check_cache(
    name: str, cache: Checked, shape: QKNormShape, dtype: torch.dtype, device: torch.device
) -> None:
    """Check that a cache is `[num_blocks, block_size, nk, d]` with evenly spaced slots.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, stride or device.
    """
    _check_kind(name, cache, dtype, device)
    if cache.dim() != 4 or cache.shape[2:] != (shape.num_kv_heads, shape.head_dim):
        expected = f"(num_blocks, block_size, {shape.num_kv_heads}, {shape.head_dim})"
        raise ValueError(f"{name}: shape must be {expected}, got {tuple(cache.shape)}")
    if cache.stride(3) != 1:
        raise ValueError(f"{name}: stride of the last dimension must be 1, got {cache.stride(3)}")
    block_stride = cache.shape[1] * cache.stride(1)
    if len(cache) > 1 and cache.stride(0) != block_stride:
        raise ValueError(f"{name}: block stride must be {block_stride}, got {cache.stride(0)}")


def check_aligned(**tensors: Tensor) -> None:
    """Check that tensors start where a vector may.

    Raises:
        ValueError: naming the first that does not.
    """
    for name, tensor in tensors.items():
        beyond = tensor.data_ptr() % ALIGNMENT
        if beyond:
            raise ValueError(
                f"{name}: address must be a multiple of {ALIGNMENT}, got {beyond} bytes beyond one"
            )


def _check_kind(name: str, tensor: Checked, dtype: torch.dtype, device: torch.device) -> None:
    """Check dtype and device."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: dtype must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: device must be {device}, got {tensor.device}")
