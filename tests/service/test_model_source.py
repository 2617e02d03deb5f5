"""What a model is called and where its files are."""

import asyncio
from pathlib import Path

import pytest

from fusewire.model import demo
from fusewire.service.config import ServeConfig
from fusewire.service.model_source import ModelError, find_folder, public_name


def test_a_model_is_called_what_the_operator_says_else_what_its_folder_or_id_says(tmp_path: Path) -> None:
    (tmp_path / "Tiny").mkdir()
    assert public_name(ServeConfig()) == "fusewire-demo"
    assert public_name(ServeConfig(model=str(tmp_path / "Tiny") + "/")) == "Tiny"
    assert public_name(ServeConfig(model="Qwen/Qwen3-0.6B")) == "Qwen/Qwen3-0.6B"
    assert public_name(ServeConfig(model=str(tmp_path), served_model_name="mine")) == "mine"


def test_the_embedded_model_and_a_folder_are_taken_as_they_are(tmp_path: Path) -> None:
    assert asyncio.run(find_folder("")) == demo.path()
    assert asyncio.run(find_folder(str(tmp_path))) == tmp_path


@pytest.mark.parametrize("model", ["./absent", "/absent/folder", "a/b/c"])
def test_what_is_neither_a_folder_nor_an_id_is_refused_by_name(model: str) -> None:
    with pytest.raises(ModelError, match=f"model: {model} is neither a folder nor a hub id"):
        asyncio.run(find_folder(model))
