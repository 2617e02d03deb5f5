"""Holds a kernel path, and the unfused one, against float32 on true rows of a step just launched.

The step leaves one layer's stream behind (`fusewire.model.hidden_state_capture`). Its QK-norm site runs again
on all of the step's tokens that were kept, so with the kernels and plans of the step itself, on a cache of
its own; then a sample of the rows is compared with the plain chain in float32, from the same stream: input
norm, projection, norm of q and k, RoPE.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fusewire.kernels.modes import KernelMode
from fusewire.kernels.packed import split_heads
from fusewire.kernels.paths import chain_rms_norm
from fusewire.kernels.rope import apply_rope, rope_rows
from fusewire.kernels.row_capture import RowCapture
from fusewire.model.device import to_device, to_host
from fusewire.model.forward_batch import ForwardBatch
from fusewire.model.hidden_state_capture import HiddenStateCapture
from fusewire.model.layers import QKNorm
from fusewire.model.observations import RowPhase, ShadowResult
from fusewire.model.site_scratch import SiteScratch

SAMPLED_ROWS = 64
"""Rows of a phase that are compared at most."""
FAULT = 1.01
"""The factor of a planted fault: see `fusewire.model.layers.QKNorm.plant_fault`."""

_THRESHOLDS = {"bfloat16": 7e-3, "float16": 1.5e-3, "float32": 1e-4}


def default_threshold(dtype_name: str) -> float:
    """Choose the relative error beyond which a path of a dtype is held to be wrong.

    A path that does what it should rounds three to seven times between the stream and q, each time by half
    a unit in the last place at most. Over the layers of the demo model and of random ones the median is
    2.9e-3 for `fused` and 3.8e-3 for `fused_norm` in bfloat16. The fewer the rows, the wider the spread: of
    single rows the worst had 3.6e-3 and 5.1e-3, and 4.6e-3 and 5.7e-3 where a head is but 16 wide. In
    float16 it is an eighth of that, 0.8e-3 at the worst; in float32 1e-7, with room for a GPU, whose
    products of other shapes add up in another order. A weight that is off by a hundredth makes 8.7e-3 or
    more in bfloat16, which has nothing closer to 1.01 than 1.008, and 1e-2 in the others. All of this was
    measured on a CPU.
    """
    return _THRESHOLDS[dtype_name]


@dataclass(frozen=True, slots=True)
class ShadowCheck:
    """A check that the device is at work on."""

    phases: Sequence[RowPhase]
    mode: KernelMode
    layer: int
    errors: Tensor
    """float32 [phases, 2], on the host, once it has arrived: of the checked path and of the unfused one."""
    arrived: torch.cuda.Event | None

    def is_known(self) -> bool:
        """Whether the errors are there."""
        return self.arrived is None or self.arrived.query()

    def observations(self) -> list[ShadowResult]:
        """Hand over the results, if they are known: none of a phase whose rows are not finite in float32."""
        return [
            ShadowResult(phase, self.mode, self.layer, error, unfused_error)
            for phase, (error, unfused_error) in zip(self.phases, self.errors.tolist(), strict=True)
            if not math.isnan(error)
        ]


class ShadowGuard:
    """Checks sampled rows of steps.

    Args:
        sites: every layer's.
        scratch: memory for as many tokens of a step as are kept.
    """

    def __init__(self, sites: Sequence[QKNorm], scratch: SiteScratch) -> None:
        self._sites = sites
        self._scratch = scratch
        self._checks = 0

    def check(
        self,
        batch: ForwardBatch,
        capture: HiddenStateCapture,
        mode: KernelMode,
        num_tokens: int,
        decode_tokens: int,
    ) -> ShadowCheck:
        """Launch a check of a mode behind the step launched last; waits for nothing.

        Args:
            batch: the step's, whose tensors are still as it left them.
            capture: what the step has left.
            num_tokens: of the step, those that pad it aside.
            decode_tokens: how many of them, the first ones, decode.
        """
        kept = min(batch.shape.num_tokens, len(capture.rows))
        ends: dict[RowPhase, tuple[int, int]] = {
            "decode": (0, min(decode_tokens, kept)),
            "prefill": (min(decode_tokens, kept), min(num_tokens, kept)),
        }
        samples = {phase: _sample(*span, self._checks) for phase, span in ends.items() if span[0] < span[1]}
        self._checks += 1
        layer = capture.layer
        site, stream, positions = self._sites[layer], capture.rows[:kept], batch.positions[:kept]
        rows = to_device(np.concatenate(list(samples.values())), stream.device)
        exact = exact_qkv(site, stream[rows], positions[rows])
        errors = []
        for each in (mode, KernelMode.UNFUSED):
            found = self._run(site, each, stream, positions, rows, batch.shape.num_tokens, capture.none)
            errors.append(_errors(found, exact, [len(sample) for sample in samples.values()]))
        return ShadowCheck(tuple(samples), mode, layer, *to_host(torch.stack(errors, dim=1)))

    def _run(
        self,
        site: QKNorm,
        mode: KernelMode,
        stream: Tensor,
        positions: Tensor,
        rows: Tensor,
        step_tokens: int,
        capture: RowCapture,
    ) -> tuple[Tensor, ...]:
        """Run a path on the stream `[T, hidden]`: q, and k and v as they enter the cache, of some rows.

        The capture, which keeps nothing, makes the kernels those of the step.
        """
        scratch = self._scratch.of(len(stream))
        for part in scratch.cache:
            part.zero_()  # a slot that is not written is an error of 1
        inputs = replace(scratch.inputs(mode), positions=positions)
        q = site.attn_input(stream, inputs, scratch.cache, step_tokens=step_tokens, capture=capture)
        slots = scratch.slots[rows]
        return q[rows], *(part.flatten(0, 1)[slots] for part in scratch.cache)


def exact_qkv(site: QKNorm, stream: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what attention is to see of a stream `[R, hidden]`, all in float32.

    Returns:
        q `[R, nq, d]`, k and v `[R, nk, d]`; q and k normed and rotated.
    """
    shape, norm, bias = site.shape, site.norm, site.qkv.bias
    hidden = F.rms_norm(stream.float(), norm.weight.shape, norm.weight.float(), norm.eps)
    qkv = F.linear(hidden, site.qkv.weight.float(), None if bias is None else bias.float())
    q, k, v = split_heads(qkv, shape)
    cos_sin = rope_rows(site.rope_table, positions, shape)
    q, k = (
        apply_rope(chain_rms_norm(part, weight.float(), shape.eps), cos_sin, shape.interleaved)
        for part, weight in ((q, site.q_weight), (k, site.k_weight))
    )
    return q, k, v


