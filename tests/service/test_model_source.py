"""What a model is called and where its files are."""

import asyncio
import logging
import subprocess
import sys
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
    (tmp_path / "config.json").touch()
    assert asyncio.run(find_folder("")) == demo.path()
    assert asyncio.run(find_folder(str(tmp_path))) == tmp_path


LONG = "/" + "x" * 300


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("/nope", "there is no folder /nope"),
        ("/absent/folder", "there is no folder /absent/folder"),
        ("./absent", "there is no folder ./absent"),
        ("../absent/folder", "there is no folder ../absent/folder"),
        ("~/absent", "there is no folder ~/absent"),
        ("absent/", "there is no folder absent/"),
        (__file__, f"{__file__} is a file, not the folder of a model"),
        (LONG, f"{LONG} cannot be read: File name too long"),
        ("a/b/c", "a/b/c is neither a folder nor a hub id"),
        ("a b", "a b is neither a folder nor a hub id"),
    ],
)
def test_what_cannot_be_an_id_is_refused_without_a_word_of_the_hub(
    model: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert public_name(ServeConfig(model=model)) == model
    with pytest.raises(ModelError) as refused:
        asyncio.run(find_folder(model))
    assert str(refused.value) == f"model: {why}"
    assert caplog.text == ""


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is empty, without config\.json"):
        asyncio.run(find_folder(str(tmp_path)))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        asyncio.run(find_folder(str(tmp_path)))


def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    """By another user, in a process of its own, for nothing is hidden from root."""
    model = tmp_path / "hidden" / "model"
    model.mkdir(parents=True)
    check = (
        "import asyncio, os, sys\n"
        "from fusewire.service.model_source import ModelError, find_folder\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "try: asyncio.run(find_folder(sys.argv[1]))\n"
        "except ModelError as error: print(error)\n"
    )
    model.parent.chmod(0)
    try:
        told = subprocess.run(
            [sys.executable, "-c", check, model], capture_output=True, text=True, check=True
        )
    finally:
        model.parent.chmod(0o700)
    assert told.stdout == f"model: {model} cannot be read: Permission denied\n"
