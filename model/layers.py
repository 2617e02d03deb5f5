"""The decoder's building blocks: RMSNorm, gated MLP and the QK-norm site.

Parameters are made on their device, in their dtype and uninitialised, for the checkpoint fills them.
Knows nothing of phases: prefill, decode and chunks take the same way through every block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusewire.kernels.modes import KernelMode
from fusewire.kernels.paths import EPILOGUE_BACKEND, PATHS, backend_name
from fusewire.kernels.qkv_epilogue import EpilogueRange, qkv_epilogue, ranges_of
from fusewire.kernels.shape import QKNormShape
from fusewire.model.config import ModelConfig
from fusewire.model.forward_batch import ForwardBatch
from fusewire.model.kv_cache import LayerCache


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Allocate a parameter without filling it."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class Linear(nn.Module):
    """`x @ weight.T + bias`, with weight `[outputs, inputs]`."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = empty_parameter(outputs, inputs, dtype=dtype, device=device)
        self.bias = empty_parameter(outputs, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., inputs]` to `[..., outputs]`."""
        return F.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """`x · rsqrt(mean(x²) + eps) · weight` over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = empty_parameter(width, dtype=dtype, device=device)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm `[..., width]`; computed in float32 inside and rounded once."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) · up(x))` with gate and up packed into one projection (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        width = config.intermediate_size
        self.gate_up = Linear(config.hidden_size, 2 * width, bias=False, dtype=dtype, device=device)
        self.down = Linear(width, config.hidden_size, bias=False, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[T, hidden]` to the same shape."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class QKNorm(nn.Module):
    """The one site that decides the kernel path: packed qkv projection, QK norm, RoPE and KV write.

    It looks only at the batch's kernel mode and number of tokens, so it works the same in prefill,
    decode and chunks.
    """

    def __init__(
        self,
        config: ModelConfig,
        rope_table: Tensor,
        *,
        dtype: torch.dtype,
        device: torch.device,
        deterministic: bool = False,
    ) -> None:
        """Share `rope_table`, float32 `[max_positions, head_dim]` of cos and sin, among the layers.

        Args:
            deterministic: let `fused` be the same kernel at every number of tokens.
        """
        super().__init__()
        self.shape = QKNormShape(
            num_q_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            rotary_dim=config.head_dim,
        )
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, width, bias=config.attention_bias, dtype=dtype, device=device)
        self.q_weight = empty_parameter(config.head_dim, dtype=dtype, device=device)
        self.k_weight = empty_parameter(config.head_dim, dtype=dtype, device=device)
        self.rope_table = rope_table
        measured = ranges_of(self.shape, config.hidden_size, dtype, device)
        self.epilogue_ranges = () if deterministic else measured

    def backend(self, mode: KernelMode, num_tokens: int) -> str:
        """Name what runs a step of so many tokens on a path."""
        epilogue = self._epilogue(mode, num_tokens)
        return EPILOGUE_BACKEND if epilogue else backend_name(mode, self.qkv.weight.device)

    def _epilogue(self, mode: KernelMode, num_tokens: int) -> EpilogueRange | None:
        """Find out whether the projection's epilogue does the step, and how."""
        if mode is not KernelMode.FUSED:
            return None
        fitting = (
            sizes for sizes in self.epilogue_ranges if sizes.min_tokens <= num_tokens <= sizes.max_tokens
        )
        return next(fitting, None)

    def attn_input(self, hidden: Tensor, batch: ForwardBatch, cache: LayerCache) -> Tensor:
        """Turn hidden rows `[T, hidden]` into q `[T, num_q_heads, head_dim]`; k and v enter the cache."""
        if epilogue := self._epilogue(batch.kernel_mode, len(hidden)):
            return qkv_epilogue(
                hidden,
                self.qkv.weight,
                self.qkv.bias,
                self.q_weight,
                self.k_weight,
                self.rope_table,
                batch.positions,
                cache.k,
                cache.v,
                batch.slots,
                self.shape,
                epilogue.plan,
            )
        return PATHS[batch.kernel_mode](
            self.qkv(hidden),
            self.q_weight,
            self.k_weight,
            self.rope_table,
            batch.positions,
            cache.k,
            cache.v,
            batch.slots,
            self.shape,
        )
