"""A layer's projections: what is checked, what runs, and the results against float64, graphs and overlap."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fusewire.kernels.linear_plans import TABLE, LinearKind, LinearPlan, plan_for
from fusewire.kernels.projections import linear_add_, norm_glu, norm_linear, streams_weights
from fusewire.kernels.rms_norm import rms_norm
from fusewire.kernels.silu_mul import silu_mul
from fusewire.kernels.skinny_linear import skinny_linear_reference
from tests.kernels.cases import rms_relative_error

EPS = 1e-6
ERROR = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""RMS relative error that a few roundings to a dtype stay below."""
SHAPES = [  # of a layer and of the head
    (LinearKind.NORM_LINEAR, 4096, 1024),
    (LinearKind.LINEAR_ADD, 1024, 2048),
    (LinearKind.NORM_GLU, 6144, 1024),
    (LinearKind.LINEAR_ADD, 1024, 3072),
    (LinearKind.NORM_LINEAR, 151936, 1024),
    (LinearKind.NORM_LINEAR, 6144, 4096),
    (LinearKind.LINEAR_ADD, 4096, 4096),
    (LinearKind.NORM_GLU, 24576, 4096),
    (LinearKind.LINEAR_ADD, 4096, 12288),
]
OTHERS = [(kind, outputs, width) for kind in LinearKind for outputs, width in ((2304, 1280), (130, 768))]
"""Not measured, with a tail of outputs; the last takes the library's way where T is large."""
SMALL = [(kind, 24, 48) for kind in LinearKind]


@dataclass(frozen=True)
class Projection:
    """The arguments of one of the three calls, its residual among them."""

    kind: LinearKind
    x: Tensor
    weight: Tensor
    norm_weight: Tensor
    bias: Tensor | None
    residual: Tensor

    def run(self, *, overlap: bool = True) -> Tensor:
        """Call it; a residual is added to in a copy, so that calls can be compared."""
        if self.kind is LinearKind.LINEAR_ADD:
            return self.add_to_(self.residual.clone(), overlap=overlap)
        if self.kind is LinearKind.NORM_GLU:
            return norm_glu(self.x, self.norm_weight, EPS, self.weight, overlap=overlap)
        return norm_linear(self.x, self.norm_weight, EPS, self.weight, self.bias, overlap=overlap)

    def add_to_(self, stream: Tensor, *, overlap: bool = True) -> Tensor:
        """Add to a stream that is then the result."""
        linear_add_(stream, self.x, self.weight, self.bias, overlap=overlap)
        return stream

    def exact(self) -> Tensor:
        """The result in float64."""
        adds = self.kind is LinearKind.LINEAR_ADD
        return skinny_linear_reference(
            self.x.double(),
            self.weight.double(),
            None if self.bias is None else self.bias.double(),
            norm_weight=None if adds else self.norm_weight.double(),
            eps=EPS,
            glu=self.kind is LinearKind.NORM_GLU,
            residual=self.residual.double() if adds else None,
        )


def draw(kind, outputs, width, tokens, dtype=torch.bfloat16, device="cuda", *, bias=False, seed=0, padding=0):
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

    weight = (normal(outputs, width) / width**0.5).to(dtype)
    x = (2 * normal(tokens, width + padding)).to(dtype)[:, :width]
    norm_weight = (1 + normal(width) / 8).to(dtype)
    offsets = normal(outputs).to(dtype) if bias else None
    return Projection(kind, x, weight, norm_weight, offsets, normal(tokens, outputs).to(dtype))


