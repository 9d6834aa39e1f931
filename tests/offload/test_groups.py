"""Stores of layers with sliding windows against dictionaries of lists."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import BudgetError, ClosedError
from penstock.offload.blocks import KVCost
from penstock.offload.groups import KVGroups, open_kv
from penstock.offload.kv import KVStore

LAYERS = {0: None, 1: 5, 2: None, 3: 5, 4: 9}
"""What five layers see."""

WINDOWS = {layer: window for layer, window in LAYERS.items() if window}
HEADS, SIZE = 2, 3
ROW = 2 * HEADS * SIZE * 4
"""Keys and values of a token in one layer."""


@dataclass(frozen=True)
class Part:
    sequence: object
    start: int
    end: int


def cost_of(size, besides=0):
    return KVCost(5 * ROW, besides, size, ((5, 2 * ROW), (9, ROW)))


def store_of(num_tokens, *, size=4, besides=0):
    """Room for sequences of so many tokens in all, if they were in layers without windows."""
    cost = cost_of(size, besides)
    return KVGroups(limit_nbytes=num_tokens * cost.token_nbytes + 4 * besides, cost=cost, windows=WINDOWS)


def rows_of(sequence, layer, start, end):
    """Rows that say whose they are: [n, H, D] keys and values."""
    places = torch.arange(start, end).float()[:, None, None] + 1000 * layer
    return (places + 100_000 * sequence).expand(-1, HEADS, SIZE), -places.expand(-1, HEADS, SIZE)


def append(store, spans):
    """Store rows in every layer, and compare what comes back with what the new tokens see."""
    places = store.locate(spans)
    assert places.positions.tolist() == [place for span in spans for place in range(span.start, span.end)]
    for layer, window in LAYERS.items():
        made = [rows_of(span.sequence, layer, span.start, span.end) for span in spans]
        kept = store.append(layer, places, *(torch.cat(parts) for parts in zip(*made, strict=True)))
        assert kept.places.offsets == (0, *torch.tensor([span.end - span.start for span in spans]).cumsum(0).tolist())
        for index, span in enumerate(spans):
            first = 0 if window is None else max(span.start - window + 1, 0)
            wanted = rows_of(span.sequence, layer, first, span.end)
            for got, want in zip(kept.of(index), wanted, strict=True):
                assert torch.equal(got[-len(want) :], want)
                assert window is None or len(got) < span.end - span.start + window + 4
            heads = [kept.of(index, part)[0] for part in kept.head_groups(index, 1)]
            assert torch.equal(torch.cat(heads, 1), kept.of(index)[0])
        check_singles(kept, spans, layer, window)


def check_singles(kept, spans, layer, window):
    """What a kernel finds by the table."""
    size = kept.blocks[0].shape[1]
    for row, span in zip(kept.places.singles.table, spans[: kept.places.singles.count], strict=True):
        for place in range(0 if window is None else max(span.end - window, 0), span.end):
            found = kept.blocks[0][row[place // size], place % size]
            assert torch.equal(found, rows_of(span.sequence, layer, place, place + 1)[0][0])


@settings(max_examples=60)
@given(st.data(), st.sampled_from([1, 4]))
def test_new_tokens_see_what_their_windows_reach(data, size):
    store = store_of(60, size=size)
    known, capacities = {}, {}
    for step in range(data.draw(st.integers(1, 14))):
        what = data.draw(st.sampled_from(["acquire", "append", "append", "append", "extend", "release"]))
        if what == "acquire":
            capacity = data.draw(st.integers(1, 50))
            if store.fits(capacity):
                store.acquire(step, num_tokens=capacity)
                known[step], capacities[step] = 0, capacity
        elif known and what == "extend":
            grown, wanted = data.draw(st.sampled_from(sorted(known))), data.draw(st.integers(1, 50))
            free = store.statistics().num_free_blocks
            if store.extend(grown, num_tokens=wanted):
                capacities[grown] = max(capacities[grown], wanted)
            else:
                assert store.statistics().num_free_blocks == free
        elif known and what == "release":
            gone = data.draw(st.sampled_from(sorted(known)))
            store.release(gone)
            del known[gone]
        else:
            spans = []
            for one, start in known.items():
                if start < capacities[one] and data.draw(st.booleans()):
                    most = capacities[one] if data.draw(st.booleans()) else start + 1
                    spans.append(Part(one, start, data.draw(st.integers(start + 1, most))))
            known |= {span.sequence: span.end for span in spans}
            if spans:
                append(store, sorted(spans, key=lambda span: span.end - span.start > 1))
        store.check_integrity()
    for one in known:
        store.release(one)
    store.check_integrity()
    statistics = store.statistics()
    assert statistics.num_sequences == statistics.nbytes == 0
    assert statistics.num_free_blocks == statistics.num_blocks


def test_a_long_sequence_goes_round_and_round():
    store = store_of(300)
    store.acquire(0, num_tokens=290)
    append(store, [Part(0, 0, 50)])
    for start, end in pairwise([50, *range(51, 90), 97, 98, 99, 200, 201, 210, 290]):
        append(store, [Part(0, start, end)])
        store.check_integrity()


def test_windows_make_room_for_more_sequences():
    full = KVStore(limit_nbytes=100_000, cost=KVCost(5 * ROW, 0, 4))
    groups = KVGroups(limit_nbytes=100_000, cost=cost_of(4), windows=WINDOWS)
    counts = []
    for store in (full, groups):
        store.prepare([100] * 50)
        running = 0
        while store.fits(100):
            store.acquire(running, num_tokens=100)
            running += 1
        store.check_integrity()
        counts.append(running)
    assert counts == [4, 9], "two layers keep 8 tokens of 100, and one 12; the other two all"
    assert groups.statistics().nbytes == 9 * cost_of(4).of(100) <= 100_000


def test_the_limit_is_divided_anew_for_other_lengths_and_for_what_is_besides():
    store = store_of(400, besides=500)
    store.prepare([10] * 10)
    store.acquire("short", num_tokens=10)
    assert not store.fits(390)
    store.release("short")
    assert store.fits(390)
    store.acquire("long", num_tokens=390)
    store.keep_state(7, "long", "state", nbytes=500)
    store.check_integrity()
    assert (store.state(7, "long"), store.state(6, "long")) == ("state", None)
    store.keep_state(7, "long", "larger", nbytes=501)
    with pytest.raises(AssertionError, match="states of 501 bytes"):
        store.check_integrity()
    with pytest.raises(BudgetError, match="no room for the keys and values of that"):
        store.check(5000, "that")
    store.close()
    store.release("long")
    with pytest.raises(ClosedError):
        store.acquire("late", num_tokens=1)


def test_all_layers_may_have_one_window():
    cost = KVCost(2 * ROW, 0, 4, ((5, 2 * ROW),))
    assert cost.window == 5
    assert cost.of(1000) == 2 * cost.block_nbytes == sum(part.of(1000) for part in cost.parts().values())
    store = open_kv(limit_nbytes=10 * cost.block_nbytes, cost=cost, windows={0: 5, 1: 5})
    store.prepare([1000] * 5)
    for number in range(5):
        assert store.fits(1000)
        store.acquire(number, num_tokens=1000)
    assert isinstance(open_kv(limit_nbytes=100, cost=KVCost(1), windows={}), KVStore)


def test_what_others_read_is_not_hidden():
    store = store_of(100)
    store.acquire(0, num_tokens=20)
    append(store, [Part(0, 0, 9)])
    places = store.locate([Part(0, 9, 10)])
    with pytest.raises(AssertionError, match="may be seen by another"):
        store.read(1, places)
