"""Attention over the paged cache under the interpreter: edges of blocks, splits and tiles, and strays."""

from dataclasses import replace

import pytest
import torch

from fusewire.kernels.paged_decode import (
    DecodePlan,
    DecodeWorkspace,
    decode_workspace,
    launch_decode,
    paged_decode,
)
from fusewire.kernels.paged_prefill import SPLIT_PLACES, PrefillPlan, launch_prefill, paged_prefill
from tests.kernels.cases import sparse_zeros
from tests.kernels.test_paged_attention import MIXED, PagedCase, decode_case, make_paged

PLAN = DecodePlan(16, min_split=32, max_splits=3, num_warps=4, num_stages=2)
STEPS = PrefillPlan(16, num_warps=4, num_stages=2)
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 2e-6}, torch.float16: {"rtol": 2e-3, "atol": 1e-3}}


def space_for(case: PagedCase, plan: DecodePlan) -> DecodeWorkspace:
    """A workspace whose floats are NaN, so that what was not written this time shows."""
    rows, heads, head_dim = case.q.shape
    workspace = decode_workspace(rows, heads, case.k_cache.shape[2], head_dim, CPU, [plan])
    workspace.partials.fill_(torch.nan)
    workspace.lse.fill_(torch.nan)
    return workspace


def check_decode(case: PagedCase, plan: DecodePlan = PLAN) -> torch.Tensor:
    workspace = space_for(case, plan)
    got = launch_decode(*case.decode_args(), workspace, plan)
    torch.testing.assert_close(got.double(), case.expected(), **TOLERANCE[got.dtype])
    assert (workspace.arrivals == 0).all()
    return got


def check_prefill(case: PagedCase, tile_tokens: int, plan: PrefillPlan = STEPS) -> None:
    check_tiles(case, case.tiles(tile_tokens), tile_tokens, plan)


def check_tiles(case: PagedCase, tiles: torch.Tensor, tile_tokens: int, plan: PrefillPlan = STEPS) -> None:
    workspace = case.prefill_workspace()
    args = case.prefill_args(tiles, workspace)
    got = launch_prefill(*args, plan, tile_tokens=tile_tokens)
    written = sum(case.query_lens)
    torch.testing.assert_close(got[:written].double(), case.expected()[:written], **TOLERANCE[got.dtype])
    assert (workspace.arrivals == 0).all()


def check_splits(
    case: PagedCase, tile_tokens: int, *splits: int, min_split: int = 64, plan: PrefillPlan = STEPS
) -> None:
    """Check a case whose tiles, longest first, must come to be split so."""
    tiles = case.tiles(tile_tokens, split_places=SPLIT_PLACES, min_split=min_split)
    assert tiles[tiles[:, 2] == 0][:, 3].tolist() == list(splits)
    check_tiles(case, tiles, tile_tokens, plan)


@pytest.mark.parametrize("lengths", [[1, 15, 16, 17], [31, 32, 33, 64], [65, 96, 97, 130]], ids=str)
def test_decode_at_the_edges_of_blocks_and_splits(lengths):
    check_decode(decode_case(lengths))


def test_a_long_context_makes_splits_longer():
    check_decode(decode_case([200]), replace(PLAN, min_split=16, max_splits=4))


def test_more_splits_than_are_merged_at_once():
    case = decode_case([150, 20], (8, 1), 128)
    check_decode(case, DecodePlan(16, min_split=16, max_splits=10, num_warps=1, num_stages=2))


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"),
    [((2, 2), 32, 16), ((5, 1), 24, 5), ((6, 2), 20, 1), ((16, 1), 16, 64)],
    ids=str,
)
def test_decode_of_any_site(heads, head_dim, block_size):
    check_decode(decode_case([70, 7], heads, head_dim, block_size=block_size))


def test_decode_in_half_precision():
    check_decode(decode_case([70, 7], dtype=torch.float16))


def test_padding_rows_become_zeros_and_touch_nothing():
    case = decode_case([0, 40, 0])
    got = check_decode(case)
    assert (got[0] == 0).all()
    assert (got[2] == 0).all()


def test_one_split_needs_no_workspace():
    case = decode_case([50])
    nothing = torch.empty(0)
    whole = replace(PLAN, max_splits=1)
    got = launch_decode(*case.decode_args(), DecodeWorkspace(nothing, nothing, nothing.int()), whole)
    torch.testing.assert_close(got, check_decode(case))


def test_replays_give_the_same_bits():
    case = decode_case([100, 33])
    workspace = space_for(case, PLAN)
    first = launch_decode(*case.decode_args(), workspace, PLAN)
    assert torch.equal(launch_decode(*case.decode_args(), workspace, PLAN), first)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_slots_past_32_bits(phase):
    case = decode_case([20], (1, 1), 128, torch.float16)
    blocks = 2**31 // (16 * 128) + 3
    far = torch.tensor([[blocks - 2, blocks - 3]], dtype=torch.int32)
    caches = []
    for cache in (case.k_cache, case.v_cache):
        caches.append(sparse_zeros(blocks * 16 * 128, torch.float16).view(blocks, 16, 1, 128))
        caches[-1][far[0].long()] = cache[case.block_tables[case.seats[0], :2].long()]
    case = replace(
        case, k_cache=caches[0], v_cache=caches[1], block_tables=far, seats=torch.zeros(1, dtype=torch.int32)
    )
    if phase == "decode":
        check_decode(case)
    else:
        check_prefill(case, 1)


