"""Where Triton kernels run, and how large their tiles are."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton

WARP_BYTES = 512
"""What 32 lanes load with one 16-byte vector each."""

INTERPRETED: bool = triton.knobs.runtime.interpret
"""TRITON_INTERPRET=1: kernels run in Python on CPU tensors, for tests."""


def runs_triton(device: torch.device) -> bool:
    """Tell whether a kernel can be launched on tensors of this device."""
    return device.type == "cuda" or INTERPRETED


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one, which is where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def rows_per_warp(row_bytes: int) -> int:
    """Rows that a warp loads with one 16-byte vector per lane, or one row if that is wider."""
    return max(1, WARP_BYTES // row_bytes)
