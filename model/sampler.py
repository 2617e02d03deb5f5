"""Chooses the next token of each row from its logits, and lets the host have it later.

Knobs and history are in the seats' table, and a choice goes back into it on the device: a step can be
launched before the host knows what the step ahead of it chose. The host decides which parts run, from
its own copy of the knobs. Random numbers depend only on (seed, index in the answer), so a request draws
the same token alone or in any batch, on any device. Knows nothing of sequences beyond their seats.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fusewire.kernels.sampling import FEW_ROWS, FORBIDDEN, LARGEST, draw, find_floors, penalise, workspace_for
from fusewire.model.batch import Row, Sampled
from fusewire.model.device import to_device
from fusewire.model.sampling_params import SamplingParams
from fusewire.model.seats import SeatTable

_ADJUSTED, _TRUNCATED, _REPORTED = 1, 2, 4
"""What a row needs beside a draw: penalties, bias or bans; a floor; log-probabilities."""


class Sampler:
    """Chooses tokens for the sequences of one table.

    Args:
        seats: where knobs and tokens are; choices are written to it.
        vocab_size: V, logits of a row.
        max_rows: rows of the largest batch.
    """

    def __init__(self, seats: SeatTable, vocab_size: int, max_rows: int) -> None:
        self._seats = seats
        self._vocab_size = vocab_size
        self._max_rows = max_rows
        self._workspace = workspace_for(max_rows, vocab_size, seats.device)
        self._ids = torch.empty(max_rows, dtype=torch.int32, device=seats.device)
        self._free: list[_Parcel] = []
        """Parcels that no choice is in; as many are made as there ever are choices in flight."""
        self._known: list[SamplingParams | None] = [None] * len(seats.params)
        self._needs = [0] * len(seats.params)
        """What each seat needs under the knobs that are known."""

    @torch.inference_mode()
    def choose(
        self,
        logits: Tensor,
        rows: Sequence[Row],
        seats: Tensor,
        lengths: Tensor,
        chosen: Callable[[], None] = lambda: None,
    ) -> "Choice":
        """Choose a token for each row and append it to the seat's tokens; waits for nothing.

        The order is: repetition, presence and frequency penalty, logit bias, bans; then temperature,
        top-k, top-p, min-p and the draw. Log-probabilities are of the logits as they came. The choice from
        logits that are not all finite is `fusewire.kernels.sampling.NO_TOKEN`.

        Args:
            logits: `[S, V]`, fp16, bf16 or fp32, S from 1 to `max_rows`; rows may be strided.
            rows: the S rows that sample, in the order of the logits.
            seats: int32 `[S]`, on the device: each row's seat.
            lengths: int32 `[S]`, on the device: `start + count` of each row.
            chosen: called when all is launched but the copies to the host.

        Raises:
            TypeError: for logits of another dtype.
            ValueError: for logits whose rows have gaps.
        """
        needs = self._needs_of(rows)
        adjusted = _where(needs, _ADJUSTED)
        if len(adjusted) < len(rows):  # the others' draws are made, too, and made again below
            wanted = [need & _TRUNCATED for need in needs if not need & _ADJUSTED]
            self._draw(logits, seats, lengths, None, truncated=any(wanted))
        if adjusted:
            index = _index(adjusted, logits)
            shaped = self._adjust(logits, index, [rows[place] for place in adjusted], seats, lengths)
            truncated = any(needs[place] & _TRUNCATED for place in adjusted)
            self._draw(shaped, seats, lengths, index, truncated=truncated)
        ids = self._ids[: len(rows)]
        asking = [(place, self._params(rows[place]).logprobs) for place in _where(needs, _REPORTED)]
        report = _report(logits, ids, asking) if asking else None
        chosen()
        parcel = self._free.pop() if self._free else _Parcel.on(logits.device, self._max_rows)
        parcel.send(ids, report)
        return Choice(parcel, len(rows), asking, self._free.append)

    @torch.inference_mode()
    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile all that any choice from contiguous logits of a dtype may need, so that no request waits.

        The seat for padding lends itself; of its tokens, the one after the first is overwritten.
        """
        table, width = self._seats, self._vocab_size
        for count in {1, min(FEW_ROWS + 1, self._max_rows)}:
            logits = torch.zeros(count, width, dtype=dtype, device=table.device)
            seats = torch.full((count,), table.num_seats, dtype=torch.int32, device=table.device)
            lengths = torch.ones_like(seats)
            index = _index(range(count), logits)
            adjusted = penalise(logits, index, seats, lengths, table.knobs, table.tokens, 1)
            for truncated in (False, True):
                self._draw(logits, seats, lengths, None, truncated=truncated)
                self._draw(adjusted, seats, lengths, index, truncated=truncated)

    def _needs_of(self, rows: Sequence[Row]) -> list[int]:
        """Tell what each row needs; a seat's knobs are looked at when they change."""
        params, known, needs = self._seats.params, self._known, self._needs
        found = []
        for row in rows:
            seat = row.seat
            if known[seat] is not params[seat]:
                known[seat] = params[seat]
                needs[seat] = _needs(params[seat], self._vocab_size)
            found.append(needs[seat] | _ADJUSTED if row.banned_ids else needs[seat])
        return found

    def _params(self, row: Row) -> SamplingParams:
        return self._seats.params[row.seat]

    def _draw(
        self, logits: Tensor, seats: Tensor, lengths: Tensor, index: Tensor | None, *, truncated: bool
    ) -> None:
        """Draw from logits `[R, V]` of the rows of an index, or of all."""
        knobs = self._seats.knobs
        floors = find_floors(logits, seats, knobs, self._workspace, index) if truncated else None
        tokens = self._seats.tokens
        draw(logits, seats, lengths, knobs, tokens, self._ids, self._workspace, floors, index)

    def _adjust(
        self, logits: Tensor, index: Tensor, rows: Sequence[Row], seats: Tensor, lengths: Tensor
    ) -> Tensor:
        """Copy the logits `[R, V]` of an index as float32; penalise, add bias and ban."""
        if any(self._params(row).penalised for row in rows):
            longest = max(row.start + row.count for row in rows)
            table = self._seats
            adjusted = penalise(logits, index, seats, lengths, table.knobs, table.tokens, longest)
        else:
            adjusted = logits.index_select(0, index).float()
        flat, width = adjusted.view(-1), self._vocab_size
        biases = [
            (place * width + token, max(bias, -LARGEST.value))
            for place, row in enumerate(rows)
            for token, bias in self._params(row).logit_bias.items()
        ]
        if biases:
            entries, values = zip(*biases, strict=True)
            flat.scatter_add_(0, _index(entries, logits), _floats(values, logits))
        bans = [place * width + token for place, row in enumerate(rows) for token in row.banned_ids]
        if bans:
            flat.index_fill_(0, _index(bans, logits), FORBIDDEN.value)
        return adjusted


