"""Times every plan worth a try for the projections of a step of few tokens, beside the library's way.

    python -m tests.benchmarks.linear --out linear.json

Wants a CUDA device. GPU time of one call inside a CUDA graph that chains many, over rotating copies of
the weight that together exceed the L2 cache twice, so that weights come from DRAM as they do in a model of
many layers; our launches overlap, as they do in a step. Each plan's result is held against float64 before
it is timed: it may be 1.05 times as wrong as the library's. A plan that cannot run is recorded with its
error. Last, whole layers (both projections of attention and of the MLP, with attention left out) run in one
graph under the best plans, with and without overlap, and the library's way.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.errors import TritonError

from fusewire.kernels.launch import OVERLAPPING, architecture_of
from fusewire.kernels.linear_plans import LinearKind, LinearPlan, plan_for
from fusewire.kernels.rms_norm import rms_norm
from fusewire.kernels.silu_mul import silu_mul
from fusewire.kernels.skinny_linear import Extras, compile_launch, launch, skinny_linear_reference
from tests.kernels.cases import rms_relative_error

TOKENS = (1, 2, 4, 8, 16, 32, 64)
LAYER_TOKENS = (1, 32)
DTYPE = torch.bfloat16
EPS = 1e-6
PEAK = 3.0e12
"""Bytes a second that an H100 copies: shares are of the weight's bytes at this rate."""
COLD_BYTES = 120 << 20
"""Copies of a weight together have at least as many."""
CHAIN_SECONDS = 400e-6
"""A graph takes at least this long at the peak, so that its start and end do not count."""
FEWEST_CALLS, MOST_CALLS = 16, 128
SLEEP_CYCLES = 500_000
"""Keeps the device busy while a slow host launches a graph behind it."""
SLACK, TINY = 1.05, 1e-6
FAILURES = (RuntimeError, ValueError, TritonError)
"""What a plan that asks for too much of a device raises."""


@dataclass(frozen=True)
class Site:
    """A projection of a model."""

    model: str
    name: str
    kind: LinearKind
    outputs: int
    """Rows of the weight, N."""
    width: int
    """Its columns, K."""

    def bytes(self) -> int:
        """Size of the weight."""
        return self.outputs * self.width * DTYPE.itemsize

    def floor_us(self) -> float:
        """Time to read the weight at the peak."""
        return self.bytes() / PEAK * 1e6


@dataclass(frozen=True)
class Model:
    """The projections of a layer, in their order, and the head."""

    name: str
    layer: tuple[Site, ...]
    head: Site
    chained: int
    """Layers of a chain."""


def _model(name: str, hidden: int, qkv: int, attention: int, intermediate: int, chained: int) -> Model:
    layer = (
        Site(name, "qkv", LinearKind.NORM_LINEAR, qkv, hidden),
        Site(name, "o", LinearKind.LINEAR_ADD, hidden, attention),
        Site(name, "gate_up", LinearKind.NORM_GLU, 2 * intermediate, hidden),
        Site(name, "down", LinearKind.LINEAR_ADD, hidden, intermediate),
    )
    return Model(name, layer, Site(name, "head", LinearKind.NORM_LINEAR, 151936, hidden), chained)


MODELS = (
    _model("0.6b", hidden=1024, qkv=4096, attention=2048, intermediate=3072, chained=28),
    _model("8b", hidden=4096, qkv=6144, attention=4096, intermediate=12288, chained=12),
)

