"""Times paged attention under a few plans each, beside torch's attention on contiguous tensors.

    python -m tests.benchmarks.attention --out attention.json

Wants a CUDA device. bf16, GPU time of one call inside a CUDA graph whose calls work on caches of their
own, each cold, as the layers of a model are. Decode is bound by how fast the cache arrives: its figure is
the share of 3.0 TB/s. Prefill is bound by its products: its figure is TFLOP/s of the scores that causality
leaves. A plan's result is held against the chosen plan's before it is timed. Whatever cannot run is
recorded with its error and skipped, and so is what would start after `--seconds`.

Of the library's backends it also tells what a first call with a new length costs, which is when cuDNN
builds a plan, and whether a call can be captured.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, astuple, dataclass
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from triton.errors import TritonError

from fusewire.kernels.launch import architecture_of
from fusewire.kernels.paged_decode import (
    DecodePlan,
    decode_plan,
    decode_workspace,
    launch_decode,
    padded,
)
from fusewire.kernels.paged_prefill import (
    SPLIT_STEP,
    PrefillPlan,
    launch_prefill,
    prefill_plan,
    prefill_tiles,
    prefill_workspace,
    split_places_for,
    tile_tokens_for,
)
from fusewire.service.bench.timing import GRAPH_CALLS, Timer
from tests.kernels.cases import rms_relative_error

DTYPE = torch.bfloat16
HEAD_DIM = 128
BLOCK_SIZE = 16
COPY_BYTES_PER_S = 3.0e12
COLD_BYTES = 256 << 20
"""Caches of all sets together have at least this, unless there is a set for each call of a graph."""
SAME = 2**-7
"""RMS relative difference of two plans' results that rounding explains."""
FAILURES = (RuntimeError, ValueError, TritonError)
HEADS = ((16, 8), (32, 8))

DECODE_CUTS = (  # block_n, num_warps, num_stages
    (64, 4, 3),
    (64, 4, 2),
    (64, 4, 4),
    (64, 2, 3),
    (32, 2, 4),
    (128, 4, 2),
    (128, 8, 2),
    (128, 8, 3),
)
DECODE_SPLITS = {  # rows: min_split, max_splits
    1: ((64, 64), (128, 64), (256, 32), (512, 16)),
    8: ((64, 32), (128, 32), (256, 16), (512, 8)),
    32: ((128, 16), (256, 16), (512, 8), (1024, 4)),
    64: ((256, 8), (256, 16), (512, 8), (1024, 4)),
    256: ((256, 8), (512, 8), (1024, 4), (1 << 20, 1)),
}
PREFILL_CUTS = (  # rows of a tile, block_n, num_warps, num_stages
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (128, 128, 8, 2),
    (128, 64, 4, 3),
    (64, 64, 4, 3),
    (64, 64, 4, 2),
)
PREFILL_SMALL_CUTS = ((64, 128, 4, 2), (32, 64, 4, 3), (16, 64, 4, 3), (16, 128, 4, 2))
NEW_LENGTHS = (4096, 5120, 16384)


