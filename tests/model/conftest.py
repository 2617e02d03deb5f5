"""Small random checkpoints, written by transformers once a session."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tools.model_driver import Checkpoint, make_checkpoint


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Make the checkpoint of a named shape, or hand out the one made before: not to be changed."""
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            made[name] = make_checkpoint(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def checkpoint(checkpoints: Callable[[str], Checkpoint]) -> Checkpoint:
    """The plain one: grouped queries, untied, float32."""
    return checkpoints("gqa")


@pytest.fixture
def copied(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A copy of the plain one's folder, to spoil."""
    return Path(shutil.copytree(checkpoint.folder, tmp_path / "copy"))


@pytest.fixture
def edit_json() -> Callable[[Path, dict[str, object]], None]:
    """Merge keys into a JSON file; a value of `...` removes the key."""

    def edit(path: Path, changes: dict[str, object]) -> None:
        values = json.loads(path.read_text()) if path.exists() else {}
        values |= changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return edit
