"""The operators are what their schemas say: mutations, fakes, and what torch.compile makes of them."""

import pytest
import torch

from fusewire.kernels.modes import KernelMode
from fusewire.kernels.ops import qk_norm_op, qk_norm_rope_cache_op
from fusewire.kernels.paths import PATHS
from tests.kernels.cases import make_case, site_shape

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its tracer, about itself
SITES = [
    site_shape(4, 2, 64),
    site_shape(4, 2, 64, rotary_dim=32, interleaved=True),
    site_shape(4, 2, 64, mrope_section=(12, 10, 10), mrope_interleaved=True),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
every_site = pytest.mark.parametrize("shape", SITES, ids=str)
every_device = pytest.mark.parametrize("device", DEVICES)


@every_device
@every_site
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schemas_and_fakes_are_true(shape, dtype, device):
    case = make_case(shape, 5, dtype, device=device, dropped=(3,))
    heads = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim)
    torch.library.opcheck(qk_norm_rope_cache_op, (*case.args()[:-1], *shape.fields))
    torch.library.opcheck(qk_norm_op, (case.qkv, case.q_weight, case.k_weight, *heads, shape.eps))


@every_device
@every_site
@pytest.mark.parametrize("mode", KernelMode)
def test_a_compiled_path_is_the_path(mode, shape, device):
    torch.compiler.reset()
    case = make_case(shape, 5, device=device)
    traced, eager = case.copy(), case.copy()
    compiled = torch.compile(PATHS[mode], backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*traced.args()), PATHS[mode](*eager.args()))
    assert torch.equal(traced.k_cache, eager.k_cache)
    assert torch.equal(traced.v_cache, eager.v_cache)


def test_a_tracer_sees_one_operator_for_the_whole_step():
    seen = []

    def note(module, _):
        seen.extend(str(node.target) for node in module.graph.nodes if "fusewire" in str(node.target))
        return module.forward

    torch.compiler.reset()
    case = make_case(site_shape(), 3)
    torch.compile(PATHS[KernelMode.FUSED], backend=note, fullgraph=True)(*case.args())
    assert [name.rpartition("fusewire.")[2] for name in seen] == ["qk_norm_rope_cache.default"]
