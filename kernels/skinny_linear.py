# ruff: noqa: N803, N806
"""A projection of few tokens, with what comes before and after it, in one launch; its torch twin beside it.

A decode step is bound by how fast weights arrive. So a program streams the weight rows of a few outputs,
and does in passing what would be launches of their own: the RMSNorm before, and after it a bias, the
residual's addition or silu(gate) * up. The norm needs no pass of its own, for

    linear(rms_norm(x)) = rsqrt(mean(x**2) + eps) * ((x * norm_weight) @ weight.T)

and the sum of squares is at hand when the product is. Sums are fp32; results are rounded once, and for
more than one token so is x * norm_weight, which a tensor core takes in x's dtype.

Knows nothing of layers or of which shapes it is good for; `linear_plans` and `projections` do.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fusewire.kernels.compiling import compile_kernel
from fusewire.kernels.launch import on_device
from fusewire.kernels.linear_plans import LinearPlan
from fusewire.kernels.row_capture import RowCapture, capture_arguments

_COPIED = tl.constexpr(1024)
"""Elements of a row that are copied together."""
VECTOR_BYTES = 16
"""What a lane loads at once."""


@dataclass(frozen=True, slots=True)
class Extras:
    """What is fused to the product; the kernel is compiled for it."""

    norm: bool = False
    glu: bool = False
    residual: bool = False
    bias: bool = False
    kept_rows: int = 0
    """Rows of x that a `RowCapture` has room for; 0 without one."""


def skinny_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    glu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Do the kernel's work in torch, on any device: in fp32 (of fp64 inputs, in fp64), rounded once.

    Shapes are those of `launch`; the residual is left as it was.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide)
    if norm_weight is not None:
        rows = rows * torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + eps) * norm_weight.to(wide)
    product = F.linear(rows, weight.to(wide), None if bias is None else bias.to(wide))
    if glu:
        gate, up = product.chunk(2, dim=-1)
        product = F.silu(gate) * up
    if residual is not None:
        product = residual.to(wide) + product
    return product.to(x.dtype)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: LinearPlan,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    glu: bool = False,
    residual: Tensor | None = None,
    overlap: bool = False,
    out: Tensor | None = None,
    capture: RowCapture | None = None,
) -> Tensor:
    """Launch the kernel under a given plan; tensors are not checked.

    Args:
        x: `[T, K]`, T at most `linear_plans.MOST_TOKENS`; rows may be strided.
        weight: `[N, K]`, contiguous.
        bias: `[N]`, or None.
        norm_weight: `[K]`: x is normed first, with `eps`.
        glu: rows of the weight are N / 2 gates, then N / 2 ups; there is no bias.
        residual: `[T, N]`, rows may be strided: the product is added to it, in place.
        overlap: start while the launch before still runs, which must not write a weight or bias; what
            else it writes is waited for. From sm_90 on.
        out: what is returned, contiguous; not beside a residual.
        capture: where x is copied to, if its flag says so.

    Returns:
        `[T, N]`, `[T, N / 2]` of a GLU, or the residual.

    Raises:
        ValueError: if the plan does not fit K.
    """
    num_tokens, width = x.shape
    outputs = len(weight) // 2 if glu else len(weight)
    if out is None:
        out = x.new_empty(num_tokens, outputs) if residual is None else residual
    if num_tokens == 0:
        return out
    x_stride, out_stride = (x.stride(0), out.stride(0)) if num_tokens > 1 else (width, outputs)
    kept_rows, flag, kept = capture_arguments(capture, x)
    extras = Extras(norm_weight is not None, glu, residual is not None, bias is not None, kept_rows)
    compiled = compile_launch(
        x.device, x.dtype, num_tokens, outputs, width, x_stride, out_stride, extras, plan, overlap
    )
    with on_device(x.device):
        compiled.kernel[compiled.programs, 1, 1](
            x, x if norm_weight is None else norm_weight, weight, x if bias is None else bias, out,
            flag, kept, num_tokens, x_stride, out_stride, eps, *compiled.constants,
        )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True)
class _Compiled:
    """The kernel for one shape, dtype and plan."""

    kernel: Any
    constants: tuple[int | str, ...]
    programs: int


@lru_cache(maxsize=4096)
def compile_launch(
    device: torch.device,
    dtype: torch.dtype,
    num_tokens: int,
    outputs: int,
    width: int,
    x_stride: int,
    out_stride: int,
    extras: Extras,
    plan: LinearPlan,
    overlap: bool,
) -> _Compiled:
    """Compile for aligned tensors and these strides; a launch looks it up, past Triton's own slower way."""
    constants = tile_constants(num_tokens, outputs, width, dtype.itemsize, extras, plan, overlap)
    flag = torch.int32 if extras.kept_rows else dtype
    kernel = compile_kernel(
        skinny_linear_kernel, device, dtype, dtype, dtype, dtype, dtype, flag, dtype,
        1, x_stride, out_stride, 1e-6, **constants,
        num_warps=plan.num_warps, num_stages=plan.num_stages, launch_pdl=overlap,
    )  # fmt: skip
    return _Compiled(kernel, tuple(constants.values()), triton.cdiv(outputs, plan.block_n))


