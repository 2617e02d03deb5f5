# ruff: noqa: N803
"""What the `fused` step adds to a captured decode layer of one token, beside different neighbours.

    python -m tests.benchmarks.decode_layer --out decode-layer.json

A layer here is the packed projection, the step, and the output projection, for the sites of Qwen3-0.6B
and 8B in bf16; its cost is the time of 20 such layers in one CUDA graph with the step, minus without.
The neighbours are cuBLAS products, or Triton matrix-vector products that launch plainly or overlap
(programmatic dependent launch: they fetch their first weights while the launch before still runs).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fusewire.kernels.qk_norm_rope_cache import launch, site_plan
from fusewire.kernels.shape import QKNormShape
from fusewire.service.bench.inputs import draw_buffers, draw_site
from fusewire.service.bench.timing import GRAPH_CALLS, Timer

LAYERS = GRAPH_CALLS
SITES = {
    "qwen3-0.6b": (1024, QKNormShape(16, 8, 128, 1e-6, 128)),
    "qwen3-8b": (4096, QKNormShape(32, 8, 128, 1e-6, 128)),
}
Project = Callable[[Tensor, Tensor], Tensor]


@triton.jit
def product_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Multiply ROWS rows of weight `[N, K]` by one vector."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    part = tl.load(weight + row * K + k)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        total += part.to(tl.float32) * tl.load(x + start + k).to(tl.float32)
        if start + BLOCK_K < K:
            part = tl.load(weight + row * K + start + BLOCK_K + k)
    result = tl.sum(total, axis=1, keep_dims=True)
    tl.store(out + row, result.to(out.dtype.element_ty))


def triton_product(x: Tensor, weight: Tensor, *, overlap: bool) -> Tensor:
    out = x.new_empty(1, len(weight))
    rows = 8 if len(weight) > 4096 else 4
    product_kernel[(len(weight) // rows,)](
        x,
        weight,
        out,
        weight.shape[1],
        ROWS=rows,
        BLOCK_K=512,
        OVERLAP=overlap,
        num_warps=4,
        launch_pdl=overlap,
    )
    return out


def neighbours() -> dict[str, tuple[Project, bool]]:
    """Ways to project, and whether the step overlaps them."""
    return {
        "cublas": (F.linear, False),
        "cublas, the step overlaps": (F.linear, True),
        "triton": (lambda x, weight: triton_product(x, weight, overlap=False), False),
        "triton, all overlap": (lambda x, weight: triton_product(x, weight, overlap=True), True),
    }


def measure(name: str, timer: Timer) -> dict:
    width, shape = SITES[name]
    site = draw_site(shape, 1, torch.bfloat16, timer.device)
    buffers = draw_buffers(site, LAYERS)
    into = [torch.randn(shape.qkv_width, width, device=timer.device).mul_(0.02).bfloat16() for _ in buffers]
    back = [torch.randn(width, shape.q_width, device=timer.device).mul_(0.02).bfloat16() for _ in buffers]
    hidden = torch.randn(1, width, device=timer.device).bfloat16()
    plan = site_plan(1, shape, torch.bfloat16, timer.device)

    def with_step(layer: int, project: Project, overlap: bool) -> Tensor:
        mine = buffers[layer]
        q = launch(
            project(hidden, into[layer]), site.q_weight, site.k_weight, site.rope_table, site.positions,
            mine.k_cache, mine.v_cache, site.slots, shape, plan, overlap,
        )  # fmt: skip
        return project(q.view(1, -1), back[layer])

    def without(layer: int, project: Project) -> Tensor:
        return project(project(hidden, into[layer])[:, : shape.q_width], back[layer])

    found = {}
    for kind, (project, overlap) in neighbours().items():
        exact = hidden.double() @ into[0].double().T
        error = ((project(hidden, into[0]).double() - exact).norm() / exact.norm()).item()
        plain = timer.in_graph(lambda layer, p=project: without(layer, p), LAYERS)
        full = timer.in_graph(lambda layer, p=project, o=overlap: with_step(layer, p, o), LAYERS)
        found[kind] = {
            "product_error": error,
            "layer_us": plain.median,
            "with_step_us": full.median,
            "step_adds_us": full.median - plain.median,
        }
        print(
            f"{name}, {kind}: {plain.median:.2f} us, the step adds {full.median - plain.median:.2f} us",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    timer = Timer.on(torch.device("cuda", torch.cuda.current_device()), repeats=60)
    found = {
        "command": "python -m tests.benchmarks.decode_layer",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "layers": {name: measure(name, timer) for name in SITES},
    }
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
