"""Where Triton kernels run, and how large their tiles are."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton

WARP_BYTES = 512
"""What 32 lanes load with one 16-byte vector each."""

OVERLAPPING = 90
"""The first architecture whose launches may begin before the one before them has ended."""

INTERPRETED: bool = triton.knobs.runtime.interpret
"""TRITON_INTERPRET=1: kernels run in Python on CPU tensors, for tests."""


def runs_triton(device: torch.device) -> bool:
    """Tell whether a kernel can be launched on tensors of this device."""
    return device.type == "cuda" or INTERPRETED


@lru_cache(maxsize=64)
def architecture_of(device: torch.device) -> int:
    """Compute capability as one number, 90 for sm_90; 0 where there is none."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one, which is where Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def rows_per_warp(row_bytes: int) -> int:
    """Rows that a warp loads with one 16-byte vector per lane, or one row if that is wider."""
    return max(1, WARP_BYTES // row_bytes)
