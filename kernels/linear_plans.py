"""How launches of `skinny_linear` cut a product of few tokens, per GPU architecture and shape.

The table is measured, never tuned while serving: `python -m tests.benchmarks.linear` times every plan
worth a try beside the library's way. Knows no tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType
from typing import TypeAlias


class LinearKind(StrEnum):
    """A projection and what is fused to it."""

    NORM_LINEAR = "norm_linear"
    """RMSNorm before it."""
    LINEAR_ADD = "linear_add"
    """The residual added after it."""
    NORM_GLU = "norm_glu"
    """RMSNorm before it, silu(gate) * up after it; N counts the rows of gate and up together."""


MOST_TOKENS = 64
"""A launch of more tokens is no longer bound by its weights, and the library's."""

_LEAST_STEP = 64
"""K is a multiple of this, so that no vector of a weight row lies across its end."""


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """How a launch cuts the product: a program has `block_n` outputs (of a GLU: gates and ups) and all of K.

    One token is multiplied lane by lane, more by tensor cores. Weights do not depend on the launch
    before, so a launch that overlaps it asks for its first ones while that still runs.
    """

    block_n: int
    """Outputs of a program, a power of two; for more than one token at least 8."""
    block_k: int
    """Elements of K in one step, a power of two; for one token it may exceed K, and then masks."""
    num_warps: int
    num_stages: int = 1
    """Steps whose operands are in shared memory or on their way there; unused for one token."""
    split: int = 1
    """Parts of a step that warps sum apart from each other; unused for one token. Divides block_k."""
    prefetch_k: int = 0
    """Columns of the weight that are called into the L2 cache before the launch before has ended."""
    evict_first: bool = True
    """Tell the L2 cache that weights are not read again before the next step."""
    norm_inside: bool = True
    """False: a launch of its own norms x, where doing so in every program costs more."""

    def __post_init__(self) -> None:
        """Check what does not depend on a tensor."""
        for name in ("block_n", "block_k", "num_warps", "split"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"{name}: must be a power of two, got {size}")
        if self.block_k // self.split < 16:
            raise ValueError(f"split: leaves parts of less than 16 elements of block_k, got {self.split}")
        if self.num_stages < 1 or self.prefetch_k < 0:
            raise ValueError(f"num_stages, prefetch_k: out of range, got {self}")

    def fits(self, width: int, tokens: int) -> bool:
        """Tell whether steps divide K = width, which more tokens than one need."""
        return tokens == 1 or (width % self.block_k == 0 and self.block_n >= 8)


@dataclass(frozen=True, slots=True)
class LinearRange:
    """The plan of launches of up to `max_tokens` tokens; None is the library's way."""

    max_tokens: int
    plan: LinearPlan | None


Site: TypeAlias = tuple[int, LinearKind, int, int]


def _ranges(*pairs: tuple[int, LinearPlan | None]) -> tuple[LinearRange, ...]:
    return tuple(LinearRange(most, plan) for most, plan in pairs)


def _one(block_n: int, block_k: int, num_warps: int = 4) -> LinearPlan:
    """All of K of a few weight rows at once, multiplied lane by lane."""
    return LinearPlan(block_n, block_k, num_warps)


def _wide(block_n: int, *, prefetch_k: int = 512) -> LinearPlan:
    """Tiles of many weight rows, for tensor cores that read both operands from shared memory."""
    return LinearPlan(block_n, 128, 4, 5, prefetch_k=prefetch_k)


def _split(block_n: int, *, prefetch_k: int = 1024) -> LinearPlan:
    """Tiles of few weight rows, each of four warps with a quarter of a step."""
    return LinearPlan(block_n, 256, 4, 5, split=4, prefetch_k=prefetch_k)


def _after_norm(plan: LinearPlan) -> LinearPlan:
    """The plan with the norm before it in a launch of its own, as is faster for more than one token."""
    return replace(plan, norm_inside=False)


