"""Writes a Hugging Face folder of a Qwen3 shape with random weights, for benchmarks and load tests.

Weights are drawn so that activations keep their scale through the layers: projections have variance
1/inputs, those that write to the residual stream 1/(2 · layers) of that. Tensors are made one at a
time and written at once, so an 8B model needs little memory. Needs torch alone.

    python tests/tools/random_checkpoint.py --shape qwen3-8b --out DIR --device cuda
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SHARD_BYTES = 4 << 30
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Shape:
    """The numbers that tell one Qwen3 dense model from another."""

    hidden: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int = 151936
    tied: bool = True
    positions: int = 40960
    eos_ids: tuple[int, ...] = (151645, 151643)

    def config(self, dtype: str) -> dict[str, object]:
        """Spell the shape as config.json does."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dtype": dtype,
            "eos_token_id": self.eos_ids[0],
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.positions,
            "num_attention_heads": self.q_heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"},
            "sliding_window": None,
            "tie_word_embeddings": self.tied,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocabulary,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], float | None]]:
        """List each tensor's name, shape and standard deviation (None: a norm's weight, around 1)."""
        hidden, width = self.hidden, self.head_dim
        residual = 1 / math.sqrt(2 * self.layers)
        q_rows, kv_rows = self.q_heads * width, self.kv_heads * width
        from_hidden = 1 / math.sqrt(hidden)
        yield "model.embed_tokens.weight", (self.vocabulary, hidden), from_hidden
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (hidden,), None
            yield prefix + "self_attn.q_proj.weight", (q_rows, hidden), from_hidden
            yield prefix + "self_attn.k_proj.weight", (kv_rows, hidden), from_hidden
            yield prefix + "self_attn.v_proj.weight", (kv_rows, hidden), from_hidden
            yield prefix + "self_attn.q_norm.weight", (width,), None
            yield prefix + "self_attn.k_norm.weight", (width,), None
            yield prefix + "self_attn.o_proj.weight", (hidden, q_rows), residual / math.sqrt(q_rows)
            yield prefix + "post_attention_layernorm.weight", (hidden,), None
            yield prefix + "mlp.gate_proj.weight", (self.intermediate, hidden), from_hidden
            yield prefix + "mlp.up_proj.weight", (self.intermediate, hidden), from_hidden
            down = residual / math.sqrt(self.intermediate)
            yield prefix + "mlp.down_proj.weight", (hidden, self.intermediate), down
        yield "model.norm.weight", (hidden,), None
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, hidden), from_hidden


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 32, 192, vocabulary=512, positions=512, eos_ids=(0,)),
    "qwen3-0.6b": Shape(1024, 28, 16, 8, 128, 3072),
    "qwen3-8b": Shape(4096, 36, 32, 8, 128, 12288, tied=False),
}


def write_checkpoint(
    shape: Shape,
    folder: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    tokenizer: Path | None = None,
) -> None:
    """Write config.json, generation_config.json and the weights; overwrites what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", shape.config(dtype))
    _write_json(folder / "generation_config.json", {"eos_token_id": list(shape.eos_ids)})
    size = getattr(torch, dtype).itemsize
    shards = _plan_shards(shape, size, shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
        weight_map = {
            tensor: file for file, shard in zip(names, shards, strict=True) for tensor, _, _ in shard
        }
        total = sum(math.prod(dims) for shard in shards for _, dims, _ in shard) * size
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    generator = torch.Generator(device).manual_seed(seed)
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, dtype, generator)
    if tokenizer is not None:
        for name in TOKENIZER_FILES:
            if (tokenizer / name).exists():
                shutil.copyfile(tokenizer / name, folder / name)


Shard = list[tuple[str, tuple[int, ...], float | None]]


def _plan_shards(shape: Shape, size: int, shard_bytes: int) -> list[Shard]:
    """Fill shards in the order of the tensors; a shard holds at least one."""
    shards: list[Shard] = [[]]
    filled = 0
    for tensor in shape.tensors():
        needed = math.prod(tensor[1]) * size
        if shards[-1] and filled + needed > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += needed
    return shards


def _write_shard(path: Path, shard: Shard, dtype: str, generator: torch.Generator) -> None:
    """Write one safetensors file: header length, JSON header, then the tensors' bytes in order."""
    kind: torch.dtype = getattr(torch, dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims, _ in shard:
        end = offset + math.prod(dims) * kind.itemsize
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(dims),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for _, dims, deviation in shard:
            tensor = _random(dims, deviation, kind, generator).cpu()
            file.write(tensor.view(torch.uint8).numpy().data)


def _random(
    dims: tuple[int, ...], deviation: float | None, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    noise = torch.empty(dims, dtype=dtype, device=generator.device).normal_(generator=generator)
    return noise.mul_(0.1).add_(1.0) if deviation is None else noise.mul_(deviation)


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True, help="which model's shape")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to draw them")
    parser.add_argument("--dtype", choices=SAFETENSORS_DTYPES, default="bfloat16", help="their type")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer files to copy")
    options = parser.parse_args()
    start = time.perf_counter()
    write_checkpoint(
        SHAPES[options.shape],
        options.out,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
    )
    size = sum(path.stat().st_size for path in options.out.glob("*.safetensors"))
    print(f"{options.out}: {size / 2**30:.2f} GiB in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
