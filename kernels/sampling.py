# ruff: noqa: N803, N806
"""Penalties, truncation and the draw of next tokens, without a visit to the host; torch twins beside them.

Each sequence has a record of 32-bit words on the device: its knobs, in the order named below, and its
tokens. Kernels look both up, so the host sends nothing but which record each row of logits belongs to.

A draw is the largest of logit / temperature plus Gumbel noise. The noise of a token depends on nothing
but (seed, index in the answer, token), so a sequence draws the same alone or in any batch, on any device.
What truncation leaves is told by a floor, the least logit that may be drawn: equal tokens are kept or
dropped together. The twins read values where that saves work, so on a GPU they would wait for it.

A row with a logit that is NaN or infinite has no choice: `NO_TOKEN` is drawn. So what forbids a token must
be finite, see `FORBIDDEN`, and penalties are cut off at `LARGEST`.

Knows nothing of requests, nor of what a host may want added to logits before a draw.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusewire.kernels.checks import ALIGNMENT, check_float
from fusewire.kernels.compiling import compile_kernel
from fusewire.kernels.launch import on_device, runs_triton

TEMPERATURE = tl.constexpr(0)
TOP_P = tl.constexpr(1)
MIN_P = tl.constexpr(2)
REPETITION = tl.constexpr(3)
PRESENCE = tl.constexpr(4)
FREQUENCY = tl.constexpr(5)
TOP_K = tl.constexpr(6)
PROMPT_LEN = tl.constexpr(7)
SEED_LOW = tl.constexpr(8)
SEED_HIGH = tl.constexpr(9)
"""Where a record has each knob: six float32, two int32, the halves of the seed. Top-k 0 keeps all."""

LEAST_TEMPERATURE = tl.constexpr(1e-6)
"""Below this, differences of logits lose their meaning in float32; the draw is greedy anyway."""

NO_TOKEN = tl.constexpr(-1)
"""Drawn from a row whose logits are not all finite."""
LARGEST = tl.constexpr(1e30)
"""A penalised logit is at most so large, so that no penalty makes a finite one infinite."""
FORBIDDEN = tl.constexpr(-1e32)
"""The logit of a token that must not be drawn: below all others, and finite at every temperature."""

_SMALL_PART, _PART = 1024, 4096
"""Logits of a program that draws."""
FEW_ROWS = 8
"""Up to so many rows are cut in small parts, for there to be programs enough."""
_COLUMNS = 128
_BLOCKS_AT_ONCE = 64
"""Truncation looks at blocks of so many logits, so many blocks together."""
_HISTORY = 1024
"""Tokens of a program that counts them."""
_ELEMENTS_AT_ONCE = 1 << 18
"""Logits that the twin draws from together: they and their noise stay in a CPU's cache."""
_DROPPED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Low bits of a float32 that are zero for every value of the dtype."""
_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Workspace:
    """Memory that launches need. Those that may run at the same time need one each."""

    scores: Tensor
    """fp32 `[rows, parts]`: each part's best score."""
    candidates: Tensor
    """int32 `[rows, parts]`: whose it is."""
    arrivals: Tensor
    """int32 `[rows]`: zero before a launch, and again after it, so that a graph can replay."""
    peaks: Tensor
    """fp32 `[rows, blocks]`: the largest logit of each block."""
    live: Tensor
    """int32 `[rows, blocks]`: the blocks that still matter."""
    floors: Tensor
    """fp32 `[rows]`."""


def workspace_for(max_rows: int, vocab_size: int, device: torch.device) -> Workspace:
    """Allocate what launches on up to `max_rows` rows of `vocab_size` logits need."""
    parts, blocks = triton.cdiv(vocab_size, _SMALL_PART), _padded_blocks(vocab_size)
    return Workspace(
        scores=torch.empty(max_rows, parts, dtype=torch.float32, device=device),
        candidates=torch.empty(max_rows, parts, dtype=torch.int32, device=device),
        arrivals=torch.zeros(max_rows, dtype=torch.int32, device=device),
        peaks=torch.empty(max_rows, blocks, dtype=torch.float32, device=device),
        live=torch.empty(max_rows, blocks, dtype=torch.int32, device=device),
        floors=torch.empty(max_rows, dtype=torch.float32, device=device),
    )


# ---- the draw ----


