"""Small random Qwen3 checkpoints with their transformers twin, and a driver that steps ours over them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from fusewire.kernels.modes import KernelMode
from fusewire.model.attention import select_backend
from fusewire.model.batch import Row, Seating
from fusewire.model.config import ModelConfig
from fusewire.model.families.qwen3 import Qwen3
from fusewire.model.forward_batch import StepInputs, StepShape
from fusewire.model.kv_cache import KVCache, blocks_for
from fusewire.model.sampling_params import SamplingParams
from fusewire.model.seats import SeatTable
from fusewire.model.weights import load_weights

CPU = torch.device("cpu")
BLOCK_SIZE = 4
VOCABULARY = 97
CONTEXT = 128


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder and, in float32, the transformers model that it holds."""

    folder: Path
    reference: Qwen3ForCausalLM

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """The reference's logits [len(tokens), vocabulary]."""
        return self.reference(torch.tensor([tokens])).logits[0]


SHAPES: dict[str, dict[str, object]] = {
    "gqa": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "mqa_wide_heads_tied": {
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "tie_word_embeddings": True,
    },
    "mha_sharded_bf16": {
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "saved_dtype": torch.bfloat16,
        "shard_size": "20KB",
    },
    "bias_fp16_rope": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "saved_dtype": torch.float16,
    },
}


def make_checkpoint(name: str, folder: Path) -> Checkpoint:
    """Write the checkpoint of a named shape into a folder and load its twin."""
    options = dict(SHAPES[name])
    dtype = options.pop("saved_dtype", torch.float32)
    shard_size = options.pop("shard_size", "1GB")
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=3,
        max_position_embeddings=CONTEXT,
        eos_token_id=VOCABULARY - 1,
        **options,
    )
    _write_random(config, folder, dtype, shard_size)
    reference = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Checkpoint(folder, reference.eval())


def _write_random(config: Qwen3Config, folder: Path, dtype: torch.dtype, shard_size: str) -> None:
    """Save a model whose every weight, norms and biases included, is random and matters."""
    generator = torch.Generator().manual_seed(7)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if "norm" in name else 1.5 * noise / weight.shape[-1] ** 0.5)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)


class FedSequence:
    """One sequence fed to the model in pieces, its blocks scattered over the cache."""

    def __init__(self, seat: int, tokens: Sequence[int]) -> None:
        self.seat = seat
        self.tokens = list(tokens)
        self.done = 0

    def next_row(self, tokens: int) -> Row:
        """The next piece, of this many tokens or what is left."""
        count = min(tokens, len(self.tokens) - self.done)
        self.done += count
        return Row(self.seat, self.done - count, count, samples=False)


class Driver:
    """A model loaded on the CPU in float32, stepped over a paged cache with logits for every token."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        config = ModelConfig.read(folder)
        attention = select_backend("auto", config, 16, torch.float32, CPU)
        self.model = Qwen3(config, attention, CONTEXT, torch.float32, CPU)
        load_weights(folder, self.model.checkpoint_views(), self.model.tied_tensors)
        self.cache = KVCache(config, 256, BLOCK_SIZE, torch.float32, CPU)
        self.seats = SeatTable(16, CONTEXT, blocks_for(CONTEXT, BLOCK_SIZE), CPU)
        self.inputs = StepInputs(self.seats, BLOCK_SIZE, 16 * CONTEXT, 16)
        self._free = list(range(256))
        self._next_seat = 0
        random.Random(seed).shuffle(self._free)

    def start(self, tokens: Sequence[int]) -> FedSequence:
        """Begin a sequence with blocks of its own."""
        count = blocks_for(len(tokens), BLOCK_SIZE)
        blocks, self._free = self._free[:count], self._free[count:]
        seat, self._next_seat = self._next_seat, self._next_seat + 1
        self.seats.seat([Seating(seat, tokens, len(tokens), blocks, SamplingParams())])
        return FedSequence(seat, tokens)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row], mode: KernelMode) -> list[Tensor]:
        """Run one step; each row's logits [tokens of the row, vocabulary]."""
        num_tokens = sum(row.count for row in rows)
        batch = self.inputs.load(rows, mode, StepShape(num_tokens, len(rows), 1 + len(rows), num_tokens))
        self.inputs.expand(batch)
        logits = self.model.logits(self.model(batch, self.cache, every_token=True))
        return list(logits.split(batch.query_lens))
