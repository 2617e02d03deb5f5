"""The Qwen3 dense decoder (Qwen team 2025; `Qwen3ForCausalLM` in transformers).

Pre-norm blocks of grouped-query attention, with per-head RMSNorm of q and k before RoPE, and a gated
MLP. Knows the names of the checkpoint's tensors; nothing of files, phases or kernel modes.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusewire.kernels.projections import norm_linear
from fusewire.kernels.rope import rope_frequencies, rope_table
from fusewire.kernels.row_capture import RowCapture
from fusewire.model.attention import AttentionBackend, StepAttention
from fusewire.model.config import ModelConfig
from fusewire.model.forward_batch import ForwardBatch
from fusewire.model.hidden_state_capture import HiddenStateCapture
from fusewire.model.kv_cache import KVCache, LayerCache
from fusewire.model.layers import GatedMLP, Linear, QKNorm, RMSNorm, empty_parameter

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""The checkpoint's names of what may be one tensor."""


class DecoderLayer(nn.Module):
    """Causal grouped-query attention over the paged cache, and an MLP; each adds to the stream in place."""

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
        self.mlp = GatedMLP(config, dtype=dtype, device=device)

    def add_to_(
        self,
        stream: Tensor,
        batch: ForwardBatch,
        attend: StepAttention,
        cache: LayerCache,
        capture: RowCapture | None,
    ) -> None:
        """Turn the residual stream `[T, hidden]` into the next layer's."""
        q = self.qk_norm.attn_input(stream, batch, cache, capture=capture)  # [T, nq, d]
        self._finish(stream, attend(q, cache))

    def of_samples(
        self,
        stream: Tensor,
        batch: ForwardBatch,
        attend: StepAttention,
        cache: LayerCache,
        capture: RowCapture | None,
    ) -> Tensor:
        """The next layer's stream of the tokens that yield logits alone: `[S, hidden]`.

        Keys and values of all tokens enter the cache.
        """
        q = self.qk_norm.attn_input(stream, batch, cache, capture=capture)
        sampled = stream[batch.logit_rows]
        if len(sampled):
            self._finish(sampled, attend.of_samples(q, cache))
        return sampled

    def _finish(self, stream: Tensor, attended: Tensor) -> None:
        self.out.add_to_(stream, attended.flatten(1))
        self.mlp.add_to_(stream)


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

    def forward(
        self,
        batch: ForwardBatch,
        cache: KVCache,
        *,
        every_token: bool = False,
        capture: HiddenStateCapture | None = None,
    ) -> Tensor:
        """Run the decoder over a step's T tokens: the last residual stream of the tokens that yield logits.

        Of the others the last layer computes only what enters the cache.

        Args:
            every_token: treat all tokens as if they yielded logits.
            capture: keeps the stream that enters the layer whose turn it is.

        Returns:
            `[S, hidden]` in the order of `batch.logit_rows`, or `[T, hidden]`.
        """
        attend = self.attention.begin(batch)
        stream = F.embedding(batch.input_ids, self.embedding)
        layers = cast(list[DecoderLayer], list(self.layers))
        captures = [None if capture is None else capture.of_layer(number) for number in range(len(layers))]
        if samples_only := not every_token and not batch.shape.is_decode:
            *layers, last = layers
        for number, layer in enumerate(layers):
            layer.add_to_(stream, batch, attend, cache.layers[number], captures[number])
        if not samples_only:
            return stream
        return last.of_samples(stream, batch, attend, cache.layers[-1], captures[-1])

    def logits(self, stream: Tensor, out: Tensor | None = None) -> Tensor:
        """Map rows of the residual stream `[S, hidden]` to logits `[S, vocabulary]`, in `out` if given."""
        return norm_linear(stream, self.norm.weight, self.norm.eps, self.head, out=out)

    @property
    def sites(self) -> list[QKNorm]:
        """Every layer's QK-norm site; all are alike but for their weights."""
        return [layer.qk_norm for layer in cast(list[DecoderLayer], list(self.layers))]

    @property
    def site(self) -> QKNorm:
        """The first layer's."""
        first = self.layers[0]
        assert isinstance(first, DecoderLayer)
        return first.qk_norm

    @property
    def tied_tensors(self) -> dict[str, str]:
        """Names of tensors without a view, and the one that each is equal to or is stored instead of."""
        return {HEAD: EMBEDDING} if self.config.tie_word_embeddings else {}

    def checkpoint_views(self) -> dict[str, Tensor]:
        """Map each of the checkpoint's tensor names to the place it fills, packed or not."""
        views = {EMBEDDING: self.embedding.data, "model.norm.weight": self.norm.weight.data}
        if not self.config.tie_word_embeddings:
            views[HEAD] = self.head.data
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            prefix = f"model.layers.{number}."
            views |= {prefix + name: view for name, view in self._layer_views(layer).items()}
        return views

    def _layer_views(self, layer: DecoderLayer) -> dict[str, Tensor]:
        config = self.config
        qk_norm, mlp = layer.qk_norm, layer.mlp
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        qkv = {
            f"self_attn.{name}_proj": rows * config.head_dim for name, rows in zip("qkv", heads, strict=True)
        }
        gate_up = {"mlp.gate_proj": config.intermediate_size, "mlp.up_proj": config.intermediate_size}
        return {
            "input_layernorm.weight": qk_norm.norm.weight.data,
            "post_attention_layernorm.weight": mlp.norm.weight.data,
            "self_attn.q_norm.weight": qk_norm.q_weight.data,
            "self_attn.k_norm.weight": qk_norm.k_weight.data,
            **_packed_views(qk_norm.qkv, qkv),
            **_packed_views(layer.out, {"self_attn.o_proj": config.hidden_size}),
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