def _sample(start: int, end: int, turn: int) -> np.ndarray:
    """Choose `SAMPLED_ROWS` of the rows at most, evenly spaced, others from turn to turn: int64."""
    stride = -(-(end - start) // SAMPLED_ROWS)
    return np.arange(start + turn % stride, end, stride)


def _errors(found: Sequence[Tensor], exact: Sequence[Tensor], counts: list[int]) -> Tensor:
    """The largest error among q, k and v `[R, heads, d]`, of each phase's rows: float32 `[phases]`.

    Rows that are not finite in float32 tell nothing of a path and are left out; NaN where no row is left. A
    path that gives no number where float32 does has an infinite error.
    """
    wrong, true = (
        torch.stack([part.square().sum((1, 2)) for part in parts])  # [3, R]
        for parts in ([mine.float() - right for mine, right in zip(found, exact, strict=True)], exact)
    )
    usable = true.isfinite().all(0)  # [R]
    wrong, true = (part.where(usable, 0) for part in (wrong, true))
    tiny = torch.finfo(torch.float32).tiny
    errors = []
    for off, size, some in zip(*(each.split(counts, -1) for each in (wrong, true, usable)), strict=True):
        ratios = (off.sum(1) / size.sum(1).clamp_min(tiny)).nan_to_num(nan=torch.inf)
        errors.append(ratios.amax().sqrt().where(some.any(), torch.nan))
    return torch.stack(errors)
