"""A prefix is found if and only if the same tokens were computed on the same mode for the same salt."""

from array import array

from hypothesis import given
from hypothesis import strategies as st

from fusewire.kernels.modes import KernelMode
from fusewire.service.engine.block_pool import BlockPool
from fusewire.service.engine.prefix_cache import KEY_BYTES, PrefixCache, PrefixChain

SIZE = 3
sequences = st.lists(st.integers(0, 2), min_size=SIZE, max_size=4 * SIZE)
contexts = st.tuples(st.sampled_from(KernelMode), st.sampled_from(["", "a", "\0", "a\0", "ä"]))


def key_of_last_block(mode: KernelMode, salt: str, tokens: list[int]) -> bytes:
    return PrefixChain(mode, salt, SIZE).key(len(tokens) // SIZE - 1, array("i", tokens))


@given(left=st.tuples(contexts, sequences), right=st.tuples(contexts, sequences))
def test_keys_agree_exactly_where_the_whole_prefix_does(left, right) -> None:
    def told(which):
        (mode, salt), tokens = which
        return mode, salt, tokens[: len(tokens) // SIZE * SIZE]

    first, second = told(left), told(right)
    assert (key_of_last_block(*first) == key_of_last_block(*second)) == (first == second)
    assert len(key_of_last_block(*first)) == KEY_BYTES


@given(tokens=sequences, asked=st.lists(st.integers(0, 3), max_size=6))
def test_keys_do_not_depend_on_when_they_are_asked_for(tokens: list[int], asked: list[int]) -> None:
    whole = array("i", tokens)
    at_once, piecewise = (PrefixChain(KernelMode.FUSED, "", SIZE) for _ in range(2))
    for index in asked:
        if index < len(tokens) // SIZE:
            piecewise.key(index, whole[: (index + 1) * SIZE])
    for index in range(len(tokens) // SIZE):
        assert piecewise.key(index, whole) == at_once.key(index, whole)


@given(computed=sequences, num_computed=st.integers(0, 4 * SIZE), asked=sequences)
def test_a_match_is_the_longest_common_run_of_computed_blocks(
    computed: list[int], num_computed: int, asked: list[int]
) -> None:
    pool = BlockPool(8, SIZE)
    cache = PrefixCache(pool)
    num_computed = min(num_computed, len(computed))
    blocks = pool.allocate(pool.blocks_for(len(computed)))
    chain = PrefixChain(KernelMode.FUSED, "", SIZE)
    for end in (num_computed // 2, num_computed):  # chunk by chunk
        cache.register(chain, array("i", computed), blocks, end)
    assert chain.registered == pool.num_keyed == num_computed // SIZE
    pool.free(blocks)

    common = 0
    while common < min(num_computed, len(asked)) and computed[common] == asked[common]:
        common += 1
    expected = min(common // SIZE, (len(asked) - 1) // SIZE)
    assert cache.match(PrefixChain(KernelMode.FUSED, "", SIZE), array("i", asked)) == blocks[:expected]
    assert cache.match(PrefixChain(KernelMode.UNFUSED, "", SIZE), array("i", asked)) == []


def test_a_sequence_loses_its_end_before_its_beginning() -> None:
    pool = BlockPool(4, SIZE)
    cache, tokens = PrefixCache(pool), array("i", range(4 * SIZE + 1))
    blocks = pool.allocate(4)
    cache.register(PrefixChain(KernelMode.FUSED, "", SIZE), tokens, blocks, 4 * SIZE)
    pool.free(blocks)
    for left in (3, 2, 1, 0):
        pool.allocate(1)
        assert cache.match(PrefixChain(KernelMode.FUSED, "", SIZE), tokens) == blocks[:left]