def draw(
    logits: Tensor,
    seats: Tensor,
    lengths: Tensor,
    knobs: Tensor,
    tokens: Tensor,
    ids: Tensor,
    workspace: Workspace,
    floors: Tensor | None = None,
    rows: Tensor | None = None,
) -> None:
    """Choose a token for each row of logits, and append it to the row's sequence.

    At temperature 0 it is the one of the largest logit, the first of equal ones. Of a row that has a logit
    which is not finite it is `NO_TOKEN`, and token 0 is appended, for a step that was launched already.

    Args:
        logits: `[R, V]`, fp16, bf16 or fp32; rows may be strided.
        seats: int32 `[S]`, the record of each row of the batch.
        lengths: int32 `[S]`, tokens of the sequence so far, which is where the choice goes.
        knobs: int32 `[records, words]`, rows may be strided.
        tokens: int32 `[records, longest]`, rows may be strided; entry `lengths` of a row is written.
        ids: int32 `[S]`, gets the choices.
        workspace: of `workspace_for` at least R rows and this V.
        floors: fp32 `[R]`, least logit of each row that may be chosen at a temperature above 0.
        rows: int64 `[R]`, the row of the batch that each row of logits is; None if they are the batch.

    Raises:
        TypeError: for logits of another dtype.
        ValueError: for logits whose rows have gaps.
    """
    _check_logits(logits)
    if not runs_triton(logits.device):
        draw_reference(logits, seats, lengths, knobs, tokens, ids, floors, rows)
        return
    logits = _aligned(logits)
    count, vocab_size = logits.shape
    part = _SMALL_PART if count <= FEW_ROWS else _PART
    parts = triton.cdiv(vocab_size, part)
    _launch(
        draw_kernel, (count * parts, 1, 1),
        logits, seats, lengths, _or(rows, seats), _or(floors, workspace.floors), knobs, tokens, ids,
        workspace.scores, workspace.candidates, workspace.arrivals,
        logits.stride(0), knobs.stride(0), tokens.stride(0),
        VOCAB=vocab_size, PARTS=parts, PART=part, INDEXED=rows is not None, FLOORED=floors is not None,
    )  # fmt: skip


