"""Where a model's files come from, and what the model is called.

Embedded, from a folder, or fetched from the Hugging Face hub. Knows the files' names and not what is
in them.
"""

import asyncio
import logging
import threading
from concurrent.futures import Future
from pathlib import Path

from fusewire.model import demo
from fusewire.service.config import ServeConfig

log = logging.getLogger(__name__)

DEMO_NAME = "fusewire-demo"
CONFIG_FILE = "config.json"
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
"""What is fetched from the hub: neither pickles nor code."""


class ModelError(ValueError):
    """There is no such model; the message is for the operator."""


def public_name(config: ServeConfig) -> str:
    """The name that requests use: the one that was given, else the folder's, else the hub id."""
    if config.served_model_name:
        return config.served_model_name
    if not config.model:
        return DEMO_NAME
    folder = Path(config.model)
    return folder.resolve().name if _is_folder(folder) else config.model


async def find_folder(model: str) -> Path:
    """Return the folder of a model, fetched from the hub if it is neither empty nor a path.

    Raises:
        ModelError: if it cannot be had, or holds no model.
    """
    if not model:
        return demo.path()
    if _is_folder(Path(model)):
        return _checked(Path(model))
    _refuse_path(model)
    fetched: Future[Path] = Future()
    fetched.set_running_or_notify_cancel()
    # A daemon, so that the process can stop while gigabytes are on their way.
    threading.Thread(target=_fetch, args=(model, fetched), name="fetch-model", daemon=True).start()
    return await asyncio.wrap_future(fetched)


def _is_folder(path: Path) -> bool:
    """Whether this is a folder; one that may not be looked at is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _checked(folder: Path) -> Path:
    """Return a folder in full, once it is seen to be that of a model."""
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise ModelError(f"model: the folder {folder} cannot be read: {error.strerror}") from error
    if CONFIG_FILE not in names:
        raise ModelError(
            f"model: the folder {folder} {'has no' if names else 'is empty, without'} {CONFIG_FILE}"
        )
    return folder.resolve()


def _refuse_path(model: str) -> None:
    """Raise what is wrong with a model that is no folder, if it can only be meant as a path."""
    try:
        if Path(model).exists():
            raise ModelError(f"model: {model} is a file, not the folder of a model")
    except OSError as error:
        raise ModelError(f"model: {model} cannot be read: {error.strerror}") from error
    if model.startswith(("/", ".", "~")) or model.endswith("/"):
        raise ModelError(f"model: there is no folder {model}")


def _fetch(model: str, fetched: "Future[Path]") -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model)
        log.info("fetching %s from the hub", model)
        fetched.set_result(Path(snapshot_download(model, allow_patterns=MODEL_FILES)))
    except HFValidationError:
        fetched.set_exception(ModelError(f"model: {model} is neither a folder nor a hub id"))
    except OSError as error:
        reason = str(error).splitlines()[0]
        fetched.set_exception(
            ModelError(f"model: {model} is no folder, and the hub does not give it: {reason}")
        )
    except Exception as error:
        log.exception("fetching failed")
        fetched.set_exception(ModelError(f"model: {model} cannot be fetched: {type(error).__name__}"))
