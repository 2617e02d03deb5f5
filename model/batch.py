"""What the engine asks of one step, in plain Python, and what it gets back.

Torch-free on purpose: the scheduler builds these, the runner turns them into tensors. A step holds
one kernel mode; its rows may mix decode and prefill, for the phase belongs to the row.

A running sequence has a seat, an index into tables that live on the device: its tokens, its block
table, its sampling knobs. So a row says where it is in its sequence and no more, and a step can be
planned before the step ahead of it has told its tokens: those are on the device already.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fusewire.kernels.modes import KernelMode
from fusewire.model.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Seating:
    """A sequence takes a seat, before its first row or, after a preemption, again."""

    seat: int
    token_ids: Sequence[int]
    """Every token that is known: the prompt, and what was generated before a preemption."""
    prompt_len: int
    """How many of them are the prompt; the rest, and all to come, are the answer."""
    block_table: Sequence[int]
    """Covers `token_ids`; token at position p lives in block `block_table[p // block_size]`."""
    params: SamplingParams

    def __post_init__(self) -> None:
        """Check that there is a prompt."""
        if not 0 < self.prompt_len <= len(self.token_ids):
            raise ValueError(f"prompt_len: must be 1 to {len(self.token_ids)}, got {self.prompt_len}")


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's share of a step: tokens `[start, start + count)` of it. A decode row has one.

    A row that samples ends at the sequence's last token, and its choice becomes token `start + count`,
    on the device at once and on the host when the step is collected.
    """

    seat: int
    start: int
    count: int
    samples: bool
    """False for a prompt chunk that does not end the prompt: no logits are computed for it."""
    new_block: int = -1
    """Block that the last token of the row is the first to use, if the table did not have it; else -1."""
    banned_ids: Sequence[int] = ()
    """Tokens that must not be chosen now (end and stop tokens before min_tokens)."""

    def __post_init__(self) -> None:
        """Check that the row holds a token and starts inside the sequence."""
        if self.count < 1:
            raise ValueError(f"count: a row needs at least one token, got {self.count}")
        if self.start < 0:
            raise ValueError(f"start: must not be negative, got {self.start}")


@dataclass(frozen=True, slots=True)
class Step:
    """What one step computes, on one kernel mode. Each seat has one row at most."""

    mode: KernelMode
    rows: Sequence[Row]
    seatings: Sequence[Seating] = ()
    """Applied before the rows."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(row.count for row in self.rows)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token chosen for one row that asked for one."""

    token_id: int
    """Negative if the row's logits are not all finite, so that there is no choice."""
    logprob: float | None = None
    """Natural log, before temperature, penalties and bias; None unless asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, best first."""