def draw_reference(
    logits: Tensor,
    seats: Tensor,
    lengths: Tensor,
    knobs: Tensor,
    tokens: Tensor,
    ids: Tensor,
    floors: Tensor | None = None,
    rows: Tensor | None = None,
) -> None:
    """Do the kernel's work in torch."""
    places = slice(len(logits)) if rows is None else rows
    seats, lengths = seats[places].long(), lengths[places].long()
    words = knobs[seats]
    temperature = _float_word(words, TEMPERATURE)
    chosen = logits.argmax(-1)
    drawn = (temperature > 0).nonzero().flatten()
    for some in drawn.split(max(1, _ELEMENTS_AT_ONCE // logits.shape[-1])):
        part = logits[some].float()
        if floors is not None:
            part.masked_fill_(part < floors[some, None], -math.inf)
        part *= temperature[some, None].clamp(min=LEAST_TEMPERATURE.value).reciprocal()
        keys = random_keys(_seeds(words[some]), lengths[some] - words[some, PROMPT_LEN.value])
        chosen[some] = (part + gumbel_noise(*keys, logits.shape[-1])).argmax(-1)
    chosen.masked_fill_(~logits.isfinite().all(-1), NO_TOKEN.value)
    ids[places] = chosen.int()
    tokens[seats, lengths] = chosen.clamp(min=0).int()


@triton.jit(do_not_specialize_on_alignment=["seats", "lengths", "rows", "floors", "knobs", "tokens", "ids"])
def draw_kernel(
    logits: tl.tensor,
    seats: tl.tensor,
    lengths: tl.tensor,
    rows: tl.tensor,
    floors: tl.tensor,
    knobs: tl.tensor,
    tokens: tl.tensor,
    ids: tl.tensor,
    scores: tl.tensor,
    candidates: tl.tensor,
    arrivals: tl.tensor,
    logits_stride: tl.tensor,
    knobs_stride: tl.tensor,
    tokens_stride: tl.tensor,
    VOCAB: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    INDEXED: tl.constexpr,
    FLOORED: tl.constexpr,
) -> None:
    """Find the best of PART logits of a row; who completes the row chooses among the parts' best."""
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    token = part * PART + tl.arange(0, PART)
    # What is past the end is finite and loses; what is not finite becomes +inf and wins, whatever follows.
    LEAST: tl.constexpr = -65504.0 if logits.dtype.element_ty == tl.float16 else FORBIDDEN
    score = tl.load(logits + row * logits_stride + token, mask=token < VOCAB, other=LEAST)
    score = score.to(tl.float32)
    score = tl.where(tl.abs(score) < float("inf"), score, float("inf"))
    place = _place(rows, row, INDEXED)
    seat = tl.load(seats + place).to(tl.int64)
    length = tl.load(lengths + place)
    record = knobs + seat * knobs_stride
    temperature = _float(record, TEMPERATURE)
    if temperature > 0:
        if FLOORED:
            score = tl.where(score < tl.load(floors + row), float("-inf"), score)
        first, second = _random_keys(record, length - tl.load(record + PROMPT_LEN))
        score = score * tl.div_rn(1.0, tl.maximum(temperature, LEAST_TEMPERATURE))
        score += _gumbel(token.to(tl.uint32), first, second)
    best, chosen = tl.max(score, axis=0, return_indices=True)
    chosen = tl.where(best < float("inf"), tl.minimum(chosen + part * PART, VOCAB - 1), NO_TOKEN)
    if PARTS > 1:
        WIDTH: tl.constexpr = triton.next_power_of_2(PARTS)
        tl.store(scores + row * PARTS + part, best, cache_modifier=".cg")
        tl.store(candidates + row * PARTS + part, chosen, cache_modifier=".cg")
        tl.debug_barrier()  # both stores, before one thread says so
        if tl.atomic_add(arrivals + row, 1, sem="acq_rel", scope="gpu") < PARTS - 1:
            return
        tl.store(arrivals + row, 0)
        other = tl.arange(0, WIDTH)
        theirs = row * PARTS + other
        score = tl.load(scores + theirs, mask=other < PARTS, other=float("-inf"), cache_modifier=".cg")
        candidate = tl.load(candidates + theirs, mask=other < PARTS, other=VOCAB, cache_modifier=".cg")
        chosen = tl.min(tl.where(score == tl.max(score, axis=0), candidate, VOCAB), axis=0)
    tl.store(ids + place, chosen)
    tl.store(tokens + seat * tokens_stride + length, tl.maximum(chosen, 0))


# ---- random numbers ----


def random_keys(seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Mix 64-bit seeds, held in int64 `[R]`, and positions into two 32-bit keys, int64 `[R]` each."""
    mixed = _mix64_twin(_mix64_twin(seeds) + positions)
    return mixed & _MASK32, (mixed >> 32) & _MASK32


def random_bits(first: Tensor, second: Tensor, count: int) -> Tensor:
    """Hash each row's keys, int64 `[R]`, with the counters 0 to count - 1: int64 `[R, count]` below 2^32."""
    counters = torch.arange(count, device=first.device)
    return _mix32_twin((_mix32_twin(counters ^ first[:, None]) + second[:, None]) & _MASK32)


def gumbel_noise(first: Tensor, second: Tensor, count: int) -> Tensor:
    """Turn the hash into standard Gumbel noise, float32 `[R, count]`.

    With u uniform in (0, 1), -log(-log(1 - u)) is Gumbel; the likely winners have a small u, which
    float32 resolves finely.
    """
    uniform = (random_bits(first, second, count).float() + 0.5) * 2.0**-32
    return -(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24))).log()


def _mix64_twin(x: Tensor) -> Tensor:
    """Scramble 64 bits one to one: the finalizer of splitmix64 (Steele, Lea and Flood 2014).

    Constants above 2^63 stand as their negative twins modulo 2^64, which is how int64 multiplies.
    """
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift 64 bits right, zeros in."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mix32_twin(x: Tensor) -> Tensor:
    """Scramble 32 bits, held in int64, one to one: the finalizer of MurmurHash3 (Appleby 2011).

    A constant above 2^31 stands as its negative twin modulo 2^32, so no product leaves int64.
    """
    x = ((x ^ (x >> 16)) * (0x85EBCA6B - (1 << 32))) & _MASK32
    x = ((x ^ (x >> 13)) * (0xC2B2AE35 - (1 << 32))) & _MASK32
    return x ^ (x >> 16)


@triton.jit
def _random_keys(record: tl.tensor, position: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Mix a record's seed and a position into two keys, uint32; see `random_keys`."""
    low = tl.load(record + SEED_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(record + SEED_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    mixed = _mix64(_mix64((high << 32) | low) + position.to(tl.uint64))
    return mixed.to(tl.uint32), (mixed >> 32).to(tl.uint32)


@triton.jit
def _mix64(x: tl.tensor) -> tl.tensor:
    """Scramble 64 bits, uint64."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _mix32(x: tl.tensor) -> tl.tensor:
    """Scramble 32 bits, uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _gumbel(counter: tl.tensor, first: tl.tensor, second: tl.tensor) -> tl.tensor:
    """Gumbel noise of each counter, fp32; see `gumbel_noise`.

    What rounding 1 - u loses of a small u, the last factor gives back (Goldberg 1991, theorem 4).
    """
    bits = _mix32(_mix32(counter ^ first) + second)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)  # 2^-32, 1 - 2^-24
    rest = 1.0 - u
    exponential = tl.where(rest == 1.0, u, tl.log(rest) * (u / (rest - 1.0)))
    return -tl.log(exponential)


# ---- truncation ----


def find_floors(
    logits: Tensor,
    seats: Tensor,
    knobs: Tensor,
    workspace: Workspace,
    rows: Tensor | None = None,
) -> Tensor:
    """Find the least logit of each row that survives top-k, then top-p, then min-p.

    Probabilities are those at the row's temperature. Arguments and errors are those of `draw`.

    Returns:
        fp32 `[R]`, part of the workspace; -inf for a row that truncates nothing or has temperature 0.
    """
    _check_logits(logits)
    count, vocab_size = logits.shape
    floors = workspace.floors[:count]
    if not runs_triton(logits.device):
        return floors.copy_(floors_reference(logits, seats, knobs, rows))
    logits = _aligned(logits)
    blocks, padded = triton.cdiv(vocab_size, _COLUMNS), _padded_blocks(vocab_size)
    groups = triton.cdiv(blocks, _BLOCKS_AT_ONCE)
    site = (logits, seats, _or(rows, seats), knobs, workspace.peaks)
    strides = (logits.stride(0), knobs.stride(0))
    tiles = {"COLUMNS": _COLUMNS, "AT_ONCE": _BLOCKS_AT_ONCE, "INDEXED": rows is not None}
    _launch(
        peaks_kernel, (count * groups, 1, 1), *site, *strides,
        VOCAB=vocab_size, GROUPS=groups, PADDED=padded, **tiles,
    )  # fmt: skip
    _launch(
        floors_kernel, (count, 1, 1), *site, workspace.live, floors, *strides,
        VOCAB=vocab_size, BLOCKS=blocks, PADDED=padded, DROPPED=_DROPPED_BITS[logits.dtype], **tiles,
        num_warps=16,
    )  # fmt: skip
    return floors


def floors_reference(logits: Tensor, seats: Tensor, knobs: Tensor, rows: Tensor | None = None) -> Tensor:
    """Do the kernels' work in torch."""
    vocab_size = logits.shape[-1]
    words = knobs[seats[slice(None) if rows is None else rows].long()]
    temperature = _float_word(words, TEMPERATURE)
    top_p, min_p = _float_word(words, TOP_P), _float_word(words, MIN_P)
    top_k = words[:, TOP_K.value].long()
    limits = torch.where(top_k > 0, top_k.clamp(max=vocab_size), vocab_size)
    scale = temperature.clamp(min=LEAST_TEMPERATURE.value)
    floors = torch.where(min_p > 0, logits.amax(-1).float() + scale * min_p.log(), -math.inf)
    ranked = ((limits < vocab_size) | (top_p < 1)).nonzero().flatten()
    if len(ranked):
        kept = _rank(logits[ranked].float(), limits[ranked], top_p[ranked], scale[ranked])
        floors[ranked] = torch.maximum(floors[ranked], kept)
    return torch.where(temperature > 0, floors, -math.inf)


def _rank(logits: Tensor, limits: Tensor, top_p: Tensor, scale: Tensor) -> Tensor:
    """Find the least logit `[R]` that survives top-k, then top-p, in rows of float32 logits `[R, V]`."""
    most = logits.shape[-1] if bool((limits == logits.shape[-1]).any()) else int(limits.max())
    ranked = logits.topk(most).values  # [R, most], descending
    kth = ranked.gather(-1, limits[:, None] - 1)
    odds = ((ranked - ranked[:, :1]) / scale[:, None]).exp()
    before = odds.cumsum(-1) - odds  # of the likelier tokens
    total = torch.where(logits < kth, 0, ((logits - ranked[:, :1]) / scale[:, None]).exp()).sum(-1)
    inside = (before < (top_p * total)[:, None]) | (top_p >= 1)[:, None]
    kept = (inside & (ranked >= kth)).sum(-1, keepdim=True).clamp(min=1)
    return ranked.gather(-1, kept - 1)[:, 0]


@triton.jit(do_not_specialize_on_alignment=["seats", "rows", "knobs"])
def peaks_kernel(
    logits: tl.tensor,
    seats: tl.tensor,
    rows: tl.tensor,
    knobs: tl.tensor,
    peaks: tl.tensor,
    logits_stride: tl.tensor,
    knobs_stride: tl.tensor,
    VOCAB: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    INDEXED: tl.constexpr,
) -> None:
    """Find the largest logit of each of AT_ONCE blocks of a row."""
    row = (tl.program_id(0) // GROUPS).to(tl.int64)
    record = knobs + tl.load(seats + _place(rows, row, INDEXED)).to(tl.int64) * knobs_stride
    if not _truncates(record, VOCAB):
        return
    block = (tl.program_id(0) % GROUPS) * AT_ONCE + tl.arange(0, AT_ONCE)
    token = block[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    logit = tl.load(logits + row * logits_stride + token, mask=token < VOCAB, other=float("-inf"))
    logit = logit.to(tl.float32)
    logit = tl.where(logit == logit, logit, float("-inf"))
    tl.store(peaks + row * PADDED + block, tl.max(logit, axis=1), mask=block < PADDED)


@triton.jit(do_not_specialize_on_alignment=["seats", "rows", "knobs", "floors"])
def floors_kernel(
    logits: tl.tensor,
    seats: tl.tensor,
    rows: tl.tensor,
    knobs: tl.tensor,
    peaks: tl.tensor,
    live: tl.tensor,
    floors: tl.tensor,
    logits_stride: tl.tensor,
    knobs_stride: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    DROPPED: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    INDEXED: tl.constexpr,
) -> None:
    """Find the floor of one row by halving the range of floats it may be; see `_highest`.

    Blocks whose peak is below every floor that is still possible are not looked at any more.
    """
    row = tl.program_id(0).to(tl.int64)
    record = knobs + tl.load(seats + _place(rows, row, INDEXED)).to(tl.int64) * knobs_stride
    floor = tl.full((), float("-inf"), tl.float32)
    if _truncates(record, VOCAB):
        temperature = tl.maximum(_float(record, TEMPERATURE), LEAST_TEMPERATURE)
        inverse = tl.div_rn(1.0, temperature)
        mine = logits + row * logits_stride
        listed = live + row * PADDED
        block = tl.arange(0, PADDED)
        peak = tl.load(peaks + row * PADDED + block, mask=block < BLOCKS, other=float("-inf"))
        top = tl.maximum(tl.max(peak, axis=0), -3.0e38)  # finite, if there is no logit to speak of

        top_k = tl.load(record + TOP_K)
        if (top_k > 0) & (top_k < VOCAB):
            # As many blocks as tokens to keep have peaks this high, so the floor is not below.
            least = _kth_peak(peak, top, top_k, DROPPED)
            floor = _highest(
                mine, listed, peak, least, top, top_k.to(tl.float32), top, inverse,
                False, VOCAB, BLOCKS, PADDED, DROPPED, COLUMNS, AT_ONCE,
            )  # fmt: skip
        top_p = _float(record, TOP_P)
        if top_p < 1:
            count = _list_live(listed, peak, floor, BLOCKS, PADDED)
            total = _weigh(mine, listed, count, floor, top, inverse, True, VOCAB, COLUMNS, AT_ONCE)
            # VOCAB tokens below this share weigh less than what may be dropped, with room for rounding.
            least = top + temperature * tl.log((1.0 - top_p) / (2 * VOCAB))
            floor = _highest(
                mine, listed, peak, tl.maximum(floor, least), top, top_p * total, top, inverse,
                True, VOCAB, BLOCKS, PADDED, DROPPED, COLUMNS, AT_ONCE,
            )  # fmt: skip
        min_p = _float(record, MIN_P)
        if min_p > 0:
            floor = tl.maximum(floor, top + temperature * tl.log(min_p))
    tl.store(floors + row, floor)


@triton.jit
def _truncates(record: tl.tensor, VOCAB: tl.constexpr) -> tl.tensor:
    """Whether a record keeps some tokens from being drawn."""
    top_k = tl.load(record + TOP_K)
    limited = ((top_k > 0) & (top_k < VOCAB)) | (_float(record, TOP_P) < 1) | (_float(record, MIN_P) > 0)
    return (_float(record, TEMPERATURE) > 0) & limited


@triton.jit
def _highest(
    logits: tl.tensor,
    listed: tl.tensor,
    peak: tl.tensor,
    least: tl.tensor,
    most: tl.tensor,
    target: tl.tensor,
    top: tl.tensor,
    inverse: tl.tensor,
    MASS: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    DROPPED: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> tl.tensor:
    """Find the highest float from which on up logits weigh `target`; `least` if there is none up to `most`.

    As the weight changes at logits only, that float is a logit of the row.
    """
    low, high = _key(least, DROPPED), _key(most, DROPPED)
    count = _list_live(listed, peak, _value(low, DROPPED), BLOCKS, PADDED)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        at = _value(middle, DROPPED)
        if _weigh(logits, listed, count, at, top, inverse, MASS, VOCAB, COLUMNS, AT_ONCE) >= target:
            low = middle
            if count > AT_ONCE:
                count = _list_live(listed, peak, at, BLOCKS, PADDED)
        else:
            high = middle - 1
    return _value(low, DROPPED)


@triton.jit
def _kth_peak(peak: tl.tensor, top: tl.tensor, k: tl.tensor, DROPPED: tl.constexpr) -> tl.tensor:
    """Find the kth largest of the peaks; -inf if there are not so many."""
    low, high = _key(tl.full((), float("-inf"), tl.float32), DROPPED), _key(top, DROPPED)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        if tl.sum((peak >= _value(middle, DROPPED)).to(tl.int32), axis=0) >= k:
            low = middle
        else:
            high = middle - 1
    return _value(low, DROPPED)


@triton.jit
def _list_live(
    listed: tl.tensor, peak: tl.tensor, least: tl.tensor, BLOCKS: tl.constexpr, PADDED: tl.constexpr
) -> tl.tensor:
    """List the blocks that have a logit of `least` or more, in order; return how many."""
    block = tl.arange(0, PADDED)
    lives = (block < BLOCKS) & (peak >= least)
    place = tl.cumsum(lives.to(tl.int32), axis=0) - 1
    tl.debug_barrier()  # the list as it was is read to the end
    tl.store(listed + place, block, mask=lives)
    tl.debug_barrier()
    return tl.sum(lives.to(tl.int32), axis=0)


@triton.jit
def _weigh(
    logits: tl.tensor,
    listed: tl.tensor,
    count: tl.tensor,
    least: tl.tensor,
    top: tl.tensor,
    inverse: tl.tensor,
    MASS: tl.constexpr,
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> tl.tensor:
    """Count the logits of `least` or more in the listed blocks; with MASS, add their odds against `top`."""
    total = tl.zeros((AT_ONCE, COLUMNS), tl.float32)
    first = count * 0
    while first < count:
        number = first + tl.arange(0, AT_ONCE)
        block = tl.load(listed + number, mask=number < count, other=0)
        token = block[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        there = (number < count)[:, None] & (token < VOCAB)
        logit = tl.load(logits + token, mask=there, other=float("-inf")).to(tl.float32)
        if MASS:
            total += tl.where(logit >= least, tl.exp((logit - top) * inverse), 0.0)
        else:
            total += tl.where(logit >= least, 1.0, 0.0)
        first += AT_ONCE
    return tl.sum(tl.sum(total, axis=1), axis=0)


@triton.jit
def _key(value: tl.tensor, DROPPED: tl.constexpr) -> tl.tensor:
    """Number the floats in their order, int64, leaving out those with one of the DROPPED low bits set."""
    KEPT: tl.constexpr = (0x7FFFFFFF >> DROPPED) << DROPPED
    bits = value.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & KEPT)) >> DROPPED).to(tl.int64)


@triton.jit
def _value(key: tl.tensor, DROPPED: tl.constexpr) -> tl.tensor:
    """Undo `_key`."""
    KEPT: tl.constexpr = (0x7FFFFFFF >> DROPPED) << DROPPED
    bits = key.to(tl.int32) << DROPPED
    return (bits ^ ((bits >> 31) & KEPT)).to(tl.float32, bitcast=True)


# ---- penalties ----


def penalise(
    logits: Tensor,
    rows: Tensor,
    seats: Tensor,
    lengths: Tensor,
    knobs: Tensor,
    tokens: Tensor,
    longest: int,
) -> Tensor:
    """Copy rows of logits, lowering those of tokens that their sequences have had.

    Repetition (CTRL, Keskar et al. 2019, section 4.1) divides positive and multiplies negative logits
    of every token of prompt or answer; presence and frequency subtract once, and once per occurrence,
    for tokens of the answer. The result is cut off at plus and minus `LARGEST`; a logit that is not finite
    becomes NaN. Arguments and errors are those of `draw`, but:

    Args:
        logits: `[S, V]`, of the whole batch.
        rows: int64 `[R]`, the rows to copy; those without penalties stay as they are.
        longest: the largest of these rows' lengths, or more.

    Returns:
        fp32 `[R, V]`.
    """
    _check_logits(logits)
    if not runs_triton(logits.device):
        return penalise_reference(logits, rows, seats, lengths, knobs, tokens, longest)
    logits = _aligned(logits)
    count, vocab_size = len(rows), logits.shape[-1]
    counts = torch.zeros(count, vocab_size, dtype=torch.int32, device=logits.device)
    adjusted = torch.empty(count, vocab_size, dtype=torch.float32, device=logits.device)
    _launch(
        count_kernel, (count, triton.cdiv(longest, _HISTORY), 1),
        rows, seats, lengths, knobs, tokens, counts, knobs.stride(0), tokens.stride(0),
        VOCAB=vocab_size, BLOCK=_HISTORY,
    )  # fmt: skip
    parts = triton.cdiv(vocab_size, _PART)
    _launch(
        penalise_kernel, (count * parts, 1, 1),
        logits, rows, seats, knobs, counts, adjusted, logits.stride(0), knobs.stride(0),
        VOCAB=vocab_size, PARTS=parts, PART=_PART,
    )  # fmt: skip
    return adjusted


def penalise_reference(
    logits: Tensor,
    rows: Tensor,
    seats: Tensor,
    lengths: Tensor,
    knobs: Tensor,
    tokens: Tensor,
    longest: int,
) -> Tensor:
    """Do the kernels' work in torch."""
    adjusted, places = logits[rows].float(), seats[rows].long()
    words = knobs[places]
    history = tokens[places, :longest].long()  # [R, longest]
    position = torch.arange(history.shape[1], device=logits.device)
    past = position < lengths[rows, None]
    answer = past & (position >= words[:, PROMPT_LEN.value, None])
    history.masked_fill_(~past, 0)
    seen = torch.zeros_like(adjusted).scatter_add_(-1, history, past.float()) > 0
    written = torch.zeros_like(adjusted).scatter_add_(-1, history, answer.float())
    repetition, presence, frequency = (
        _float_word(words, word)[:, None] for word in (REPETITION, PRESENCE, FREQUENCY)
    )
    repeated = torch.where(adjusted > 0, adjusted / repetition, adjusted * repetition)
    lowered = torch.where(seen, repeated, adjusted) - presence * (written > 0) - frequency * written
    lowered.clamp_(-LARGEST.value, LARGEST.value)
    return lowered.masked_fill_(~adjusted.isfinite(), math.nan)


@triton.jit(do_not_specialize_on_alignment=["rows", "seats", "lengths", "knobs", "tokens"])
def count_kernel(
    rows: tl.tensor,
    seats: tl.tensor,
    lengths: tl.tensor,
    knobs: tl.tensor,
    tokens: tl.tensor,
    counts: tl.tensor,
    knobs_stride: tl.tensor,
    tokens_stride: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Count BLOCK tokens of a sequence: two for one of the answer, and one, once, for those of the prompt."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(rows + row)
    seat = tl.load(seats + place).to(tl.int64)
    record = knobs + seat * knobs_stride
    subtracts = (_float(record, PRESENCE) != 0) | (_float(record, FREQUENCY) != 0)
    if not (subtracts | (_float(record, REPETITION) != 1)):
        return
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    past = position < tl.load(lengths + place)
    token = tl.load(tokens + seat * tokens_stride + position, mask=past, other=0)
    written = position >= tl.load(record + PROMPT_LEN)
    target = counts + row * VOCAB + token
    tl.atomic_add(target, 2, mask=past & written, sem="relaxed")
    tl.atomic_or(target, 1, mask=past & ~written, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["rows", "seats", "knobs"])
def penalise_kernel(
    logits: tl.tensor,
    rows: tl.tensor,
    seats: tl.tensor,
    knobs: tl.tensor,
    counts: tl.tensor,
    adjusted: tl.tensor,
    logits_stride: tl.tensor,
    knobs_stride: tl.tensor,
    VOCAB: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    """Copy PART logits of a row, lowering those that were counted."""
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    place = tl.load(rows + row)
    record = knobs + tl.load(seats + place).to(tl.int64) * knobs_stride
    token = (tl.program_id(0) % PARTS) * PART + tl.arange(0, PART)
    there = token < VOCAB
    logit = tl.load(logits + place * logits_stride + token, mask=there).to(tl.float32)
    finite = tl.abs(logit) < float("inf")
    counted = tl.load(counts + row * VOCAB + token, mask=there, other=0)
    written = (counted >> 1).to(tl.float32)
    repetition = _float(record, REPETITION)
    repeated = tl.where(logit > 0, tl.div_rn(logit, repetition), logit * repetition)
    logit = tl.where(counted > 0, repeated, logit)
    logit -= tl.where(written > 0, _float(record, PRESENCE), 0.0)
    logit -= _float(record, FREQUENCY) * written
    logit = tl.where(finite, tl.minimum(tl.maximum(logit, -LARGEST), LARGEST), float("nan"))
    tl.store(adjusted + row * VOCAB + token, logit, mask=there)


# ---- what they share ----


@triton.jit
def _place(rows: tl.tensor, row: tl.tensor, INDEXED: tl.constexpr) -> tl.tensor:
    """Tell which row of the batch a row of logits is."""
    place = row
    if INDEXED:
        place = tl.load(rows + row)
    return place


@triton.jit
def _float(record: tl.tensor, WORD: tl.constexpr) -> tl.tensor:
    """Load a float32 knob."""
    return tl.load(record + WORD).to(tl.float32, bitcast=True)


def _float_word(words: Tensor, word: tl.constexpr) -> Tensor:
    """Pick a float32 knob `[R]` out of records' words, int32 `[R, words]`."""
    return words[:, word.value].contiguous().view(torch.float32)


def _seeds(words: Tensor) -> Tensor:
    """Join the halves of seeds, unsigned 64-bit held in int64 `[R]`."""
    return (words[:, SEED_HIGH.value].long() << 32) | (words[:, SEED_LOW.value].long() & _MASK32)


def _padded_blocks(vocab_size: int) -> int:
    """Blocks of a row, to a power of two."""
    return triton.next_power_of_2(triton.cdiv(vocab_size, _COLUMNS))


def _check_logits(logits: Tensor) -> None:
    """Check what the kernels rely on."""
    check_float("logits", logits)
    if logits.stride(1) != 1:
        raise ValueError(f"logits: stride of the last dimension must be 1, got {logits.stride(1)}")


def _aligned(logits: Tensor) -> Tensor:
    """Copy logits that do not start where a vector may; rows that do not are the stride's to tell."""
    return logits if logits.data_ptr() % ALIGNMENT == 0 else logits.clone()


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """Give a kernel some pointer for what it will not look at."""
    return unused if tensor is None else tensor


def _launch(
    kernel: Any,
    grid: tuple[int, int, int],
    *args: Tensor | int,
    num_warps: int = 4,
    **constants: int,
) -> None:
    """Launch a kernel past Triton's own, slower way."""
    first = args[0]
    assert isinstance(first, Tensor)
    kinds = tuple(arg.dtype if isinstance(arg, Tensor) else arg for arg in args)
    compiled = _compile(kernel, first.device, kinds, tuple(constants.items()), num_warps)
    with on_device(first.device):
        compiled[grid](*args, *constants.values())


@lru_cache(maxsize=256)
def _compile(
    kernel: Any,
    device: torch.device,
    kinds: Sequence[torch.dtype | int],
    constants: Sequence[tuple[str, int]],
    num_warps: int,
) -> Any:
    """Compile for tensors of these dtypes and these integers."""
    return compile_kernel(kernel, device, *kinds, **dict(constants), num_warps=num_warps)
