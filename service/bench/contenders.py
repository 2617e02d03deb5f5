"""Everything that is timed, behind one protocol: bind to a site once, then call on buffers.

Fusewire's paths, plain torch, and the three launches of `baselines`; other libraries are in `peers`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fusewire.kernels.launch import OVERLAPPING, architecture_of
from fusewire.kernels.modes import KernelMode
from fusewire.kernels.packed import split_heads, write_kv
from fusewire.kernels.paths import PATHS, backend_name, chain_rms_norm
from fusewire.kernels.qk_norm import qk_norm
from fusewire.kernels.qk_norm_rope_cache import qk_norm_rope_cache
from fusewire.kernels.rope import apply_rope, rope_rows
from fusewire.service.bench import baselines
from fusewire.service.bench.exactness import Work
from fusewire.service.bench.inputs import Buffers, Site, path_arguments

Call = Callable[[Buffers], object]
"""Do the work on these buffers; returns what `Work` says."""


class Absent(Exception):
    """A contender cannot take part here; the message says why."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to do a kind of work."""

    name: str
    work: Work
    backend: str
    """What runs it, as reports spell it."""
    bind: Callable[[Site], Call]
    """Prepare what calls at one size share; raises `Absent` where it cannot run."""
    joined_cache: bool = False
    """Takes caches that are halves of one tensor."""


def own_contenders(device: torch.device) -> Mapping[str, Contender]:
    """List the contenders that need no other library, by name."""
    torch_name, triton_name = f"torch-{device.type}", f"triton-{device.type}"
    made = [
        *(
            Contender(mode.value, Work.STEP, backend_name(mode, device), partial(_path, mode))
            for mode in KernelMode
        ),
        Contender("fused_overlap", Work.STEP, backend_name(KernelMode.FUSED, device), _overlapping),
        Contender("rms_norm", Work.STEP, torch_name, _rms_norm_step),
        Contender("compile", Work.STEP, f"inductor-{device.type}", _compiled_step),
        Contender("three_launches", Work.STEP, triton_name, _three_launches),
        Contender("seed_norm", Work.NORM, triton_name, _seed_norm),
        Contender("seed_rope", Work.ROPE, triton_name, _seed_rope),
        Contender("seed_write", Work.WRITE, triton_name, _seed_write),
        Contender("copy", Work.COPY, triton_name if device.type == "cuda" else torch_name, _copy),
        Contender("chain_norm", Work.NORM, torch_name, _chain_norm),
        Contender("torch_norm", Work.NORM, torch_name, _torch_norm),
        Contender("qk_norm", Work.NORM, backend_name(KernelMode.FUSED_NORM, device), _qk_norm),
    ]
    return {contender.name: contender for contender in made}


def _path(mode: KernelMode, site: Site) -> Call:
    """One of Fusewire's three paths."""
    path = PATHS[mode]

    def call(buffers: Buffers) -> Tensor:
        return path(*path_arguments(site, buffers))

    return call


def _overlapping(site: Site) -> Call:
    """`fused` by programmatic dependent launch: it starts while the call before it still runs."""
    device = site.q_weight.device
    if architecture_of(device) < OVERLAPPING:
        raise Absent(f"launches overlap from sm_{OVERLAPPING} on, and this is {device.type}")

    def call(buffers: Buffers) -> Tensor:
        return qk_norm_rope_cache(*path_arguments(site, buffers), overlap=True)

    return call


def _compiled_step(site: Site) -> Call:
    """The unfused chain under torch.compile, for this size alone."""
    torch.compiler.reset()  # sizes before this one must not count towards dynamo's limit
    path = torch.compile(PATHS[KernelMode.UNFUSED], dynamic=False, fullgraph=True)

    def call(buffers: Buffers) -> Tensor:
        return path(*path_arguments(site, buffers))

    return call


def _rms_norm_step(site: Site) -> Call:
    """`F.rms_norm` of q and of k, RoPE in torch operations, and an indexed write."""
    shape, norm = site.shape, _torch_norm(site)

    def call(buffers: Buffers) -> Tensor:
        q, k = norm(buffers)
        cos_sin = rope_rows(site.rope_table, site.positions, shape).to(q.dtype)
        v = split_heads(buffers.qkv, shape)[2]
        write_kv(apply_rope(k, cos_sin, False), v, buffers.k_cache, buffers.v_cache, site.slots)
        return apply_rope(q, cos_sin, False)

    return call


def _torch_norm(site: Site) -> Callable[[Buffers], tuple[Tensor, Tensor]]:
    """`F.rms_norm` of q and of k."""
    dims, eps = (site.shape.head_dim,), site.shape.eps

    def call(buffers: Buffers) -> tuple[Tensor, Tensor]:
        q, k, _ = split_heads(buffers.qkv, site.shape)
        return F.rms_norm(q, dims, site.q_weight, eps), F.rms_norm(k, dims, site.k_weight, eps)

    return call


def _chain_norm(site: Site) -> Call:
    """The norm of q and of k as separate torch operations, the way a model file spells it."""

    def call(buffers: Buffers) -> tuple[Tensor, Tensor]:
        q, k, _ = split_heads(buffers.qkv, site.shape)
        eps = site.shape.eps
        return chain_rms_norm(q, site.q_weight, eps), chain_rms_norm(k, site.k_weight, eps)

    return call


def _qk_norm(site: Site) -> Call:
    """Fusewire's norm kernel alone, in place."""

    def call(buffers: Buffers) -> tuple[Tensor, Tensor]:
        qk_norm(buffers.qkv, site.q_weight, site.k_weight, site.shape)
        return split_heads(buffers.qkv, site.shape)[:2]

    return call


def _three_launches(site: Site) -> Call:
    """Norm, RoPE and KV write, a Triton launch each."""
    norm, rope, write = _seed_norm(site), _seed_rope(site), _seed_write(site)

    def call(buffers: Buffers) -> Tensor:
        norm(buffers)
        rope(buffers)
        write(buffers)
        return split_heads(buffers.qkv, site.shape)[0]

    return call


def _seed_norm(site: Site) -> Call:
    _require_triton(site)

    def call(buffers: Buffers) -> tuple[Tensor, Tensor]:
        baselines.seed_norm(buffers.qkv, site.q_weight, site.k_weight, site.shape)
        return split_heads(buffers.qkv, site.shape)[:2]

    return call


def _seed_rope(site: Site) -> Call:
    _require_triton(site)

    def call(buffers: Buffers) -> tuple[Tensor, Tensor]:
        baselines.seed_rope(buffers.qkv, site.rope_table, site.positions, site.shape)
        return split_heads(buffers.qkv, site.shape)[:2]

    return call


def _seed_write(site: Site) -> Call:
    _require_triton(site)

    def call(buffers: Buffers) -> None:
        baselines.seed_write(buffers.qkv, buffers.k_cache, buffers.v_cache, site.slots, site.shape)

    return call


def _copy(site: Site) -> Call:
    """Move as many bytes as the step must: qkv to a tensor of its size."""
    in_triton = baselines.needs_triton(site.q_weight.device) is None

    def call(buffers: Buffers) -> Tensor:
        target = torch.empty_like(buffers.qkv)
        if in_triton:
            baselines.copy(target, buffers.qkv)
        else:
            target.copy_(buffers.qkv)
        return target

    return call


def _require_triton(site: Site) -> None:
    if reason := baselines.needs_triton(site.q_weight.device):
        raise Absent(reason)
