"""The sampler against naive references, one row at a time, and against transformers' processors."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fusewire.kernels import sampling
from fusewire.kernels.sampling import find_floors, gumbel_noise, random_bits, random_keys, workspace_for
from fusewire.model.batch import Row, Sampled, Seating
from fusewire.model.sampler import Choice, Sampler
from fusewire.model.sampling_params import SamplingParams
from fusewire.model.seats import KNOBS, SeatTable

CPU = torch.device("cpu")
on_gpu = pytest.mark.gpu


@dataclass(frozen=True)
class Asked:
    """A sequence that wants its next token."""

    params: SamplingParams
    prompt: Sequence[int] = (0,)
    output: Sequence[int] = ()
    banned: Sequence[int] = ()

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.output]


class Seated:
    """Sequences on seats of their own, not in order, and a sampler for them."""

    def __init__(self, asked: Sequence[Asked], vocab_size: int, device: torch.device = CPU) -> None:
        self.asked = asked
        longest = max(len(one.tokens) for one in asked)
        self.table = SeatTable(len(asked), longest + 8, 3, device)
        self.seats = [len(asked) - 1 - number for number in range(len(asked))]
        for seat, one in zip(self.seats, asked, strict=True):
            self.table.seat([Seating(seat, one.tokens, len(one.prompt), [0], one.params)])
        self.sampler = Sampler(self.table, vocab_size, len(asked))

    def choose(self, logits: Tensor, which: Sequence[int] | None = None, later: int = 0) -> Choice:
        """Choose for some of the sequences, `later` tokens after they were seated."""
        which = range(len(self.asked)) if which is None else which
        lengths = [len(self.asked[number].tokens) + later for number in which]
        rows = [
            Row(self.seats[number], length - 1, 1, True, banned_ids=self.asked[number].banned)
            for number, length in zip(which, lengths, strict=True)
        ]
        device = self.table.device
        seats = torch.tensor([row.seat for row in rows], dtype=torch.int32).to(device)
        at = torch.tensor(lengths, dtype=torch.int32).to(device)
        return self.sampler.choose(logits, rows, seats, at)


def sample(logits: Tensor, asked: Sequence[Asked]) -> list[Sampled]:
    return Seated(asked, logits.shape[-1], logits.device).choose(logits).collect()


def ids_of(sampled: Sequence[Sampled]) -> list[int]:
    return [one.token_id for one in sampled]


def test_the_kernels_find_the_knobs_where_the_table_has_them() -> None:
    words = ("TEMPERATURE", "TOP_P", "MIN_P", "REPETITION", "PRESENCE", "FREQUENCY", "TOP_K", "PROMPT_LEN")
    words += ("SEED_LOW", "SEED_HIGH")
    assert [getattr(sampling, word).value for word in words] == list(range(len(KNOBS)))
    for word, knob in zip(words, KNOBS, strict=True):
        assert knob.removesuffix("_penalty") == word.lower()


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


def survivors(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    table = Seated([Asked(one) for one in params], logits.shape[-1])
    workspace = workspace_for(*logits.shape, CPU)
    floors = find_floors(logits, torch.tensor(table.seats, dtype=torch.int32), table.table.knobs, workspace)
    return logits >= floors[:, None]


rows_of_scores = st.integers(1, 24).flatmap(
    lambda width: st.lists(
        st.tuples(
            st.lists(st.integers(-40, 0).map(lambda n: n / 4), min_size=width, max_size=width),
            st.integers(0, 30),
            st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
            st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
            st.sampled_from([0.5, 1.0, 4.0]),
            st.integers(-9, 9),
        ),
        min_size=1,
        max_size=5,
    )
)


@given(rows=rows_of_scores)
@settings(max_examples=300, deadline=None)
def test_truncation_equals_the_naive_one(
    rows: list[tuple[list[float], int, float, float, float, int]],
) -> None:
    logits, params, expected = [], [], []
    for scores, top_k, top_p, min_p, temperature, shift in rows:
        logits.append([score * temperature + shift for score in scores])
        params.append(SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
        relative = [score - max(scores) for score in scores]
        expected.append(naive_survivors(relative, top_k, top_p, min_p))
    kept = survivors(torch.tensor(logits), params)
    assert [set(row.nonzero()[:, 0].tolist()) for row in kept] == expected


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
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    assert torch.equal(survivors(logits, [params] * 64), expected.isfinite())


def test_a_greedy_row_is_not_truncated() -> None:
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    knobs = [SamplingParams(temperature=t, top_k=3, top_p=0.5, min_p=0.1) for t in (0.0, 1.0)]
    assert survivors(logits, knobs).all(-1).tolist() == [True, False]


# ---- penalties, bias, bans ----


def adjusted(logits: Tensor, asked: Sequence[Asked]) -> Tensor:
    seated = Seated(asked, logits.shape[-1])
    return sampling.penalise(
        logits,
        torch.arange(len(asked)),
        torch.tensor(seated.seats, dtype=torch.int32),
        torch.tensor([len(one.tokens) for one in asked], dtype=torch.int32),
        seated.table.knobs,
        seated.table.tokens,
        max(len(one.tokens) for one in asked),
    )


@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.floats(-8, 8, width=32), min_size=9, max_size=9),
            st.lists(st.integers(0, 8), min_size=1, max_size=12),
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
    asked = []
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
        asked.append(Asked(params, prompt, output))
    actual = adjusted(torch.tensor([row[0] for row in rows]), asked)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_repetition_penalty_equals_that_of_transformers() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    seen = [3, 7, 7, 20, 41]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), logits.clone())
    actual = adjusted(logits, [Asked(SamplingParams(repetition_penalty=1.3), seen[:2], seen[2:])])
    torch.testing.assert_close(actual, expected)


def test_a_bias_of_minus_infinity_bans_as_transformers_does() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(2))
    banned = [int(logits.argmax()), 7]
    expected = SuppressTokensLogitsProcessor(banned)(torch.tensor([[0]]), logits.clone())
    asked = Asked(SamplingParams(logit_bias=dict.fromkeys(banned, -math.inf)))
    assert ids_of(sample(logits, [asked])) == [int(expected.argmax())]


def test_bias_bans_and_penalties_move_a_greedy_choice() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(6, 1)
    asked = [
        Asked(SamplingParams()),
        Asked(SamplingParams(), banned=[3, 2]),
        Asked(SamplingParams(logit_bias={0: 10.0, 3: -1.0})),
        Asked(SamplingParams(presence_penalty=2.0), output=[3]),
        Asked(SamplingParams(logit_bias={3: 100.0}), banned=[3]),
        Asked(SamplingParams(presence_penalty=2.0), prompt=[3]),
    ]
    assert ids_of(sample(logits, asked)) == [3, 1, 0, 2, 2, 3]
    assert ids_of(sample(logits[1:5], asked[1:5])) == [1, 0, 2, 2]  # no row is as it came
    assert logits.tolist() == [[0.0, 1.0, 2.0, 3.0]] * 6


def test_what_a_seat_held_before_does_not_count() -> None:
    seated = Seated([Asked(SamplingParams(presence_penalty=5.0), [0], [3, 3, 3])], 4)
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert ids_of(seated.choose(logits).collect()) == [2]
    seated.table.seat([Seating(0, [0], 1, [0], SamplingParams(presence_penalty=4.0))])
    seated.asked = [Asked(SamplingParams(), [0])]
    assert ids_of(seated.choose(logits).collect()) == [3]


def test_new_knobs_on_a_seat_are_seen() -> None:
    seated = Seated([Asked(SamplingParams())], 4)
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    first = seated.choose(logits).collect()
    seated.table.seat([Seating(0, [0], 1, [0], SamplingParams(logit_bias={1: 9.0}, logprobs=2))])
    second = seated.choose(logits).collect()
    assert ids_of(first + second) == [3, 1]
    assert (len(first[0].top), len(second[0].top)) == (0, 2)


# ---- random numbers ----


def naive_mix(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)


def naive_key(seed: int, position: int) -> tuple[int, int]:
    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    mixed = mix((mix(seed) + position) % 2**64)
    return mixed % 2**32, mixed >> 32


def keys_of(seeds: Sequence[int], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    signed = [seed - 2**64 if seed >= 2**63 else seed for seed in seeds]
    return random_keys(torch.tensor(signed), torch.tensor(positions))


words = st.integers(0, 2**32 - 1)


@given(first=words, second=words)
@settings(max_examples=50, deadline=None)
def test_the_hash_equals_the_one_in_python_integers(first: int, second: int) -> None:
    bits = random_bits(torch.tensor([first, 1]), torch.tensor([second, 2]), 40)[0].tolist()
    assert bits == [naive_mix((naive_mix(token ^ first) + second) % 2**32) for token in range(40)]


@given(seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5), position=st.integers(0, 2**31 - 1))
@settings(max_examples=50, deadline=None)
def test_the_keys_equal_those_in_python_integers(seeds: list[int], position: int) -> None:
    first, second = keys_of(seeds, [position] * len(seeds))
    assert [*zip(first.tolist(), second.tolist(), strict=True)] == [naive_key(s, position) for s in seeds]


def test_the_key_tells_seeds_and_positions_apart() -> None:
    seeds = [*range(300), 2**64 - 1, 2**63, 0x9E3779B97F4A7C15]
    first, second = keys_of([seed for seed in seeds for _ in range(300)], [*range(300)] * len(seeds))
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == len(seeds) * 300


def test_the_noise_is_gumbel() -> None:
    noise = gumbel_noise(*keys_of([5] * 64, range(64)), 4096).double()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)  # Euler's constant
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.01)
    ordered = noise.flatten().sort().values
    empirical = torch.arange(1, ordered.numel() + 1) / ordered.numel()
    assert (torch.exp(-torch.exp(-ordered)) - empirical).abs().max() < 0.004  # Kolmogorov-Smirnov


DRAWS = 20_000


def draws_over_seeds(logits: Tensor, params: Sequence[SamplingParams]) -> list[int]:
    asked = [Asked(one, output=range(4)) for one in params]
    return ids_of(sample(logits.expand(DRAWS, -1), asked))


def draws_over_positions(logits: Tensor, params: SamplingParams) -> list[int]:
    """One sequence at all its lengths together, which a step would not do."""
    table = SeatTable(1, DRAWS + 1, 1, CPU)
    table.seat([Seating(0, [0], 1, [0], params)])
    rows = [Row(0, position, 1, True) for position in range(DRAWS)]
    seats = torch.zeros(DRAWS, dtype=torch.int32)
    lengths = torch.arange(1, DRAWS + 1, dtype=torch.int32)
    choice = Sampler(table, len(logits), DRAWS).choose(logits.expand(DRAWS, -1), rows, seats, lengths)
    return ids_of(choice.collect())


def chi_square(tokens: list[int], probabilities: Tensor) -> float:
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probabilities)).double()
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities[probabilities > 0].double() * len(tokens)
    return ((counts[probabilities > 0] - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_frequencies_match_the_softmax(vary: str) -> None:
    logits = torch.linspace(-1.5, 1.5, 20)[torch.randperm(20, generator=torch.Generator().manual_seed(2))]
    if vary == "seed":
        tokens = draws_over_seeds(logits, [SamplingParams(temperature=0.7, seed=n) for n in range(DRAWS)])
    else:
        tokens = draws_over_positions(logits, SamplingParams(temperature=0.7, seed=11))
    assert chi_square(tokens, (logits / 0.7).softmax(-1)) < 43.8  # 99.9 % point for 19 degrees of freedom


def test_frequencies_match_the_truncated_softmax() -> None:
    logits = torch.linspace(-2, 2, 20)
    tokens = draws_over_positions(logits, SamplingParams(temperature=1.5, top_k=8, top_p=0.9))
    probabilities = (logits / 1.5).softmax(-1)
    probabilities[:13] = 0  # top-k leaves 8, of which the first 7 hold 0.927
    assert chi_square(tokens, probabilities / probabilities.sum()) < 22.5  # 99.9 %, 6 degrees


def test_the_position_is_the_index_in_the_answer() -> None:
    logits = torch.zeros(3, 5000)
    params = SamplingParams(temperature=1.0, seed=3)
    asked = [Asked(params, [1], [2, 3]), Asked(params, [1, 2, 3, 4], [9, 9]), Asked(params, [1, 2], [3])]
    same, too, other = ids_of(sample(logits, asked))
    assert same == too != other


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
any_sequences = st.lists(
    st.builds(
        Asked,
        any_params,
        st.lists(st.integers(0, 49), min_size=1, max_size=5),
        st.lists(st.integers(0, 49), max_size=9),
        st.lists(st.integers(0, 49), max_size=2),
    ),
    min_size=1,
    max_size=6,
)


@given(asked=any_sequences, at_once=st.integers(1, 200), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_row_draws_the_same_alone_and_in_any_batch(
    asked: list[Asked], at_once: int, data: st.DataObject
) -> None:
    logits = torch.randn(len(asked), 50, generator=torch.Generator().manual_seed(4)) * 2
    alone = [sample(logits[row : row + 1], [asked[row]])[0] for row in range(len(asked))]
    order = data.draw(st.permutations(range(len(asked))))
    seated = Seated(asked, 50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_ELEMENTS_AT_ONCE", at_once)
        together = seated.choose(logits[order], order).collect()
    assert ids_of(together) == [alone[row].token_id for row in order]
    for sampled, row in zip(together, order, strict=True):
        assert len(sampled.top) == asked[row].params.logprobs
        assert [token for token, _ in sampled.top] == [token for token, _ in alone[row].top]
        assert sampled.logprob == (pytest.approx(alone[row].logprob) if asked[row].params.logprobs else None)


def test_a_tiny_temperature_is_greedy_and_equal_logits_share_the_draw() -> None:
    logits = torch.tensor([[5.0, 5.5, 100.0, 99.9], [1.0, 1.0, -50.0, -50.0]])
    cold = Asked(SamplingParams(temperature=1e-45))
    assert sample(logits[:1], [cold])[0].token_id == 2
    asked = [Asked(SamplingParams(temperature=1.0, top_k=1, seed=seed)) for seed in range(40)]
    assert set(ids_of(sample(logits[1:].expand(40, -1), asked))) == {0, 1}


def test_of_equal_logits_a_greedy_row_takes_the_first() -> None:
    logits = torch.tensor([[1.0, 7.0, 7.0, 0.0], [3.0, 3.0, 3.0, 3.0]])
    assert ids_of(sample(logits, [Asked(SamplingParams())] * 2)) == [1, 0]


# ---- log-probabilities ----


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(5), dtype=torch.bfloat16)
    expected = logits.float().log_softmax(-1)
    asked = [
        Asked(SamplingParams(logprobs=3, logit_bias={7: 100.0}, temperature=2.0)),
        Asked(SamplingParams()),
        Asked(SamplingParams(logprobs=1, repetition_penalty=2.0), prompt=range(30)),
    ]
    first, second, third = sample(logits, asked)
    assert first.token_id == 7
    assert first.logprob == pytest.approx(expected[0, 7].item())
    best = expected[0].topk(3)
    assert [value for _, value in first.top] == pytest.approx(best.values.tolist())
    assert [expected[0, token].item() for token, _ in first.top] == pytest.approx(best.values.tolist())
    assert (second.logprob, second.top) == (None, ())
    assert third.logprob is not None
    assert len(third.top) == 1


# ---- on its way to the host and to the next step ----


def check_choices_in_flight(device: torch.device) -> None:
    """Three steps are launched before the first is collected; the table has all their tokens."""
    asked = [Asked(SamplingParams(temperature=1.0, seed=n, logprobs=n), [1] * (n + 1)) for n in range(4)]
    seated = Seated(asked, 300, device)
    generator = torch.Generator().manual_seed(6)
    for start in (0, 3):  # parcels are used again
        logits = [torch.randn(4, 300, generator=generator).to(device) for _ in range(3)]
        flying = [seated.choose(logits[step], later=start + step) for step in range(3)]
        landed = [choice.collect() for choice in flying]
        assert len({tuple(ids_of(sampled)) for sampled in landed}) == 3
        for step, sampled in enumerate(landed):
            assert flying[step].collect() == sampled
            for number, one in enumerate(asked):
                place = len(one.tokens) + start + step
                assert seated.table.tokens[seated.seats[number], place] == sampled[number].token_id
                assert len(sampled[number].top) == number
                if number:
                    chosen = logits[step][number].log_softmax(-1)[sampled[number].token_id]
                    assert sampled[number].logprob == pytest.approx(chosen.item(), abs=1e-5)
    tokens = seated.table.tokens.cpu()
    for number, one in enumerate(asked):
        assert tokens[seated.seats[number], : len(one.tokens)].tolist() == one.tokens
        assert (tokens[seated.seats[number], len(one.tokens) + 6 :] == 0).all()
    assert tokens[-1].tolist() == [0] * tokens.shape[1]  # the seat of padding


def test_choices_in_flight_arrive_in_order() -> None:
    check_choices_in_flight(CPU)


def test_a_choice_is_penalised_in_the_next_step() -> None:
    """The host has not seen the first choice when it asks for the second."""
    seated = Seated([Asked(SamplingParams(frequency_penalty=2.0))], 4)
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.5]])
    flying = [seated.choose(logits, later=step) for step in range(3)]
    assert [ids_of(choice.collect()) for choice in flying] == [[3], [2], [3]]


def test_warming_up_leaves_sequences_alone() -> None:
    seated = Seated([Asked(SamplingParams(), [1, 2], [3])], 300)
    before = seated.table.records.clone()
    seated.sampler.warm_up(torch.float32)
    assert torch.equal(seated.table.records[:-1], before[:-1])
    assert seated.table.tokens[-1, 0] == 0


def test_gaps_between_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="stride of the last dimension"):
        sample(torch.zeros(2, 60)[:, ::2], [Asked(SamplingParams())] * 2)
    with pytest.raises(TypeError, match="dtype"):
        sample(torch.zeros(2, 60).double(), [Asked(SamplingParams())] * 2)


# ---- on a GPU ----


def varied(count: int, vocab_size: int) -> list[Asked]:
    """Sequences of every kind, among them greedy ones and ones without truncation."""
    generator = torch.Generator().manual_seed(7)

    def history(longest: int) -> list[int]:
        length = int(torch.randint(1, longest, (), generator=generator))
        return torch.randint(0, vocab_size, (length,), generator=generator).tolist()

    return [
        Asked(
            SamplingParams(
                temperature=(0.0, 0.6, 1.0, 1.5)[n % 4],
                top_k=(0, 20, 0, 1500)[n % 5 % 4],
                top_p=(1.0, 0.95, 0.8)[n % 3],
                min_p=(0.0, 0.0, 0.02)[n % 7 % 3],
                seed=n * 0x9E3779B97F4A7C15 % 2**64,
                repetition_penalty=(1.0, 1.3)[n % 11 == 3],
                presence_penalty=(0.0, 0.7)[n % 13 == 5],
                frequency_penalty=(0.0, 0.2)[n % 6 == 4],
                logit_bias={n: 2.0, vocab_size - 1: -3.0} if n % 8 == 1 else {},
                logprobs=int(n % 9 == 2),
            ),
            history(3000),
            history(600),
            [n] if n % 10 == 9 else (),
        )
        for n in range(count)
    ]


@on_gpu
@pytest.mark.parametrize("vocab_size", [997, 32_000, 151_936])
@pytest.mark.parametrize("rows", [1, 3, 24])
def test_a_gpu_draws_what_a_cpu_draws(vocab_size: int, rows: int) -> None:
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(8)) * 3
    asked = varied(rows, vocab_size)
    expected, actual = sample(logits, asked), sample(logits.cuda(), asked)
    assert ids_of(actual) == ids_of(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.logprob == (None if theirs.logprob is None else pytest.approx(theirs.logprob, abs=1e-4))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_row_of_a_large_batch_draws_what_it_draws_alone_on_a_gpu(dtype: torch.dtype) -> None:
    asked = varied(40, 151_936)
    logits = (torch.randn(40, 151_936 + 8, generator=torch.Generator().manual_seed(9)) * 3).to(dtype).cuda()
    together = sample(logits[:, :-8], asked)
    for row in range(0, 40, 3):
        assert sample(logits[row : row + 1, :-8], [asked[row]])[0].token_id == together[row].token_id


@on_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_choosing_does_not_wait_for_the_gpu() -> None:
    asked = varied(24, 32_000)
    seated = Seated(asked, 32_000, torch.device("cuda", 0))
    logits = torch.randn(24, 32_000, generator=torch.Generator().manual_seed(10)).cuda()
    rows = [Row(seat, len(one.tokens) - 1, 1, True) for seat, one in zip(seated.seats, asked, strict=True)]
    seats = torch.tensor(seated.seats, dtype=torch.int32, device="cuda")
    lengths = torch.tensor([len(one.tokens) for one in asked], dtype=torch.int32, device="cuda")
    seated.sampler.choose(logits, rows, seats, lengths).collect()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)  # a step that takes some 100 ms
        busy = torch.cuda.Event()
        busy.record()
        choice = seated.sampler.choose(logits, rows, seats, lengths)
        assert not busy.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(choice.collect()) == 24


@on_gpu
def test_nothing_is_compiled_after_warming_up() -> None:
    asked = varied(24, 32_000)
    seated = Seated(asked, 32_000, torch.device("cuda", 0))
    seated.sampler.warm_up(torch.bfloat16)
    compiled = sampling._compile.cache_info().currsize
    logits = torch.randn(24, 32_000, device="cuda").bfloat16()
    for which in ([0], [1], [3], [4], [5], [9], range(8), range(24), [4, 9], range(10, 24)):
        seated.choose(logits[: len(which)], which).collect()
    assert sampling._compile.cache_info().currsize == compiled


@on_gpu
def test_choices_in_flight_arrive_in_order_from_a_gpu() -> None:
    check_choices_in_flight(torch.device("cuda", 0))


@on_gpu
def test_a_draw_can_be_captured() -> None:
    asked = varied(16, 32_000)
    seated = Seated(asked, 32_000, torch.device("cuda", 0))
    seats = torch.tensor(seated.seats, dtype=torch.int32, device="cuda")
    lengths = torch.tensor([len(one.tokens) for one in asked], dtype=torch.int32, device="cuda")
    logits = torch.randn(16, 32_000, generator=torch.Generator().manual_seed(11)).cuda()
    workspace = workspace_for(16, 32_000, logits.device)
    ids = torch.zeros(16, dtype=torch.int32, device="cuda")
    knobs, tokens = seated.table.knobs, seated.table.tokens

    def step() -> None:
        floors = find_floors(logits, seats, knobs, workspace)
        sampling.draw(logits, seats, lengths, knobs, tokens, ids, workspace, floors)

    step()
    expected = ids.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        ids.zero_()
        graph.replay()
        assert torch.equal(ids, expected)
