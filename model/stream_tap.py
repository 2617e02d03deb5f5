"""A copy of the residual stream as it enters one layer, so that the layer can be looked at afterwards.

Inside a CUDA graph a stream is gone when the step is done. So every forward pass leaves one layer's
behind: one small copy a step, whoever comes to look. Knows nothing of who does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusewire.kernels.copy_rows import copy_rows


@dataclass(frozen=True, slots=True)
class StreamTap:
    """What keeps the stream of one layer during a forward pass."""

    layer: int
    """From 0; -1 keeps none."""
    kept: Tensor
    """[at most so many tokens, hidden]: the step's first ones, those that pad it included."""

    def pass_by(self, layer: int, stream: Tensor) -> None:
        """Copy the stream `[T, hidden]` that enters a layer, if it is the one, as far as there is room."""
        if layer == self.layer:
            copy_rows(stream[: len(self.kept)], self.kept)


NO_TAP = StreamTap(-1, torch.empty(0, 0))
"""Keeps nothing."""


class StreamTaps:
    """The taps of one model, which share their memory: what is kept holds until the next forward pass.

    Args:
        num_layers: layers that take turns.
        most_tokens: how many tokens of a step are kept; 0 lets every tap keep nothing.
        hidden: width of the stream.
    """

    def __init__(
        self, num_layers: int, most_tokens: int, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._kept = torch.zeros(most_tokens, hidden, dtype=dtype, device=device)
        self._num_layers = num_layers
        self._turn = 0

    @property
    def next(self) -> StreamTap:
        """The tap of the layer whose turn it is, for a forward pass that is not captured."""
        return self.numbered(self._turn)

    def turn(self) -> None:
        """Let it be the next layer's turn: to be called when one has been looked at."""
        self._turn += 1

    def numbered(self, number: int) -> StreamTap:
        """The tap of any number from 0, for a graph that keeps it: layers take turns from one to the next."""
        return StreamTap(number % self._num_layers, self._kept) if len(self._kept) else NO_TAP