@dataclass(slots=True)
class Choice:
    """Chosen tokens on their way to the host."""

    _parcel: "_Parcel"
    _count: int
    _asking: Sequence[tuple[int, int]]
    """Rows that asked for log-probabilities, and for how many of the likeliest tokens."""
    _give_back: Callable[["_Parcel"], None]
    _sampled: list[Sampled] = field(default_factory=list)

    def collect(self) -> list[Sampled]:
        """Wait for the tokens, not for what was launched after them; the same list when asked again."""
        if not self._sampled:
            ids, report = self._parcel.open(self._count)
            self._give_back(self._parcel)
            self._sampled = [Sampled(token) for token in ids]
            for (row, most), (logprob, *rest) in zip(self._asking, report, strict=True):
                values, tokens = rest[: len(rest) // 2], rest[len(rest) // 2 :]
                top = tuple(zip(map(int, tokens[:most]), values[:most], strict=True))
                self._sampled[row] = Sampled(ids[row], logprob, top)
        return self._sampled


@dataclass(slots=True)
class _Parcel:
    """Host memory that a step's choices are copied to, used again once they are read."""

    ids: Tensor
    """int32 `[max_rows]`, pinned where there is a GPU."""
    arrived: torch.cuda.Event | None
    report: Tensor | None = None

    @classmethod
    def on(cls, device: torch.device, max_rows: int) -> "_Parcel":
        """Make one for choices that are made on a device."""
        cuda = device.type == "cuda"
        ids = torch.empty(max_rows, dtype=torch.int32, pin_memory=cuda)
        return cls(ids, torch.cuda.Event() if cuda else None)

    def send(self, ids: Tensor, report: Tensor | None) -> None:
        """Start the copy of ids `[S]` and, if there is one, of a report `[A, columns]`."""
        self.ids[: len(ids)].copy_(ids, non_blocking=True)
        if report is not None:
            self.report = torch.empty_like(report, device="cpu", pin_memory=self.arrived is not None)
            self.report.copy_(report, non_blocking=True)
        if self.arrived is not None:
            self.arrived.record()

    def open(self, count: int) -> tuple[list[int], list[list[float]]]:
        """Wait for the copy; hand out ids and the rows of the report."""
        if self.arrived is not None:
            self.arrived.synchronize()
        report, self.report = self.report, None
        return self.ids[:count].tolist(), [] if report is None else report.tolist()


def _needs(params: SamplingParams, vocab_size: int) -> int:
    """Tell what rows under these knobs need beside a draw."""
    truncated = 0 < params.top_k < vocab_size or params.top_p < 1 or params.min_p > 0
    return (
        (_ADJUSTED if params.penalised or params.logit_bias else 0)
        | (_TRUNCATED if truncated and not params.greedy else 0)
        | (_REPORTED if params.logprobs else 0)
    )


def _where(needs: Sequence[int], what: int) -> list[int]:
    """List the rows that need one of these."""
    return [place for place, need in enumerate(needs) if need & what]


def _report(logits: Tensor, ids: Tensor, asking: Sequence[tuple[int, int]]) -> Tensor:
    """Gather log-probabilities of rows that ask: float64 `[A, 1 + 2 * most]`.

    A row is the chosen token's, the likeliest ones' and the ids of these, which float64 holds exactly.
    """
    rows = _index([row for row, _ in asking], logits)
    logprobs = logits.index_select(0, rows).float().log_softmax(-1)
    top = logprobs.topk(min(max(most for _, most in asking), logits.shape[-1]))
    chosen = ids.index_select(0, rows).clamp(min=0)
    own = logprobs.gather(-1, chosen.long()[:, None])
    return torch.cat([own, top.values, top.indices.double()], dim=-1)


def _index(values: Sequence[int], like: Tensor) -> Tensor:
    return to_device(np.array(values, dtype=np.int64), like.device)


def _floats(values: Sequence[float], like: Tensor) -> Tensor:
    return to_device(np.array(values, dtype=np.float32), like.device)
