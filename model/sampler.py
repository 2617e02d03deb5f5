"""Chooses the next token of each row from its logits.

Vectorised over rows. Random numbers depend only on (seed, position): a counter-based hash gives
every token of the vocabulary its own number, so a request draws the same token alone or in any
batch, on any device. Knows nothing of sequences beyond the ids it is handed.
"""

import math
from collections.abc import Callable, Sequence
from itertools import chain
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from fusewire.model.batch import Sampled, SampleSpec
from fusewire.model.device import to_device

_MIN_TEMPERATURE = 1e-6
"""Below this, scaled differences of logits lose their meaning in float32; the draw is greedy anyway."""
_ELEMENTS_AT_ONCE = MappingProxyType({"cpu": 1 << 18, "cuda": 1 << 24})
"""Logits shaped together: what stays in a CPU's cache; what bounds working memory on a GPU."""
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


@torch.inference_mode()
def sample(logits: Tensor, specs: Sequence[SampleSpec]) -> list[Sampled]:
    """Choose a token for each row of logits [S, V]; waits for the device once.

    The order is: repetition, presence and frequency penalty, logit bias, bans; then temperature,
    top-k, top-p, min-p and the draw. Log-probabilities are of the logits as they came.
    """
    chosen = logits.argmax(-1)
    shaped = _where(specs, lambda spec: not _is_plain(spec))
    at_once = max(_ELEMENTS_AT_ONCE[logits.device.type] // logits.shape[-1], 1)
    for start in range(0, len(shaped), at_once):
        part = shaped[start : start + at_once]
        rows = _index(part, logits)
        chosen[rows] = _choose(logits[rows].float(), [specs[row] for row in part])
    return _report(logits, chosen, specs)


def _where(specs: Sequence[SampleSpec], predicate: Callable[[SampleSpec], bool]) -> list[int]:
    return [row for row, spec in enumerate(specs) if predicate(spec)]


def _is_plain(spec: SampleSpec) -> bool:
    """Whether the row's token is just the argmax of its logits."""
    params = spec.params
    return params.greedy and not (params.penalised or params.logit_bias or spec.banned_ids)


def _choose(logits: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """Choose a token [R] for rows of float32 logits [R, V], which are overwritten."""
    penalise(logits, specs)
    for entries, accumulate in ((_biases(specs), True), (_bans(specs), False)):
        if entries:
            rows, ids, values = zip(*entries, strict=True)
            index = (_index(rows, logits), _index(ids, logits))
            logits.index_put_(index, _floats(values, logits), accumulate=accumulate)
    chosen = logits.argmax(-1)
    if drawn := _where(specs, lambda spec: not spec.params.greedy):
        rows_drawn = _index(drawn, logits)
        chosen[rows_drawn] = _draw(logits[rows_drawn], [specs[row] for row in drawn])
    return chosen


def _biases(specs: Sequence[SampleSpec]) -> list[tuple[int, int, float]]:
    return [
        (row, token, bias) for row, spec in enumerate(specs) for token, bias in spec.params.logit_bias.items()
    ]


def _bans(specs: Sequence[SampleSpec]) -> list[tuple[int, int, float]]:
    return [(row, token, -math.inf) for row, spec in enumerate(specs) for token in spec.banned_ids]


def penalise(logits: Tensor, specs: Sequence[SampleSpec]) -> None:
    """Lower, in place, the logits [R, V] of tokens seen before, for the rows that ask for it.

    Repetition (CTRL, Keskar et al. 2019, section 4.1) divides positive and multiplies negative
    logits of every token of prompt or output; presence and frequency subtract once, and once per
    occurrence, for tokens of the output.
    """
    penalised = _where(specs, lambda spec: spec.params.penalised)
    if not penalised:
        return
    rows = _index(penalised, logits)
    params = [specs[row].params for row in penalised]
    part = logits[rows]  # [R', V]
    written = _counts([specs[row].output_ids for row in penalised], part)
    seen = (_counts([specs[row].prompt_ids for row in penalised], part) + written) > 0
    repetition = _floats([p.repetition_penalty for p in params], part)[:, None]
    presence = _floats([p.presence_penalty for p in params], part)[:, None]
    frequency = _floats([p.frequency_penalty for p in params], part)[:, None]
    part = torch.where(seen, torch.where(part > 0, part / repetition, part * repetition), part)
    logits[rows] = part - presence * (written > 0) - frequency * written


def _counts(ids: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """Count the occurrences of each token id per row, as float32 of the shape of `like`."""
    counts = torch.zeros_like(like)
    total = sum(map(len, ids))
    if total:
        rows = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
        columns = np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=total)
        index = to_device(np.stack([rows, columns]), like.device)
        counts.index_put_((index[0], index[1]), torch.ones((), device=like.device), accumulate=True)
    return counts


def _draw(logits: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """Draw a token [R] from rows of adjusted logits [R, V] by the Gumbel-max trick."""
    params = [spec.params for spec in specs]
    temperature = _floats([max(p.temperature, _MIN_TEMPERATURE) for p in params], logits)
    scores = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]
    floor = truncation_floor(
        scores, [p.top_k for p in params], [p.top_p for p in params], [p.min_p for p in params]
    )
    scores.masked_fill_(scores < floor, -math.inf)
    keys = [random_key(spec.params.seed, len(spec.output_ids)) for spec in specs]
    return (scores + gumbel_noise(keys, scores.shape[-1], scores.device)).argmax(-1)


def truncation_floor(
    scores: Tensor, top_k: Sequence[int], top_p: Sequence[float], min_p: Sequence[float]
) -> Tensor:
    """Find the least score [R, 1] that survives top-k, then top-p, then min-p, in each row.

    `scores` [R, V] are float32 log-weights whose maximum is 0 in every row. A floor instead of a
    set of indices keeps or drops equal tokens together, whatever order a sort leaves them in.
    """
    floor = _floats([math.log(p) if p > 0 else -math.inf for p in min_p], scores)[:, None]
    vocabulary = scores.shape[-1]
    limits = [k if 0 < k < vocabulary else vocabulary for k in top_k]
    ranked_rows = [row for row, k in enumerate(limits) if k < vocabulary or top_p[row] < 1]
    if not ranked_rows:
        return floor
    rows = _index(ranked_rows, scores)
    part = scores[rows]  # [R', V]
    limit = _index([limits[row] for row in ranked_rows], scores)[:, None]
    ranked = part.topk(max(limits[row] for row in ranked_rows)).values  # [R', most], descending
    kth = ranked.gather(-1, limit - 1)
    mass = _floats([top_p[row] if top_p[row] < 1 else math.inf for row in ranked_rows], scores)[:, None]
    total = part.masked_fill(part < kth, -math.inf).logsumexp(-1, keepdim=True)
    probabilities = (ranked - total).exp()
    before = probabilities.cumsum(-1) - probabilities  # mass of the likelier tokens
    kept = (before < mass).sum(-1, keepdim=True).clamp(min=1)
    nucleus = ranked.gather(-1, kept - 1)
    floor[rows] = torch.maximum(floor[rows], torch.maximum(kth, nucleus))
    return floor


def random_key(seed: int, position: int) -> tuple[int, int]:
    """Mix an unsigned 64-bit seed and a token's position into two 32-bit keys."""
    mixed = _mix64((_mix64(seed & _MASK64) + position) & _MASK64)
    return mixed & _MASK32, mixed >> 32


def _mix64(x: int) -> int:
    """Scramble 64 bits one to one: the finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _mix32(x: Tensor) -> Tensor:
    """Scramble 32 bits, held in int64, one to one: the finalizer of MurmurHash3 (Appleby 2011).

    A constant above 2^31 stands as its negative twin modulo 2^32, so no product leaves int64.
    """
    x = ((x ^ (x >> 16)) * (0x85EBCA6B - (1 << 32))) & _MASK32
    x = ((x ^ (x >> 13)) * (0xC2B2AE35 - (1 << 32))) & _MASK32
    return x ^ (x >> 16)


def random_bits(keys: Sequence[tuple[int, int]], count: int, device: torch.device) -> Tensor:
    """Hash each row's key with the counters 0 to count - 1: int64 [rows, count] below 2^32."""
    first, second = to_device(np.array(keys, dtype=np.int64).T.copy(), device)[:, :, None]
    counters = torch.arange(count, device=device)
    return _mix32((_mix32(counters ^ first) + second) & _MASK32)


def gumbel_noise(keys: Sequence[tuple[int, int]], count: int, device: torch.device) -> Tensor:
    """Turn the hash into standard Gumbel noise, float32 [rows, count].

    With u uniform in (0, 1), -log(-log(1 - u)) is Gumbel; the likely winners have a small u, which
    float32 resolves finely.
    """
    uniform = (random_bits(keys, count, device).float() + 0.5) * 2.0**-32
    return -(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24))).log()