@pytest.mark.parametrize(("kind", "outputs", "width"), SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_a_cpu_runs_plain_torch(kind, outputs, width, dtype, tokens):
    bias = kind is not LinearKind.NORM_GLU
    case = draw(kind, outputs, width, tokens, dtype, "cpu", bias=bias, padding=8)
    got = case.run()
    assert got.dtype == dtype
    assert got.shape == case.exact().shape
    if tokens:
        assert rms_relative_error(got, case.exact()) <= ERROR[dtype]
    assert not streams_weights(case.x, case.weight, kind)


def test_a_residual_is_changed_in_place_and_nothing_beside_it():
    case = draw(LinearKind.LINEAR_ADD, 24, 48, 3, torch.float32, "cpu")
    arena = torch.zeros(4, 40)
    stream = arena[:3, :24]
    stream.copy_(case.residual)
    case.add_to_(stream)
    assert rms_relative_error(stream, case.exact()) <= ERROR[torch.float32]
    assert not arena[3:].any()
    assert not arena[:, 24:].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 48, dtype=torch.float64)}, TypeError, "x: dtype must be one of"),
        ({"x": torch.zeros(3, 2, 24)}, ValueError, "x: must be a matrix with contiguous rows"),
        ({"x": torch.zeros(48, 3).t()}, ValueError, "x: must be a matrix with contiguous rows"),
        ({"weight": torch.zeros(24, 47)}, ValueError, r"weight: shape must be \(24, 48\)"),
        ({"weight": torch.zeros(24, 48).half()}, TypeError, "weight: dtype must be torch.float32"),
        ({"weight": torch.zeros(48, 24).t()}, ValueError, "weight: must be contiguous"),
        ({"weight": torch.zeros(48)}, ValueError, r"weight: shape must be \(N, 48\)"),
        ({"norm_weight": torch.zeros(47)}, ValueError, r"norm_weight: shape must be \(48,\)"),
        ({"bias": torch.zeros(23)}, ValueError, r"bias: shape must be \(24,\)"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    case = draw(LinearKind.NORM_LINEAR, 24, 48, 3, torch.float32, "cpu", bias=True)
    with pytest.raises(error, match=message):
        Projection(**vars(case) | change).run()


@pytest.mark.parametrize("residual", [torch.zeros(3, 23), torch.zeros(2, 24), torch.zeros(3, 24).half()])
def test_a_residual_that_does_not_fit_is_named(residual):
    case = draw(LinearKind.LINEAR_ADD, 24, 48, 3, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"residual: must be \(3, 24\) like x"):
        case.add_to_(residual)


def test_gates_without_ups_are_refused():
    case = draw(LinearKind.NORM_GLU, 23, 48, 3, torch.float32, "cpu")
    with pytest.raises(ValueError, match="as many rows of up as of gate, got 23"):
        case.run()


@pytest.mark.parametrize("site", TABLE, ids=str)
def test_the_table_is_in_order_and_its_plans_fit(site):
    _, kind, _, width = site
    ranges = TABLE[site]
    sizes = [known.max_tokens for known in ranges]
    assert sizes == sorted(set(sizes))
    for tokens in (1, 2, 8, 16, 17, 32, 64):
        plan = plan_for(*site, tokens, 2)
        assert plan is None or plan.fits(width, tokens)
        assert plan is None or kind is not LinearKind.LINEAR_ADD or plan.norm_inside


def test_what_is_not_streamed():
    known = (90, LinearKind.NORM_LINEAR, 4096, 1024)
    assert plan_for(*known, 1, 2) is not None
    assert plan_for(*known, 65, 2) is None
    assert plan_for(*known, 0, 2) is None
    assert plan_for(*known, 1, 4) is None  # fp32 stays exact
    assert plan_for(75, *known[1:], 1, 2) is None
    assert plan_for(90, LinearKind.NORM_LINEAR, 4096, 1000, 1, 2) is None


@pytest.mark.parametrize("kind", LinearKind)
@pytest.mark.parametrize(("outputs", "width"), [(130, 768), (2304, 1280), (8192, 5120), (51200, 25600)])
def test_shapes_that_were_not_measured_take_a_plan_that_fits(kind, outputs, width):
    for tokens in (1, 2, 16):
        plan = plan_for(90, kind, outputs, width, tokens, 2)
        assert plan is not None
        assert plan.fits(width, tokens)
    assert plan_for(90, kind, outputs, width, 17, 2) is None


@pytest.mark.parametrize(
    "fields", [{"block_n": 12}, {"block_k": 0}, {"split": 32}, {"num_stages": 0}, {"prefetch_k": -1}]
)
def test_a_plan_that_cannot_be_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        LinearPlan(**{"block_n": 8, "block_k": 256, "num_warps": 4} | fields)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "outputs", "width"), SHAPES + OTHERS)
@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 31, 64, 65])
def test_agrees_with_float64(kind, outputs, width, tokens):
    case = draw(kind, outputs, width, tokens, padding=64)
    assert rms_relative_error(case.run(), case.exact()) <= ERROR[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "outputs", "width"), [*SHAPES[:4], *OTHERS, *SMALL])
