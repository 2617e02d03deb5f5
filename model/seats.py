"""The device's tables of running sequences: tokens, block tables and sampling knobs, by seat.

One record a seat, one row of one int32 tensor, so that a sequence is seated by a single copy. Kernels
read it where a step needs it; the sampler writes each chosen token into it, which makes it the next
step's input without a visit to the host. Knows nothing of requests: a seat is a number.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fusewire.model.batch import Seating
from fusewire.model.sampling_params import SamplingParams

KNOBS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
    "prompt_len",
    "seed_low",
    "seed_high",
)
"""What a record begins with, a 32-bit word each: six float32, two int32, the seed's two halves."""
NUM_FLOATS = 6
KNOB_WORDS = 16
"""Words reserved for the knobs."""


class SeatTable:
    """Records of `num_seats` seats and of one more, the last, which rows that pad a batch sit on.

    Args:
        num_seats: sequences that may run at once.
        max_tokens: the longest sequence.
        max_blocks: blocks of the longest sequence.
        device: where the tables live.
    """

    def __init__(self, num_seats: int, max_tokens: int, max_blocks: int, device: torch.device) -> None:
        self.num_seats = num_seats
        self.device = device
        self.params: list[SamplingParams] = [SamplingParams()] * (num_seats + 1)
        """The knobs on the host, to see which of the sampler's parts a step needs."""
        self._max_tokens = max_tokens
        self._tokens_at = KNOB_WORDS + max_blocks
        width = -(-(self._tokens_at + max_tokens + 1) // 4) * 4  # one past the end: the last choice
        self.records = torch.zeros(num_seats + 1, width, dtype=torch.int32, device=device)
        self.seat([Seating(num_seats, [0], 1, [0], SamplingParams())])

    @property
    def knobs(self) -> Tensor:
        """int32 `[num_seats + 1, KNOB_WORDS]`, rows strided: see `KNOBS`."""
        return self.records[:, :KNOB_WORDS]

    @property
    def block_tables(self) -> Tensor:
        """int32 `[num_seats + 1, max_blocks]`, rows strided; entries past a sequence's blocks are stale."""
        return self.records[:, KNOB_WORDS : self._tokens_at]

    @property
    def tokens(self) -> Tensor:
        """int32 `[num_seats + 1, max_tokens + 1]` at least, strided; stale past a sequence's end."""
        return self.records[:, self._tokens_at :]

    def seat(self, seatings: Sequence[Seating]) -> None:
        """Write the records of sequences that take seats; steps launched before still see the old ones.

        Raises:
            ValueError: if a sequence is longer than a record has room for.
        """
        sizes = [self._checked_size(seating) for seating in seatings]
        staged = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=self.device.type == "cuda")
        for seating, part in zip(seatings, staged.split(sizes), strict=True):
            self.params[seating.seat] = seating.params
            record = part.numpy()
            record[:KNOB_WORDS] = _knob_words(seating.params, seating.prompt_len)
            record[KNOB_WORDS : KNOB_WORDS + len(seating.block_table)] = seating.block_table
            record[self._tokens_at :] = seating.token_ids
            self.records[seating.seat, : len(record)].copy_(part, non_blocking=True)

    def _checked_size(self, seating: Seating) -> int:
        """Words of a record that a sequence fills."""
        max_blocks = self._tokens_at - KNOB_WORDS
        if len(seating.block_table) > max_blocks or len(seating.token_ids) > self._max_tokens:
            raise ValueError(
                f"seating: {len(seating.token_ids)} tokens in {len(seating.block_table)} blocks do not fit "
                f"{self._max_tokens} tokens in {max_blocks} blocks"
            )
        return self._tokens_at + len(seating.token_ids)


def _knob_words(params: SamplingParams, prompt_len: int) -> np.ndarray:
    """The first words of a record, int32 `[KNOB_WORDS]`."""
    words = np.zeros(KNOB_WORDS, dtype=np.int32)
    floats = [getattr(params, name) for name in KNOBS[:NUM_FLOATS]]
    words[:NUM_FLOATS] = np.array(floats, dtype=np.float32).view(np.int32)
    words[NUM_FLOATS : NUM_FLOATS + 2] = (min(params.top_k, 2**31 - 1), prompt_len)
    words[NUM_FLOATS + 2 : NUM_FLOATS + 4] = np.array([params.seed], dtype=np.uint64).view(np.int32)
    return words
