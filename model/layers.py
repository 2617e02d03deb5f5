"""The decoder's building blocks: RMSNorm, gated MLP and the QK-norm site.

Parameters are made on their device, in their dtype and uninitialised, for the checkpoint fills them.
Blocks add to the residual stream in place. Knows nothing of phases: prefill, decode and chunks take the
same way through every block.
"""

from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from fusewire.kernels.modes import KernelMode
from fusewire.kernels.paths import EPILOGUE_BACKEND, PATHS, backend_name
from fusewire.kernels.projections import linear_add_, norm_glu, norm_linear, streams_weights
from fusewire.kernels.qkv_epilogue import EpilogueRange, qkv_epilogue, ranges_of
from fusewire.kernels.rms_norm import rms_norm
from fusewire.kernels.row_capture import RowCapture
from fusewire.kernels.shape import QKNormShape
from fusewire.model.config import ModelConfig
from fusewire.model.kv_cache import LayerCache


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Allocate a parameter without filling it."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class Linear(nn.Module):
    """`x @ weight.T + bias`, with weight `[outputs, inputs]`; how it is computed is its user's choice."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = empty_parameter(outputs, inputs, dtype=dtype, device=device)
        self.bias = empty_parameter(outputs, dtype=dtype, device=device) if bias else None

    def add_to_(self, stream: Tensor, x: Tensor) -> None:
        """Add the projection of x `[T, inputs]` to the residual stream `[T, outputs]`, in place."""
        linear_add_(stream, x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """`x · rsqrt(mean(x²) + eps) · weight` over the last dimension (Zhang and Sennrich 2019).

    Holds the weight; the norm itself is part of the projection that follows.
    """

    def __init__(self, width: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = empty_parameter(width, dtype=dtype, device=device)
        self.eps = eps


class GatedMLP(nn.Module):
    """`down(silu(gate(h)) · up(h))` of the normed stream h, gate and up packed (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.intermediate_size
        self.norm = RMSNorm(hidden, config.rms_norm_eps, dtype=dtype, device=device)
        self.gate_up = Linear(hidden, 2 * width, bias=False, dtype=dtype, device=device)
        self.down = Linear(width, hidden, bias=False, dtype=dtype, device=device)

    def add_to_(self, stream: Tensor) -> None:
        """Add the block's output to the residual stream `[T, hidden]`, in place."""
        self.down.add_to_(stream, norm_glu(stream, self.norm.weight, self.norm.eps, self.gate_up.weight))


class TokensOfSite(Protocol):
    """What the QK-norm site looks at of T tokens: `fusewire.model.forward_batch.ForwardBatch` has it."""

    @property
    def kernel_mode(self) -> KernelMode:
        """The path to take."""
        ...

    @property
    def positions(self) -> Tensor:
        """int64 `[T]`."""
        ...

    @property
    def slots(self) -> Tensor:
        """int64 `[T]`: where each token's k and v go; -1 for a token that pads."""
        ...


class QKNorm(nn.Module):
    """The one site that decides the kernel path: input norm, packed qkv projection, QK norm, RoPE, KV write.

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
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.qkv = Linear(config.hidden_size, width, bias=config.attention_bias, dtype=dtype, device=device)
        self.q_weight = empty_parameter(config.head_dim, dtype=dtype, device=device)
        self.k_weight = empty_parameter(config.head_dim, dtype=dtype, device=device)
        self.q_weights: dict[KernelMode, Tensor] = dict.fromkeys(KernelMode, self.q_weight)
        """What each path scales q by: one weight, unless a fault is planted."""
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

    def plant_fault(self, mode: KernelMode, factor: float) -> None:
        """Scale the weight of q by a factor on one path, for drills; once the weights are loaded."""
        self.q_weights = self.q_weights | {mode: self.q_weight * factor}

    def attn_input(
        self,
        stream: Tensor,
        batch: TokensOfSite,
        cache: LayerCache,
        *,
        step_tokens: int | None = None,
        capture: RowCapture | None = None,
    ) -> Tensor:
        """Turn the residual stream `[T, hidden]` into q `[T, num_q_heads, head_dim]`.

        k and v enter the cache.

        Args:
            step_tokens: choose what runs as for a step of so many tokens; None goes by T.
            capture: where the stream is copied to, if its flag says so.
        """
        epilogue = self._epilogue(batch.kernel_mode, step_tokens or len(stream))
        if epilogue is None:
            overlap = streams_weights(stream, self.qkv.weight)
            return self.apply_to(self.project(stream, capture), batch, cache, overlap=overlap)
        hidden = rms_norm(stream, self.norm.weight, self.norm.eps, capture=capture)
        arguments = self._arguments(batch, cache)
        return qkv_epilogue(hidden, self.qkv.weight, self.qkv.bias, *arguments, epilogue.plan)

    def project(self, stream: Tensor, capture: RowCapture | None = None) -> Tensor:
        """Norm the residual stream `[T, hidden]` and project it to packed qkv `[T, qkv_width]`."""
        norm = self.norm
        return norm_linear(stream, norm.weight, norm.eps, self.qkv.weight, self.qkv.bias, capture=capture)

    def apply_to(self, qkv: Tensor, batch: TokensOfSite, cache: LayerCache, *, overlap: bool) -> Tensor:
        """Run the batch's path on packed qkv `[T, qkv_width]`; see `fusewire.kernels.paths.QKNormPath`."""
        return PATHS[batch.kernel_mode](qkv, *self._arguments(batch, cache), overlap=overlap)

    def _arguments(self, batch: TokensOfSite, cache: LayerCache) -> "_SiteArguments":
        """What every path takes after its rows, in order."""
        return (
            self.q_weights[batch.kernel_mode],
            self.k_weight,
            self.rope_table,
            batch.positions,
            cache.k,
            cache.v,
            batch.slots,
            self.shape,
        )


_SiteArguments: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, QKNormShape]