@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("tokens", [0, 1, 5, 300])
def test_every_dtype(kind, outputs, width, dtype, tokens):
    case = draw(kind, outputs, width, tokens, dtype, bias=kind is not LinearKind.NORM_GLU)
    got = case.run()
    assert got.shape == case.exact().shape
    if tokens:
        assert rms_relative_error(got, case.exact()) <= ERROR[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "outputs", "width"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_overlap_changes_no_bit(kind, outputs, width, tokens):
    case = draw(kind, outputs, width, tokens)
    want, x = case.run(overlap=False), case.x.clone()
    for _ in range(10):
        case.x.zero_()
        case.x.copy_(x)  # what an overlapping launch must wait for
        assert torch.equal(case.run(), want)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "outputs", "width"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 8, 33])
def test_a_graph_replays_what_eager_computes(kind, outputs, width, tokens):
    static, other = (draw(kind, outputs, width, tokens, seed=seed) for seed in (0, 1))
    static.run()  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = static.run()
    for name in ("x", "weight", "norm_weight", "residual"):
        getattr(static, name).copy_(getattr(other, name))
    graph.replay()
    assert torch.equal(got, other.run())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize("width", [1024, 4096])
def test_a_chain_of_launches_that_overlap_gives_the_bits_of_one_after_another(tokens, width):
    """A layer's four projections, three layers deep, in one graph."""
    layers = [
        (
            draw(LinearKind.NORM_LINEAR, 2 * width, width, tokens, seed=4 * layer),
            draw(LinearKind.LINEAR_ADD, width, 2 * width, tokens, seed=4 * layer + 1),
            draw(LinearKind.NORM_GLU, 6 * width, width, tokens, seed=4 * layer + 2),
            draw(LinearKind.LINEAR_ADD, width, 3 * width, tokens, seed=4 * layer + 3),
        )
        for layer in range(3)
    ]
    start = layers[0][0].x

    def step(*, overlap: bool) -> Tensor:
        stream = start.clone()
        for into, out, gate_up, down in layers:
            hidden = norm_linear(stream, into.norm_weight, EPS, into.weight, overlap=overlap)
            linear_add_(stream, hidden, out.weight, overlap=overlap)
            hidden = norm_glu(stream, gate_up.norm_weight, EPS, gate_up.weight, overlap=overlap)
            linear_add_(stream, hidden, down.weight, overlap=overlap)
        return stream

    want = step(overlap=False)
    step(overlap=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(overlap=True)
    for _ in range(20):
        graph.replay()
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1024), (300, 3072), (7, 80), (4096, 12288)])
def test_neighbours_agree_with_float64(dtype, tokens, width):
    generator = torch.Generator("cuda").manual_seed(0)
    rows = torch.randn(tokens, 2 * width + 16, generator=generator, device="cuda").to(dtype)
    weight = torch.randn(width, generator=generator, device="cuda").to(dtype)
    x, packed = rows[:, :width], rows[:, : 2 * width]
    want = torch.nn.functional.rms_norm(x.double(), (width,), weight.double(), EPS)
    assert rms_relative_error(rms_norm(x, weight, EPS), want) <= ERROR[dtype]
    gate, up = packed.double().chunk(2, dim=-1)
    assert rms_relative_error(silu_mul(packed), torch.nn.functional.silu(gate) * up) <= ERROR[dtype]
    assert torch.equal(rms_norm(x, weight, EPS, overlap=False), rms_norm(x, weight, EPS))
    assert torch.equal(silu_mul(packed, overlap=False), silu_mul(packed))


@pytest.mark.gpu
def test_neighbours_past_32_bits_of_offset():
    stride = 2**30 + 16
    arena = torch.empty(2 * stride + 128, dtype=torch.float16, device="cuda")
    far = arena.as_strided((3, 128), (stride, 1))
    near = torch.randn(3, 128, device="cuda").half()
    far.copy_(near)
    weight = torch.ones(128, device="cuda").half()
    assert torch.equal(rms_norm(far, weight, EPS), rms_norm(near, weight, EPS))
    assert torch.equal(silu_mul(far), silu_mul(near))
