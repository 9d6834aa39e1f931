"""Blocks: none twice, none lost, one run where there is one; and memory divided between blocks and the rest."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.offload.blocks import BlockAllocator, KVCost


def free(allocator):
    return [block for start, end in allocator.free_runs() for block in range(start, end)]


@settings(deadline=None)
@given(st.data(), st.integers(0, 40))
def test_every_block_is_free_or_has_one_owner(data, num_blocks):
    allocator = BlockAllocator(num_blocks)
    owners = []
    for _ in range(data.draw(st.integers(0, 30))):
        what = data.draw(st.sampled_from(["allocate", "extend", "release", "grow"]))
        if what == "allocate":
            count = data.draw(st.integers(0, allocator.num_free))
            longest = max((end - start for start, end in allocator.free_runs()), default=0)
            taken = allocator.allocate(count)
            assert len(taken) == count
            if count <= longest:
                assert taken == list(range(taken[0], taken[0] + count)) if count else taken == []
            owners.append(taken)
        elif what == "extend" and any(owners):
            owner = data.draw(st.sampled_from([one for one in owners if one]))
            behind = free(allocator)
            count = data.draw(st.integers(0, allocator.num_free))
            taken = allocator.allocate(count, after=owner[-1])
            assert not count or taken[0] == owner[-1] + 1 or owner[-1] + 1 not in behind
            owner += taken
        elif what == "release" and owners:
            blocks = owners.pop(data.draw(st.integers(0, len(owners) - 1)))
            allocator.release(data.draw(st.permutations(blocks)))
        elif what == "grow":
            allocator.grow(data.draw(st.integers(0, 60)))
        runs = allocator.free_runs()
        assert all(before[1] < after[0] for before, after in pairwise(runs)), "runs are whole"
        assert allocator.num_free == len(free(allocator))
        assert sorted(free(allocator) + [block for blocks in owners for block in blocks]) == list(
            range(allocator.num_blocks)
        )


def test_the_smallest_run_that_is_enough_is_used():
    allocator = BlockAllocator(20)
    parts = [allocator.allocate(count) for count in (5, 1, 3, 1, 10)]
    for place in (0, 2, 4):
        allocator.release(parts[place])
    assert allocator.allocate(3) == [6, 7, 8]
    assert allocator.allocate(12) == [*range(10, 20), 0, 1], "the largest first where none is enough"


@pytest.mark.parametrize("twice", [[3], [2, 3], [9, 4], [0]])
def test_a_block_given_back_twice_is_noticed(twice):
    allocator = BlockAllocator(10)
    allocator.release(allocator.allocate(10)[:5])
    with pytest.raises(AssertionError, match="free already"):
        allocator.release(twice)


@settings(deadline=None)
@given(
    st.integers(0, 50),
    st.integers(0, 200),
    st.sampled_from([1, 16]),
    st.lists(st.integers(1, 300), min_size=1, max_size=8),
    st.integers(0, 50_000),
)
def test_memory_is_divided_so_that_what_fits_alone_fits(token, besides, size, lengths, nbytes):
    cost = KVCost(token, besides, size)
    lengths = [length for length in lengths if cost.of(length) <= nbytes]
    if not lengths:
        return
    num_blocks = cost.divide(nbytes, lengths)
    left = nbytes - num_blocks * cost.block_nbytes
    assert left >= besides
    if token:
        assert num_blocks >= max(map(cost.blocks_of, lengths))
        assert besides or left < cost.block_nbytes, "without anything else, blocks get all"


def test_a_small_part_is_left_for_more_sequences_that_end_early():
    cost = KVCost(10, 100, 16)
    sure, unsure = (cost.divide(1_000_000, [800] * 5, least=least) for least in ([800] * 5, [20] * 5))
    assert sure == cost.divide(1_000_000, [800] * 5)
    assert unsure == pytest.approx(sure * 15 / 16, rel=0.02)
    assert 1_000_000 - unsure * cost.block_nbytes >= 600 * 100, "besides for 625 instead of 123"
    assert cost.divide(1_000_000, [8000], least=[20]) >= cost.blocks_of(8000)


def test_equal_sequences_fill_the_memory():
    cost = KVCost(10, 3000, 16)
    num_blocks = cost.divide(1_000_000, [160] * 5)
    alone = 1_000_000 // cost.of(160)
    assert min(num_blocks // 10, (1_000_000 - num_blocks * 160) // 3000) == alone
