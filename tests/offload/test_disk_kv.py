"""Keys and values on a disk are those in RAM, bit for bit; and what goes wrong with the disk."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import ReadError, WriteError
from penstock.io.fake import FakeReader, Fault
from penstock.io.files import SourceFile
from penstock.io.memory import HostMemory
from penstock.io.threads import ThreadsReader
from penstock.offload.blocks import KVCost
from penstock.offload.disk_kv import DiskKV
from penstock.offload.kv import KVStore
from penstock.offload.kv_rows import encode

SIZE = 4
DIRECTORY = Path("scratch")


@dataclass(frozen=True)
class New:
    sequence: object
    start: int
    end: int


def rows(count, shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, *shape, generator=generator) for shape in shapes)


def cost_of(layers, kv_dtype):
    """What layers of rows of these shapes keep of a token."""
    nbytes = (sum(encode(row, kv_dtype).nbytes for row in rows(1, shapes, 0)) for shapes in layers)
    return KVCost(sum(sizes := tuple(nbytes)), 0, SIZE, (), sizes)


@contextmanager
def open_disk(cost, num_blocks, landing_blocks, *, faults=None, completion="when waited for"):
    with (
        NamedTemporaryFile() as named,
        HostMemory(landing_blocks * cost.stride_nbytes) as memory,
        FakeReader(faults=faults, completion=completion) as reader,
    ):
        named.write(b"\xff" * (num_blocks * cost.on_disk.block_nbytes))  # no numbers: what nobody wrote shows
        named.flush()
        file = SourceFile.identify(Path(named.name))
        landing = torch.frombuffer(memory.view, dtype=torch.uint8)
        store = DiskKV(file, reader, landing, cost=cost, directory=DIRECTORY)
        del landing
        try:
            yield store
        finally:
            store.close()


def put(store, layer, places, new, kv_dtype):
    store.put(layer, places, tuple(encode(row, kv_dtype) for row in new))


def seen(store, layer, places, sequences, window=None):
    """Return the rows of each sequence; with a window, the last ones."""
    found = {}
    for visit in store.visit(layer, places, sequences, window=window):
        named = range(len(places.ends))[visit.sequences]
        for index, inside in zip(named, range(len(places.ends))[visit.inside], strict=True):
            length = places.ends[index]
            assert int(visit.rows.places.lengths[inside]) == length
            first = 0 if window is None else max(length - window, 0)
            found[index] = tuple(row[first:].clone() for row in visit.rows.of(inside))
            assert all(scales is None or scales.is_contiguous() for scales in visit.rows.scales)
    assert sorted(found) == list(sequences)
    return [found[index] for index in sequences]


LAYERS = [
    [[(2, 4), (2, 4)]],
    [[(1, 70)], [(3, 32), (3, 16)]],
    [[(8, 128), (8, 128)], [(1, 24)]],
]
schedules = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 11)), min_size=1, max_size=4, unique_by=lambda part: part[0]),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60)
@given(
    schedules,
    st.sampled_from(LAYERS),
    st.sampled_from(["auto", "bf16", "fp8", "int8", "int4"]),
    st.integers(17, 40),
    st.sampled_from([None, 1, 6]),
    st.sampled_from(["at once", "when waited for", "newest first"]),
)
def test_rows_are_those_in_ram(schedule, layers, kv_dtype, landing, window, completion):
    """Random prompts, parts of them and single tokens; blocks are taken in turns, so that few of them are runs."""
    cost = cost_of(layers, kv_dtype)
    num_blocks = 5 * -(-66 // SIZE)
    in_ram = KVStore(limit_nbytes=num_blocks * cost.block_nbytes, cost=cost)
    with open_disk(cost, num_blocks, landing, completion=completion) as on_disk:
        assert on_disk.statistics().num_blocks == num_blocks
        lengths = dict.fromkeys(range(5), 0)
        for number, spans in enumerate(schedule):
            news = [New(sequence, lengths[sequence], lengths[sequence] + count) for sequence, count in spans]
            for new in news:
                for store in (in_ram, on_disk):
                    if new.start == 0:
                        store.acquire(new.sequence, num_tokens=new.end)
                    assert store.extend(new.sequence, num_tokens=new.end)
                lengths[new.sequence] = new.end
            places, there = in_ram.locate(news), on_disk.locate(news)
            count = sum(new.end - new.start for new in news)
            for layer, shapes in enumerate(layers):
                made = rows(count, shapes, 10 * number + layer)
                for store, where in ((in_ram, places), (on_disk, there)):
                    put(store, layer, where, made, kv_dtype)
            for layer in range(len(layers)):
                every = range(len(news))
                wanted = seen(in_ram, layer, places, every, window)
                for one, other in zip(seen(on_disk, layer, there, every, window), wanted, strict=True):
                    assert all(map(torch.equal, one, other))
            on_disk.check_integrity()
        for sequence, length in lengths.items():
            if length:
                on_disk.release(sequence)
        on_disk.check_integrity()
        assert on_disk.statistics().num_free_blocks == num_blocks


def filled(store, length=9):
    store.acquire("a", num_tokens=40)
    places = store.locate([New("a", 0, length)])
    put(store, 0, places, rows(length, [(2, 4), (2, 4)], 0), "auto")
    return places


COST = cost_of(LAYERS[0], "auto")


def test_a_sequence_of_which_no_layer_could_be_read_at_once_has_no_room():
    with open_disk(COST, 20, 5) as store:
        assert store.could_hold(20)
        assert not store.could_hold(21)


def test_only_what_a_window_reaches_is_read():
    with open_disk(COST, 20, 10) as store:
        places = filled(store, 40)
        before = store.traffic.read_bytes
        seen(store, 0, places, range(1), window=5)
        assert store.traffic.read_bytes - before == 2 * COST.stride_nbytes


def test_a_new_token_changes_its_pages_only():
    cost = cost_of([[(8, 128), (8, 128)]], "auto")
    with open_disk(cost, 20, 10) as store:
        store.acquire("a", num_tokens=40)
        put(store, 0, store.locate([New("a", 0, 2)]), rows(2, [(8, 128)] * 2, 0), "auto")
        before = store.traffic
        put(store, 0, store.locate([New("a", 2, 3)]), rows(1, [(8, 128)] * 2, 0), "auto")
        assert store.traffic.written_bytes - before.written_bytes == 2 * 4096
        assert store.traffic.read_bytes - before.read_bytes == 2 * 4096


@pytest.mark.parametrize("fault", [Fault(), Fault("short"), Fault(errno=errno.ENOSPC)])
def test_rows_that_cannot_be_written_are_an_error(fault):
    with (
        open_disk(COST, 20, 10, faults={0: fault}) as store,
        pytest.raises(
            WriteError, match="scratch: keys and values on NVMe could not be written: cannot be wr"
        ) as caught,
    ):
        filled(store)
    assert caught.value.errno == fault.errno
    assert caught.value.file == "scratch"


@pytest.mark.parametrize("fault", [Fault(), Fault("short")])
def test_rows_that_cannot_be_read_are_an_error(fault):
    """To attend over them, and to put a new token beside them."""
    what = "scratch: keys and values on NVMe could not be read: cannot be read at"
    with open_disk(COST, 20, 10, faults={1: fault, 2: fault}) as store:
        places = filled(store)  # neighbours, so one request
        with pytest.raises(ReadError, match=what):
            seen(store, 0, places, range(1))
        with pytest.raises(ReadError, match=what):
            put(store, 0, store.locate([New("a", 9, 10)]), rows(1, [(2, 4), (2, 4)], 1), "auto")


def test_a_file_that_was_cut_short_is_an_error_not_old_rows(tmp_path):
    path = tmp_path / "scratch"
    path.write_bytes(bytes(20 * COST.on_disk.block_nbytes))
    with HostMemory(10 * COST.stride_nbytes) as memory, ThreadsReader(threads=1) as reader:
        landing = torch.frombuffer(memory.view, dtype=torch.uint8)
        store = DiskKV(SourceFile.identify(path), reader, landing, cost=COST, directory=tmp_path)
        del landing
        places = filled(store)
        seen(store, 0, places, range(1))
        os.truncate(path, 4096)
        with pytest.raises(
            ReadError, match=r"could not be read: the scratch file was cut short: wanted 81920 bytes"
        ) as caught:
            seen(store, 0, places, range(1))
        assert "got 4096" in str(caught.value)
        store.close()
