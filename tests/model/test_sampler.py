"""The sampler against naive references, one row at a time, and against transformers' processors."""

import math
from collections import Counter
from collections.abc import Sequence
from types import MappingProxyType

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fusewire.model import sampler
from fusewire.model.batch import SampleSpec
from fusewire.model.sampler import gumbel_noise, penalise, random_bits, random_key, sample, truncation_floor
from fusewire.model.sampling_params import SamplingParams

CPU = torch.device("cpu")


def spec(
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    banned: Sequence[int] = (),
) -> SampleSpec:
    return SampleSpec(params, prompt, output, banned)


# ---- truncation ----


def naive_survivors(scores: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """Top-k, then top-p, then min-p in float64; tokens equal to the last one kept stay with it."""
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    kept = set(order)
    if 0 < top_k < len(scores):
        kept = {token for token in order if scores[token] >= scores[order[top_k - 1]]}
    if top_p < 1:
        total = sum(math.exp(scores[token]) for token in kept)
        mass, last = 0.0, -math.inf
        for token in (token for token in order if token in kept):
            assume(abs(mass - top_p) > 1e-5)  # a cut this close is float32's to decide
            if mass >= top_p:
                break
            mass += math.exp(scores[token]) / total
            last = scores[token]
        kept = {token for token in kept if scores[token] >= last}
    if min_p > 0:
        assume(all(abs(score - math.log(min_p)) > 1e-5 for score in scores))
        kept = {token for token in kept if scores[token] >= math.log(min_p)}
    return kept


rows_of_scores = st.integers(1, 24).flatmap(
    lambda width: st.lists(
        st.tuples(
            st.lists(st.integers(-40, 0).map(lambda n: n / 4), min_size=width, max_size=width),
            st.integers(0, 30),
            st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
            st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
        ),
        min_size=1,
        max_size=5,
    )
)


@given(rows=rows_of_scores)
@settings(max_examples=300, deadline=None)
def test_truncation_equals_the_naive_one(rows: list[tuple[list[float], int, float, float]]) -> None:
    rows = [([score - max(scores) for score in scores], *knobs) for scores, *knobs in rows]  # type: ignore[misc]
    scores = torch.tensor([row[0] for row in rows])
    floor = truncation_floor(scores, *([row[n] for row in rows] for n in (1, 2, 3)))
    survivors = [set(row.nonzero()[:, 0].tolist()) for row in scores >= floor]
    assert survivors == [naive_survivors(*row) for row in rows]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1), (20, 0.95, 0.02)]
)
def test_truncation_equals_that_of_transformers(top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(64, 200, generator=torch.Generator().manual_seed(0)) * 3
    expected = logits
    for warper in (
        TopKLogitsWarper(top_k) if top_k else None,
        TopPLogitsWarper(top_p) if top_p < 1 else None,
        MinPLogitsWarper(min_p) if min_p else None,
    ):
        expected = expected if warper is None else warper(torch.zeros(64, 1), expected)
    scores = logits - logits.amax(-1, keepdim=True)
    survivors = scores >= truncation_floor(scores, [top_k] * 64, [top_p] * 64, [min_p] * 64)
    assert torch.equal(survivors, expected.isfinite())


# ---- penalties, bias, bans ----


@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.floats(-8, 8, width=32), min_size=9, max_size=9),
            st.lists(st.integers(0, 8), max_size=12),
            st.lists(st.integers(0, 8), max_size=12),
            st.one_of(st.just(1.0), st.floats(0.5, 3)),
            st.floats(-2, 2),
            st.floats(-2, 2),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=150, deadline=None)
def test_penalties_equal_the_naive_ones(
    rows: list[tuple[list[float], list[int], list[int], float, float, float]],
) -> None:
    expected = []
    specs = []
    for logits, prompt, output, repetition, presence, frequency in rows:
        written = Counter(output)
        seen = {*prompt, *output}
        expected.append(
            [
                logit if token not in seen else logit / repetition if logit > 0 else logit * repetition
                for token, logit in enumerate(logits)
            ]
        )
        for token, count in written.items():
            expected[-1][token] -= presence + frequency * count
        params = SamplingParams(
            repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
        )
        specs.append(spec(params, prompt, output))
    actual = torch.tensor([row[0] for row in rows])
    penalise(actual, specs)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_repetition_penalty_equals_that_of_transformers() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    seen = [3, 7, 7, 20, 41]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), logits.clone())
    penalise(logits, [spec(SamplingParams(repetition_penalty=1.3), seen[:2], seen[2:])])
    torch.testing.assert_close(logits, expected)


def test_bias_bans_and_penalties_move_a_greedy_choice() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(5, 1)
    specs = [
        spec(SamplingParams()),
        spec(SamplingParams(), banned=[3, 2]),
        spec(SamplingParams(logit_bias={0: 10.0, 3: -1.0})),
        spec(SamplingParams(presence_penalty=2.0), output=[3]),
        spec(SamplingParams(logit_bias={3: 100.0}), banned=[3]),
    ]
    assert [sampled.token_id for sampled in sample(logits, specs)] == [3, 1, 0, 2, 2]
    assert logits.tolist() == [[0.0, 1.0, 2.0, 3.0]] * 5


# ---- random numbers ----


def naive_mix(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)