ONE_TOKEN = {  # by K: weight rows of a program, block_k, num_warps, prefetch_k
    1024: (
        (4, 1024, 2, 0), (4, 1024, 4, 0), (8, 1024, 2, 0), (8, 1024, 4, 0),
        (8, 1024, 8, 0), (16, 1024, 4, 0), (16, 1024, 8, 0), (32, 1024, 8, 0),
    ),
    2048: (
        (2, 2048, 4, 0), (4, 2048, 2, 0), (4, 2048, 4, 0), (4, 2048, 8, 0),
        (8, 2048, 4, 0), (8, 2048, 8, 0), (4, 1024, 4, 2048), (8, 1024, 4, 2048),
    ),
    3072: (
        (2, 4096, 4, 0), (4, 4096, 4, 0), (4, 4096, 8, 0), (8, 4096, 8, 0), (2, 1024, 2, 3072),
        (4, 1024, 4, 3072), (4, 1024, 2, 3072), (8, 1024, 4, 3072), (4, 512, 2, 3072),
    ),
    4096: (
        (2, 4096, 4, 0), (4, 4096, 4, 0), (4, 4096, 8, 0), (8, 4096, 8, 0), (8, 4096, 16, 0),
        (4, 2048, 4, 4096), (8, 2048, 8, 4096), (8, 1024, 4, 4096), (16, 1024, 8, 2048),
    ),
    12288: (
        (2, 4096, 4, 12288), (2, 4096, 8, 12288), (4, 4096, 8, 12288), (4, 4096, 8, 0), (4, 2048, 4, 12288),
        (4, 2048, 8, 12288), (8, 2048, 8, 12288), (8, 1024, 4, 12288), (2, 16384, 16, 0),
    ),
}  # fmt: skip
EVERYTHING = 1 << 20
"""More columns than any weight has."""
INSIDE, OUTSIDE = True, False
FEW_TOKENS = {  # by most tokens: weight rows, block_k, num_warps, num_stages, split, prefetch_k, the norm
    16: (
        (8, 256, 4, 4, 4, EVERYTHING, INSIDE),
        (16, 256, 4, 4, 4, 0, INSIDE),
        (16, 256, 4, 4, 4, 1024, INSIDE),
        (16, 256, 4, 5, 4, EVERYTHING, INSIDE),
        (16, 256, 4, 4, 4, 1024, OUTSIDE),
        (16, 512, 8, 4, 8, 1024, INSIDE),
        (32, 256, 4, 4, 4, 1024, INSIDE),
        (32, 256, 4, 5, 4, 1024, OUTSIDE),
        (64, 128, 4, 5, 1, 512, OUTSIDE),
    ),
    32: (
        (8, 256, 4, 4, 4, 1024, OUTSIDE),
        (16, 256, 4, 4, 4, 1024, INSIDE),
        (16, 256, 4, 4, 4, 1024, OUTSIDE),
        (32, 256, 4, 4, 4, 1024, INSIDE),
        (32, 256, 4, 4, 4, 1024, OUTSIDE),
        (32, 256, 4, 5, 4, 0, OUTSIDE),
        (64, 128, 4, 5, 1, 512, OUTSIDE),
        (64, 64, 4, 8, 1, 512, OUTSIDE),
        (128, 64, 4, 6, 1, 512, OUTSIDE),
    ),
    64: (
        (16, 256, 4, 4, 4, 1024, OUTSIDE),
        (16, 128, 4, 6, 4, 1024, OUTSIDE),
        (32, 256, 4, 3, 4, 1024, OUTSIDE),
        (32, 128, 4, 5, 2, 1024, OUTSIDE),
        (64, 128, 4, 4, 1, 512, OUTSIDE),
        (64, 128, 4, 5, 1, 0, OUTSIDE),
        (64, 64, 4, 8, 1, 512, OUTSIDE),
        (128, 64, 4, 5, 1, 512, OUTSIDE),
        (128, 64, 8, 5, 1, 512, OUTSIDE),
    ),
}


