"""The Qwen3 dense decoder (Qwen team 2025; `Qwen3ForCausalLM` in transformers).

Pre-norm blocks of grouped-query attention, with per-head RMSNorm of q and k before RoPE, and a gated
MLP. Knows the names of the checkpoint's tensors; nothing of files, phases or kernel modes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusewire.kernels.rope import rope_frequencies, rope_table
from fusewire.model.attention import AttentionBackend, StepAttention
from fusewire.model.config import ModelConfig
from fusewire.model.forward_batch import ForwardBatch
from fusewire.model.kv_cache import KVCache, LayerCache
from fusewire.model.layers import GatedMLP, Linear, QKNorm, RMSNorm, empty_parameter


class Attention(nn.Module):
    """Causal grouped-query attention over the paged cache."""

    def __init__(
        self,
        config: ModelConfig,
        rope: Tensor,
        *,
        dtype: torch.dtype,
        device: torch.device,
        deterministic: bool,
    ) -> None:
        super().__init__()
        self.qk_norm = QKNorm(config, rope, dtype=dtype, device=device, deterministic=deterministic)
        self.out = Linear(
            config.num_heads * config.head_dim,
            config.hidden_size,
            bias=config.attention_bias,
            dtype=dtype,
            device=device,
        )

    def forward(self, x: Tensor, batch: ForwardBatch, attend: StepAttention, cache: LayerCache) -> Tensor:
        """Map `[T, hidden]` to the same shape."""
        q = self.qk_norm.attn_input(x, batch, cache)  # [T, nq, d]
        return self.out(attend(q, cache).flatten(1))


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        rope: Tensor,
        *,
        dtype: torch.dtype,
        device: torch.device,
        deterministic: bool,
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(hidden, eps, dtype=dtype, device=device)
        self.attention = Attention(config, rope, dtype=dtype, device=device, deterministic=deterministic)
        self.mlp_norm = RMSNorm(hidden, eps, dtype=dtype, device=device)
        self.mlp = GatedMLP(config, dtype=dtype, device=device)

    def forward(self, x: Tensor, batch: ForwardBatch, attend: StepAttention, cache: LayerCache) -> Tensor:
        """Map the residual stream `[T, hidden]` to the next layer's."""
        x = x + self.attention(self.attention_norm(x), batch, attend, cache)
        return x + self.mlp(self.mlp_norm(x))


class Qwen3(nn.Module):
    """The whole decoder; its parameters are uninitialised until a checkpoint fills them."""

    def __init__(
        self,
        config: ModelConfig,
        attention: AttentionBackend,
        max_positions: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        deterministic: bool = False,
    ) -> None:
        """Allocate; `deterministic` is told to `QKNorm`."""
        super().__init__()
        self.config = config
        self.attention = attention
        frequencies = rope_frequencies(config.rope_theta, config.head_dim)
        rope = rope_table(frequencies.to(device), max_positions)
        self.embedding = empty_parameter(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, rope, dtype=dtype, device=device, deterministic=deterministic)
            for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.head = (
            self.embedding
            if config.tie_word_embeddings
            else empty_parameter(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        )

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Run the decoder over a step's T tokens: the residual stream `[T, hidden]` after the last layer."""
        attend = self.attention.begin(batch)
        x = F.embedding(batch.input_ids, self.embedding)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer(x, batch, attend, layer_cache)
        return x

    def logits(self, hidden_rows: Tensor) -> Tensor:
        """Map rows of the residual stream `[S, hidden]` to logits `[S, vocabulary]`."""
        return F.linear(self.norm(hidden_rows), self.head)

    @property
    def site(self) -> QKNorm:
        """The first layer's QK-norm site; all are alike but for their weights."""
        first = self.layers[0]
        assert isinstance(first, DecoderLayer)
        return first.attention.qk_norm

    @property
    def ignored_tensors(self) -> tuple[str, ...]:
        """Names that a checkpoint may hold and that are not read: the head where it is tied."""
        return ("lm_head.weight",) if self.config.tie_word_embeddings else ()

    def checkpoint_views(self) -> dict[str, Tensor]:
        """Map each of the checkpoint's tensor names to the place it fills, packed or not."""
        views = {"model.embed_tokens.weight": self.embedding.data, "model.norm.weight": self.norm.weight.data}
        if not self.config.tie_word_embeddings:
            views["lm_head.weight"] = self.head.data
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            prefix = f"model.layers.{number}."
            views |= {prefix + name: view for name, view in self._layer_views(layer).items()}
        return views

    def _layer_views(self, layer: DecoderLayer) -> dict[str, Tensor]:
        config = self.config
        qk_norm, mlp = layer.attention.qk_norm, layer.mlp
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        qkv = {
            f"self_attn.{name}_proj": rows * config.head_dim for name, rows in zip("qkv", heads, strict=True)
        }
        gate_up = {"mlp.gate_proj": config.intermediate_size, "mlp.up_proj": config.intermediate_size}
        return {
            "input_layernorm.weight": layer.attention_norm.weight.data,
            "post_attention_layernorm.weight": layer.mlp_norm.weight.data,
            "self_attn.q_norm.weight": qk_norm.q_weight.data,
            "self_attn.k_norm.weight": qk_norm.k_weight.data,
            **_packed_views(qk_norm.qkv, qkv),
            **_packed_views(layer.attention.out, {"self_attn.o_proj": config.hidden_size}),
            **_packed_views(mlp.gate_up, gate_up),
            **_packed_views(mlp.down, {"mlp.down_proj": config.hidden_size}),
        }


def _packed_views(linear: Linear, rows: dict[str, int]) -> dict[str, Tensor]:
    """Split a packed projection into the projections it consists of, by their numbers of rows."""
    views: dict[str, Tensor] = {}
    for kind, tensor in (("weight", linear.weight), ("bias", linear.bias)):
        if tensor is not None:
            parts = tensor.data.split(list(rows.values()))
            views |= {f"{name}.{kind}": part for name, part in zip(rows, parts, strict=True)}
    return views
