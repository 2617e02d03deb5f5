"""The names of the QK-norm paths, as every layer and the command line spell them.

Knows no implementation: what runs behind a name on a device is `fusewire.kernels.paths`.
"""

from enum import StrEnum


class KernelMode(StrEnum):
    """How a forward pass computes per-head RMSNorm of q and k, RoPE and the paged KV write."""

    UNFUSED = "unfused"
    """Separate torch operations, the way a model file spells the chain."""
    FUSED_NORM = "fused_norm"
    """The RMSNorm of q and k in one launch, in place on packed qkv; RoPE and the write separate."""
    FUSED = "fused"
    """Norm, RoPE and the paged KV write together (the default)."""
