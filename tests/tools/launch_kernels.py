"""Launches every kernel on a CUDA device at sizes with ragged edges, for a memory checker to watch.

    compute-sanitizer --tool memcheck python -m tests.tools.launch_kernels
    compute-sanitizer --tool memcheck python -m tests.tools.launch_kernels --plant
    ncu --kernel-name regex:qk_norm_rope_cache python -m tests.tools.launch_kernels --tokens 32768

`--plant` tells one launch of more tokens than its tensors hold, which a checker must notice. Set
PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that tensors do not lie inside larger allocations.
"""

import argparse
from dataclasses import replace

import torch

from fusewire.kernels.paths import fused
from fusewire.kernels.plans import PLANS
from fusewire.kernels.qk_norm import qk_norm
from fusewire.kernels.qk_norm_rope_cache import launch
from fusewire.kernels.qkv_epilogue import EpiloguePlan, qkv_epilogue
from fusewire.service.bench.inputs import draw_buffers, draw_site, path_arguments
from tests.kernels.cases import Case, make_case, site_shape

SITES = (
    site_shape(16, 8, 128),
    site_shape(5, 1, 80),
    site_shape(12, 2, 128, rotary_dim=64, interleaved=True),
    site_shape(4, 2, 64, rotary_dim=20),
    site_shape(8, 4, 128, mrope_section=(24, 20, 20), mrope_interleaved=True),
)


def launch_all() -> None:
    for shape in SITES:
        for tokens in (1, 37):
            case = on_gpu(shape, tokens)
            qk_norm(case.copy().qkv, case.q_weight, case.k_weight, shape)
            for plan in PLANS:
                for overlap in (False, True):
                    launch(*case.args(), plan, overlap)
    launch_epilogues()
    torch.cuda.synchronize()


def launch_epilogues() -> None:
    """Project 37 tokens, with K in one part and in three, which meet in a workspace."""
    shape = SITES[0]
    case = on_gpu(shape, 37)
    hidden = torch.ones(37, 192, dtype=torch.bfloat16, device="cuda")
    weight = torch.ones(shape.qkv_width, 192, dtype=torch.bfloat16, device="cuda")
    for plan in (EpiloguePlan(16, 1, 64, 4, 3), EpiloguePlan(16, 3, 64, 4, 3)):
        qkv_epilogue(hidden, weight, None, *case.args()[1:], plan=plan)


def launch_past_the_end() -> None:
    """Launch 130 tokens on positions and slots of one."""
    case = on_gpu(SITES[0], 130)
    launch(
        *replace(case, slots=case.slots[:1].clone(), positions=case.positions[:1].clone()).args(), PLANS[0]
    )
    torch.cuda.synchronize()


def launch_long(tokens: int) -> None:
    """Launch `fused` on the site of Qwen3-8B a few times, for a profiler to look at the last one."""
    shape = site_shape(32, 8, 128)
    site = draw_site(shape, tokens, torch.bfloat16, torch.device("cuda", 0))
    for mine in draw_buffers(site, 4):
        fused(*path_arguments(site, mine))
    torch.cuda.synchronize()


def on_gpu(shape, tokens: int) -> Case:
    dropped = (tokens // 2,) if tokens > 1 else ()
    return make_case(shape, tokens, torch.bfloat16, device="cuda", dropped=dropped)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plant", action="store_true")
    parser.add_argument("--tokens", type=int)
    options = parser.parse_args()
    if options.plant:
        launch_past_the_end()
    elif options.tokens:
        launch_long(options.tokens)
    else:
        launch_all()
    print("launched")
