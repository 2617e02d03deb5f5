"""The tensors of one forward pass, and how the rows of a step become them.

The host packs what it knows of a step into one buffer and sends it with a single copy; the device
looks up the rest. The same tensors serve every step, so that a CUDA graph which read them once reads
the next step's there. Knows nothing of phases: a decode row is a row of one token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fusewire.kernels.modes import KernelMode
from fusewire.kernels.paged_prefill import SPLIT_PLACES, TILE_WORDS, prefill_tiles
from fusewire.kernels.step_inputs import expand_inputs
from fusewire.model.batch import Row
from fusewire.model.seats import SeatTable

_ALIGNMENT = 32
"""Elements (128 bytes): kernels specialise on aligned pointers, so every section starts on one."""
_BUFFERS = 4
"""Steps whose packed inputs may be on their way at once; more would wait for the oldest."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """How many of each thing a step has, those that only pad it included."""

    num_tokens: int
    num_rows: int
    num_tiles: int = 0
    """Tiles of the prefill attention; 0 for a decode step, in which every row has one token and samples."""
    tile_tokens: int = 1
    """Tokens of a row that a tile takes at most."""
    split_places: int = 0
    """Tiles more that there may be because long contexts are split among several."""

    @property
    def is_decode(self) -> bool:
        """Whether every row is one token."""
        return self.num_tiles == 0


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step of B rows with T tokens together, S of which yield logits."""

    kernel_mode: KernelMode
    block_size: int
    shape: StepShape
    query_lens: tuple[int, ...]
    """Tokens of each row, on the host; empty while a graph is captured, which serves any rows."""
    context_lens: tuple[int, ...]
    """Tokens of each row's sequence up to and with this step, on the host; likewise."""
    input_ids: Tensor
    """int32 [T], rows one after the other."""
    positions: Tensor
    """int64 [T], from 0 within each sequence."""
    slots: Tensor
    """int64 [T], where each token's k and v go; -1 for a token that pads."""
    row_seats: Tensor
    """int32 [B], rows of `block_tables`."""
    row_ends: Tensor
    """int32 [B + 1], 0 and where each row's tokens end among the T."""
    row_contexts: Tensor
    """int32 [B], `context_lens` on the device; 0 for a row that pads."""
    tiles: Tensor
    """int32 [tiles, TILE_WORDS], see `fusewire.kernels.paged_prefill`."""
    block_tables: Tensor
    """int32 [seats, blocks], rows strided; see `SeatTable`."""
    logit_rows: Tensor
    """int32 [S], indices into T: the last token of each row that samples."""
    sample_seats: Tensor
    """int32 [S]."""
    sample_lengths: Tensor
    """int32 [S], the position that the choice takes in its sequence."""


_PER_TOKEN = ("token_seats", "token_positions", "new_blocks")
_PER_ROW = ("row_seats", "row_contexts", "logit_rows", "sample_seats", "sample_lengths")