def _report(logits: Tensor, chosen: Tensor, specs: Sequence[SampleSpec]) -> list[Sampled]:
    """Bring chosen tokens, and log-probabilities where asked for, to the host in one copy."""
    asking = _where(specs, lambda spec: spec.params.logprobs > 0)
    if not asking:
        return [Sampled(token) for token in chosen.tolist()]
    rows = _index(asking, logits)
    logprobs = logits[rows].float().log_softmax(-1)
    top = logprobs.topk(max(specs[row].params.logprobs for row in asking))
    own = logprobs.gather(-1, chosen[rows, None])
    details = torch.cat([own, top.values, top.indices.double()], dim=-1)  # float64 holds ids exactly
    packed = torch.cat([chosen.double(), details.flatten()]).tolist()
    sampled = [Sampled(int(token)) for token in packed[: len(specs)]]
    width = details.shape[-1]
    for number, row in enumerate(asking):
        start = len(specs) + number * width
        logprob, *rest = packed[start : start + width]
        values, ids = rest[: width // 2], rest[width // 2 :]
        best = list(zip(map(int, ids), values, strict=True))[: specs[row].params.logprobs]
        sampled[row] = Sampled(sampled[row].token_id, logprob, tuple(best))
    return sampled


def _index(values: Sequence[int], like: Tensor) -> Tensor:
    return to_device(np.array(values, dtype=np.int64), like.device)


def _floats(values: Sequence[float], like: Tensor) -> Tensor:
    return to_device(np.array(values, dtype=np.float32), like.device)