def candidates(site: Site, tokens: int, architecture: int) -> tuple[LinearPlan, ...]:
    """Plans worth a try, the one that is chosen now first."""
    gates = 2 if site.kind is LinearKind.NORM_GLU else 1  # weight rows of an output
    if tokens == 1:
        tried = [
            LinearPlan(max(1, rows // gates), block_k, warps, prefetch_k=prefetch_k)
            for rows, block_k, warps, prefetch_k in ONE_TOKEN[site.width]
        ]
    else:
        most = next(size for size in sorted(FEW_TOKENS) if tokens <= size)
        adds = site.kind is LinearKind.LINEAR_ADD  # there is no norm to have outside
        tried = [
            LinearPlan(
                max(1, rows // gates), block_k, warps, stages, split, min(ahead, site.width),
                norm_inside=norm or adds,
            )
            for rows, block_k, warps, stages, split, ahead, norm in FEW_TOKENS[most]
        ]  # fmt: skip
    chosen = plan_for(architecture, site.kind, site.outputs, site.width, tokens, DTYPE.itemsize)
    known = [] if chosen is None else [chosen]
    return tuple(plan for plan in dict.fromkeys([*known, *tried]) if plan.fits(site.width, tokens))


@dataclass(frozen=True)
class Projection:
    """The tensors of one call."""

    site: Site
    x: Tensor
    weight: Tensor
    norm_weight: Tensor
    residual: Tensor

    def run(self, plan: LinearPlan | None, *, overlap: bool) -> Tensor:
        """Call it under a plan, or the library's way; a residual is added to in place."""
        kind = self.site.kind
        if kind is LinearKind.LINEAR_ADD:
            if plan is None:
                return self.residual.addmm_(self.x, self.weight.t())
            return launch(self.x, self.weight, None, plan, residual=self.residual, overlap=overlap)
        glu = kind is LinearKind.NORM_GLU
        if plan is not None and plan.norm_inside:
            return launch(
                self.x, self.weight, None, plan,
                norm_weight=self.norm_weight, eps=EPS, glu=glu, overlap=overlap,
            )  # fmt: skip
        normed = rms_norm(self.x, self.norm_weight, EPS, overlap=overlap)
        if plan is not None:
            return launch(normed, self.weight, None, plan, glu=glu, overlap=overlap)
        product = F.linear(normed, self.weight)
        return silu_mul(product, overlap=overlap) if glu else product

    def exact(self) -> Tensor:
        """The result in float64."""
        adds = self.site.kind is LinearKind.LINEAR_ADD
        return skinny_linear_reference(
            self.x.double(), self.weight.double(),
            norm_weight=None if adds else self.norm_weight.double(), eps=EPS,
            glu=self.site.kind is LinearKind.NORM_GLU, residual=self.residual.double() if adds else None,
        )  # fmt: skip

    def of(self, tokens: int) -> "Projection":
        """The same of the first tokens alone, with a residual of its own."""
        return Projection(
            self.site, self.x[:tokens], self.weight, self.norm_weight, self.residual[:tokens].clone()
        )

    def feeding(self, x: Tensor, residual: Tensor) -> "Projection":
        """The same weights on other rows: the first K columns of x."""
        return Projection(self.site, x[:, : self.site.width], self.weight, self.norm_weight, residual)


def draw(site: Site, tokens: int, device: torch.device, seed: int = 0) -> Projection:
    """Draw the tensors of a site; token i is the same at every size."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=DTYPE)

    return Projection(
        site, normal(tokens, site.width), normal(site.outputs, site.width).div_(site.width**0.5),
        1 + normal(site.width) / 8, normal(tokens, site.outputs),
    )  # fmt: skip


def describe(problem: BaseException) -> str:
    """The first line of an error."""
    return f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem) else ''}"[:200]


def compile_one(site: Site, tokens: int, plan: LinearPlan) -> None:
    """Compile a plan with overlap, in a process of its own, for Triton's cache on disk."""
    glu, adds = site.kind is LinearKind.NORM_GLU, site.kind is LinearKind.LINEAR_ADD
    extras = Extras(norm=plan.norm_inside and not adds, glu=glu, residual=adds)
    outputs = site.outputs // 2 if glu else site.outputs
    device = torch.device("cuda", 0)
    overlap = architecture_of(device) >= OVERLAPPING
    try:
        compile_launch(device, DTYPE, tokens, outputs, site.width, site.width, outputs, extras, plan, overlap)
    except FAILURES as problem:  # it comes again, and is recorded, when the plan is measured
        print(f"{site.model} {site.name} {name(plan)}: {describe(problem)}", file=sys.stderr, flush=True)


def compile_all(sites: Iterable[Site], tokens: Sequence[int], architecture: int, workers: int) -> None:
    """Compile all that will be measured, several at a time; what one kernel serves is compiled once."""
    wanted: dict[tuple[object, ...], tuple[Site, int, LinearPlan]] = {}
    for site in sites:
        for count in tokens:
            block_m = 1 if count == 1 else max(8, triton.next_power_of_2(count))
            for plan in candidates(site, count, architecture):
                wanted.setdefault((site, block_m, plan), (site, count, plan))
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(compile_one, *zip(*wanted.values(), strict=True), chunksize=4))
    except BrokenProcessPool as problem:
        print(f"compiling ahead ended: {problem}", file=sys.stderr, flush=True)


def in_graph_us(call: Callable[[int], object], calls: int, repeats: int) -> float:
    """Capture calls 0, 1, ... in one graph and take the median time of a call over its replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(0)  # compiles and sets up outside the capture
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(calls):
            call(number)
    graph.replay()
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    for start, end in pairs:
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e3 / calls


def measure_site(
    site: Site, tokens: Sequence[int], device: torch.device, repeats: int, deadline: float
) -> list[dict]:
    """Check and time everything at every size that the time allows."""
    first = draw(site, max(tokens), device)
    copies = max(2, -(-COLD_BYTES // site.bytes()))
    weights = [first.weight, *(first.weight.clone() for _ in range(copies - 1))]
    exact = first.exact()
    found = []
    for count in tokens:
        if time.monotonic() > deadline:
            print(f"{site.model} {site.name}: no time left at {count} tokens", file=sys.stderr, flush=True)
            break
        found.append(measure(first.of(count), weights, exact[:count], repeats))
        print_size(found[-1])
    return found


def measure(case: Projection, weights: Sequence[Tensor], exact: Tensor, repeats: int) -> dict:
    """Check and time every plan at one size; microseconds of a call."""
    site, tokens = case.site, len(case.x)
    calls = min(MOST_CALLS, max(FEWEST_CALLS, int(CHAIN_SECONDS * 1e6 / site.floor_us())))
    calls = -(-calls // len(weights)) * len(weights)
    architecture = architecture_of(case.x.device)
    overlap = architecture >= OVERLAPPING
    stream = case.residual.clone()  # which timing adds to
    turns = [Projection(site, case.x, weight, case.norm_weight, stream) for weight in weights]

    def timed(plan: LinearPlan | None) -> float:
        return round(
            in_graph_us(lambda number: turns[number % len(turns)].run(plan, overlap=overlap), calls, repeats),
            3,
        )

    library_error = rms_relative_error(case.of(tokens).run(None, overlap=overlap), exact)
    found: dict = {
        "model": site.model, "site": site.name, "kind": site.kind.value, "n": site.outputs, "k": site.width,
        "tokens": tokens, "floor_us": round(site.floor_us(), 3), "library_error": library_error,
        "library_us": timed(None), "plans": [],
    }  # fmt: skip
    for plan in candidates(site, tokens, architecture):
        row: dict = {"plan": asdict(plan)}
        try:
            row["error"] = rms_relative_error(case.of(tokens).run(plan, overlap=overlap), exact)
            if row["error"] <= SLACK * library_error + TINY:
                row["us"] = timed(plan)
            else:
                row["failure"] = f"wrong: error {row['error']:.5f}, the library's {library_error:.5f}"
        except FAILURES as problem:
            row["failure"] = describe(problem)
        found["plans"].append(row)
    times = {LinearPlan(**row["plan"]): row["us"] for row in found["plans"] if "us" in row}
    best = min(times, key=times.__getitem__, default=None)
    chosen = plan_for(architecture, site.kind, site.outputs, site.width, tokens, DTYPE.itemsize)
    return found | {
        "best": best and asdict(best),
        "best_us": best and times[best],
        "in_use_us": times.get(chosen) if chosen else found["library_us"],
    }


def best_plans(found: Iterable[dict], tokens: int, architecture: int) -> dict[Site, LinearPlan | None]:
    """What was fastest at each site; where this size was not measured, what is in use."""
    best: dict[Site, LinearPlan | None] = {}
    for model in MODELS:
        for site in model.layer:
            best[site] = plan_for(architecture, site.kind, site.outputs, site.width, tokens, DTYPE.itemsize)
            for size in found:
                if (size["model"], size["site"], size["tokens"]) == (site.model, site.name, tokens):
                    ours = size["best_us"] is not None and size["best_us"] <= size["library_us"]
                    best[site] = LinearPlan(**size["best"]) if ours else None
    return best


def measure_layers(
    model: Model, tokens: int, plans: dict[Site, LinearPlan | None], device: torch.device, repeats: int
) -> dict:
    """Time a chain of layers with weights of their own: microseconds of a layer."""
    layers = [
        [
            draw(site, 1, device, seed=number)
            for number, site in enumerate(model.layer, len(model.layer) * layer)
        ]
        for layer in range(model.chained)
    ]
    hidden = model.layer[0].width
    stream = torch.randn(tokens, hidden, device=device, dtype=DTYPE)

    def layer(number: int, chosen: dict[Site, LinearPlan | None], overlap: bool) -> None:
        rows = stream
        for part in layers[number]:
            adds = part.site.kind is LinearKind.LINEAR_ADD
            rows = part.feeding(rows, stream).run(chosen[part.site], overlap=overlap)
            assert not adds or rows is stream

    library: dict[Site, LinearPlan | None] = dict.fromkeys(model.layer)
    ways = {"overlap_us": (plans, True), "plain_us": (plans, False), "library_us": (library, True)}
    hopper = architecture_of(device) >= OVERLAPPING
    found: dict = {
        "model": model.name, "tokens": tokens, "layers": model.chained,
        "floor_us": round(sum(site.floor_us() for site in model.layer), 3),
        "plans": {site.name: plan and asdict(plan) for site, plan in plans.items() if site in model.layer},
    }  # fmt: skip
    for way, (chosen, overlap) in ways.items():
        try:
            us = in_graph_us(lambda n, c=chosen, o=overlap and hopper: layer(n, c, o), model.chained, repeats)
            found[way] = round(us, 3)
        except FAILURES as problem:
            found[way] = None
            print(f"{model.name} layers, {way}: {describe(problem)}", file=sys.stderr, flush=True)
    return found


def name(plan: LinearPlan) -> str:
    """The plan in few characters."""
    tail = "" if plan.norm_inside else " norm outside"
    tail += "" if plan.evict_first else " kept"
    return (
        f"n{plan.block_n} k{plan.block_k} w{plan.num_warps} s{plan.num_stages} /{plan.split} "
        f"ahead {plan.prefetch_k}{tail}"
    )


def print_size(size: dict) -> None:
    """Print the plans of one size, fastest first."""
    floor = size["floor_us"]
    print(
        f"{size['model']} {size['site']} {size['n']}x{size['k']}, {size['tokens']} tokens: "
        f"floor {floor:.2f} us, library {size['library_us']:.2f} us ({floor / size['library_us']:.0%}), "
        f"in use {size['in_use_us'] or float('nan'):.2f} us"
    )
    for row in sorted(size["plans"], key=lambda row: row.get("us", float("inf"))):
        time_or_failure = f"{row['us']:9.2f} us {floor / row['us']:5.0%}" if "us" in row else row["failure"]
        print(f"    {name(LinearPlan(**row['plan'])):<48} {time_or_failure}")
    sys.stdout.flush()


def print_summary(sizes: Sequence[dict], layers: Sequence[dict]) -> None:
    """Print one line per size, and one per chain of layers."""
    print(
        f"\n{'model':>5} {'site':>8} {'tokens':>6} {'floor':>8} {'library':>8} {'best':>8} {'share':>6}  plan"
    )
    for size in sizes:
        head = (
            f"{size['model']:>5} {size['site']:>8} {size['tokens']:6d} {size['floor_us']:8.2f} "
            f"{size['library_us']:8.2f}"
        )
        if size["best"] is None:
            print(f"{head}  no plan ran")
            continue
        mark = "" if size["best_us"] <= size["library_us"] else "  (the library is faster)"
        print(
            f"{head} {size['best_us']:8.2f} {size['floor_us'] / size['best_us']:6.0%}  "
            f"{name(LinearPlan(**size['best']))}{mark}"
        )
    for chain in layers:
        times = ", ".join(
            f"{way.removesuffix('_us')} {chain[way] or float('nan'):.2f}"
            for way in ("overlap_us", "plain_us", "library_us")
        )
        print(
            f"{chain['model']} layer of {chain['tokens']} tokens, us: floor {chain['floor_us']:.2f}, {times}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [model.name for model in MODELS]
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=names, help="0.6b,8b")
    parser.add_argument("--tokens", type=lambda text: [int(part) for part in text.split(",")], default=TOKENS)
    parser.add_argument("--seconds", type=float, default=150.0, help="no new size is begun later than this")
    parser.add_argument("--repeats", type=int, default=7, help="replays of each graph")
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument("--no-head", action="store_true", help="leave the head out")
    options = parser.parse_args()
    if not set(options.shapes) <= set(names):
        parser.error(f"--shapes: must be among {','.join(names)}, got {','.join(options.shapes)}")
    if min(options.tokens) < 1 or max(options.tokens) > max(TOKENS):
        parser.error(f"--tokens: must be within [1, {max(TOKENS)}], got {options.tokens}")
    if not torch.cuda.is_available():
        sys.exit("linear: needs a CUDA device")
    started = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = architecture_of(device)
    models = [model for model in MODELS if model.name in options.shapes]
    sites = [site for model in models for site in (*model.layer, *(() if options.no_head else (model.head,)))]
    compile_all(sites, options.tokens, architecture, options.workers)
    compiled = time.monotonic()
    print(f"compiled in {compiled - started:.0f} s", flush=True)
    sizes: list[dict] = []
    layers: list[dict] = []
    found = {
        "command": "python -m tests.benchmarks.linear",
        "device": torch.cuda.get_device_name(),
        "architecture": architecture,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": str(DTYPE),
        "sizes": sizes,
        "layers": layers,
    }

    def save() -> None:
        found["seconds"] = {
            "compile": round(compiled - started, 1), "all": round(time.monotonic() - started, 1)
        }  # fmt: skip
        options.out.write_text(json.dumps(found, indent=1) + "\n")  # a run that is cut off leaves its part

    for site in sites:
        sizes += measure_site(site, options.tokens, device, options.repeats, started + options.seconds)
        save()
    for model in models:
        for tokens in LAYER_TOKENS:
            plans = best_plans(sizes, tokens, architecture)
            layers.append(measure_layers(model, tokens, plans, device, options.repeats))
            save()
    print_summary(sizes, layers)


if __name__ == "__main__":
    main()