@lru_cache(maxsize=1024)
def _sections(shape: StepShape) -> tuple[dict[str, slice], int]:
    """Lay out the packed buffer of a shape: each section's place, and the whole length."""
    sizes = dict.fromkeys(_PER_TOKEN, shape.num_tokens) | dict.fromkeys(_PER_ROW, shape.num_rows)
    sizes |= {"row_ends": shape.num_rows + 1, "tiles": TILE_WORDS * shape.num_tiles}
    places, offset = {}, 0
    for name, size in sizes.items():
        places[name] = slice(offset, offset + size)
        offset += -(-size // _ALIGNMENT) * _ALIGNMENT
    return places, offset


class StepInputs:
    """The device memory that every step's inputs lie in, and the way there.

    Args:
        seats: the tables that rows refer to.
        block_size: tokens of a KV cache block.
        max_tokens: tokens of the largest step.
        max_rows: rows of the largest step.
    """

    def __init__(self, seats: SeatTable, block_size: int, max_tokens: int, max_rows: int) -> None:
        device = seats.device
        most_tiles = max_tokens + max_rows + SPLIT_PLACES
        _, words = _sections(StepShape(max_tokens, max_rows, most_tiles))
        self._seats = seats
        self._block_size = block_size
        self._packed = torch.zeros(words, dtype=torch.int32, device=device)
        self._ids = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self._positions = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self._slots = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self._buffers = [_HostBuffer(words, device) for _ in range(_BUFFERS)]
        self._turn = 0
        self._views = lru_cache(maxsize=1024)(self._make_views)

    def load(self, rows: Sequence[Row], mode: KernelMode, shape: StepShape) -> ForwardBatch:
        """Send a step's rows to the device; what the shape has beyond them is padding.

        The S of the batch is the number of rows that sample, whatever the shape.

        Raises:
            ValueError: if the shape is too small for the rows.
        """
        places, words = _sections(shape)
        buffer = self._buffers[self._turn]
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer.wait()
        query_lens, context_lens, num_samples = _pack(
            rows, shape, places, buffer.array[:words], self._seats.num_seats
        )
        buffer.send(self._packed[:words])
        batch = self._views(mode, shape, num_samples)
        return replace(batch, query_lens=query_lens, context_lens=context_lens)

    def load_padding(self, mode: KernelMode, shape: StepShape) -> ForwardBatch:
        """Send a step of nothing but padding, all of whose rows may sample: what a graph is captured of."""
        self.load([], mode, shape)
        return self._views(mode, shape, shape.num_rows)

    def expand(self, batch: ForwardBatch) -> None:
        """Let the device look up ids, positions and slots; the first work of a forward pass."""
        places, _ = _sections(batch.shape)
        seats, positions, new_blocks = (self._packed[places[name]] for name in _PER_TOKEN)
        expand_inputs(
            seats, positions, new_blocks, self._seats.tokens, self._seats.block_tables,
            self._block_size, batch.input_ids, batch.positions, batch.slots,
        )  # fmt: skip

    def _make_views(self, mode: KernelMode, shape: StepShape, num_samples: int) -> ForwardBatch:
        """The tensors of a step, its lengths on the host left open."""
        places, _ = _sections(shape)
        packed, tokens = self._packed, shape.num_tokens
        return ForwardBatch(
            mode,
            self._block_size,
            shape,
            (),
            (),
            self._ids[:tokens],
            self._positions[:tokens],
            self._slots[:tokens],
            packed[places["row_seats"]],
            packed[places["row_ends"]],
            packed[places["row_contexts"]],
            packed[places["tiles"]].view(-1, TILE_WORDS),
            self._seats.block_tables,
            packed[places["logit_rows"]][:num_samples],
            packed[places["sample_seats"]][:num_samples],
            packed[places["sample_lengths"]][:num_samples],
        )


class _HostBuffer:
    """Memory of the host that a device copies from, pinned and sent without waiting where that is a GPU."""

    def __init__(self, words: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._tensor = torch.zeros(words, dtype=torch.int32, pin_memory=on_gpu)
        self._sent = torch.cuda.Event() if on_gpu else None
        self.array = self._tensor.numpy()

    def wait(self) -> None:
        """Wait until what was sent last has been copied, so that it may be overwritten."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, target: Tensor) -> None:
        """Copy the first words to the target, which is as long as they are."""
        target.copy_(self._tensor[: len(target)], non_blocking=True)
        if self._sent is not None:
            self._sent.record()


def _pack(
    rows: Sequence[Row], shape: StepShape, places: dict[str, slice], packed: np.ndarray, pad_seat: int
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Write the sections of a step; returns query lengths, context lengths and the rows that sample."""
    count = len(rows)
    seats = np.fromiter((row.seat for row in rows), np.int32, count)
    starts = np.fromiter((row.start for row in rows), np.int32, count)
    counts = np.fromiter((row.count for row in rows), np.int32, count)
    samples = np.fromiter((row.samples for row in rows), np.bool_, count)
    contexts = starts + counts
    ends = np.cumsum(counts, dtype=np.int32)
    num_tokens = int(ends[-1]) if count else 0
    if num_tokens > shape.num_tokens or count > shape.num_rows:
        raise ValueError(f"rows: {count} with {num_tokens} tokens do not fit {shape}")

    def write(name: str, values: np.ndarray, padding: int) -> None:
        section = packed[places[name]]
        section[: len(values)] = values
        section[len(values) :] = padding

    token_seats, positions = seats, starts
    if num_tokens > count:
        row_of = np.repeat(np.arange(count), counts)  # [T]
        token_seats = seats[row_of]
        positions = np.arange(num_tokens, dtype=np.int32) + (starts - ends + counts)[row_of]
    write("token_seats", token_seats, pad_seat)
    write("token_positions", positions, 0)
    packed[places["new_blocks"]] = -1
    packed[places["new_blocks"]][ends - 1] = np.fromiter((row.new_block for row in rows), np.int32, count)
    write("row_seats", seats, pad_seat)
    write("row_contexts", contexts, 0)
    packed[places["row_ends"].start] = 0
    packed[places["row_ends"]][1 : count + 1] = ends
    packed[places["row_ends"]][count + 1 :] = num_tokens
    write("logit_rows", ends[samples] - 1, 0)
    write("sample_seats", seats[samples], pad_seat)
    write("sample_lengths", contexts[samples], 0)
    if not shape.is_decode:
        tiles = prefill_tiles(counts, shape.tile_tokens, contexts, split_places=shape.split_places)
        write("tiles", tiles.ravel(), -1)
    return tuple(counts.tolist()), tuple(contexts.tolist()), int(samples.sum())
