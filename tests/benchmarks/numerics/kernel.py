"""The paths alone against float64: errors by size, strange rows, bits that must not depend on a batch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from fusewire.kernels.modes import KernelMode
from fusewire.kernels.paths import PATHS
from fusewire.kernels.rope import rope_frequencies, rope_table
from fusewire.kernels.shape import QKNormShape
from tests.kernels.cases import Case, expected

HEADS = ((16, 8), (32, 8), (40, 8), (64, 8), (32, 4))
HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (1, 7, 64, 256, 1024, 4096)
LONG_TOKENS = (16384, 65536, 262144)
MAX_POSITIONS = 32768
BLOCK = 16
CHUNK_ELEMENTS = 1 << 26
"""Elements that are worked on in float64 at once."""
JUDGED_ROWS = 1024
"""Heads from which on the property is asked for: below, one rounding decides."""
MOST_OVER_UNFUSED = 1.02
MOST_FLOAT32 = 2e-6


@dataclass(frozen=True, slots=True)
class Size:
    """One cell of the grid."""

    heads: tuple[int, int]
    head_dim: int
    dtype: torch.dtype
    tokens: int

    @property
    def shape(self) -> QKNormShape:
        return QKNormShape(*self.heads, self.head_dim, 1e-6, self.head_dim)

    def fields(self) -> dict:
        dtype = str(self.dtype).removeprefix("torch.")
        heads = f"{self.heads[0]}/{self.heads[1]}"
        return {"heads": heads, "head_dim": self.head_dim, "dtype": dtype, "tokens": self.tokens}


def grid(quick: bool) -> Iterator[Size]:
    """All heads, widths and dtypes up to 4096 tokens; above, heads of 128 in the narrow dtypes."""
    if quick:
        for dtype, tokens in product(DTYPES, (1, 64, 256)):
            yield Size((16, 8), 128, dtype, tokens)
        return
    for tokens, heads, head_dim, dtype in product(TOKENS, HEADS, HEAD_DIMS, DTYPES):
        yield Size(heads, head_dim, dtype, tokens)
    for tokens, heads, dtype in product(LONG_TOKENS, HEADS, DTYPES[:2]):
        yield Size(heads, 128, dtype, tokens)
    for tokens in LONG_TOKENS:
        yield Size((16, 8), 128, torch.float32, tokens)


def draw(size: Size, device: torch.device, seed: int = 0) -> Case:
    """Draw a case on its device: tokens of unlike magnitude at any position, in blocks of random order."""
    shape, tokens = size.shape, size.tokens
    generator = torch.Generator(device).manual_seed(seed + 7 * tokens)
    qkv = torch.empty(tokens, shape.qkv_width, dtype=size.dtype, device=device).normal_(generator=generator)
    qkv.mul_(torch.rand(tokens, 1, generator=generator, device=device).mul_(4).add_(0.1).to(size.dtype))
    weights = torch.rand(2, shape.head_dim, generator=generator, device=device) + 0.5
    blocks = -(-tokens // BLOCK) + 1
    order = torch.randperm(blocks - 1, generator=generator, device=device)
    slots = (order[:, None] * BLOCK + torch.arange(BLOCK, device=device)).flatten()[:tokens].contiguous()
    caches = [
        torch.zeros(blocks, BLOCK, shape.num_kv_heads, shape.head_dim, dtype=size.dtype, device=device)
        for _ in range(2)
    ]
    return Case(
        qkv,
        weights[0].to(size.dtype),
        weights[1].to(size.dtype),
        rope_table(rope_frequencies(1e6, shape.rotary_dim, device), MAX_POSITIONS),
        torch.randint(MAX_POSITIONS, (tokens,), generator=generator, device=device),
        *caches,
        slots,
        shape,
    )


def run(mode: KernelMode, case: Case) -> tuple[Tensor, Tensor]:
    """Run a path on a copy of the case: q, and k as the cache holds it, `[T, heads, head_dim]` each."""
    mine = case if mode is KernelMode.FUSED else case.copy()
    q = PATHS[mode](*mine.args())
    return q, mine.k_cache.flatten(0, 1)[mine.slots]


def error(case: Case, q: Tensor, k: Tensor) -> dict[str, float]:
    """RMS relative error of q and k together, and the largest error against its head's RMS value."""
    wrong = right = worst = 0.0
    step = max(1, CHUNK_ELEMENTS // case.shape.qkv_width)
    for start in range(0, len(q), step):
        part = slice(start, start + step)
        some = replace(case, qkv=case.qkv[part], positions=case.positions[part], slots=case.slots[part])
        want = expected(some)
        for got, exact in ((q[part], want.q), (k[part], want.k)):
            off = got.double() - exact
            wrong += off.square().sum().item()
            right += exact.square().sum().item()
            scale = exact.square().mean(-1, keepdim=True).sqrt()
            worst = max(worst, (off.abs() / scale).max().item())
    return {"rms_relative": (wrong / right) ** 0.5, "largest_over_head_rms": worst}


def errors(quick: bool, device: torch.device) -> list[dict]:
    """Every path's error at every size of the grid, and whether the property holds."""
    rows = []
    for size in grid(quick):
        row = size.fields()
        try:
            case = draw(size, device)
            for mode in KernelMode:
                row[mode.value] = error(case, *run(mode, case))
        except torch.OutOfMemoryError:
            row["skipped"] = "does not fit the device's memory"
        else:
            row |= judge(size, row)
        rows.append(row)
        if device.type == "cuda" and size.tokens >= LONG_TOKENS[0]:
            torch.cuda.empty_cache()
    return rows


def judge(size: Size, row: dict) -> dict:
    """fp32: both below a bound. Else no worse than 1.02 times unfused, where there are rows enough."""
    fused, unfused = (row[mode.value]["rms_relative"] for mode in (KernelMode.FUSED, KernelMode.UNFUSED))
    if size.dtype == torch.float32:
        return {"judged": True, "holds": max(fused, unfused) <= MOST_FLOAT32}
    judged = size.tokens * size.shape.num_normed_heads >= JUDGED_ROWS
    return {"judged": judged, "holds": not judged or fused <= MOST_OVER_UNFUSED * unfused}


def exact_angles(device: torch.device, tokens: int) -> list[dict]:
    """Errors against angles of float64, by the position they are at: what a rounded cos and sin cost."""
    rows = []
    size = Size((16, 8), 128, torch.bfloat16, tokens)
    for first in (0, 4096, 16384, MAX_POSITIONS - tokens):
        case = replace(draw(size, device), positions=torch.arange(first, first + tokens, device=device))
        inverse = 1e6 ** (-torch.arange(0, 128, 2, dtype=torch.float64, device=device) / 128)
        angles = torch.outer(torch.arange(MAX_POSITIONS, dtype=torch.float64, device=device), inverse)
        exact = replace(case, rope_table=torch.cat((angles.cos(), angles.sin()), dim=-1))
        row: dict = {"positions": f"{first}-{first + tokens - 1}"}
        for mode in KernelMode:
            row[mode.value] = error(exact, *run(mode, case))["rms_relative"]
        rows.append(row)
    return rows


STRANGE = ("zeros", "one huge value", "denormals", "scale 1e4", "NaN", "+Inf", "-Inf")


def strange_row(kind: str, row: Tensor) -> Tensor:
    """Make a strange row of a usual one."""
    row, tiny = row.clone(), torch.finfo(row.dtype).smallest_normal
    if kind == "zeros":
        return row.zero_()
    if kind == "denormals":
        return (row.double().sign() * tiny / 4).to(row.dtype)
    if kind == "scale 1e4":
        return (row.double() * 1e4).clamp(-6e4, 6e4).to(row.dtype)
    value = {"one huge value": 3e4 if row.dtype == torch.float16 else 1e18, "NaN": float("nan")}
    row[5] = value.get(kind, float(kind.lower()) if "Inf" in kind else 0.0)
    return row


def strange(device: torch.device) -> list[dict]:
    """Put each strange row among usual ones: the others must keep their bits, its own error is told."""
    rows = []
    for dtype, kind, mode in product(DTYPES, STRANGE, KernelMode):
        case = draw(Size((16, 8), 128, dtype, 64), device)
        usual = run(mode, case.copy())
        case.qkv[31] = strange_row(kind, case.qkv[31])
        q, k = run(mode, case)
        others = torch.arange(64, device=device) != 31
        kept = all(torch.equal(a[others], b[others]) for a, b in zip((q, k), usual, strict=True))
        own = slice(31, 32)
        alone = replace(case, qkv=case.qkv[own], positions=case.positions[own], slots=case.slots[own])
        finite = bool(q[own].isfinite().all())
        row = {"dtype": str(dtype).removeprefix("torch."), "row": kind, "path": mode.value}
        row |= {"others_keep_their_bits": kept, "own_head_is_finite": finite}
        if finite and kind != "zeros":
            row["own_rms_relative"] = error(alone, q[own], k[own])["rms_relative"]
        if kind == "zeros":
            row["own_is_zero"] = not q[own].any().item()
        rows.append(row)
    return rows


SIZES = (1, 2, 17, 64, 65, 128, 129, 256, 1024, 4096)


def invariance(quick: bool, device: torch.device) -> list[dict]:
    """Bits of one token alone against the same token first, amid and last in batches of other tokens."""
    rows = []
    sizes = SIZES[:6] if quick else SIZES
    for heads, head_dim, dtype, mode in product(((16, 8), (32, 8)), (64, 128, 256), DTYPES, KernelMode):
        probe = draw(Size(heads, head_dim, dtype, 1), device)
        want = run(mode, probe)
        differ = []
        for tokens in sizes:
            batch = draw(Size(heads, head_dim, dtype, tokens), device, seed=1)
            batch = replace(batch, q_weight=probe.q_weight, k_weight=probe.k_weight)
            for place in sorted({0, tokens // 2, tokens - 1}):
                mine = batch.copy()
                mine.qkv[place] = probe.qkv[0]
                positions = mine.positions.clone()
                positions[place] = probe.positions[0]
                q, k = run(mode, replace(mine, positions=positions))
                if not (torch.equal(q[place], want[0][0]) and torch.equal(k[place], want[1][0])):
                    differ.append([tokens, place])
        fields = Size(heads, head_dim, dtype, 0).fields()
        fields.pop("tokens")
        rows.append(fields | {"path": mode.value, "batches": len(sizes), "differ": differ})
    return rows
