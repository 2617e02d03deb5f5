"""Whole forwards on each path: drift of the logits from fp32, and perplexity of held-out text.

Scores every token of a step, which the engine never does; so it runs the runner's model on the
runner's cache itself, by their private names.
"""

import gc
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Row, Seating, Step
from fusewire.model.demo import path as demo_path
from fusewire.model.runner import ModelRunner, RunnerOptions
from fusewire.model.sampling_params import SamplingParams

TEXT = Path(__file__).parents[1] / "data" / "persuasion.txt"
"""The last six chapters of Persuasion, which the demo model was not trained on."""
LOGIT_ROWS = 1024
"""Tokens whose logits are held at once."""
CHUNK = 509
"""Tokens of a prefill chunk; a prime, so that chunks end at any place in a block."""


class Scorer:
    """A loaded model that computes the residual stream of whole sequences on any path."""

    def __init__(self, folder: Path, device: torch.device, dtype: str, tokens: int) -> None:
        """Load a folder with a cache of so many tokens."""
        options = RunnerOptions(
            path=folder,
            device=device.type,
            dtype=dtype,
            max_context=tokens,
            max_step_tokens=tokens,
            kv_tokens=tokens + 64 * 16,
        )
        self._runner = ModelRunner(options)
        self._device = device

    def step(self, rows: Sequence[tuple[Sequence[int], int, int]], mode: KernelMode) -> Tensor:
        """Run one step of rows (token ids, start, first block): the stream `[T, hidden]`."""
        runner = self._runner
        made = []
        for seat, (ids, start, first_block) in enumerate(rows):
            blocks = -(-(start + len(ids)) // runner.block_size)
            table = range(first_block, first_block + blocks)
            known = [*[0] * start, *ids]  # only this step's tokens are read
            runner._seats.seat([Seating(seat, known, len(known), table, SamplingParams())])
            made.append(Row(seat, start, len(ids), samples=True))
        batch = runner._inputs.load(made, mode, runner._shape_of(Step(mode, made)))
        with torch.inference_mode():
            runner._inputs.expand(batch)
            return runner._model(batch, runner._cache, every_token=True)[: sum(row.count for row in made)]

    def prefill(self, ids: Sequence[int], mode: KernelMode, chunk: int | None = None) -> Tensor:
        """Run one sequence in one step, or in chunks: `[T, hidden]`."""
        chunk = chunk or len(ids)
        starts = range(0, len(ids), chunk)
        return torch.cat([self.step([(ids[start : start + chunk], start, 0)], mode) for start in starts])

    def segments(self, segments: Sequence[Sequence[int]], mode: KernelMode, *, decode: bool) -> Tensor:
        """Run equal segments side by side, at once or token by token: `[segments, tokens, hidden]`."""
        length = len(segments[0])
        blocks = -(-length // self._runner.block_size)
        firsts = [number * blocks for number in range(len(segments))]
        if not decode:
            rows = [(ids, 0, first) for ids, first in zip(segments, firsts, strict=True)]
            return self.step(rows, mode).unflatten(0, (len(segments), length))
        steps = [
            self.step([([ids[at]], at, first) for ids, first in zip(segments, firsts, strict=True)], mode)
            for at in range(length)
        ]
        return torch.stack(steps, dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of rows `[T, hidden]` in float64."""
        with torch.inference_mode():
            return self._runner._model.logits(hidden).double()


def held_out_ids(count: int) -> list[int]:
    """The first tokens of the held-out text in the demo model's vocabulary."""
    tokenizer = Tokenizer.from_file(str(demo_path() / "tokenizer.json"))
    ids = tokenizer.encode(TEXT.read_text(), add_special_tokens=False).ids
    if len(ids) < count:
        raise ValueError(f"count: the text has {len(ids)} tokens, got {count}")
    return ids[:count]


def drift(folder: Path, ids: Sequence[int], dtypes: Sequence[str], device: torch.device) -> list[dict]:
    """Logits of one prefill step in each dtype and path against the same weights in fp32, unfused."""
    exact_scorer = Scorer(folder, device, "float32", len(ids))
    exact = exact_scorer.prefill(ids, KernelMode.UNFUSED)
    rows = []
    for dtype in dtypes:
        scorer = exact_scorer if dtype == "float32" else Scorer(folder, device, dtype, len(ids))
        for mode in KernelMode:
            found = compare(exact_scorer, exact, scorer, scorer.prefill(ids, mode))
            rows.append({"dtype": dtype, "tokens": len(ids), "path": mode.value} | found)
        del scorer
        gc.collect()
    return rows


def compare(exact_scorer: Scorer, exact: Tensor, scorer: Scorer, hidden: Tensor) -> dict[str, float]:
    """Sum up how far logits are from the exact ones, over all positions."""
    largest = kl_sum = kl_most = wrong = right = 0.0
    agree = 0
    for start in range(0, len(hidden), LOGIT_ROWS):
        part = slice(start, start + LOGIT_ROWS)
        want, got = exact_scorer.logits(exact[part]), scorer.logits(hidden[part])
        off = got - want
        largest = max(largest, off.abs().max().item())
        wrong += off.square().sum().item()
        right += want.square().sum().item()
        want_log, got_log = want.log_softmax(-1), got.log_softmax(-1)
        kl = (want_log.exp() * (want_log - got_log)).sum(-1)
        kl_sum += kl.sum().item()
        kl_most = max(kl_most, kl.max().item())
        agree += int((want.argmax(-1) == got.argmax(-1)).sum())
    return {
        "largest_logit_difference": largest,
        "rms_relative": (wrong / right) ** 0.5,
        "mean_kl": kl_sum / len(hidden),
        "largest_kl": kl_most,
        "same_top_1": agree / len(hidden),
    }


def perplexities(
    segments: int, length: int, long: int, dtypes: Sequence[str], device: torch.device
) -> list[dict]:
    """Perplexity of the demo model on held-out text, each way to score it, on each path."""
    ids = held_out_ids(max(segments * length, long))
    parts = [ids[start : start + length] for start in range(0, segments * length, length)]
    rows = []
    for dtype in dtypes:
        scorer = Scorer(demo_path(), device, dtype, max(segments * (length + 16), long))
        for mode in KernelMode:
            for way, nats in ways(scorer, parts, ids[:long], mode):
                row = {"dtype": dtype, "path": mode.value, "scored": way, "perplexity": math.exp(nats)}
                rows.append(row)
    return rows


def ways(
    scorer: Scorer, parts: Sequence[Sequence[int]], long: Sequence[int], mode: KernelMode
) -> Iterator[tuple[str, float]]:
    """Score segments in prefill and in decode, and a long text in one prefill and in chunks: nats a token."""
    for way, decode in (("segments, prefill", False), ("segments, decode", True)):
        hidden = scorer.segments(parts, mode, decode=decode)
        total = sum(nats(scorer, rows, ids) for rows, ids in zip(hidden, parts, strict=True))
        yield way, total / sum(len(ids) - 1 for ids in parts)
    for way, chunk in (("long, one prefill", None), ("long, chunked prefill", CHUNK)):
        yield way, nats(scorer, scorer.prefill(long, mode, chunk), long) / (len(long) - 1)


def nats(scorer: Scorer, hidden: Tensor, ids: Sequence[int]) -> float:
    """Sum of the negative log-likelihood of every token but the first."""
    targets = torch.tensor(ids[1:], device=hidden.device)
    total = 0.0
    for start in range(0, len(targets), LOGIT_ROWS):
        part = slice(start, start + LOGIT_ROWS)
        logits = scorer.logits(hidden[:-1][part])
        total += F.cross_entropy(logits, targets[part], reduction="sum").item()
    return total