def test_the_chosen_decode_plan():
    case = decode_case([130, 1])
    workspace = decode_workspace(2, 4, 2, 32, CPU)
    got = paged_decode(*case.decode_args(), workspace)
    torch.testing.assert_close(got.double(), case.expected(), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("tile_tokens", [3, 8])
def test_decode_rows_and_chunks_in_one_launch(tile_tokens):
    check_prefill(make_paged(**MIXED, padding_tokens=2), tile_tokens)


@pytest.mark.parametrize(
    ("count", "length"), [(16, 16), (16, 32), (15, 47), (17, 33), (32, 48), (1, 16), (1, 17)], ids=str
)
def test_the_diagonal_at_the_edges_of_tiles(count, length):
    check_prefill(make_paged([count], [length]), 8)


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"),
    [((2, 2), 32, 16), ((5, 1), 24, 5), ((6, 2), 20, 1), ((16, 1), 16, 64)],
    ids=str,
)
def test_prefill_of_any_site(heads, head_dim, block_size):
    check_prefill(make_paged([9, 1], [40, 20], heads, head_dim, block_size=block_size), 4)


def test_prefill_in_half_precision():
    check_prefill(make_paged([9, 1], [40, 20], dtype=torch.float16), 4)


@pytest.mark.parametrize(("heads", "tile_tokens"), [((2, 2), 16), ((4, 2), 8), ((4, 1), 4)], ids=str)
def test_splits_for_groups_of_heads(heads, tile_tokens):
    check_splits(make_paged([tile_tokens], [210], heads), tile_tokens, 3)


@pytest.mark.parametrize("length", [128, 130, 191, 192, 193, 207, 208, 209])
def test_splits_at_the_edges_of_steps(length):
    check_splits(make_paged([1], [length]), 8, length // 64)


@pytest.mark.parametrize("block_n", [16, 32, 64])
def test_a_split_of_one_step(block_n):
    plan = replace(STEPS, block_n=block_n)
    check_splits(make_paged([8], [263]), 8, 4, min_split=1, plan=plan)


def test_split_and_whole_tiles_of_decode_rows_and_chunks_in_one_launch():
    case = make_paged([1, 11, 1, 3], [150, 210, 40, 3], padding_tokens=2)
    check_splits(case, 8, 1, 2, 2, 1, 1, min_split=100)


def test_splits_of_a_site_with_odd_sizes():
    case = make_paged([5, 1], [140, 133], (5, 1), 24, block_size=5)
    check_splits(case, 3, 2, 2, 2)
    check_splits(make_paged([9], [140], dtype=torch.float16), 5, 2, 2)


def test_tokens_of_split_tiles_only_are_written():
    case = make_paged([3], [150], padding_tokens=4)
    poisoned = replace(case, q=case.q.index_fill(0, torch.arange(3, 7), torch.nan))
    check_splits(poisoned, 8, 2)


def test_replays_of_splits_give_the_same_bits():
    case = make_paged([5], [270])
    args = case.prefill_args(case.tiles(8, split_places=SPLIT_PLACES, min_split=64))
    first = launch_prefill(*args, STEPS, tile_tokens=8)
    assert torch.equal(launch_prefill(*args, STEPS, tile_tokens=8), first)


def test_tokens_of_padding_tiles_are_left():
    case = make_paged([3], [20])
    tiles = torch.tensor([[-1, 0, 0, 1, 0], [-1] * 5], dtype=torch.int32)
    launch_prefill(*case.prefill_args(tiles), STEPS, tile_tokens=4)  # NaN or strays would raise
    assert launch_prefill(*case.prefill_args(tiles[:0]), STEPS, tile_tokens=4).shape == case.q.shape


def test_no_rows_at_all():
    case = decode_case([5])
    case = replace(case, q=case.q[:0], seats=case.seats[:0], context_lens=case.context_lens[:0])
    assert paged_decode(*case.decode_args(), space_for(case, PLAN)).shape == (0, 4, 32)


def test_arguments_that_do_not_fit_are_refused():
    case = decode_case([5, 6])
    workspace = space_for(case, PLAN)
    wrong = {
        "seats": (TypeError, replace(case, seats=case.seats.long())),
        "context_lens": (ValueError, replace(case, context_lens=case.context_lens[:1])),
        "v_cache": (ValueError, replace(case, v_cache=case.v_cache[:, :, :1])),
        "k_cache": (TypeError, replace(case, k_cache=case.k_cache.half())),
        "block_tables": (ValueError, replace(case, block_tables=case.block_tables.long())),
        "q": (ValueError, replace(case, q=case.q[:, :, :16].repeat(1, 1, 2).transpose(1, 2))),
    }
    for name, (error, args) in wrong.items():
        with pytest.raises(error, match=name):
            paged_decode(*args.decode_args(), workspace)
    *args, _ = case.decode_args()
    with pytest.raises(ValueError, match="scale"):
        paged_decode(*args, 0.0, workspace)
    with pytest.raises(ValueError, match=r"workspace\.partials"):
        paged_decode(*args, 1.0, replace(workspace, partials=workspace.partials[:4]))
    with pytest.raises(ValueError, match="tiles"):
        paged_prefill(*case.prefill_args(case.tiles(4)[:, :1]), tile_tokens=4)
    space = case.prefill_workspace()
    space = replace(space, partials=space.partials[:4])
    with pytest.raises(ValueError, match=r"workspace\.partials"):
        paged_prefill(*case.prefill_args(case.tiles(4), space), tile_tokens=4)
    with pytest.raises(ValueError, match="tile_tokens"):
        paged_prefill(*case.prefill_args(case.tiles(4)), tile_tokens=0)
