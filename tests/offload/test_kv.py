"""The paged store against dictionaries of lists."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import BudgetError, ClosedError
from penstock.offload import kv
from penstock.offload.blocks import KVCost
from penstock.offload.kv import KVStore

KINDS = {
    0: (((2, 4), torch.float32), ((2, 4), torch.float32)),
    1: (((1, 6), torch.float16),),
    5: (((2, 3), torch.bfloat16), ((2, 8), torch.bfloat16)),
}
"""What three layers store for a token: keys and values, latents, heads of different sizes."""

TOKEN = sum(dtype.itemsize * heads * size for rows in KINDS.values() for (heads, size), dtype in rows)


@dataclass(frozen=True)
class Part:
    sequence: object
    start: int
    end: int


def append(store, spans, seed=0):
    """Store random rows in every layer; return them by layer and what the store returns."""
    places = store.locate(spans)
    generator = torch.Generator().manual_seed(seed)
    total = sum(span.end - span.start for span in spans)
    result = {}
    for layer, rows in KINDS.items():
        new = tuple(
            torch.randn(heads, total, size, generator=generator).to(dtype).transpose(0, 1)
            for (heads, size), dtype in rows
        )
        result[layer] = new, store.append(layer, places, *new)
    return places, result


def limited(num_blocks, *, size=4, sequence_nbytes=0, besides=0):
    cost = KVCost(TOKEN, sequence_nbytes, size)
    return KVStore(limit_nbytes=num_blocks * cost.block_nbytes + besides, cost=cost)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([None, 12, 40]), st.sampled_from([1, 4, 16]), st.sampled_from([1, 3, 32]))
def test_the_store_keeps_what_was_stored(data, num_blocks, size, run_tokens):
    """Random sequences come, grow in ragged micro-batches of several at once, and leave."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv, "RUN_TOKENS", run_tokens)
        _store_and_compare(data, num_blocks, size)


