"""Compares the logits of two paths, position by position, from the streams that lead to them.

Streams are kept instead of logits, for they are a hundredth as wide; the head makes both sides' logits of a
few positions at a time. Knows nothing of how the streams came about.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fusewire.model.observations import LogitDrift

POSITIONS = 32
"""Compared at once; streams are padded to a multiple of it, so that the head has one size."""


def compare_streams(left: Tensor, right: Tensor, logits_of: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """Compare the logits of streams `[P, hidden]`, P a multiple of `POSITIONS`, in parts.

    Args:
        logits_of: maps a stream to logits `[P, vocabulary]`.

    Yields:
        float32 `[POSITIONS, 5]`, the fields of `LogitDrift` in order; nothing is waited for.
    """
    for ours, theirs in zip(left.split(POSITIONS), right.split(POSITIONS), strict=True):
        yield compare_logits(logits_of(ours).float(), logits_of(theirs).float())


def compare_logits(left: Tensor, right: Tensor) -> Tensor:
    """Compare float32 logits `[P, vocabulary]`: float32 `[P, 5]`, the fields of `LogitDrift` in order."""
    differences = (left - right).abs_()
    likeliest, of_ids = left.topk(2, dim=-1)
    divergence = F.kl_div(right.log_softmax(-1), left.log_softmax(-1), reduction="none", log_target=True).sum(
        -1
    )
    figures = (
        differences.amax(-1),
        differences.mean(-1),
        divergence.clamp_min_(0),  # of equal distributions, rounding may leave less
        of_ids[:, 0] == right.argmax(-1),
        likeliest[:, 0] - likeliest[:, 1],
    )
    return torch.stack([figure.float() for figure in figures], dim=-1)


def drifts_of(figures: Tensor) -> list[LogitDrift]:
    """Read figures `[P, 5]` of `compare_logits`; waits for them."""
    return [
        LogitDrift(largest, mean, divergence, bool(same), gap)
        for largest, mean, divergence, same, gap in figures.tolist()
    ]
