"""Two homes of keys and values: who goes where, and what the thread of host RAM promises."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import BudgetError
from penstock.kernels.attention import Rule
from penstock.kernels.paged_reference import attend_paged
from penstock.offload import homes as module
from penstock.offload import host_kv
from penstock.offload.blocks import KVCost
from penstock.offload.homes import KVHomes
from penstock.offload.kv import KVStore
from penstock.offload.tiers import Tier

COST = KVCost(token_nbytes=2 * 2 * 4 * 4, sequence_nbytes=100, block_tokens=4)
"""Keys and values of one layer: two heads of size 4 in float32."""


@dataclass(frozen=True)
class New:
    sequence: object
    start: int
    end: int


def open_homes(device_blocks=4, host_blocks=8, sequences=20, cost=COST):
    limit = device_blocks * cost.block_nbytes + sequences * cost.sequence_nbytes
    return KVHomes(KVStore(limit_nbytes=limit, cost=cost), cost=cost, host_nbytes=host_blocks * cost.block_nbytes + 7)


@pytest.fixture(autouse=True)
def attend(monkeypatch):
    """The kernel is its reference here, or what a test puts into this list."""
    kernel = [attend_paged]

    def call(*args, **more):
        kernel[0](*args, **more)

    monkeypatch.setattr(module, "load_attend_paged", lambda _: call)
    return kernel


@pytest.fixture(autouse=True)
def nothing_left(caplog):
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("penstock-attention")]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], "memory has views left"


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, 2, 4, generator=generator) for _ in range(2))


def test_sequences_go_to_the_device_while_it_has_room_and_then_to_host_ram():
    with open_homes(sequences=3) as homes:
        homes.prepare([16])
        for number in range(3):
            assert homes.fits(16)
            homes.acquire(number, num_tokens=16)
            homes.check_integrity()
        assert [homes.home_of(number) for number in range(3)] == [Tier.DEVICE, Tier.HOST, Tier.HOST]
        assert not homes.fits(1)
        assert homes.store_of(1) is homes.store_of(2) is not homes.store_of(0)
        homes.release(0)
        homes.acquire("next", num_tokens=3)
        assert homes.home_of("next") is Tier.DEVICE
        homes.release(1)
        assert homes.fits(16)
        for sequence in (2, "next"):
            homes.release(sequence)
        homes.check_integrity()
        after = homes.statistics()
    assert (after.device.num_sequences, after.host.num_sequences, after.host.num_free_blocks) == (0, 0, 8)


def test_states_of_every_sequence_are_on_the_device():
    """And so a sequence whose keys are in host RAM takes its part of the device's budget."""
    with open_homes(device_blocks=4, sequences=2) as homes:
        homes.prepare([16])
        homes.acquire("a", num_tokens=16)
        homes.acquire("b", num_tokens=4)
        assert homes.home_of("b") is Tier.HOST
        store = homes.store_of("b")
        store.keep_state(3, "b", "a state", nbytes=100)
        assert store.state(3, "b") == homes._device.state(3, "b") == "a state"
        homes.check_integrity()
        assert not homes.fits(4), "there is no room for a third one's states"


def test_the_device_sets_memory_aside_for_sequences_that_are_elsewhere():
    cost = KVCost(token_nbytes=64, sequence_nbytes=256, block_tokens=4)
    store = KVStore(limit_nbytes=100 * cost.block_nbytes, cost=cost)
    with KVHomes(store, cost=cost, host_nbytes=40 * cost.block_nbytes) as homes:
        homes.prepare([4] * 5)
        count = 0
        while homes.fits(4):
            homes.acquire(count, num_tokens=4)
            count += 1
        homes.check_integrity()
        assert homes.statistics().host.num_free_blocks == 0
        assert homes.statistics().device.num_free_blocks == 0
        assert count == 40 + homes.statistics().device.num_blocks


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), max_size=40), st.integers(0, 12), st.integers(0, 12))
def test_homes_never_lose_a_block(steps, device_blocks, host_blocks):
    with open_homes(device_blocks, host_blocks, sequences=6) as homes:
        running = set()
        for number, length in steps:
            if number in running:
                homes.release(number)
                running.remove(number)
            elif homes.fits(length):
                homes.check(length)
                homes.acquire(number, num_tokens=length)
                running.add(number)
            homes.check_integrity()
        for number in running:
            homes.release(number)
        homes.check_integrity()
        assert homes.statistics().device.nbytes == 0


