"""The demo model as a trainable module, and the optimiser that trains it.

The architecture is Qwen3's (transformers `models/qwen3/modeling_qwen3.py`), with the same parameter
names, so that its state dict is the checkpoint; dropout on the embedding and on each residual branch is
training's own. Knows shapes and gradients; nothing of files or data.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_REPEAT_WINDOW = 64


class Attention(nn.Module):
    """Grouped-query causal attention with the QK norm before RoPE."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, self.head_dim = config["hidden_size"], config["head_dim"]
        q_width = config["num_attention_heads"] * self.head_dim
        kv_width = config["num_key_value_heads"] * self.head_dim
        self.q_proj = nn.Linear(hidden, q_width, bias=False)
        self.k_proj = nn.Linear(hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, hidden, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config["rms_norm_eps"])
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config["rms_norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return [rows, length, hidden]; `cos` and `sin` are [length, head_dim]."""
        rows, length, _ = x.shape
        heads = (rows, length, -1, self.head_dim)
        q = _rotated(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), cos, sin)
        k = _rotated(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))


class Mlp(nn.Module):
    """The gated feed-forward network (SwiGLU)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of x's shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer: pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: dict[str, Any], dropout: float) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.dropout = dropout

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return a tensor of x's shape."""
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class Decoder(nn.Module):
    """Embedding, layers and the last norm; named `model` in the checkpoint."""

    def __init__(self, config: dict[str, Any], dropout: float) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.embed_tokens = nn.Embedding(config["vocab_size"], hidden)
        self.layers = nn.ModuleList(Layer(config, dropout) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(hidden, eps=config["rms_norm_eps"])


class Network(nn.Module):
    """The whole causal language model, its output head tied to the embedding."""

    def __init__(self, config: dict[str, Any], dropout: float, repeat_weight: float = 0.0) -> None:
        super().__init__()
        self.model = Decoder(config, dropout)
        self.dropout = dropout
        self.repeat_weight = repeat_weight
        cos, sin = _rope_table(config["max_position_embeddings"], config["head_dim"], config["rope_theta"])
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        residual_std = config["initializer_range"] / (2 * config["num_hidden_layers"]) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                last_of_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(
                    parameter, std=residual_std if last_of_branch else config["initializer_range"]
                )

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return each position's cross entropy in nats, [rows, length]; 0 where the target is -100.

        In training, `repeat_weight` times the unlikelihood of repeats is added to it.
        """
        length = ids.shape[1]
        x = F.dropout(self.model.embed_tokens(ids), self.dropout, self.training)
        for layer in self.model.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        return self.head_loss(x, ids, targets)

    def head_loss(self, x: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of the last hidden state against the targets."""
        logits = F.linear(self.model.norm(x), self.model.embed_tokens.weight).float()
        log_p = F.log_softmax(logits, dim=-1)
        loss = F.nll_loss(log_p.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        if self.training and self.repeat_weight:
            loss = loss + self.repeat_weight * _repeat_loss(log_p, ids, targets)
        return loss

    def compile_parts(self) -> None:
        """Compile the layer (once for all) and the head; whole-model compilation starts slower."""
        for layer in self.model.layers:
            layer.compile(dynamic=False)
        self.head_loss = torch.compile(self.head_loss, dynamic=False)  # type: ignore[method-assign]


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz; matrices of one shape go in one batch.

    Keller Jordan et al., "Muon" (2024); the update's size follows AdamW's RMS of 0.2 as in "Muon is
    Scalable for LLM Training" (arXiv:2502.16982), so that both optimisers share one learning rate.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update to every matrix."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                shapes.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in shapes.items():
                self._step_shape(shape, matrices, group)

    def _step_shape(self, shape: torch.Size, matrices: list[Tensor], group: dict[str, Any]) -> None:
        gradient = torch.stack([m.grad for m in matrices if m.grad is not None])
        average = self.state[matrices[0]].setdefault("average", torch.zeros_like(gradient))
        average.lerp_(gradient, 1 - group["momentum"])
        update = orthogonalised(gradient.lerp(average, group["momentum"]))
        scale = group["lr"] * 0.2 * max(shape) ** 0.5
        for matrix, direction in zip(matrices, update, strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-scale)


def orthogonalised(batch: Tensor) -> Tensor:
    """Return the nearest (semi-)orthogonal matrices of [n, rows, columns], roughly, in five steps."""
    a, b, c = _NEWTON_SCHULZ
    wide = batch.shape[-2] <= batch.shape[-1]
    x = (batch if wide else batch.mT).to(torch.bfloat16)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(batch.dtype)


def _repeat_loss(log_p: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
    """Return the unlikelihood, in nats, of each token that would repeat a recent bigram, [rows, length].

    Token-level unlikelihood (Welleck et al., arXiv:1908.04319), with fewer negatives: what followed the
    present token where it last stood, within `_REPEAT_WINDOW` tokens, unless it is the target.
    """
    length = ids.shape[1]
    offsets = torch.arange(1, _REPEAT_WINDOW + 1, device=ids.device)
    earlier = torch.arange(length, device=ids.device)[:, None] - offsets  # [length, window]
    inside = earlier >= 0
    earlier = earlier.clamp(min=0)
    followed = ids[:, (earlier + 1).clamp(max=length - 1)]  # [rows, length, window]
    target = targets[:, :, None]
    repeats = (ids[:, earlier] == ids[:, :, None]) & inside & (followed != target) & (target >= 0)
    p = log_p.gather(-1, followed).exp().clamp(max=0.999)
    return -(torch.log1p(-p) * repeats).sum(-1)


def _rope_table(positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin, [positions, head_dim], both halves alike (neox order)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to [..., length, head_dim]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin
