"""Times every way to cut the projection with its epilogue, beside a library's product and one more launch.

    python -m tests.benchmarks.epilogue --out epilogue.json

Wants a CUDA device. GPU time of one call inside a CUDA graph, over sets of weights, caches and inputs
that together exceed the L2 cache, so that weights come from DRAM as they do in a model of many layers.
At each size: `linear` is the library's product, `alone` ours without its epilogue, `pair` the library's
product and the one-launch kernel (`overlapped`: which starts while the product still runs), and
`epilogue` ours with it. A plan's results are held against float64 before it is timed, and the bits of
its row 0 are noted: row 0 is the same token at every size, so equal bits show how far invariance goes.
A plan that cannot run is recorded with its error.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, astuple, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.errors import TritonError

from fusewire.kernels.launch import architecture_of
from fusewire.kernels.modes import KernelMode
from fusewire.kernels.paths import PATHS
from fusewire.kernels.qk_norm_rope_cache import qk_norm_rope_cache
from fusewire.kernels.qkv_epilogue import (
    EpiloguePlan,
    Workspace,
    launch,
    plan_for,
    project,
    workspace_for,
)
from fusewire.kernels.rope import rope_frequencies, rope_table
from fusewire.kernels.shape import QKNormShape
from fusewire.service.bench.timing import GRAPH_CALLS, Timer, l2_bytes
from tests.kernels.cases import Case, expected, rms_relative_error

TOKENS = (1, 4, 16, 32, 64, 256, 512, 1024, 4096)
BLOCK_SIZE = 16
DTYPE = torch.bfloat16
ONE_ROUNDING = 2**-9
"""RMS relative error that one rounding to bfloat16 stays below, and two do not."""
FAILURES = (RuntimeError, ValueError, TritonError)
"""What a plan that asks for too much of a device raises."""

DECODE = (  # split_k, block_k, num_warps, num_stages
    (1, 128, 4, 4),
    (1, 64, 8, 8),
    (2, 128, 4, 4),
    (2, 64, 4, 8),
    (3, 128, 4, 3),
    (4, 64, 4, 4),
    (4, 128, 4, 3),
    (5, 64, 4, 4),
    (8, 64, 4, 4),
)
SHORT = (
    EpiloguePlan(64, 1, 64, 4, 4),
    EpiloguePlan(64, 2, 64, 4, 4),
    EpiloguePlan(64, 3, 64, 4, 4),
    EpiloguePlan(64, 1, 128, 4, 3),
    EpiloguePlan(128, 1, 64, 4, 4),
    EpiloguePlan(128, 1, 64, 8, 4),
    EpiloguePlan(128, 1, 128, 8, 3),
    EpiloguePlan(128, 2, 64, 8, 4),
)
LONG = (
    EpiloguePlan(128, 1, 64, 4, 3),
    EpiloguePlan(128, 1, 64, 4, 4),
    EpiloguePlan(128, 1, 64, 8, 3),
    EpiloguePlan(128, 1, 64, 8, 4),
    EpiloguePlan(128, 1, 128, 8, 3),
    EpiloguePlan(256, 1, 64, 8, 3),
    EpiloguePlan(256, 1, 64, 8, 4),
)


@dataclass(frozen=True)
class Model:
    """What the projection of a model's attention is made of."""

    name: str
    width: int
    """Elements of a hidden row."""
    shape: QKNormShape
    slack_us: float
    """What the epilogue may add to the faster product in decode, in microseconds,"""
    slack_share: float
    """or as a share of it."""


MODELS = (
    Model("0.6b", 1024, QKNormShape(16, 8, 128, 1e-6, 128), slack_us=0.5, slack_share=0.0),
    Model("8b", 4096, QKNormShape(32, 8, 128, 1e-6, 128), slack_us=0.0, slack_share=0.03),
)


def candidates(model: Model, tokens: int) -> tuple[EpiloguePlan, ...]:
    """Plans worth a try at a size, the one that is chosen now among them."""
    if tokens <= 64:
        block_t = max(16, triton.next_power_of_2(tokens))
        tried = tuple(EpiloguePlan(block_t, *rest) for rest in DECODE)
    else:
        tried = SHORT if tokens <= 512 else LONG
    return tuple(dict.fromkeys((*tried, plan_for(tokens, model.shape, model.width))))


@dataclass(frozen=True)
class Projection:
    """One set of tensors: the hidden rows, the weight, and the site that they feed."""

    hidden: Tensor
    weight: Tensor
    site: Case
    """Its qkv is float64: what the projection should be; of the first set only."""

    def args(self) -> tuple:
        """Arguments of the epilogue's launch up to its plan."""
        return (self.hidden, self.weight, None, *self.site.args()[1:])

    def step(self, path: Callable[..., Tensor], **options: object) -> Tensor:
        """Run the library's product, then a path on its result."""
        return path(F.linear(self.hidden, self.weight), *self.site.args()[1:], **options)

    def copy(self) -> "Projection":
        """The same in memory of its own, but for what all layers share."""
        site = replace(self.site, k_cache=self.site.k_cache.clone(), v_cache=self.site.v_cache.clone())
        return Projection(self.hidden.clone(), self.weight.clone(), site)

    def bytes(self) -> int:
        """Memory that a call reads for the first time."""
        return self.hidden.nbytes + self.weight.nbytes


def draw(model: Model, tokens: int, device: torch.device) -> Projection:
    """Draw a set; token i is the same at every size."""
    generator = torch.Generator(device).manual_seed(model.width)
    most, shape = max(TOKENS), model.shape

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

    weight = (normal(shape.qkv_width, model.width) / model.width**0.5).to(DTYPE)
    hidden = normal(most, model.width)[:tokens].to(DTYPE)
    q_weight, k_weight = (1 + normal(2, shape.head_dim) / 8).to(DTYPE)
    blocks = most // BLOCK_SIZE + 2
    order = torch.randperm((blocks - 1) * BLOCK_SIZE, generator=generator, device=device)
    positions = torch.randint(most, (most,), generator=generator, device=device)
    cache = torch.zeros(blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim, dtype=DTYPE, device=device)
    table = rope_table(rope_frequencies(1e6, shape.rotary_dim), most).to(device)
    exact = hidden.double() @ weight.double().T
    site = Case(
        exact, q_weight, k_weight, table, positions[:tokens].contiguous(),
        cache, cache.clone(), order[:tokens].contiguous(), shape,
    )  # fmt: skip
    return Projection(hidden.contiguous(), weight, site)


def errors(case: Projection, q: Tensor) -> dict[str, float]:
    """RMS relative error of q, k and v against float64."""
    want = expected(case.site)
    k, v = case.site.cached()
    exact = {"q": (q, want.q), "k": (k, want.k), "v": (v, want.v)}
    return {name: rms_relative_error(*pair) for name, pair in exact.items()}


def row_bits(case: Projection, q: Tensor) -> str:
    """A short digest of token 0's q, k and v."""
    rows = (q[0], *(part[0] for part in case.site.cached()))
    raw = b"".join(row.contiguous().view(torch.uint8).cpu().numpy().tobytes() for row in rows)
    return hashlib.sha256(raw).hexdigest()[:8]


def describe(problem: BaseException) -> str:
    """The first line of an error."""
    return f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem) else ''}"[:200]


def compile_plan(model: Model, plan: EpiloguePlan) -> None:
    """Run a plan with and without its epilogue, in a process of its own, for Triton's cache on disk."""
    case = draw(model, 1, torch.device("cuda", 0))
    try:
        launch(*case.args(), plan)
        project(case.hidden, case.weight, None, model.shape, plan)
        torch.cuda.synchronize()
    except FAILURES as problem:  # it comes again, and is recorded, when the plan is measured
        print(f"{model.name} {name(plan)}: {describe(problem)}", file=sys.stderr, flush=True)


def compile_all(models: Sequence[Model], tokens: Sequence[int], workers: int) -> None:
    """Compile all that will be measured, several at a time."""
    wanted = dict.fromkeys(
        (model, plan) for model in models for count in tokens for plan in candidates(model, count)
    )
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(compile_plan, *zip(*wanted, strict=True)))
    except BrokenProcessPool as problem:
        print(f"compiling ahead ended: {problem}", file=sys.stderr, flush=True)


def check_plan(case: Projection, plan: EpiloguePlan, chain: dict[str, float]) -> dict:
    """Hold a plan against float64, and against itself in a second run, which is recorded if it fails.

    Args:
        chain: errors of the separate torch operations, of which a plan may have 1.02 times as much.
    """
    shape = case.site.shape
    found = {"plan": asdict(plan)}
    try:
        case.site.k_cache.zero_()
        case.site.v_cache.zero_()
        q = launch(*case.args(), plan)
        found |= {"errors": errors(case, q), "row_bits": row_bits(case, q)}
        qkv = project(case.hidden, case.weight, None, shape, plan)
        found["product_error"] = rms_relative_error(qkv, case.site.qkv)
        limits = {name: max(1.02 * error, ONE_ROUNDING) for name, error in chain.items()}
        wrong = [name for name, error in found["errors"].items() if not error <= limits[name]]
        if wrong or not found["product_error"] <= ONE_ROUNDING:
            found["failure"] = f"wrong: {', '.join(wrong) or 'the product alone'}"
        elif not torch.equal(q, launch(*case.args(), plan)):
            found["failure"] = "a second run gave other bits"
    except FAILURES as problem:
        found["failure"] = describe(problem)
    return found


def measure(model: Model, tokens: int, timer: Timer) -> dict:
    """Check and time everything at one size; microseconds of a call."""
    first = draw(model, tokens, timer.device)
    sets = min(GRAPH_CALLS, max(4, -(-4 * l2_bytes(timer.device) // first.bytes())))
    copies = [first, *(first.copy() for _ in range(sets - 1))]

    def timed(call: Callable[[Projection], Tensor]) -> float:
        return round(timer.in_graph(lambda number: call(copies[number]), sets).median, 3)

    fused = PATHS[KernelMode.FUSED]
    chain = errors(first, first.step(PATHS[KernelMode.UNFUSED]))
    found = {
        "model": model.name,
        "tokens": tokens,
        "sets": sets,
        "chain_errors": chain,
        "pair_errors": errors(first, first.step(fused)),
        "linear_us": timed(lambda case: F.linear(case.hidden, case.weight)),
        "pair_us": timed(lambda case: case.step(fused)),
        "overlapped_us": timed(lambda case: case.step(qk_norm_rope_cache, overlap=True)),
        "plans": [check_plan(first, plan, chain) for plan in candidates(model, tokens)],
    }
    for row in found["plans"]:
        if "failure" not in row:
            row |= time_plan(EpiloguePlan(**row["plan"]), model, tokens, timed, timer.device)
    return found | verdict(model, found)


def time_plan(
    plan: EpiloguePlan,
    model: Model,
    tokens: int,
    timed: Callable[[Callable[[Projection], Tensor]], float],
    device: torch.device,
) -> dict:
    """Time a plan with and without its epilogue."""
    space = workspace_for(tokens, model.shape, plan, device)
    try:
        return {
            "epilogue_us": timed(lambda case: launch(*case.args(), plan, space)),
            "alone_us": timed(lambda case: product(case, plan, space)),
        }
    except FAILURES as problem:
        return {"failure": describe(problem)}


def product(case: Projection, plan: EpiloguePlan, space: Workspace) -> Tensor:
    return project(case.hidden, case.weight, None, case.site.shape, plan, space)


def verdict(model: Model, found: dict) -> dict:
    """Say which plan is best, and what the epilogue adds to the faster of both products."""
    rows = [row for row in found["plans"] if "failure" not in row]
    if not rows:
        return {"best": None}
    best = min(rows, key=lambda row: row["epilogue_us"])
    alone = min(row["alone_us"] for row in rows)
    product_us, pair_us = min(found["linear_us"], alone), min(found["pair_us"], found["overlapped_us"])
    added = best["epilogue_us"] - product_us
    cheap = added <= max(model.slack_us, model.slack_share * product_us)
    ahead = best["epilogue_us"] < pair_us
    return {
        "best": best["plan"],
        "best_errors": best["errors"],
        "epilogue_us": best["epilogue_us"],
        "alone_us": alone,
        "added_us": round(added, 3),
        "added_share": round(added / product_us, 4),
        "pair_over_epilogue": round(pair_us / best["epilogue_us"], 3),
        "reached": ahead and (cheap or found["tokens"] > 64),
    }


def name(plan: EpiloguePlan) -> str:
    """The plan in few characters: tokens x K step, parts, warps, stages."""
    return "{0}x{2} /{1} w{3} s{4}".format(*astuple(plan))


def invariance(found: Iterable[dict]) -> list[dict]:
    """Group the plans of each model by the bits of token 0's row, over all sizes."""
    groups: dict[tuple[str, str], set[str]] = {}
    for size in found:
        for row in size["plans"]:
            if "failure" not in row:
                label = f"{name(EpiloguePlan(**row['plan']))}"
                groups.setdefault((size["model"], row["row_bits"]), set()).add(label)
    return [{"model": model, "bits": bits, "plans": sorted(plans)} for (model, bits), plans in groups.items()]


def print_plans(size: dict) -> None:
    for row in sorted(size["plans"], key=lambda row: row.get("epilogue_us", float("inf"))):
        times = (
            row.get("failure") or f"{row['epilogue_us']:9.2f} {row['alone_us']:9.2f}  bits {row['row_bits']}"
        )
        print(f"    {name(EpiloguePlan(**row['plan'])):<22} {times}")


def print_table(sizes: Sequence[dict], groups: Sequence[dict]) -> None:
    """Print what was found, plans first and the verdicts last."""
    for size in sizes:
        print(f"{size['model']}, {size['tokens']} tokens: plan, epilogue us, alone us")
        print_plans(size)
    print("\nbits of row 0, and the plans that give them; a plan named twice gives others at another size:")
    for group in groups:
        print(f"    {group['model']} {group['bits']}: {', '.join(group['plans'])}")
    print(
        f"\n{'model':>5} {'tokens':>6} {'linear':>8} {'alone':>8} {'pair':>8} {'overlap':>8} {'epilogue':>8} "
        f"{'added':>7} {'share':>7} {'pair/e':>7} {'error q':>8} {'chain q':>8}  reached, plan"
    )
    for size in sizes:
        head = f"{size['model']:>5} {size['tokens']:6d} {size['linear_us']:8.2f}"
        if size["best"] is None:
            print(f"{head}  no plan ran")
            continue
        print(
            f"{head} {size['alone_us']:8.2f} {size['pair_us']:8.2f} {size['overlapped_us']:8.2f} "
            f"{size['epilogue_us']:8.2f} {size['added_us']:+7.2f} {size['added_share']:+7.1%} "
            f"{size['pair_over_epilogue']:7.3f} {size['best_errors']['q']:8.5f} "
            f"{size['chain_errors']['q']:8.5f}  {'yes' if size['reached'] else 'no'}, "
            f"{name(EpiloguePlan(**size['best']))}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=[model.name for model in MODELS])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=20, help="samples of each graph")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1))
    options = parser.parse_args()
    if min(options.tokens) < 1 or max(options.tokens) > max(TOKENS):
        parser.error(f"--tokens: must be within [1, {max(TOKENS)}], got {options.tokens}")
    if not torch.cuda.is_available():
        sys.exit("epilogue: needs a CUDA device")
    models = [model for model in MODELS if options.models is None or model.name in options.models]
    started = time.monotonic()
    compile_all(models, options.tokens, options.workers)
    compiled = time.monotonic()
    print(f"compiled in {compiled - started:.0f} s", flush=True)
    timer = Timer.on(torch.device("cuda", torch.cuda.current_device()), options.repeats)
    sizes = []
    found = {
        "command": "python -m tests.benchmarks.epilogue",
        "device": torch.cuda.get_device_name(),
        "architecture": architecture_of(timer.device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": str(DTYPE),
        "sizes": sizes,
    }
    for model in models:
        for tokens in options.tokens:
            sizes.append(measure(model, tokens, timer))
            options.out.write_text(
                json.dumps(found, indent=1) + "\n"
            )  # a run that is cut off leaves its part
    found["same_row_bits"] = invariance(sizes)
    found["seconds"] = {"compile": round(compiled - started, 1), "all": round(time.monotonic() - started, 1)}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print_table(sizes, found["same_row_bits"])


if __name__ == "__main__":
    main()
