"""What kernel modes are called on the wire: the one table for clients, RPCs and commands.

Knows the proto's enum and nothing of what a mode does or whether a server has it.
"""

from collections.abc import Mapping
from types import MappingProxyType

from fusewire.kernels.modes import KernelMode
from fusewire.v1 import kernel_pb2

WIRE_MODES: Mapping[KernelMode | None, kernel_pb2.KernelMode] = MappingProxyType(
    {
        None: kernel_pb2.KERNEL_MODE_UNSPECIFIED,
        KernelMode.UNFUSED: kernel_pb2.KERNEL_MODE_UNFUSED,
        KernelMode.FUSED_NORM: kernel_pb2.KERNEL_MODE_FUSED_NORM,
        KernelMode.FUSED: kernel_pb2.KERNEL_MODE_FUSED,
    }
)
"""None leaves the choice to the server."""
MODES: Mapping[int, KernelMode | None] = MappingProxyType({wire: mode for mode, wire in WIRE_MODES.items()})
"""The way back."""