_HALVED = LinearPlan(16, 512, 8, 4, split=8, prefetch_k=1024)
_LINEAR, _ADD, _GLU = LinearKind.NORM_LINEAR, LinearKind.LINEAR_ADD, LinearKind.NORM_GLU
TABLE: Mapping[Site, tuple[LinearRange, ...]] = MappingProxyType(
    {
        # Qwen3-0.6B: qkv, o, gate and up, down, head
        (90, _LINEAR, 4096, 1024): _ranges(
            (1, _one(4, 1024)), (8, _after_norm(_split(32))), (64, _after_norm(_wide(64)))
        ),
        (90, _ADD, 1024, 2048): _ranges((1, _one(2, 2048)), (8, _split(32)), (32, _wide(64))),
        (90, _GLU, 6144, 1024): _ranges(
            (1, _one(2, 1024, 2)), (8, _after_norm(_split(16))), (64, _after_norm(_wide(32)))
        ),
        (90, _ADD, 1024, 3072): _ranges(
            (1, _one(4, 4096, 8)), (8, _split(32)), (16, _wide(64)), (32, _split(32, prefetch_k=0))
        ),
        (90, _LINEAR, 151936, 1024): _ranges(
            (1, _one(4, 1024, 2)), (8, _after_norm(_split(32))), (64, _after_norm(_wide(64)))
        ),
        # Qwen3-8B: qkv, o, gate and up, down, head
        (90, _LINEAR, 6144, 4096): _ranges(
            (1, _one(2, 4096)), (8, _after_norm(_split(32))), (64, _after_norm(_wide(64)))
        ),
        (90, _ADD, 4096, 4096): _ranges((1, _one(2, 4096)), (16, _wide(64))),
        (90, _GLU, 24576, 4096): _ranges(
            (1, _one(1, 4096)),
            (8, _after_norm(_split(16))),
            (32, _after_norm(_wide(32))),
            (64, _after_norm(_wide(32, prefetch_k=0))),
        ),
        (90, _ADD, 4096, 12288): _ranges(
            (1, _one(2, 16384, 16)),
            (4, None),
            (16, _HALVED),
            (32, _split(32, prefetch_k=0)),
            (64, _wide(64, prefetch_k=0)),
        ),
        (90, _LINEAR, 151936, 4096): _ranges(
            (1, _one(2, 4096)), (16, _after_norm(_split(32))), (64, _after_norm(_wide(64)))
        ),
    }
)
"""Ranges by (compute capability, kind, N, K), smallest first; another key takes the default."""

DEFAULT_TOKENS = 16
"""Most tokens for which a product that was not measured is ours."""

_LEAST_OUTPUTS = 2048
"""Fewer are given to programs in small portions, so that there are programs enough."""

_TILE_BYTES = 32 << 10
"""Weights of one program of one token that are on their way at once."""


@lru_cache(maxsize=4096)
def plan_for(
    architecture: int, kind: LinearKind, outputs: int, width: int, tokens: int, itemsize: int
) -> LinearPlan | None:
    """Choose how a product of `tokens` rows is cut; None: it is the library's.

    Args:
        architecture: compute capability, 90 for sm_90.
        outputs: rows of the weight, N.
        width: its columns, K.
        itemsize: bytes of an element; only 2-byte types are streamed.
    """
    if itemsize != 2 or architecture < 80 or width % _LEAST_STEP or not 0 < tokens <= MOST_TOKENS:
        return None
    ranges = TABLE.get((architecture, kind, outputs, width))
    if ranges is None:
        return _default(kind, outputs, width, tokens)
    return next((known.plan for known in ranges if tokens <= known.max_tokens), None)


def _default(kind: LinearKind, outputs: int, width: int, tokens: int) -> LinearPlan | None:
    """Cut a product that was not measured."""
    if tokens > DEFAULT_TOKENS or width % 256:
        return None
    of_one = 2 if kind is LinearKind.NORM_GLU else 1  # weight rows of an output
    if tokens > 1:
        plan = _split(32 // of_one if outputs >= _LEAST_OUTPUTS else 8)
        return plan if kind is LinearKind.LINEAR_ADD else _after_norm(plan)
    block_k = min(4096, 1 << (width - 1).bit_length())
    most = 8 if outputs >= _LEAST_OUTPUTS else 4
    return LinearPlan(max(1, min(most, _TILE_BYTES // (2 * block_k)) // of_one), block_k, 4)
