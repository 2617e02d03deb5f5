"""Small fakes for the engine's tests: requests, and a runner that needs no model."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Row, Sampled
from fusewire.model.sampling_params import SamplingParams
from fusewire.service.engine.request import Request
from fusewire.service.messages import AddRequest


class FakeRunner:
    """Chooses each token from the sequence so far, and checks what a real runner relies on.

    It keeps a fake KV cache: the token whose KV a slot holds. A row may only be sampled when the
    slots of its whole sequence hold exactly that sequence.
    """

    def __init__(self, num_blocks: int, block_size: int, vocab_size: int = 97) -> None:
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.cache: list[int | None] = [None] * (num_blocks * block_size)
        self.modes: list[KernelMode] = []

    def backend(self, mode: KernelMode, num_tokens: int) -> str:
        return "fake"

    def run(self, rows: Sequence[Row], mode: KernelMode) -> list[Sampled | None]:
        self.modes.append(mode)
        return [self._run_row(row) for row in rows]

    def _run_row(self, row: Row) -> Sampled | None:
        for offset, token in enumerate(row.token_ids):
            self.cache[self._slot(row, row.start + offset)] = token
        if row.sample is None:
            return None
        length = row.start + len(row.token_ids)
        cached = [self.cache[self._slot(row, position)] for position in range(length)]
        expected = [*row.sample.prompt_ids, *row.sample.output_ids]
        assert cached == expected, "the cache does not hold the row's own sequence"
        return Sampled(self.next_token(expected))

    def _slot(self, row: Row, position: int) -> int:
        return row.block_table[position // self.block_size] * self.block_size + position % self.block_size

    def next_token(self, tokens: Sequence[int]) -> int:
        return (sum(tokens) * 31 + len(tokens)) % self.vocab_size

    def expected_answer(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(max_tokens):
            tokens.append(self.next_token(tokens))
        return tokens[len(prompt) :]


@pytest.fixture
def fake_runner() -> type[FakeRunner]:
    return FakeRunner


@pytest.fixture
def make_request() -> Callable[..., Request]:
    ids = itertools.count()

    def make(prompt: Sequence[int], max_tokens: int = 4, **spec: Any) -> Request:
        order = next(ids)
        message = AddRequest(
            request_id=spec.pop("request_id", f"r{order}"),
            prompt_ids=list(prompt),
            sampling=SamplingParams(),
            max_tokens=max_tokens,
            arrival=0.0,
            **spec,
        )
        return Request(message, order, owner=None)  # type: ignore[arg-type]

    return make
