"""Times every way to cut a launch of `qk_norm_rope_cache`, which `kernels/plans.py` keeps the best of.

    python -m tests.benchmarks.tune_plans --out plans.json

Wants a CUDA device. GPU time per launch inside a CUDA graph over buffers larger than the L2 cache. A
plan takes part only if it gives the bits of the plan in use. Prints, for each size, the best plan and
how much slower the one in use is.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import torch
import triton

from fusewire.kernels.launch import architecture_of
from fusewire.kernels.plans import Plan
from fusewire.kernels.qk_norm_rope_cache import launch, site_plan
from fusewire.kernels.shape import QKNormShape
from fusewire.service.bench.inputs import draw_buffers, draw_site, number_of_sets, path_arguments
from fusewire.service.bench.timing import GRAPH_CALLS, Timer, l2_bytes

HEADS = ((16, 8), (32, 8), (64, 8))
TOKENS = (1, 8, 64, 128, 256, 1024, 4096, 32768)
CANDIDATES = (
    Plan(num_warps=1, heads=1),
    Plan(num_warps=1, heads=4),
    Plan(num_warps=2, heads=4),
    Plan(num_warps=2, heads=8),
    Plan(num_warps=4, heads=4),
    Plan(num_warps=4, heads=8),
    Plan(num_warps=8, heads=8),
)


def measure(shape: QKNormShape, tokens: int, timer: Timer) -> dict:
    """Time all candidates at one size, in microseconds."""
    site = draw_site(shape, tokens, torch.bfloat16, timer.device)
    sets = number_of_sets(site.step_bytes, l2_bytes(timer.device), GRAPH_CALLS)
    buffers = draw_buffers(site, sets)
    used = site_plan(tokens, shape, torch.bfloat16, timer.device)

    def run(number: int, plan: Plan) -> torch.Tensor:
        return launch(*path_arguments(site, buffers[number]), plan)

    want = (run(0, used), buffers[0].k_cache.clone())
    times = {}
    for plan in dict.fromkeys((used, *CANDIDATES)):
        buffers[0].k_cache.zero_()
        if torch.equal(run(0, plan), want[0]) and torch.equal(buffers[0].k_cache, want[1]):
            times[plan] = timer.in_graph(lambda number, plan=plan: run(number, plan), sets).median
    best = min(times, key=times.__getitem__)
    return {
        "q_heads": shape.num_q_heads,
        "kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "tokens": tokens,
        "bytes": site.step_bytes,
        "us": {name(plan): round(us, 3) for plan, us in times.items()},
        "best": name(best),
        "used": name(used),
        "used_over_best": round(times[used] / times[best], 3),
    }


def name(plan: Plan) -> str:
    return f"{plan.num_warps} warps, {plan.heads} heads"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    out = parser.parse_args()
    timer = Timer.on(torch.device("cuda", torch.cuda.current_device()), repeats=30)
    rows = []
    for head_dim, heads, tokens in product(out.head_dims, HEADS, TOKENS):
        rows.append(measure(QKNormShape(*heads, head_dim, 1e-6, head_dim), tokens, timer))
        row = rows[-1]
        print(
            f"{heads[0]}/{heads[1]} x {head_dim}, {tokens:6d} tokens: best {row['best']} "
            f"{row['us'][row['best']]:.2f} us; used {row['used']} {row['us'][row['used']]:.2f} us",
            flush=True,
        )
    found = {
        "command": "python -m tests.benchmarks.tune_plans",
        "device": torch.cuda.get_device_name(),
        "architecture": architecture_of(timer.device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sizes": rows,
    }
    out.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
