"""A checkpoint with one broken row: what touches it ends with a clear error, and nothing else notices."""

import json
import shutil
from collections.abc import Iterator

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file

from fusewire.model import demo
from fusewire.v1 import admin_pb2
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1.kernel_pb2 import KernelMode
from tests.tools.server_process import ServerProcess
from tests.tools.streams import greedy, stream, stream_all

BROKEN = 1234
"""The token whose embedding is NaN."""
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune "


@pytest.fixture(scope="module")
def broken_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The demo model, its head no longer tied so that the broken embedding is an input alone."""
    folder = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(demo.path(), folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][BROKEN] = torch.nan
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    options = ("--model", str(folder), "--shadow-every", "1")
    with ServerProcess(tmp_path_factory.mktemp("server") / "log", *options) as running:
        yield running


def broken_prompt(mode: KernelMode = KernelMode.KERNEL_MODE_UNSPECIFIED) -> pb.GenerateRequest:
    request = greedy("", 8, mode)
    request.token_ids.ids.extend([BROKEN, *range(100, 140)])
    return request


@pytest.mark.parametrize("mode", [m for m in KernelMode.values() if m])
def test_logits_that_are_not_finite_end_their_request_alone(
    broken_server: ServerProcess, mode: KernelMode
) -> None:
    server, path = broken_server, KernelMode.Name(mode).removeprefix("KERNEL_MODE_").lower()
    expected = stream(server.generation, greedy(TEXT, 24)).text
    before = server.metric("fusewire_nonfinite_logits_total", kernel_mode=path)
    for _ in range(2):
        with pytest.raises(grpc.RpcError) as refused:
            server.generation.Generate(broken_prompt(mode), timeout=60)
        assert refused.value.code() is grpc.StatusCode.INTERNAL
        assert refused.value.details() == "logits are not finite"
    beside = stream_all(server.generation, [greedy(TEXT, 24), broken_prompt(mode), greedy(TEXT, 24)])
    assert [answer.text for answer in beside] == [expected, "", expected]
    assert beside[1].status is grpc.StatusCode.INTERNAL
    assert server.metric("fusewire_nonfinite_logits_total", kernel_mode=path) == before + 3
    lines = [line for line in server.log.read_text().splitlines() if "logits are not finite" in line]
    assert len([line for line in lines if f"kernel_mode={path} " in line]) == 3


def test_no_path_is_blamed_and_no_block_is_kept(broken_server: ServerProcess) -> None:
    """Every step is checked, and the same prompt finds nothing of its own in the cache."""
    server = broken_server
    hits = server.metric("fusewire_prefix_cache_hit_tokens_total")
    for _ in range(2):
        assert stream(server.generation, broken_prompt()).status is grpc.StatusCode.INTERNAL
    assert server.metric("fusewire_prefix_cache_hit_tokens_total") == hits
    guard = server.admin.GetKernelMode(admin_pb2.GetKernelModeRequest(), timeout=10).guard
    assert not guard.fallback_active
    assert server.metric("fusewire_shadow_checks_total", result="failed") == 0
    assert server.metric("fusewire_shadow_checks_total", result="passed") > 0
    assert server.metric("fusewire_kv_cache_usage_ratio") == 0