@dataclass(frozen=True)
class Work:
    """Rows of a step, and the q and kv heads that attend."""

    name: str
    heads: tuple[int, int]
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]

    @property
    def cache_bytes(self) -> int:
        """Keys and values of all contexts."""
        return sum(self.context_lens) * 2 * self.heads[1] * HEAD_DIM * DTYPE.itemsize

    @property
    def flops(self) -> int:
        """Of both products, of pairs of a query and a position that it sees."""
        rows = zip(self.query_lens, self.context_lens, strict=True)
        seen = sum(count * length - count * (count - 1) // 2 for count, length in rows)
        return 4 * seen * self.heads[0] * HEAD_DIM


@dataclass(frozen=True)
class Inputs:
    """What the kernels are given for a piece of work, with caches of several layers."""

    q: Tensor
    caches: list[tuple[Tensor, Tensor]]
    block_tables: Tensor
    seats: Tensor
    query_starts: Tensor
    context_lens: Tensor

    @property
    def scale(self) -> float:
        return HEAD_DIM**-0.5


def draw(work: Work, sets: int, device: torch.device) -> Inputs:
    """Draw inputs; blocks lie anywhere in the caches."""
    counts = torch.tensor([-(-length // BLOCK_SIZE) for length in work.context_lens])
    num_blocks, most = int(counts.sum()), int(counts.max())
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
    tables = torch.zeros(len(counts), most, dtype=torch.int32)
    for row, blocks in enumerate(order.split(counts.tolist())):
        tables[row, : len(blocks)] = blocks

    def cache() -> Tensor:
        shape = (num_blocks + 1, BLOCK_SIZE, work.heads[1], HEAD_DIM)
        return torch.empty(shape, dtype=DTYPE, device=device).normal_()

    return Inputs(
        torch.randn(sum(work.query_lens), work.heads[0], HEAD_DIM, device=device).to(DTYPE),
        [(cache(), cache()) for _ in range(sets)],
        tables.to(device),
        torch.arange(len(counts), dtype=torch.int32, device=device),
        torch.tensor([0, *accumulate(work.query_lens)], dtype=torch.int32, device=device),
        torch.tensor(work.context_lens, dtype=torch.int32, device=device),
    )


def sets_for(work: Work) -> int:
    """Caches that a graph's calls rotate over."""
    return max(2, min(GRAPH_CALLS, -(-COLD_BYTES // work.cache_bytes)))


def decode_works() -> Iterator[Work]:
    """Every number of rows at every context, one long context, and one batch of mixed ones."""
    mixed = torch.randint(100, 2049, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    for heads in HEADS:
        for rows in DECODE_SPLITS:
            for context in (256, 800, 2048):
                yield Work(f"{rows} x {context}", heads, (1,) * rows, (context,) * rows)
        yield Work("1 x 16384", heads, (1,), (16384,))
        yield Work("256 x 100..2048", heads, (1,) * 256, tuple(mixed))


def prefill_works() -> Iterator[Work]:
    """Whole prompts, a chunk at the end of a long one, many short ones, and a mixed step."""
    for heads in HEADS:
        for length in (1024, 4096, 16384):
            yield Work(f"{length} fresh", heads, (length,), (length,))
        for count in (64, 512):
            yield Work(f"{count} of 16384", heads, (count,), (16384,))
        yield Work("32 x 128", heads, (128,) * 32, (128,) * 32)
        yield Work("32 decoding + 224", heads, (1,) * 32 + (224,), (500,) * 32 + (224,))
        yield Work("32 decoding + 64 of 12000", heads, (1,) * 32 + (64,), (2000,) * 32 + (12000,))


def decode_candidates(rows: int, heads: tuple[int, int]) -> tuple[DecodePlan, ...]:
    """The chosen plan, every cut with a number's first splits, and its other splits with the first cut."""
    first, *others = DECODE_SPLITS[rows]
    cuts = [DecodePlan(cut[0], max(first[0], cut[0]), first[1], *cut[1:]) for cut in DECODE_CUTS]
    splits = [DecodePlan(DECODE_CUTS[0][0], *split, *DECODE_CUTS[0][1:]) for split in others]
    return tuple(dict.fromkeys((decode_plan(rows, heads[1], HEAD_DIM, DTYPE), *cuts, *splits)))


def prefill_candidates(work: Work, architecture: int) -> tuple[tuple[int, PrefillPlan], ...]:
    """Rows of a tile and plans, those that are chosen first."""
    group = work.heads[0] // work.heads[1]
    block_m = padded(tile_tokens_for(*work.heads, sum(work.query_lens), DTYPE) * group)
    small = sum(work.query_lens) <= 1024 or len(work.query_lens) > 1
    cuts = PREFILL_CUTS + PREFILL_SMALL_CUTS if small else PREFILL_CUTS
    tried = [(cut[0], PrefillPlan(*cut[1:])) for cut in cuts]
    return tuple(dict.fromkeys(((block_m, prefill_plan(block_m, HEAD_DIM, DTYPE, architecture)), *tried)))


def decode_call(inputs: Inputs, plan: DecodePlan, *, overlap: bool = False) -> Callable[[int], Tensor]:
    """Decode on the caches of a set."""
    rows, num_q_heads, _ = inputs.q.shape
    num_kv_heads = inputs.caches[0][0].shape[2]
    space = decode_workspace(rows, num_q_heads, num_kv_heads, HEAD_DIM, inputs.q.device, [plan])

    def call(number: int) -> Tensor:
        k, v = inputs.caches[number]
        return launch_decode(
            inputs.q, k, v, inputs.block_tables, inputs.seats, inputs.context_lens, inputs.scale,
            space, plan, overlap=overlap,
        )  # fmt: skip

    return call


def prefill_call(inputs: Inputs, work: Work, block_m: int, plan: PrefillPlan) -> Callable[[int], Tensor]:
    """Prefill on the caches of a set."""
    tile_tokens = max(1, block_m * work.heads[1] // work.heads[0])
    places = split_places_for(tile_tokens, work.heads[0] // work.heads[1])
    if plan.block_n > SPLIT_STEP:
        places = 0
    tiles = prefill_tiles(work.query_lens, tile_tokens, work.context_lens, split_places=places)
    tiles = torch.from_numpy(tiles).to(inputs.q.device)
    space = prefill_workspace(*work.heads, HEAD_DIM, DTYPE, inputs.q.device)

    def call(number: int) -> Tensor:
        k, v = inputs.caches[number]
        return launch_prefill(
            inputs.q, k, v, inputs.block_tables, inputs.seats, inputs.query_starts, inputs.context_lens,
            tiles, inputs.scale, space, plan, tile_tokens=tile_tokens,
        )  # fmt: skip

    return call


def describe(problem: BaseException) -> str:
    """The first line of an error."""
    return f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem) else ''}"[:200]


Variant = tuple[tuple[int, int], DecodePlan | tuple[int, PrefillPlan]]


def compile_variant(variant: Variant) -> None:
    """Run a plan once on little work, in a process of its own, for Triton's cache on disk."""
    heads, plan = variant
    work = Work("compile", heads, (1,), (BLOCK_SIZE,))
    try:
        inputs = draw(work, 1, torch.device("cuda", 0))
        if isinstance(plan, DecodePlan):
            decode_call(inputs, plan)(0)
        else:
            prefill_call(inputs, work, *plan)(0)
        torch.cuda.synchronize()
    except FAILURES as problem:  # it comes again, and is recorded, when the plan is measured
        print(f"{heads} {plan}: {describe(problem)}", file=sys.stderr, flush=True)


def compile_all(architecture: int, workers: int) -> None:
    """Compile all that will be measured, several at a time; prefill takes longest."""
    prefill = [
        (work.heads, plan) for work in prefill_works() for plan in prefill_candidates(work, architecture)
    ]
    decode = [
        (heads, plan) for heads in HEADS for rows in DECODE_SPLITS for plan in decode_candidates(rows, heads)
    ]
    variants: list[Variant] = list(dict.fromkeys((*prefill, *decode)))
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(compile_variant, variants))
    except BrokenProcessPool as problem:
        print(f"compiling ahead ended: {problem}", file=sys.stderr, flush=True)


def time_call(call: Callable[[int], Tensor], sets: int, timer: Timer, like: Tensor | None = None) -> dict:
    """Microseconds of a call in a graph, or why there are none; its result is compared first."""
    try:
        if like is not None:
            difference = rms_relative_error(call(0), like.double())
            if not difference <= SAME:
                return {"failure": f"wrong: differs by {difference:.2g}"}
        return {"us": round(timer.in_graph(call, sets).median, 2)}
    except FAILURES as problem:
        return {"failure": describe(problem)}


def measure_decode(work: Work, timer: Timer) -> dict:
    """Time every plan of a piece of decode work, the best one also with launches that overlap."""
    sets = sets_for(work)
    inputs = draw(work, sets, timer.device)
    plans = decode_candidates(len(work.query_lens), work.heads)
    like = decode_call(inputs, plans[0])(0)
    rows = [
        {"plan": asdict(plan)} | time_call(decode_call(inputs, plan), sets, timer, like) for plan in plans
    ]
    for row in rows:
        if "us" in row:
            row["share"] = round(work.cache_bytes / row["us"] / COPY_BYTES_PER_S * 1e6, 3)
    found = {"work": work.name, "heads": work.heads, "sets": sets, "plans": rows}
    timed = [row for row in rows if "us" in row]
    if timed:
        best = min(timed, key=lambda row: row["us"])
        best["best"] = True
        plan = DecodePlan(**best["plan"])
        found["overlapped"] = time_call(decode_call(inputs, plan, overlap=True), sets, timer, like)
    return found


def measure_prefill(work: Work, timer: Timer) -> dict:
    """Time every plan of a piece of prefill work, and the library on contiguous tensors."""
    sets = sets_for(work)
    inputs = draw(work, sets, timer.device)
    plans = prefill_candidates(work, architecture_of(timer.device))
    like = prefill_call(inputs, work, *plans[0])(0)
    rows = [
        {"block_m": block_m, "plan": asdict(plan)}
        | time_call(prefill_call(inputs, work, block_m, plan), sets, timer, like)
        for block_m, plan in plans
    ]
    library = [
        {"library": name} | time_call(call, sets, timer)
        for name, call in library_calls(work, sets, timer.device)
    ]
    for row in (*rows, *library):
        if "us" in row:
            row["tflops"] = round(work.flops / row["us"] / 1e6, 1)
    timed = [row for row in rows if "us" in row]
    if timed:
        min(timed, key=lambda row: row["us"])["best"] = True
    return {"work": work.name, "heads": work.heads, "sets": sets, "plans": rows, "library": library}


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally from the lower right corner with one backend only."""
    square = q.shape[2] == k.shape[2]
    mask = None if square else causal_lower_right(q.shape[2], k.shape[2])
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=square, enable_gqa=q.shape[1] != k.shape[1]
        )


def cudnn_operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the cuDNN backend ends in, past torch's choice of backends."""
    if q.shape[2] != k.shape[2]:
        raise ValueError("cudnn: causal from the upper left corner only")
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, True)[0]


def contiguous(work: Work, expand: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v `[B, heads, tokens, d]` of rows of equal length, in the memory order of tokens."""
    batch, count, length = len(work.query_lens), work.query_lens[0], work.context_lens[0]

    def heads(number: int, tokens: int) -> Tensor:
        return torch.randn(batch, tokens, number, HEAD_DIM, device=device).to(DTYPE).transpose(1, 2)

    kv_heads = work.heads[0] if expand else work.heads[1]
    return heads(work.heads[0], count), heads(kv_heads, length), heads(kv_heads, length)


LIBRARY: dict[str, tuple[bool, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "flash, enable_gqa": (False, lambda *qkv: sdpa(SDPBackend.FLASH_ATTENTION, *qkv)),
    "flash, kv expanded": (True, lambda *qkv: sdpa(SDPBackend.FLASH_ATTENTION, *qkv)),
    "cudnn, enable_gqa": (False, lambda *qkv: sdpa(SDPBackend.CUDNN_ATTENTION, *qkv)),
    "cudnn, kv expanded": (True, lambda *qkv: sdpa(SDPBackend.CUDNN_ATTENTION, *qkv)),
    "cudnn operator": (False, cudnn_operator),
    "cudnn operator, kv expanded": (True, cudnn_operator),
}
"""Whether kv heads are expanded to as many as q heads beforehand, and the call."""


def library_calls(
    work: Work, sets: int, device: torch.device
) -> Iterator[tuple[str, Callable[[int], Tensor]]]:
    """The library's ways, where rows are of one length."""
    if len({*zip(work.query_lens, work.context_lens, strict=True)}) > 1:
        return
    for name, (expand, attend) in LIBRARY.items():
        tensors = [contiguous(work, expand, device) for _ in range(min(sets, 4))]
        yield name, lambda number, mine=tensors, attend=attend: attend(*mine[number % len(mine)])


def measure_first_calls(device: torch.device) -> list[dict]:
    """Milliseconds of the first and the second call of each length, by the clock, with its end awaited."""
    found = []
    for name, (expand, attend) in LIBRARY.items():
        row = {"library": name}
        for length in NEW_LENGTHS:
            qkv = contiguous(Work("first", HEADS[0], (length,), (length,)), expand, device)
            try:
                row[str(length)] = [_clock(lambda qkv=qkv, attend=attend: attend(*qkv)) for _ in range(2)]
            except FAILURES as problem:
                row["failure"] = describe(problem)
        found.append(row)
    return found


def _clock(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return round((time.perf_counter() - start) * 1e3, 3)


def capturable(device: torch.device) -> dict[str, str]:
    """Whether a call of a length seen before can be captured, and replays to the same result."""
    work = Work("capture", HEADS[0], (NEW_LENGTHS[0],), (NEW_LENGTHS[0],))
    found = {}
    for name, (expand, attend) in LIBRARY.items():
        qkv = contiguous(work, expand, device)
        try:
            want = attend(*qkv)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = attend(*qkv)
            graph.replay()
            found[name] = "yes" if torch.equal(got, want) else "yes, other bits"
        except FAILURES as problem:
            found[name] = f"no: {describe(problem)}"
    return found


def short(row: dict) -> str:
    """A plan in few characters."""
    if "library" in row:
        return row["library"]
    if "block_m" in row:
        return "{}x{} w{} s{}".format(row["block_m"], *astuple(PrefillPlan(**row["plan"])))
    block_n, least, most, warps, stages = astuple(DecodePlan(**row["plan"]))
    return f"{block_n} w{warps} s{stages}, >={least} <={most}"


def print_work(found: dict) -> None:
    """Print the plans of a piece of work, fastest first; the first of the file is the one chosen now."""
    print(f"\n{found['heads'][0]}/{found['heads'][1]} heads, {found['work']}:")
    chosen = found["plans"][0]
    rows = sorted((*found["plans"], *found.get("library", ())), key=lambda row: row.get("us", float("inf")))
    for row in rows:
        figure = f"{row['share']:.1%}" if "share" in row else f"{row.get('tflops', 0):.0f} TFLOP/s"
        text = f"{row['us']:10.2f} us  {figure}" if "us" in row else row["failure"]
        mark = ("*" if row.get("best") else " ") + ("<" if row is chosen else " ")
        print(f"  {mark} {short(row):<32} {text}")
    if "overlapped" in found:
        print(f"     {'best, launches overlap':<32} {found['overlapped']}", flush=True)


def guarded(measure: Callable[[Work, Timer], dict], work: Work, timer: Timer) -> dict | None:
    """Measure and print, or print why not."""
    try:
        found = measure(work, timer)
    except FAILURES as problem:
        print(f"\n{work.heads} {work.name}: {describe(problem)}", flush=True)
        return None
    print_work(found)
    return found


def measure_all(
    works: Sequence[Work], measure: Callable[[Work, Timer], dict], timer: Timer, until: float
) -> list:
    """Measure one after the other, as long as there is time."""
    found = []
    for work in works:
        if time.monotonic() > until:
            print(f"\n{work.heads} {work.name}: no time left", flush=True)
            continue
        found.append(guarded(measure, work, timer))
        torch.cuda.empty_cache()
    return [row for row in found if row is not None]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=110, help="nothing is started after this")
    parser.add_argument("--repeats", type=int, default=8, help="samples of each graph")
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument("--only", choices=["decode", "prefill", "library"])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("attention: needs a CUDA device")
    started = time.monotonic()
    until = started + options.seconds
    device = torch.device("cuda", torch.cuda.current_device())
    found: dict = {
        "command": "python -m tests.benchmarks.attention",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": str(DTYPE),
    }
    if options.only != "library":
        compile_all(architecture_of(device), options.workers)
        print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    timer = Timer.on(device, options.repeats)
    parts: dict[str, Callable[[], object]] = {
        "decode": lambda: measure_all(list(decode_works()), measure_decode, timer, until - 35),
        "library": lambda: {
            "first_and_second_call_ms": measure_first_calls(device),
            "captured": capturable(device),
        },
        "prefill": lambda: measure_all(list(prefill_works()), measure_prefill, timer, until),
    }
    for name, part in parts.items():
        if options.only in (None, name):
            found[name] = part()
            if name == "library":
                print(json.dumps(found[name], indent=1), flush=True)
            found["seconds"] = round(time.monotonic() - started, 1)
            options.out.write_text(json.dumps(found, indent=1) + "\n")  # a run cut off leaves its part
    print(f"\n{found['seconds']:.0f} s; * is the fastest plan, < the chosen one")


if __name__ == "__main__":
    main()
