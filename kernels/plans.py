"""How launches of `qk_norm_rope_cache` cut their work, per GPU architecture, head_dim and size.

The table is measured, never tuned while serving: `python -m tests.benchmarks.tune_plans` times every plan
at every size, and says what the one in use loses. Knows no tensors.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Plan:
    """How a launch cuts its work into programs.

    A row, which is one head of one token, lies within one warp under every plan, the same elements
    in the same lanes. So the order in which it is summed, and every bit of the result, is the same
    under every plan.
    """

    num_warps: int
    """Warps of a program; its tile has as many rows as they load with one 16-byte vector a lane."""
    heads: int
    """Heads of one token that lie side by side in a tile; the rest of a tile's rows are more tokens."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """The plan of launches of up to `max_tokens` tokens."""

    max_tokens: int
    plan: Plan


_ONE_HEAD = Plan(num_warps=1, heads=1)
_SPREAD = Plan(num_warps=1, heads=4)
_DENSE = Plan(num_warps=4, heads=8)
_ANY_SIZE = sys.maxsize

_DEFAULT = (Bucket(64, _SPREAD), Bucket(_ANY_SIZE, _DENSE))
"""Few tokens spread their heads over the multiprocessors, many fill larger programs."""

TABLE: Mapping[tuple[int, int], tuple[Bucket, ...]] = MappingProxyType(
    {
        (90, 64): (Bucket(256, _SPREAD), Bucket(_ANY_SIZE, _DENSE)),
        (90, 128): (Bucket(128, _ONE_HEAD), Bucket(_ANY_SIZE, _DENSE)),
    }
)
"""Buckets by (compute capability, head_dim), smallest first; another key takes the default."""

WIDE_ROWS = _DENSE
"""The plan of rows that are wider than a warp, at every size."""

PLANS = tuple(dict.fromkeys(bucket.plan for buckets in (*TABLE.values(), _DEFAULT) for bucket in buckets))
"""Every plan that a launch can have."""


def plan_for(num_tokens: int, architecture: int, head_dim: int) -> Plan:
    """Choose the plan of a launch; architecture is the compute capability, 90 for sm_90."""
    buckets = TABLE.get((architecture, head_dim), _DEFAULT)
    return next(bucket.plan for bucket in buckets if num_tokens <= bucket.max_tokens)
