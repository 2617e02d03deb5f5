"""Loading checkpoints: what is read, and what a broken one says."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusewire.model.config import ModelError
from fusewire.model.weights import load_weights
from tests.tools.model_driver import Checkpoint, Driver

KEY = "model.layers.1.self_attn.k_proj.weight"
Edit = Callable[[dict[str, Tensor]], object]


def rewrite(folder: Path, edit: Edit) -> None:
    """Change the tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_progress_reaches_the_total(checkpoints: Callable[[str], Checkpoint]) -> None:
    folder = checkpoints("mha_sharded_bf16").folder
    model = Driver(folder).model
    seen: list[tuple[int, int]] = []
    load_weights(folder, model.checkpoint_views(), progress=lambda done, total: seen.append((done, total)))
    total = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert seen[-1] == (total, total)
    assert {total for _, total in seen} == {total}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_every_parameter_is_filled(checkpoint: Checkpoint) -> None:
    model = Driver(checkpoint.folder).model
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    load_weights(checkpoint.folder, model.checkpoint_views())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    expected = sum(parameter.numel() for parameter in checkpoint.reference.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_a_tied_checkpoint_may_repeat_its_head(
    checkpoints: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    tied = checkpoints("mqa_wide_heads_tied").folder
    tensors = load_file(tied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tied / "config.json").read_text())
    assert torch.equal(Driver(tmp_path).model.head, Driver(tied).model.embedding)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(KEY), f"{KEY}: is missing"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "extra: is no tensor of this model"),
        (
            lambda tensors: tensors.update({KEY: tensors[KEY].T.contiguous()}),
            rf"{KEY}: must have shape \(32, 40\), got \(40, 32\)",
        ),
        (lambda tensors: tensors.update({KEY: tensors[KEY].to(torch.int8)}), f"{KEY}: must be of type .*I8"),
    ],
)
def test_a_wrong_tensor_is_named(copied: Path, edit: Edit, message: str) -> None:
    rewrite(copied, edit)
    with pytest.raises(ModelError, match=message):
        Driver(copied)


def test_files_that_cannot_be_used_are_named(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read"):
        Driver(copied)
    weights.unlink()
    torch.save({}, copied / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds neither model\.safetensors nor"):
        Driver(copied)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {KEY: "gone.safetensors"}}, r"gone\.safetensors is missing"),
        ({"weight_map": {KEY: "../elsewhere.safetensors"}}, "is not a file name"),
        ({}, "weight_map: cannot be read"),
        ({"weight_map": {"lm_head.weight": "model.safetensors"}}, None),
    ],
)
def test_the_index_is_checked(copied: Path, index: dict[str, object], message: str | None) -> None:
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    if message is None:
        Driver(copied)
    else:
        with pytest.raises(ModelError, match=message):
            Driver(copied)
