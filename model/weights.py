"""Streams a safetensors checkpoint into a model's parameters, tensor by tensor.

Reads one file or the shards that an index names; never unpickles anything. Knows nothing of
architectures: the model says which tensor goes where, and packing is a matter of its views.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusewire.model.config import ModelError

Progress = Callable[[int, int], None]
"""Told the bytes read so far and in all, after each tensor."""

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@torch.no_grad()
def load_weights(
    folder: Path,
    views: Mapping[str, Tensor],
    ignored: Collection[str] = (),
    progress: Progress | None = None,
) -> None:
    """Copy each tensor of the folder's checkpoint into its view, converting dtype and device.

    Names, shapes and dtypes of the whole checkpoint are checked before anything is copied.

    Args:
        folder: a Hugging Face folder with `model.safetensors`, or with an index and its shards.
        views: every tensor that must be there, by name, and what it fills.
        ignored: names that may be there and are not read.
        progress: told after each tensor.

    Raises:
        ModelError: for a file that cannot be read, and for a tensor that is missing, unknown,
            of another shape or no floating-point type; it names the file and the tensor.
    """
    with ExitStack() as stack:
        sources: dict[str, Any] = {}
        for path in _checkpoint_files(folder):
            file = stack.enter_context(_open(path))
            for name in file.keys():  # noqa: SIM118 - a handle is no mapping
                if name in ignored:
                    continue
                _check_tensor(path, name, file, views)
                sources[name] = file
        if missing := sorted(views.keys() - sources.keys()):
            raise ModelError(f"{folder}: {missing[0]}: is missing ({len(missing)} missing in all)")
        sizes = {name: _bytes_of(file.get_slice(name)) for name, file in sources.items()}
        total, done = sum(sizes.values()), 0
        for name, file in sources.items():
            views[name].copy_(file.get_tensor(name))
            done += sizes[name]
            if progress is not None:
                progress(done, total)


def _checkpoint_files(folder: Path) -> list[Path]:
    """List the checkpoint's files: the shards of the index where there is one."""
    index = folder / _INDEX_FILE
    if not index.exists():
        if not (folder / _SINGLE_FILE).exists():
            raise ModelError(f"{folder}: holds neither {_SINGLE_FILE} nor {_INDEX_FILE}")
        return [folder / _SINGLE_FILE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: weight_map: cannot be read: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index}: weight_map: {name!r} is not a file name")
        if not (folder / name).exists():
            raise ModelError(f"{index}: weight_map: {name} is missing")
    return [folder / name for name in names]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error


def _check_tensor(path: Path, name: str, file: Any, views: Mapping[str, Tensor]) -> None:
    if name not in views:
        raise ModelError(f"{path}: {name}: is no tensor of this model")
    source = file.get_slice(name)
    shape, expected = tuple(source.get_shape()), tuple(views[name].shape)
    if shape != expected:
        raise ModelError(f"{path}: {name}: must have shape {expected}, got {shape}")
    if source.get_dtype() not in _DTYPE_BYTES:
        raise ModelError(
            f"{path}: {name}: must be of type {', '.join(_DTYPE_BYTES)}, got {source.get_dtype()}"
        )


def _bytes_of(source: Any) -> int:
    return math.prod(source.get_shape()) * _DTYPE_BYTES[source.get_dtype()]
