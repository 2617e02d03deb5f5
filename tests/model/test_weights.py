"""Loading checkpoints: what is read, and what a broken one says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3ForCausalLM

from fusewire.kernels.modes import KernelMode
from fusewire.model.config import ModelError
from fusewire.model.weights import load_weights
from tests.tools.model_driver import Checkpoint, Driver

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
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


def error_against_transformers(folder: Path) -> float:
    """The largest difference of a logit, between this folder's model here and there."""
    tokens = list(range(0, 90, 3))
    driver = Driver(folder)
    row = driver.start(tokens).next_row(len(tokens))
    reference = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0]
    assert expected.abs().max() > 1
    return float((driver.step([row], KernelMode.UNFUSED)[0] - expected).abs().max())


def without_prefix(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def in_float64(tensors: dict[str, Tensor]) -> None:
    for name, tensor in list(tensors.items()):
        tensors[name] = tensor.double() + 1e-12  # what float32 rounds away


@pytest.mark.parametrize(
    "edit",
    [
        without_prefix,
        in_float64,
        lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
        lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.ones(8)}),
    ],
)
def test_spellings_of_a_checkpoint_are_read_as_transformers_does(copied: Path, edit: Edit) -> None:
    rewrite(copied, edit)
    assert error_against_transformers(copied) < 1e-4


def tied_copy(checkpoints: Callable[[str], Checkpoint], folder: Path, edit: Edit) -> Path:
    """A tied checkpoint with other tensors."""
    shutil.copytree(checkpoints("mqa_wide_heads_tied").folder, folder, dirs_exist_ok=True)
    rewrite(folder, edit)
    return folder


def test_a_head_that_is_not_the_embedding_is_kept_whatever_the_config_says(
    checkpoints: Callable[[str], Checkpoint], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def add_another(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].flip(0)

    folder = tied_copy(checkpoints, tmp_path, add_another)
    assert error_against_transformers(folder) < 1e-4
    own = [record.getMessage() for record in caplog.records if record.name.startswith("fusewire")]
    assert len(own) == 1
    assert "tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight" in own[0]


@pytest.mark.parametrize("keep_embedding", [True, False])
def test_a_tied_head_that_is_stored_takes_no_memory_of_its_own(
    checkpoints: Callable[[str], Checkpoint], tmp_path: Path, keep_embedding: bool
) -> None:
    def store_head(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        if not keep_embedding:
            del tensors[EMBEDDING]

    folder = tied_copy(checkpoints, tmp_path, store_head)
    model = Driver(folder).model
    assert model.head is model.embedding
    assert error_against_transformers(folder) < 1e-4


def test_the_single_file_wins_over_an_index(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = load_file(copied / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, copied / "shard.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "shard.safetensors")}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    assert error_against_transformers(copied) < 1e-4
    [warning] = [record.getMessage() for record in caplog.records if record.name == "fusewire.model"]
    assert "model.safetensors is read, model.safetensors.index.json beside it is not" in warning


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(KEY), f"{KEY}: is missing"),
        (lambda tensors: tensors.pop(HEAD), f"{HEAD}: is missing"),
        (
            lambda tensors: tensors.update({KEY.removeprefix("model."): tensors[KEY].clone()}),
            f"is stored as .*{KEY[6:]} too",
        ),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "extra: is no tensor of this model"),
        (
            lambda tensors: tensors.update({KEY: tensors[KEY].T.contiguous()}),
            rf"{KEY}: must have shape \(32, 40\), got \(40, 32\)",
        ),
        (lambda tensors: tensors.update({KEY: tensors[KEY].to(torch.int8)}), f"{KEY}: must be of type .*I8"),
        (
            lambda tensors: tensors.update({KEY: tensors[KEY].to(torch.float8_e4m3fn)}),
            f"{KEY}: must be of type .*F8_E4M3",
        ),
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
        ({"weight_map": {"lm_head.weight": "shard.safetensors"}}, None),
    ],
)
def test_the_index_is_checked(copied: Path, index: dict[str, object], message: str | None) -> None:
    (copied / "model.safetensors").rename(copied / "shard.safetensors")
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    if message is None:
        Driver(copied)
    else:
        with pytest.raises(ModelError, match=message):
            Driver(copied)
