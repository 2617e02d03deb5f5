"""Streams a safetensors checkpoint into a model's parameters, tensor by tensor.

Reads one file or the shards that an index names; never unpickles anything. Knows nothing of
architectures: the model says which tensor goes where, and packing is a matter of its views.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusewire.model.config import ModelError

log = logging.getLogger("fusewire.model")

Progress = Callable[[int, int], None]
"""Told the bytes read so far and in all, after each tensor."""

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_PREFIX, _HEAD = "model.", "lm_head."
"""What the names of a decoder and of its head begin with; a decoder saved alone leaves the prefix out."""
_UNUSED = "rotary_emb.inv_freq"
"""The end of a name that old checkpoints have and that is computed here."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in an open safetensors file."""

    path: Path
    name: str
    """As the file spells it."""
    _file: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        return tuple(self._file.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> str:
        """Its type as the file spells it, for instance "BF16"."""
        return str(self._file.get_slice(self.name).get_dtype())

    @property
    def num_bytes(self) -> int:
        """What it takes in the file; of a floating-point tensor alone."""
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]

    @property
    def is_floating(self) -> bool:
        """Whether it has a floating-point type that is read here."""
        return self.dtype in _DTYPE_BYTES

    def read(self) -> Tensor:
        """The tensor on the CPU."""
        return self._file.get_tensor(self.name)

    def error(self, problem: str) -> ModelError:
        """What is wrong with it, for the operator."""
        return ModelError(f"{self.path}: {self.name}: {problem}")


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """Open a folder's checkpoint for the length of a `with` block: its tensors by their whole names.

    Raises:
        ModelError: for a file that is missing or cannot be read, and a tensor stored under two names.
    """
    with ExitStack() as stack:
        tensors: dict[str, StoredTensor] = {}
        for path in _checkpoint_files(folder):
            file = stack.enter_context(_open(path))
            for name in file.keys():  # noqa: SIM118 - a handle is no mapping
                if name.endswith(_UNUSED):
                    continue
                tensor = StoredTensor(path, name, file)
                whole_name = name if name.startswith((_PREFIX, _HEAD)) else _PREFIX + name
                if tensors.setdefault(whole_name, tensor).name != name:
                    raise tensor.error(f"is stored as {tensors[whole_name].name} too")
                tensors[whole_name] = tensor
        yield tensors


@torch.no_grad()
def load_weights(
    folder: Path,
    views: Mapping[str, Tensor],
    tied: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Copy each tensor of the folder's checkpoint into its view, converting dtype and device.

    Names, shapes and dtypes of the whole checkpoint are checked before anything is copied.

    Args:
        folder: a Hugging Face folder with `model.safetensors`, or with an index and its shards.
        views: every tensor that must be there, by name, and what it fills.
        tied: names of tensors that have no view of their own, and the one that each is stored instead
            of, or equal to.
        progress: told after each tensor.

    Raises:
        ModelError: for a file that cannot be read, and for a tensor that is missing, unknown,
            of another shape or no floating-point type; it names the file and the tensor.
    """
    if (folder / _SINGLE_FILE).exists() and (folder / _INDEX_FILE).exists():
        log.warning("%s: %s is read, %s beside it is not", folder, _SINGLE_FILE, _INDEX_FILE)
    with open_checkpoint(folder) as stored:
        sources = {
            (tied or {}).get(name, name): tensor
            for name, tensor in stored.items()
            if (tied or {}).get(name) not in stored
        }
        for name, tensor in sources.items():
            _check_tensor(tensor, views.get(name))
        if missing := sorted(views.keys() - sources.keys()):
            raise ModelError(f"{folder}: {missing[0]}: is missing ({len(missing)} missing in all)")
        total, done = sum(tensor.num_bytes for tensor in sources.values()), 0
        for name, tensor in sources.items():
            views[name].copy_(tensor.read())
            done += tensor.num_bytes
            if progress is not None:
                progress(done, total)


def has_weights(folder: Path) -> bool:
    """Whether there is a checkpoint, readable or not."""
    return (folder / _SINGLE_FILE).exists() or (folder / _INDEX_FILE).exists()


def _checkpoint_files(folder: Path) -> list[Path]:
    """List the checkpoint's files: the single one, else the shards of the index."""
    if (folder / _SINGLE_FILE).exists():
        return [folder / _SINGLE_FILE]
    index = folder / _INDEX_FILE
    if not index.exists():
        raise ModelError(f"{folder}: holds neither {_SINGLE_FILE} nor {_INDEX_FILE}")
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


def _check_tensor(tensor: StoredTensor, view: Tensor | None) -> None:
    if view is None:
        raise tensor.error("is no tensor of this model")
    if tensor.shape != tuple(view.shape):
        raise tensor.error(f"must have shape {tuple(view.shape)}, got {tensor.shape}")
    if not tensor.is_floating:
        raise tensor.error(f"must be of type {', '.join(_DTYPE_BYTES)}, got {tensor.dtype}")
