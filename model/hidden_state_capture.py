"""A copy of the residual stream as it enters one layer, so that the layer can be checked after the step.

Inside a CUDA graph a stream is gone when the step is done. So every forward pass leaves that of one layer
behind; which one, a flag on the device says for each layer, so that the same graph serves all layers in turn.
"""

import torch

from fusewire.kernels.row_capture import RowCapture

_FLAG_WORDS = 4
"""int32 words from one flag to the next: kernels expect tensors to start at 16 bytes."""


class HiddenStateCapture:
    """The stream that enters one layer of the forward pass launched last; layers take turns.

    Args:
        num_layers: layers of the model.
        max_tokens: tokens of a step that are kept, the first ones.
        hidden: width of the stream.
    """

    def __init__(
        self, num_layers: int, max_tokens: int, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layer = 0
        """Whose stream forward passes leave from now on."""
        self.rows = torch.zeros(max_tokens, hidden, dtype=dtype, device=device)
        """`[max_tokens, hidden]`: the step's first tokens, those that pad it included."""
        self._flags = torch.zeros(num_layers + 1, _FLAG_WORDS, dtype=torch.int32, device=device)
        self._flags[0, 0] = 1
        *self._captures, self.none = (RowCapture(flag[:1], self.rows) for flag in self._flags)
        """What keeps nothing, for a launch that is to be the same otherwise: the last one's flag stays 0."""

    def of_layer(self, layer: int) -> RowCapture:
        """What the first launch of a layer is to be given."""
        return self._captures[layer]

    def turn(self) -> None:
        """Let it be the next layer's turn, from the next forward pass on; waits for nothing."""
        self._flags[self.layer].zero_()
        self.layer = (self.layer + 1) % len(self._captures)
        self._flags[self.layer].fill_(1)