def test_what_fits_neither_home_is_refused_with_both_sizes():
    with open_homes(device_blocks=2, host_blocks=8, sequences=1) as homes:
        homes.check(32)
        with pytest.raises(BudgetError) as caught:
            homes.check(33, "prompt 7")
    text = str(caught.value)
    assert "no room for the keys and values of prompt 7 (33 tokens) in one home: wanted 2404 bytes" in text
    assert "got 612 bytes in all on the device, 2048 in host RAM" in text


def test_without_room_for_a_block_the_device_is_the_only_home():
    with open_homes(host_blocks=0) as homes:
        assert homes.statistics().host is None
        with pytest.raises(BudgetError, match=r"\(4000 tokens\): wanted"):
            homes.check(4000)


def test_a_model_that_keeps_no_keys_has_no_home_in_host_ram():
    cost = KVCost(0, 100, 4)
    with KVHomes(KVStore(limit_nbytes=300, cost=cost), cost=cost, host_nbytes=1 << 20) as homes:
        assert homes.statistics().host is None
        assert homes.fits(1000)


def hosted(homes, *lengths):
    """Make sequences 0 .. whose home is host RAM; the device has room for one token less."""
    for number, length in enumerate(lengths):
        homes.acquire(number, num_tokens=length)
        assert homes.home_of(number) is Tier.HOST
    return homes.store_of(0)


def test_rows_come_back_as_attention_and_as_copies():
    with open_homes(device_blocks=0, sequences=2) as homes:
        store = hosted(homes, 9, 6)
        first = store.locate([New(0, 0, 8), New(1, 0, 5)])
        old = rows(13)
        kept = store.append(0, first, *old)
        assert (kept.known(0), kept.known(1), kept.num_heads, kept.value_size) == (0, 0, 2, 4)
        places = store.locate([New(0, 8, 9), New(1, 5, 6)])
        new = rows(2, seed=1)
        kept = store.append(0, places, *new)
        query, rule = torch.randn(2, 4, 4), Rule(scale=0.5)
        made = store.wait(store.attend(kept, query, rule))
        for number, (begin, end) in enumerate(((0, 8), (8, 13))):
            whole = [torch.cat([a[begin:end], b[number : number + 1]]) for a, b in zip(old, new, strict=True)]
            wanted = torch.nn.functional.scaled_dot_product_attention(
                query[number, :, None], *(part.transpose(0, 1) for part in whole), scale=0.5, enable_gqa=True
            )
            torch.testing.assert_close(made[number], wanted[:, 0])
            keys, values = store.wait(store.fetch(kept, number, slice(1, 2)))
            torch.testing.assert_close(keys, old[0][begin:end, 1:2], rtol=0, atol=0)
            torch.testing.assert_close(values, old[1][begin:end, 1:2], rtol=0, atol=0)
        again = store.read(0, places)
        assert store.wait(store.fetch(again, 1, slice(0, 2)))[0].shape == (6, 2, 4)
        homes.check_integrity()
        assert homes.statistics().attention_seconds > 0


def test_what_was_sent_may_change_at_once():
    with open_homes(device_blocks=0, sequences=2) as homes:
        store = hosted(homes, 8)
        places = store.locate([New(0, 0, 8)])
        sent = rows(8)
        wanted = sent[0].clone()
        store.append(0, places, *sent)
        sent[0].zero_()
        (keys, _) = store.wait(store.fetch(store.read(0, places), 0, slice(0, 2)))
        assert torch.equal(keys, wanted)