def _store_and_compare(data, num_blocks, size):
    store = KVStore(cost=KVCost(0, 0, size)) if num_blocks is None else limited(num_blocks, size=size)
    known, capacities = {}, {}
    for step in range(data.draw(st.integers(1, 12))):
        what = data.draw(st.sampled_from(["acquire", "acquire", "append", "append", "append", "extend", "release"]))
        if what == "acquire":
            capacity = data.draw(st.integers(1, 40))
            if store.fits(capacity):
                store.acquire(step, num_tokens=capacity)
                known[step] = {layer: tuple([] for _ in rows) for layer, rows in KINDS.items()}
                capacities[step] = capacity
        elif what == "extend" and known:
            grown = data.draw(st.sampled_from(sorted(known)))
            wanted = data.draw(st.integers(1, 40))
            free = store.statistics().num_free_blocks
            if store.extend(grown, num_tokens=wanted):
                capacities[grown] = max(capacities[grown], wanted)
            else:
                assert -(-wanted // size) > -(-capacities[grown] // size) + free
                assert store.statistics().num_free_blocks == free
        elif what == "release" and known:
            gone = data.draw(st.sampled_from(sorted(known)))
            store.release(gone)
            del known[gone]
        elif what == "append":
            spans = []
            for one in data.draw(st.permutations(sorted(known))):
                start = len(known[one][0][0])
                if start < capacities[one] and data.draw(st.booleans()):
                    spans.append(Part(one, start, data.draw(st.integers(start + 1, capacities[one]))))
            if spans:
                check_append(store, spans, known, step)
        store.check_integrity()
    for one in known:
        store.release(one)
    store.check_integrity()
    assert store.statistics().nbytes == store.statistics().num_sequences == 0
    assert store.statistics().num_blocks == store.statistics().num_free_blocks


def check_append(store, spans, known, seed):
    places, stored = append(store, spans, seed)
    assert places.positions.tolist() == [place for span in spans for place in range(span.start, span.end)]
    assert places.lengths.tolist() == [span.end for span in spans] == list(places.ends)
    for layer, (new, kept) in stored.items():
        for index, span in enumerate(spans):
            begin, end = places.offsets[index : index + 2]
            for want, row in zip(known[span.sequence][layer], new, strict=True):
                want.extend(row[begin:end])
            for rows in (kept, store.read(layer, places)):
                for want, got in zip(known[span.sequence][layer], rows.of(index), strict=True):
                    assert torch.equal(got, torch.stack(want))


def scattered(count=3):
    """Return a store of which every second block is taken, and the sequence 'apart' gets `count` of the others."""
    store = limited(2 * count)
    for number in range(2 * count):
        store.acquire(number, num_tokens=4)
    for number in range(0, 2 * count, 2):
        store.release(number)
    store.acquire("apart", num_tokens=4 * count)
    return store


def test_scattered_sequences_are_copied_together_by_parts_of_the_heads():
    store = scattered()
    store.check_integrity()
    places, stored = append(store, [Part("apart", 0, 11)])
    assert places.firsts == (None,)
    for new, kept in stored.values():
        for got, want in zip(kept.of(0), new, strict=True):
            assert torch.equal(got, want)
        assert kept.copy_nbytes(0) >= sum(row.numel() * row.element_size() for row in new)
        assert list(kept.head_groups(0, 1 << 20)) == [slice(0, new[0].shape[1])]
        parts = list(kept.head_groups(0, 1))
        assert [part.stop - part.start for part in parts] == [1] * new[0].shape[1]
        for place, row in enumerate(new):
            assert torch.equal(torch.cat([kept.of(0, part)[place] for part in parts], 1), row)


def test_a_sequence_grows_into_the_blocks_behind_it_where_they_are_free():
    store = limited(8)
    store.acquire("one", num_tokens=8)
    append(store, [Part("one", 0, 8)])
    assert store.extend("one", num_tokens=13)
    store.acquire("two", num_tokens=4)
    assert store.locate([Part("one", 8, 13)]).firsts == (0,)
    assert store.extend("one", num_tokens=20)
    store.check_integrity()
    assert store.locate([Part("one", 13, 20)]).firsts == (None,), "the one behind was taken"
    assert not store.extend("two", num_tokens=13), "three blocks more, and two are free"
    assert store.extend("two", num_tokens=8)
    assert store.statistics().num_free_blocks == 1
    assert store.statistics().peak_nbytes == store.statistics().nbytes == 7 * 4 * TOKEN


def test_a_sequence_in_one_run_is_a_view():
    store = limited(8)
    store.acquire(0, num_tokens=20)
    _, stored = append(store, [Part(0, 0, 20)])
    for _, kept in stored.values():
        assert kept.copy_nbytes(0) == 0
        assert all(rows.untyped_storage().data_ptr() == store._pool.data_ptr() for rows in kept.of(0))
        assert list(kept.head_groups(0, 1)) == [slice(0, kept.blocks[0].shape[2])]


def test_layers_fill_the_pool_exactly():
    store = limited(7)
    store.acquire(0, num_tokens=2)
    append(store, [Part(0, 0, 1)])
    assert store._carved == store._pool.numel() == 7 * 4 * TOKEN
    assert store.measure() == KVCost(TOKEN, 0, 4)
    with pytest.raises(AssertionError, match="no more than the rehearsal has seen"):
        store.append(9, store.locate([Part(0, 1, 2)]), torch.zeros(1, 1, 1))


def test_what_sequences_keep_besides_blocks_has_its_share():
    store = limited(40, sequence_nbytes=500, besides=5000)
    store.prepare([4] * 100)
    running = 0
    while store.fits(4):
        store.acquire(running, num_tokens=4)
        store.keep_state(0, running, "state", nbytes=500)
        store.check_integrity()
        running += 1
    assert running == (40 * 4 * TOKEN + 5000) // (4 * TOKEN + 500)
    assert store.state(0, 3) == "state"
    store.keep_state(0, 3, "larger", nbytes=501)
    with pytest.raises(AssertionError, match="states of 501 bytes"):
        store.check_integrity()


def test_memory_is_divided_again_when_either_share_is_off():
    """A few large shares, then many small ones: of blocks little changes, of what is left for the rest everything."""
    store = limited(1000, sequence_nbytes=TOKEN)
    store.prepare([1000])
    store.prepare([8] * 10)
    running = 0
    while store.fits(8):
        store.acquire(running, num_tokens=8)
        running += 1
    assert running > 400, "of 444 that fit"


def test_a_long_sequence_gets_the_memory_when_the_others_have_left():
    store = limited(40, sequence_nbytes=5 * 4 * TOKEN, besides=0)
    store.prepare([4] * 10)
    longest = 4 * 35
    store.check(longest)
    store.acquire("short", num_tokens=4)
    assert not store.fits(longest)
    store.release("short")
    assert store.fits(longest)
    store.acquire("long", num_tokens=longest)
    _, stored = append(store, [Part("long", 0, longest)])
    assert all(torch.equal(kept.of(0)[0], new[0]) for new, kept in stored.values())
    store.check_integrity()
    with pytest.raises(BudgetError, match="no room for the keys and values of that"):
        store.check(longest + 1, "that")


def test_misuse_is_noticed():
    store = limited(8)
    store.acquire(0, num_tokens=6)
    store.locate([Part(0, 0, 3)])
    with pytest.raises(AssertionError, match="in order"):
        store.locate([Part(0, 0, 3)])
    with pytest.raises(AssertionError, match="never outgrows"):
        store.locate([Part(0, 3, 7)])
    with pytest.raises(AssertionError, match="already running"):
        store.acquire(0, num_tokens=1)
    with pytest.raises(AssertionError, match="only when they fit"):
        store.acquire(1, num_tokens=100)
    store._sequences[0].blocks[0] = 7
    with pytest.raises(AssertionError, match="free or has one owner"):
        store.check_integrity()


def test_a_closed_store_lets_sequences_go_and_takes_none():
    store = limited(8)
    store.acquire(0, num_tokens=6)
    store.close()
    store.close()
    store.release(0)
    store.prepare([32])
    assert store._pool is None
    with pytest.raises(ClosedError):
        store.acquire(1, num_tokens=6)
