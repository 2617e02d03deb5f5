"""What ends the start of an engine, before anything large is loaded for nothing, and that it is heard of."""

import json
import os
from pathlib import Path

import msgspec
import pytest

from fusewire.model import demo
from fusewire.service.config import ServeConfig
from fusewire.service.engine.__main__ import build
from fusewire.service.life_signs import PAUSE_SECONDS, Alive, LifeSigns
from fusewire.service.supervisor import START_PATIENCE
from fusewire.service.tokenizer import TokenizerError


def folder_without_tokenizer(folder: Path, weights: bytes | None = None) -> Path:
    """The demo's files but for the tokenizer's, with its weights or others."""
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo.path() / name).read_bytes())
    if weights is None:
        (folder / "model.safetensors").symlink_to(demo.path() / "model.safetensors")
    else:
        (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_the_loading_says_that_it_goes_on() -> None:
    reader, writer = os.pipe()
    build(ServeConfig(device="cpu").engine(str(demo.path())), signs=LifeSigns(writer))
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        asked = [msgspec.json.decode(line, type=Alive).patience for line in pipe]
    assert asked[0] == START_PATIENCE + PAUSE_SECONDS, "transformers may have to be imported"
    megabytes = (demo.path() / "model.safetensors").stat().st_size / 1e6
    assert asked[1:] == [pytest.approx(20 + megabytes / 20 + PAUSE_SECONDS)] * (len(asked) - 1)
    assert len(asked) > 1, "a hang is noticed sooner once the weights are being read"


def start(folder: Path) -> None:
    build(ServeConfig(device="cpu").engine(str(folder)))


def test_a_missing_tokenizer_is_noticed_before_the_weights_are_read(tmp_path: Path) -> None:
    folder = folder_without_tokenizer(tmp_path, weights=b"unreadable")
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor vocab\.json with merges\.txt$"):
        start(folder)


def test_a_tokenizer_that_cannot_be_served_ends_the_start(tmp_path: Path) -> None:
    folder = folder_without_tokenizer(tmp_path)
    tokenizer = json.loads((demo.path() / "tokenizer.json").read_text("utf-8"))
    tokenizer["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(TokenizerError, match="only byte-level BPE can be served"):
        start(folder)
