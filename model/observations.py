"""What is found out about a step beside its tokens, some steps later.

Torch-free, as `fusewire.model.batch` is. Knows nothing of how it is found out.
"""

from dataclasses import dataclass
from typing import Literal

from fusewire.kernels.modes import KernelMode

RowPhase = Literal["prefill", "decode"]
"""The phase of a row; a step may hold both."""


@dataclass(frozen=True, slots=True)
class ShadowResult:
    """How far a path and the unfused one are from float32 on the same rows of one layer.

    Errors are the root mean square of the difference over that of the float32 values, of q or of k and v
    as they enter the cache, whichever is largest.
    """

    phase: RowPhase
    """Of the rows."""
    mode: KernelMode
    """The path that was checked: the step's, or fused on an unfused step."""
    layer: int
    relative_error: float
    unfused_error: float


@dataclass(frozen=True, slots=True)
class QKTime:
    """Device time of the QK-norm step in one layer, by the clock on a CPU."""

    phase: RowPhase
    mode: KernelMode
    num_tokens: int
    """Of the step, those that pad it included."""
    seconds: float


Observation = ShadowResult | QKTime


@dataclass(frozen=True, slots=True)
class LogitDrift:
    """How the logits of one position differ between two paths that were fed the same tokens."""

    max_difference: float
    """The largest absolute difference of a logit."""
    mean_difference: float
    kl_divergence: float
    """Of the right path's distribution from the left's, in nats."""
    same_top1: bool
    """Whether the likeliest token is the same."""
    top2_gap: float
    """By how much the left path's largest logit exceeds its second."""
