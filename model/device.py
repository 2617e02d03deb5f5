"""Devices and dtypes by name, and the ways between host and device.

Knows nothing of models.
"""

import numpy as np
import torch

from fusewire.model.config import ModelError


def resolve_device(name: str) -> torch.device:
    """Pick the device for "auto", "cuda" or "cpu"; auto takes CUDA where there is one.

    Raises:
        ModelError: if CUDA is asked for and absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("device: cuda was asked for and no CUDA device is available")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def resolve_dtype(name: str, checkpoint: str, device: torch.device) -> torch.dtype:
    """Pick the dtype by name; auto is float32 on CPU and the checkpoint's on CUDA."""
    if name == "auto":
        name = checkpoint if device.type == "cuda" else "float32"
    return getattr(torch, name)


def name_of_dtype(dtype: torch.dtype) -> str:
    """Spell a dtype as config files do: "bfloat16" for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def name_of_device(device: torch.device) -> str:
    """Name the device for reports: "cpu", or the product name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Move a host array to the device without waiting for it: through pinned memory on CUDA."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Start a copy to the host; also the event that says when it has arrived, if it takes time."""
    if tensor.device.type != "cuda":
        return tensor, None
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived
