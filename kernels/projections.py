"""A layer's projections with what comes before and after them: the one place that picks what runs.

Few tokens of a 2-byte type on a GPU take `skinny_linear`, one launch that streams the weights; the plan
says how, and that it does. Everything else is the library's product with kernels beside it, and on a CPU
plain torch. Knows nothing of layers, phases or kernel modes.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fusewire.kernels.checks import (
    Checked,
    Fields,
    Layout,
    check_aligned,
    check_float,
    check_tensor,
    fields_of,
)
from fusewire.kernels.launch import OVERLAPPING, architecture_of
from fusewire.kernels.linear_plans import LinearKind, LinearPlan, plan_for
from fusewire.kernels.rms_norm import rms_norm
from fusewire.kernels.row_capture import RowCapture, check_capture
from fusewire.kernels.silu_mul import silu_mul
from fusewire.kernels.skinny_linear import launch


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    overlap: bool = True,
    out: Tensor | None = None,
    capture: RowCapture | None = None,
) -> Tensor:
    """Compute `linear(rms_norm(x))`.

    Args:
        x: `[T, K]`, fp16, bf16 or fp32; rows may be strided, T may be 0.
        norm_weight: `[K]`.
        weight: `[N, K]`, as `nn.Linear` holds it.
        bias: `[N]`, or None.
        overlap: start while the launch before still runs, which may write x but none of the other
            arguments; from sm_90 on, without effect elsewhere.
        out: `[T, N]` in x's dtype, contiguous, to be filled and returned.
        capture: where x is copied to, if its flag says so.

    Returns:
        `[T, N]` in x's dtype, which is every argument's.

    Raises:
        TypeError: for a dtype that is not supported or not x's.
        ValueError: for a shape, stride or device that does not fit.
    """
    plan = _plan(
        LinearKind.NORM_LINEAR,
        fields_of(x),
        fields_of(weight),
        _optional(norm_weight),
        _optional(bias),
        _optional(out),
    )
    if plan is not None:
        return _normed_launch(
            x, norm_weight, eps, weight, bias, plan, glu=False, overlap=overlap, out=out, capture=capture
        )
    normed = rms_norm(x, norm_weight, eps, overlap=overlap, capture=capture)
    if out is None:
        return F.linear(normed, weight, bias)
    torch.mm(normed, weight.t(), out=out)
    return out if bias is None else out.add_(bias)


def linear_add_(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, overlap: bool = True
) -> None:
    """Add `linear(x)` to the residual, in place.

    Args:
        residual: `[T, N]` in x's dtype; rows may be strided, and share no memory with x.
        x: as the others in `norm_linear`, which also says what is raised.
    """
    plan = _plan(
        LinearKind.LINEAR_ADD, fields_of(x), fields_of(weight), None, _optional(bias), fields_of(residual)
    )
    if plan is None:
        residual.addmm_(x, weight.t())
        if bias is not None:
            residual.add_(bias)
        return
    check_aligned(residual=residual, x=x, weight=weight)
    launch(x, weight, bias, plan, residual=residual, overlap=_overlaps(x, overlap))


def norm_glu(x: Tensor, norm_weight: Tensor, eps: float, gate_up: Tensor, *, overlap: bool = True) -> Tensor:
    """Compute `silu(gate) * up` of `linear(rms_norm(x))`.

    Args:
        gate_up: `[2 * I, K]`: I rows of gate, then I of up. The others are as in `norm_linear`, which
            also says what is raised.

    Returns:
        `[T, I]` in x's dtype.
    """
    plan = _plan(LinearKind.NORM_GLU, fields_of(x), fields_of(gate_up), _optional(norm_weight))
    if plan is None:
        return silu_mul(F.linear(rms_norm(x, norm_weight, eps, overlap=overlap), gate_up), overlap=overlap)
    return _normed_launch(x, norm_weight, eps, gate_up, None, plan, glu=True, overlap=overlap)


def streams_weights(x: Tensor, weight: Tensor, kind: LinearKind = LinearKind.NORM_LINEAR) -> bool:
    """Tell whether a projection of x is one streaming launch, and not the library's product."""
    return _plan(kind, fields_of(x), fields_of(weight)) is not None


def _normed_launch(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    plan: LinearPlan,
    *,
    glu: bool,
    overlap: bool,
    out: Tensor | None = None,
    capture: RowCapture | None = None,
) -> Tensor:
    """Launch with the norm in it or, if the plan says so, before it."""
    check_aligned(x=x, norm_weight=norm_weight, weight=weight)
    overlap = _overlaps(x, overlap)
    if plan.norm_inside:
        check_capture(capture, x)
        return launch(
            x, weight, bias, plan,
            norm_weight=norm_weight, eps=eps, glu=glu, overlap=overlap, out=out, capture=capture,
        )  # fmt: skip
    normed = rms_norm(x, norm_weight, eps, overlap=overlap, capture=capture)
    return launch(normed, weight, bias, plan, glu=glu, overlap=overlap, out=out)


def _overlaps(x: Tensor, overlap: bool) -> bool:
    return overlap and architecture_of(x.device) >= OVERLAPPING


def _optional(tensor: Tensor | None) -> Fields | None:
    return None if tensor is None else fields_of(tensor)


@lru_cache(maxsize=4096)
def _plan(
    kind: LinearKind,
    x: Fields,
    weight: Fields,
    norm_weight: Fields | None = None,
    bias: Fields | None = None,
    residual: Fields | None = None,
) -> LinearPlan | None:
    """Check the layouts and find their plan; None where the library's way is taken. Errors are not kept."""
    rows, weights = Layout(*x), Layout(*weight)
    check_float("x", rows)
    _check_rows("x", rows)
    width, like = rows.shape[1], (rows.dtype, rows.device)
    if weights.dim() != 2:
        raise ValueError(f"weight: shape must be (N, {width}), got {tuple(weights.shape)}")
    outputs = len(weights)
    check_tensor("weight", weights, (outputs, width), *like)
    if kind is LinearKind.NORM_GLU and outputs % 2:
        raise ValueError(f"gate_up: must have as many rows of up as of gate, got {outputs}")
    if norm_weight is not None:
        check_tensor("norm_weight", Layout(*norm_weight), (width,), *like)
    if bias is not None:
        check_tensor("bias", Layout(*bias), (outputs,), *like)
    if residual is not None:
        sums = Layout(*residual)
        _check_rows("residual", sums)
        if tuple(sums.shape) != (len(rows), outputs) or (sums.dtype, sums.device) != like:
            raise ValueError(f"residual: must be {(len(rows), outputs)} like x, got {sums}")
    if rows.device.type != "cuda":
        return None
    return plan_for(architecture_of(rows.device), kind, outputs, width, len(rows), rows.dtype.itemsize)


def _check_rows(name: str, rows: Checked) -> None:
    """Check that an argument is a matrix whose rows are contiguous."""
    if rows.dim() != 2 or (rows.shape[1] > 1 and rows.stride(1) != 1):
        raise ValueError(
            f"{name}: must be a matrix with contiguous rows, got {tuple(rows.shape)}, strides {rows.stride()}"
        )