@given(key=st.tuples(*[st.integers(0, 2**32 - 1)] * 2))
@settings(max_examples=50, deadline=None)
def test_the_hash_equals_the_one_in_python_integers(key: tuple[int, int]) -> None:
    bits = random_bits([key, (1, 2)], 40, CPU)[0].tolist()
    assert bits == [naive_mix((naive_mix(token ^ key[0]) + key[1]) % 2**32) for token in range(40)]


def test_the_key_tells_seeds_and_positions_apart() -> None:
    seeds = [*range(300), 2**64 - 1, 2**63, 0x9E3779B97F4A7C15]
    keys = {random_key(seed, position) for seed in seeds for position in range(300)}
    assert len(keys) == len(seeds) * 300


def test_the_noise_is_gumbel() -> None:
    noise = gumbel_noise([random_key(5, position) for position in range(64)], 4096, CPU).double()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)  # Euler's constant
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.01)
    ordered = noise.flatten().sort().values
    empirical = torch.arange(1, ordered.numel() + 1) / ordered.numel()
    assert (torch.exp(-torch.exp(-ordered)) - empirical).abs().max() < 0.004  # Kolmogorov-Smirnov


DRAWS = 20_000


def chi_square(tokens: list[int], probabilities: torch.Tensor) -> float:
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probabilities)).double()
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities[probabilities > 0].double() * len(tokens)
    return ((counts[probabilities > 0] - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_frequencies_match_the_softmax(vary: str) -> None:
    logits = torch.linspace(-1.5, 1.5, 20)[torch.randperm(20, generator=torch.Generator().manual_seed(2))]
    specs = [
        spec(
            SamplingParams(temperature=0.7, seed=n if vary == "seed" else 11),
            output=range(n if vary == "position" else 4),
        )
        for n in range(DRAWS)
    ]
    tokens = [sampled.token_id for sampled in sample(logits.expand(DRAWS, -1), specs)]
    assert chi_square(tokens, (logits / 0.7).softmax(-1)) < 43.8  # 99.9 % point for 19 degrees of freedom


def test_frequencies_match_the_truncated_softmax() -> None:
    logits = torch.linspace(-2, 2, 20)
    params = SamplingParams(temperature=1.5, top_k=8, top_p=0.9)
    specs = [spec(params, output=range(n)) for n in range(DRAWS)]
    tokens = [sampled.token_id for sampled in sample(logits.expand(DRAWS, -1), specs)]
    probabilities = (logits / 1.5).softmax(-1)
    probabilities[:13] = 0  # top-k leaves 8, of which the first 7 hold 0.927
    assert chi_square(tokens, probabilities / probabilities.sum()) < 22.5  # 99.9 %, 6 degrees


any_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-30, 0.3, 1.0, 50.0]),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.5),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    logit_bias=st.dictionaries(st.integers(0, 49), st.floats(-5, 5), max_size=3),
    logprobs=st.integers(0, 4),
)
any_specs = st.lists(
    st.builds(
        spec,
        any_params,
        st.lists(st.integers(0, 49), max_size=5),
        st.lists(st.integers(0, 49), max_size=9),
        st.lists(st.integers(0, 49), max_size=2),
    ),
    min_size=1,
    max_size=6,
)


@given(specs=any_specs, at_once=st.integers(1, 200), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_row_draws_the_same_alone_and_in_any_batch(
    specs: list[SampleSpec], at_once: int, data: st.DataObject
) -> None:
    logits = torch.randn(len(specs), 50, generator=torch.Generator().manual_seed(4)) * 2
    alone = [sample(logits[row : row + 1], [specs[row]])[0] for row in range(len(specs))]
    order = data.draw(st.permutations(range(len(specs))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "_ELEMENTS_AT_ONCE", MappingProxyType({"cpu": at_once}))
        together = sample(logits[order], [specs[row] for row in order])
    assert [sampled.token_id for sampled in together] == [alone[row].token_id for row in order]
    for sampled, row in zip(together, order, strict=True):
        assert len(sampled.top) == specs[row].params.logprobs
        assert [token for token, _ in sampled.top] == [token for token, _ in alone[row].top]
        assert sampled.logprob == (pytest.approx(alone[row].logprob) if specs[row].params.logprobs else None)


def test_a_tiny_temperature_is_greedy_and_equal_logits_share_the_draw() -> None:
    logits = torch.tensor([[5.0, 5.5, 100.0, 99.9], [1.0, 1.0, -50.0, -50.0]])
    cold = spec(SamplingParams(temperature=1e-45))
    assert sample(logits[:1], [cold])[0].token_id == 2
    specs = [spec(SamplingParams(temperature=1.0, top_k=1, seed=seed)) for seed in range(40)]
    assert {sampled.token_id for sampled in sample(logits[1:].expand(40, -1), specs)} == {0, 1}


# ---- log-probabilities ----


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(5), dtype=torch.bfloat16)
    expected = logits.float().log_softmax(-1)
    specs = [
        spec(SamplingParams(logprobs=3, logit_bias={7: 100.0}, temperature=2.0)),
        spec(SamplingParams()),
        spec(SamplingParams(logprobs=1, repetition_penalty=2.0), prompt=range(30)),
    ]
    first, second, third = sample(logits, specs)
    assert first.token_id == 7
    assert first.logprob == pytest.approx(expected[0, 7].item())
    best = expected[0].topk(3)
    assert [value for _, value in first.top] == pytest.approx(best.values.tolist())
    assert [expected[0, token].item() for token, _ in first.top] == pytest.approx(best.values.tolist())
    assert (second.logprob, second.top) == (None, ())
    assert third.logprob is not None
    assert len(third.top) == 1
