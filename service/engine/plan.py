"""One step as it is planned and, later, settled: whose rows it has and how much of each phase.

Knows nothing of how rows are chosen: that is `fusewire.service.engine.scheduler`.
"""

from dataclasses import dataclass, field

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Row, Seating, Step
from fusewire.service.engine.request import Request
from fusewire.service.messages import Phase


@dataclass(slots=True)
class StepPlan:
    """What one step computes, on one kernel mode. Decode rows come first."""

    number: int
    """Counts planned steps from 1."""
    mode: KernelMode
    requests: list[Request] = field(default_factory=list)
    """Whose the rows are, one a row."""
    rows: list[Row] = field(default_factory=list)
    seatings: list[Seating] = field(default_factory=list)
    decode_tokens: int = 0
    prefill_tokens: int = 0
    attended: float = 0.0
    """Over the prefill tokens, the sum of how many tokens each attends to."""

    @property
    def step(self) -> Step:
        """What the runner is asked for."""
        return Step(self.mode, self.rows, self.seatings)

    @property
    def phase(self) -> Phase:
        """The phase that all rows share, or "mixed"."""
        if not self.prefill_tokens:
            return "decode"
        return "mixed" if self.decode_tokens else "prefill"

    @property
    def mean_context(self) -> float:
        """Tokens that a prefill token attends to, on average; 0 without any."""
        return self.attended / self.prefill_tokens if self.prefill_tokens else 0.0

    def add_decode(self, request: Request, new_block: int) -> None:
        """Add a request's decode row."""
        request.last_step = self.number
        self.requests.append(request)
        self.rows.append(request.decode_row(new_block))
        self.decode_tokens += 1

    def add_prefill(self, request: Request, count: int) -> None:
        """Add a row of so many of a request's pending tokens."""
        request.last_step = self.number
        self.attended += count * (request.computed + (count + 1) / 2)
        self.requests.append(request)
        self.rows.append(request.prefill_row(count))
        self.prefill_tokens += count