def tile_constants(
    num_tokens: int,
    outputs: int,
    width: int,
    itemsize: int,
    extras: Extras,
    plan: LinearPlan,
    overlap: bool = False,
) -> dict[str, int | str]:
    """Derive the kernel's compile-time arguments, in its order.

    Raises:
        ValueError: if the plan does not fit K.
    """
    if not plan.fits(width, num_tokens):
        raise ValueError(f"plan: does not fit {num_tokens} tokens of K = {width}, got {plan}")
    rows = plan.block_n * (2 if extras.glu else 1)
    least = 8 if rows >= 16 else 16
    block_m = 1 if num_tokens == 1 else max(least, triton.next_power_of_2(num_tokens))
    ahead = min(plan.prefetch_k, width) * itemsize if overlap else 0
    pieces = max(1, plan.num_warps * 32 // rows) if ahead else 1
    while ahead % (pieces * VECTOR_BYTES):
        pieces //= 2
    return {
        "N": outputs,
        "K": width,
        "NORM": extras.norm,
        "GLU": extras.glu,
        "RESIDUAL": extras.residual,
        "BIAS": extras.bias,
        "KEPT_ROWS": extras.kept_rows,
        "BLOCK_M": block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "SPLIT": plan.split,
        "VECTOR": VECTOR_BYTES // itemsize,
        "EVICT": "evict_first" if plan.evict_first else "",
        "PIECES": pieces,
        "PIECE_BYTES": ahead // pieces,
        "OVERLAP": overlap,
    }


@triton.jit(do_not_specialize=["num_tokens"])
def skinny_linear_kernel(
    x: tl.tensor,
    norm_weight: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    flag: tl.tensor,
    kept: tl.tensor,
    num_tokens: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    eps: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    GLU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    KEPT_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    VECTOR: tl.constexpr,
    EVICT: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE_BYTES: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Compute BLOCK_N outputs of all tokens.

    A GLU's gates and ups are one tile of weight rows, up to eight gates, then their ups, and so on:
    a thread of a tensor core's result has rows i and i + 8, so nothing is exchanged to bring them together.
    """
    ROWS: tl.constexpr = 2 * BLOCK_N if GLU else BLOCK_N
    RUN: tl.constexpr = BLOCK_N if BLOCK_N < 8 else 8
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    wanted = tl.load(flag) if KEPT_ROWS > 0 else 0  # by the host, long before the launch that is waited for
    row = tl.arange(0, ROWS)
    output = tl.program_id(0) * BLOCK_N + (row // (2 * RUN) * RUN + row % RUN if GLU else row)
    if N % BLOCK_N != 0:
        output = tl.minimum(output, N - 1)  # read twice rather than masked
    weight_row = output.to(tl.int64)
    if GLU:
        weight_row += tl.where(row % (2 * RUN) < RUN, 0, N)
    weights = weight + weight_row * K  # [ROWS]
    if PIECE_BYTES > 0:
        _prefetch(weights, PIECES, PIECE_BYTES)

    token = tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = out + token[None, :].to(tl.int64) * out_stride + column[:, None]  # [BLOCK_N, BLOCK_M]
    keep = (token[None, :] < num_tokens) & (column[:, None] < N)
    if BLOCK_M == 1:
        product, squares, before = _one_token(
            x, norm_weight, weights, target, keep,
            K, NORM, RESIDUAL, ROWS, BLOCK_K, VECTOR, EVICT, OVERLAP,
        )  # fmt: skip
    else:
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        before = tl.load(target, mask=keep, other=0.0) if RESIDUAL else 0.0
        product, squares = _few_tokens(
            x, norm_weight, weights, num_tokens, x_stride,
            K, NORM, ROWS, BLOCK_M, BLOCK_K, SPLIT, EVICT,
        )  # fmt: skip

    if NORM:
        product *= tl.rsqrt(squares / K + eps)[None, :]
    if BIAS:
        product += tl.load(bias + output).to(tl.float32)[:, None]
    if GLU:
        by_run = tl.permute(tl.reshape(product, (BLOCK_N // RUN, 2, RUN, BLOCK_M)), (0, 2, 3, 1))
        gate, up = tl.split(tl.reshape(by_run, (BLOCK_N, BLOCK_M, 2)))
        product = gate * tl.sigmoid(gate) * up
    if RESIDUAL:
        product += before.to(tl.float32)
    tl.store(target, product.to(out.dtype.element_ty), mask=keep)
    if KEPT_ROWS > 0:  # noqa: SIM102 - decided while compiling, the other by each launch
        if (tl.program_id(0) == 0) & (wanted != 0):
            _keep_rows(x, kept, tl.minimum(num_tokens, KEPT_ROWS), x_stride, K)


@triton.jit
def _keep_rows(x: tl.tensor, kept: tl.tensor, count: tl.tensor, x_stride: tl.tensor, K: tl.constexpr) -> None:
    """Copy the first rows of x."""
    for start in tl.range(0, K, _COPIED):
        column = start + tl.arange(0, _COPIED)
        for row in tl.range(0, count):
            values = tl.load(x + row * x_stride + column, mask=column < K, other=0.0)
            tl.store(kept + row * K + column, values, mask=column < K)


@triton.jit
def _prefetch(rows: tl.tensor, PIECES: tl.constexpr, PIECE_BYTES: tl.constexpr) -> None:
    """Call the first PIECES * PIECE_BYTES of each row into the L2 cache, a piece a thread."""
    piece = tl.arange(0, PIECES)[None, :].to(tl.int64) * PIECE_BYTES
    address = rows.to(tl.int64)[:, None] + piece
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
        "=r,l,r",
        [address, PIECE_BYTES],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _one_token(
    x: tl.tensor,
    norm_weight: tl.tensor,
    weights: tl.tensor,
    target: tl.tensor,
    keep: tl.tensor,
    K: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    EVICT: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Multiply and add lane by lane: the product `[ROWS, 1]`, x's sum of squares `[1]`, and what is added to.

    The first step's weights are on their way before the launch before has ended, and each step's while
    the one before is summed. A lane's vector is a dimension of its own, so steps are summed without
    lanes meeting.
    """
    CHUNKS: tl.constexpr = BLOCK_K // VECTOR
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    chunk = tl.arange(0, CHUNKS)[None, :, None]
    k = chunk * VECTOR + tl.arange(0, VECTOR)[None, None, :]  # [1, CHUNKS, VECTOR]
    rows = weights[:, None, None] + k
    w = _load_step(rows, k, 0, K, BLOCK_K, EVICT)
    scale = _load_step(norm_weight + k, k, 0, K, BLOCK_K, "") if NORM else w
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    before = tl.load(target, mask=keep, other=0.0) if RESIDUAL else 0.0
    totals = tl.zeros((ROWS, CHUNKS), tl.float32)
    squares = tl.zeros((1, CHUNKS), tl.float32)
    for step in tl.static_range(STEPS):
        factor = _load_step(x + k, k, step, K, BLOCK_K, "").to(tl.float32)
        w_now, scale_now = w, scale
        if step + 1 < STEPS:
            w = _load_step(rows, k, step + 1, K, BLOCK_K, EVICT)
            if NORM:
                scale = _load_step(norm_weight + k, k, step + 1, K, BLOCK_K, "")
        if NORM:
            squares += tl.sum(factor * factor, axis=2)
            factor *= scale_now.to(tl.float32)
        totals += tl.sum(w_now.to(tl.float32) * factor, axis=2)
    product = tl.sum(totals, axis=1)[:, None]
    return product, tl.sum(squares, axis=1) if NORM else product, before


@triton.jit
def _load_step(
    pointers: tl.tensor,
    k: tl.tensor,
    STEP: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVICT: tl.constexpr,
) -> tl.tensor:
    """Load BLOCK_K elements of each row, zeros past K."""
    if (STEP + 1) * BLOCK_K <= K:
        part = tl.load(pointers + STEP * BLOCK_K, eviction_policy=EVICT)
    else:
        inside = STEP * BLOCK_K + k < K
        part = tl.load(pointers + STEP * BLOCK_K, mask=inside, other=0.0, eviction_policy=EVICT)
    return part


@triton.jit
def _few_tokens(
    x: tl.tensor,
    norm_weight: tl.tensor,
    weights: tl.tensor,
    num_tokens: tl.tensor,
    x_stride: tl.tensor,
    K: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    EVICT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Multiply by tensor cores: the product `[ROWS, BLOCK_M]` and the tokens' sums of squares `[BLOCK_M]`.

    The weight is the left operand, whose side of an instruction is the longer one, unless its rows are
    too few. With SPLIT, each part of a step is a product of its own, of warps of its own.
    """
    PART: tl.constexpr = BLOCK_K // SPLIT
    if SPLIT == 1:
        k = tl.arange(0, BLOCK_K)[None, :]
        token = tl.arange(0, BLOCK_M)[:, None]
        rows = weights[:, None] + k
    else:
        k = tl.arange(0, SPLIT)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]
        token = tl.arange(0, BLOCK_M)[None, :, None]
        rows = weights[None, :, None] + k
    # Tokens past the last are read as the last, and not stored.
    tokens = x + tl.minimum(token, num_tokens - 1).to(tl.int64) * x_stride + k
    squares = tl.zeros(tokens.shape, tl.float32)
    LEFT: tl.constexpr = ROWS >= 16
    if SPLIT == 1:
        total = tl.zeros((ROWS, BLOCK_M) if LEFT else (BLOCK_M, ROWS), tl.float32)
    else:
        total = tl.zeros((SPLIT, ROWS, BLOCK_M) if LEFT else (SPLIT, BLOCK_M, ROWS), tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        w = tl.load(rows + start, eviction_policy=EVICT)
        factor = tl.load(tokens + start)
        if NORM:
            wide = factor.to(tl.float32)
            squares += wide * wide
            factor = (wide * tl.load(norm_weight + start + k).to(tl.float32)).to(x.dtype.element_ty)
        left, right = (w, factor) if LEFT else (factor, w)
        right = tl.trans(right) if SPLIT == 1 else tl.permute(right, (0, 2, 1))
        total = tl.dot(left, right, total, input_precision="ieee")
    if SPLIT > 1:
        total = tl.sum(total, axis=0)
        squares = tl.sum(squares, axis=0)
    product = total if LEFT else tl.trans(total)
    return product, tl.sum(squares, axis=1)
