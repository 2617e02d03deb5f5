"""One request as the scheduler sees it: its tokens, its blocks, its path so far.

Knows nothing of what is said on the socket or of tensors.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Row, Seating
from fusewire.model.observations import RowPhase
from fusewire.service.engine.channel import Connection
from fusewire.service.engine.prefix_cache import PrefixChain
from fusewire.service.messages import AddRequest, Ended, EndReason, KernelPath

NO_SEAT = -1


class Run(NamedTuple):
    """What a step was to one of its rows."""

    phase: RowPhase
    mode: KernelMode
    backend: str


@dataclass(slots=True, eq=False)
class Request:
    """The state of one generation between `AddRequest` and `Ended`.

    Planning runs ahead of results: `computed` counts tokens whose KV is computed or will be by a step
    that was launched, `tokens` are those whose ids are known. A running request first prefills until
    all its known tokens are computed; from the row that samples on it decodes, and has exactly one
    more token than `computed`, whose id the device may be the only one to know.
    """

    spec: AddRequest
    order: int
    """Counts arrivals at the engine; breaks ties of priority."""
    owner: Connection
    """The front end that gets the events."""

    tokens: "array[int]" = field(init=False)
    """Prompt and answer, as far as it is known; int32."""
    rank: tuple[int, int] = field(init=False)
    """The order of scheduling, best first: higher priority, then earlier arrival."""
    pin: KernelMode | None = field(init=False)
    """The kernel mode that it insists on."""
    max_length: int = field(init=False)
    """Prompt and the longest answer."""
    ending_ids: frozenset[int] = field(init=False)
    """Tokens that end the answer."""
    banned_ids: tuple[int, ...] = field(init=False)
    """The same, in the order in which a row names them."""
    ban_ends: int = field(init=False)
    """Rows that end before this position must not choose `banned_ids`."""

    mode: KernelMode = KernelMode.FUSED
    """Of its next step; the scheduler says, unless it is pinned."""
    seat: int = NO_SEAT
    """Index of its tables on the device while it runs."""
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    decoding: bool = False
    """Whether its next row is a decode row; not once the last one is planned."""
    last_step: int = 0
    """Number of the last step that had a row of it."""
    ended: bool = False
    was_scheduled: bool = False
    preempted_at: float | None = None
    requeued_seconds: float = 0.0
    """How long it waited to be recomputed since its last token, or its first scheduling."""
    preempted_seconds: float = 0.0
    """The same before its last token: a time within its prefill and decode, which end with tokens."""
    chain: PrefixChain | None = None
    """Of its blocks, all computed on one mode; None once they are not, or if the cache is off."""
    last_run: Run | None = None
    _runs: set[Run] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Start with the prompt alone, and work out what every step will ask for."""
        spec = self.spec
        if not spec.prompt_ids:
            raise ValueError(f"prompt_ids: request {spec.request_id} has none")
        self.tokens = array("i", spec.prompt_ids)
        self.rank = (-spec.priority, self.order)
        self.pin = spec.kernel_mode
        self.max_length = len(self.tokens) + spec.max_tokens
        self.banned_ids = (*spec.eos_ids, *spec.stop_ids)
        self.ending_ids = frozenset(self.banned_ids)
        self.ban_ends = len(self.tokens) + spec.min_tokens if self.banned_ids else 0

    @property
    def pending(self) -> int:
        """Known tokens whose KV no launched step computes; at least 1 until the row that samples."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        """Tokens of the answer that are known."""
        return len(self.tokens) - len(self.spec.prompt_ids)

    # ---- planning ----

    def seating(self, seat: int) -> Seating:
        """Take a seat, with every token known and blocks for them all."""
        self.seat = seat
        prompt_len = len(self.spec.prompt_ids)
        return Seating(seat, self.tokens[:], prompt_len, self.blocks[:], self.spec.sampling)

    def decode_row(self, new_block: int) -> Row:
        """A row of the newest token, known here or not; it samples the next one."""
        start = self.computed
        self.computed = end = start + 1
        self.decoding = end + 1 < self.max_length
        return Row(self.seat, start, 1, True, new_block, self.banned_ids if end < self.ban_ends else ())

    def prefill_row(self, count: int) -> Row:
        """A row of the next `count` pending tokens; it samples if they are the last."""
        start = self.computed
        self.computed = end = start + count
        samples = end == len(self.tokens)
        self.decoding = samples and end + 1 < self.max_length
        banned_ids = self.banned_ids if samples and end < self.ban_ends else ()
        return Row(self.seat, start, count, samples, banned_ids=banned_ids)

    # ---- results ----

    def note_run(self, run: Run) -> None:
        """Remember what a step was to this request. On another mode, its blocks form no chain any more."""
        self.last_run = run
        self._runs.add(run)
        if self.chain is not None and self.chain.mode is not run.mode:
            self.chain = None

    def note_token(self, token_id: int) -> None:
        """Take in the next token of the answer."""
        self.tokens.append(token_id)
        if self.requeued_seconds:
            self.preempted_seconds += self.requeued_seconds
            self.requeued_seconds = 0.0

    def end(self, reason: EndReason, stop_id: int | None, problem: str) -> Ended:
        """Say how it went; `problem` tells why, if the reason is "error"."""
        self.ended = True
        return Ended(
            self.spec.request_id,
            reason,
            prefill_path=self._path("prefill"),
            decode_path=self._path("decode"),
            prefill_backend=self._backend("prefill"),
            decode_backend=self._backend("decode"),
            stop_id=stop_id,
            preempted_seconds=self.preempted_seconds,
            problem=problem,
        )

    def _path(self, phase: RowPhase) -> KernelPath:
        return cast(KernelPath, _one_name(run.mode for run in self._runs if run.phase == phase))

    def _backend(self, phase: RowPhase) -> str:
        return _one_name(run.backend for run in self._runs if run.phase == phase)


def _one_name(names: Iterable[str]) -> str:
    """The name that all share, "mixed" if they differ, "" if there are none."""
    distinct = set(names)
    return "mixed" if len(distinct) > 1 else str(next(iter(distinct), ""))
