"""What the engine asks of one step, in plain Python, and what it gets back.

Torch-free on purpose: the scheduler builds these, the runner turns them into tensors. A step holds
one kernel mode; its rows may mix decode and prefill, for the phase belongs to the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fusewire.model.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """Says that a row's last token yields a new one, and how it is chosen."""

    params: SamplingParams
    prompt_ids: Sequence[int]
    """The request's prompt, read only when `params.penalised`."""
    output_ids: Sequence[int]
    """The tokens generated so far; their number is the position that seeds the random numbers."""
    banned_ids: Sequence[int] = ()
    """Tokens that must not be chosen now (end and stop tokens before min_tokens)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's share of a step: tokens `[start, start + len(token_ids))` of it.

    `block_table` covers every position up to the row's last; token at position p lives in block
    `block_table[p // block_size]` at offset `p % block_size`. A decode row has one token.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    sample: SampleSpec | None
    """None for a prompt chunk that does not end the prompt: no logits are computed for it."""

    def __post_init__(self) -> None:
        """Check that the row holds a token and starts inside the sequence."""
        if not self.token_ids:
            raise ValueError("token_ids: a row needs at least one token, got 0")
        if self.start < 0:
            raise ValueError(f"start: must not be negative, got {self.start}")


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token chosen for one row that asked for one."""

    token_id: int
    logprob: float | None = None
    """Natural log, before temperature, penalties and bias; None unless asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, best first."""