def test_latents_are_keys_and_values_at_once():
    cost = KVCost(2 * 4 * 4, 0, 4)
    with open_homes(device_blocks=0, cost=cost) as homes:
        store = hosted(homes, 5)
        store.append(0, store.locate([New(0, 0, 4)]), rows(4)[0])
        new = rows(1, seed=1)[0]
        kept = store.append(0, store.locate([New(0, 4, 5)]), new).sharing_values(3)
        query = torch.randn(1, 2, 4)
        made = store.wait(store.attend(kept, query, Rule(scale=1.0)))
        keys = torch.cat([rows(4)[0], new]).transpose(0, 1)
        wanted = torch.nn.functional.scaled_dot_product_attention(query[0, :, None], keys, keys[..., :3], scale=1.0)
        torch.testing.assert_close(made[0], wanted[:, 0])
        assert kept.value_size == 3


def test_errors_of_the_thread_come_out_as_themselves_once(attend):
    def fails(*_, **__):
        raise MemoryError("no memory for partial results")

    with open_homes(device_blocks=0, sequences=2) as homes:
        store = hosted(homes, 4)
        kept = store.append(0, store.locate([New(0, 0, 1)]), *rows(1))
        attend[0] = fails
        with pytest.raises(MemoryError, match="partial results"):
            store.wait(store.attend(kept, torch.randn(1, 2, 4), Rule(scale=1.0)))
        attend[0] = attend_paged
        assert store.wait(store.attend(kept, torch.randn(1, 2, 4), Rule(scale=1.0))).shape == (1, 2, 4)
        homes.check_integrity()


def test_rows_that_could_not_be_stored_are_said_at_the_end_of_the_pass(monkeypatch):
    with open_homes(device_blocks=0, sequences=2) as homes:
        store = hosted(homes, 4)
        places = store.locate([New(0, 0, 4)])
        with monkeypatch.context() as patch:
            patch.setattr(store.store, "put", lambda *_: 1 // 0)
            store.append(0, places, *rows(4))
            with pytest.raises(ZeroDivisionError):
                homes.check_integrity()
        homes.release(0)
        homes.check_integrity()


def test_blocks_are_given_back_when_nothing_touches_them_any_more(attend):
    asked, go_on = threading.Event(), threading.Event()

    def waits(*args, **more):
        asked.set()
        go_on.wait()
        attend_paged(*args, **more)

    attend[0] = waits
    with open_homes(device_blocks=0, sequences=2) as homes:
        store = hosted(homes, 4)
        kept = store.append(0, store.locate([New(0, 0, 1)]), *rows(1))
        attended = store.attend(kept, torch.randn(1, 2, 4), Rule(scale=1.0))
        asked.wait()
        releasing = threading.Thread(target=homes.release, args=(0,))
        releasing.start()
        assert homes.statistics().host.num_sequences == 1
        go_on.set()
        releasing.join()
        assert attended.done()
        assert homes.statistics().host.num_sequences == 0


def test_a_forward_waits_when_too_many_rows_are_under_way(monkeypatch):
    monkeypatch.setattr(host_kv, "STAGED_NBYTES", 2 * COST.token_nbytes)
    waited, go_on = [], threading.Event()

    def wait(future):
        waited.append(future)
        go_on.set()
        return future.result()

    with open_homes(device_blocks=0, sequences=2) as homes:
        store = hosted(homes, 8)
        monkeypatch.setattr(store, "wait", wait)
        store._submit(go_on.wait)
        for start in range(2):
            store.append(0, store.locate([New(0, start, start + 1)]), *rows(1))
        assert not waited
        store.append(0, store.locate([New(0, 2, 3)]), *rows(1))
        assert len(waited) >= 1
        store.append(0, store.locate([New(0, 3, 8)]), *rows(5))  # more than the limit, but one micro-batch's
        homes.check_integrity()


def test_close_ends_what_is_under_way_and_sequences_may_still_be_released():
    homes = open_homes(device_blocks=0, sequences=2)
    store = hosted(homes, 4, 4)
    store.append(0, store.locate([New(0, 0, 4)]), *rows(4))
    homes.close()
    homes.close()
    homes.release(0)
    homes.release(1)
