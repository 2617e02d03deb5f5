"""What the engine asks of what computes its steps: `fusewire.model.runner.ModelRunner`, or one of a test."""

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Sampled, Step


class Runner(Protocol):
    """Computes steps."""

    def launch(self, step: Step) -> Any:
        """Start a step behind those launched before; returns what the others are to be given."""
        ...

    def collect(self, launched: Any) -> Sequence[Sampled | None]:
        """Wait for a step; an entry a row, None for rows that sample nothing."""
        ...

    def nonfinite_rows(self, launched: Any) -> Collection[int]:
        """The rows of a collected step, by index, that completed a block whose k or v is not finite."""
        ...

    def backend(self, mode: KernelMode, num_tokens: int) -> str:
        """Name what runs a step of so many tokens on a path."""
        ...

    def check_device(self) -> None:
        """Raise whatever it is that keeps the device from running anything more."""
        ...


class StepTimer(Protocol):
    """Tells what a runner's device did."""

    def device_seconds(self, launched: Any) -> float:
        """Tell how long the device worked on a step that was collected."""
        ...
