"""One request as the scheduler sees it: its tokens, its blocks, its path so far.

Knows nothing of what is said on the socket or of tensors.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, cast

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Row, SampleSpec
from fusewire.service.engine.channel import Connection
from fusewire.service.messages import AddRequest, KernelPath

RowPhase = Literal["prefill", "decode"]


@dataclass(slots=True, eq=False)
class Request:
    """The state of one generation between `AddRequest` and `Ended`.

    Invariant: the KV of tokens `[0, computed)` is in `blocks`; `computed < len(tokens)` while the
    request lives, for the last token's KV is computed by the step that samples its successor.
    """

    spec: AddRequest
    order: int
    """Counts arrivals at the engine; breaks ties of priority."""
    owner: Connection
    """The front end that gets the events."""
    tokens: list[int] = field(init=False)
    """Prompt and answer."""
    output_ids: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    was_scheduled: bool = False
    preempted_at: float | None = None
    preempted_seconds: float = 0.0
    _paths: dict[RowPhase, set[KernelMode]] = field(default_factory=dict)
    _backends: dict[RowPhase, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Start with the prompt alone."""
        if not self.spec.prompt_ids:
            raise ValueError(f"prompt_ids: request {self.spec.request_id} has none")
        self.tokens = list(self.spec.prompt_ids)

    @property
    def rank(self) -> tuple[int, int]:
        """The order of scheduling, best first: higher priority, then earlier arrival."""
        return -self.spec.priority, self.order

    @property
    def pending(self) -> int:
        """Tokens whose KV is still to be computed; at least 1."""
        return len(self.tokens) - self.computed

    @property
    def phase(self) -> RowPhase:
        """Decode once only the newest generated token is pending; recomputation is prefill."""
        return "decode" if self.output_ids and self.pending == 1 else "prefill"

    def row(self, count: int) -> Row:
        """The next `count` pending tokens as a row of a step; samples if they are the last."""
        end = self.computed + count
        return Row(
            token_ids=self.tokens[self.computed : end],
            start=self.computed,
            block_table=self.blocks,
            sample=self._sample_spec() if end == len(self.tokens) else None,
        )

    def _sample_spec(self) -> SampleSpec:
        spec = self.spec
        too_short = len(self.output_ids) < spec.min_tokens
        return SampleSpec(
            params=spec.sampling,
            prompt_ids=spec.prompt_ids,
            output_ids=self.output_ids,
            banned_ids=(*spec.eos_ids, *spec.stop_ids) if too_short else (),
        )

    def note_path(self, phase: RowPhase, mode: KernelMode, backend: str) -> None:
        """Remember that a step of this phase ran on this path, and what ran it."""
        self._paths.setdefault(phase, set()).add(mode)
        self._backends.setdefault(phase, set()).add(backend)

    def backend(self, phase: RowPhase) -> str:
        """What ran all steps of a phase, "mixed" for several, "" when the phase did not run."""
        return _one_name(self._backends.get(phase, set()))

    def path(self, phase: RowPhase) -> KernelPath:
        """The one path of a phase, "mixed" for several, "" when the phase did not run."""
        return cast(KernelPath, _one_name(self._paths.get(phase, set())))


def _one_name(names: Collection[str]) -> str:
    """The name that is the only one, "mixed" for several, "" for none."""
    return "mixed" if len(names) > 1 else str(next(iter(names), ""))
