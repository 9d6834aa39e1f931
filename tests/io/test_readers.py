"""What every backend must do, on real files; the faults are real too."""

import contextlib
import errno
import logging
import mmap
import os
import platform
import random
import resource
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reader_backends import BACKENDS, identify

from penstock.errors import ClosedError, FileChangedError, ReadError
from penstock.io.direct import resident_pages
from penstock.io.libc import ffi, libc
from penstock.io.reader import ALIGNMENT, Read

KIB = 1 << 10
MIB = 1 << 20


def open_descriptors():
    return sorted(os.listdir("/proc/self/fd"))


def up(nbytes):
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def test_reads_a_whole_file_with_an_unaligned_tail(make_reader, make_file, memory):
    file, content = make_file(3 * MIB + 1234)
    reader = make_reader(1 * MIB)
    reader.wait(reader.submit([Read(file, 0, memory.view[: up(file.nbytes)])]))
    assert memory.view[: file.nbytes] == content
    statistics = reader.statistics()
    assert (statistics.reads, statistics.bytes_read, statistics.buffered_reads) == (4, file.nbytes, 0)
    assert statistics.busy_seconds > 0


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_random_extents(backend, data, make_file, memory):
    nbytes = data.draw(st.integers(0, 600 * KIB), label="file")
    file, content = make_file(nbytes)
    extents = data.draw(
        st.lists(st.tuples(st.integers(0, up(nbytes) // ALIGNMENT + 1), st.integers(0, 40)), max_size=6),
        label="extents",
    )
    batches = data.draw(st.integers(1, 3), label="batches")
    memory.view[:] = b"\xee" * memory.nbytes
    position, placed = 0, []
    for block, blocks in extents:
        placed.append((block * ALIGNMENT, memory.view[position : position + blocks * ALIGNMENT]))
        position += blocks * ALIGNMENT
    with BACKENDS[backend](16 * KIB) as reader:
        tickets = [
            reader.submit([Read(file, offset, target) for offset, target in placed[first::batches]])
            for first in range(batches)
        ]
        for ticket in data.draw(st.permutations(tickets), label="order"):
            reader.wait(ticket)
        statistics = reader.statistics()
    for offset, target in placed:
        expected = content[offset : offset + target.nbytes]
        assert target[: len(expected)] == expected
    delivered = sum(len(content[offset : offset + target.nbytes]) for offset, target in placed)
    assert statistics.bytes_read == delivered
    assert bytes(memory.view[position:]) == b"\xee" * (memory.nbytes - position)
    file.path.unlink()


def test_many_tickets_waited_for_out_of_order(make_reader, make_file, memory):
    files = [make_file(256 * KIB + 17 * index) for index in range(6)]
    reader = make_reader(4 * KIB)
    tickets = {}
    for index, (file, _) in enumerate(files):
        target = memory.view[index * MIB : index * MIB + up(file.nbytes)]
        tickets[index] = reader.submit([Read(file, 0, target)])
    order = list(tickets)
    random.Random(7).shuffle(order)
    for index in order:
        reader.wait(tickets[index])
        content = files[index][1]
        assert memory.view[index * MIB : index * MIB + len(content)] == content


def test_a_batch_larger_than_any_queue(make_reader, make_file, memory):
    file, content = make_file(8 * MIB)
    reader = make_reader(4 * KIB)
    ticket = reader.submit([Read(file, 0, memory.view)])
    empty = reader.submit([])
    reader.wait(empty)
    reader.wait(ticket)
    assert memory.view == content
    assert reader.statistics().reads == 2048


def test_the_page_cache_is_left_alone(make_reader, make_file, memory):
    file, _ = make_file(4 * MIB)
    with open(file.path, "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        reader = make_reader(MIB)
        reader.wait(reader.submit([Read(file, 0, memory.view[: 4 * MIB])]))
        if reader.statistics().buffered_reads == 0:
            assert resident_pages(stream.fileno(), file.nbytes) == 0


def test_reads_past_the_end_deliver_what_there_is(make_reader, make_file, memory):
    file, content = make_file(5000)
    reader = make_reader()
    reader.wait(reader.submit([Read(file, 0, memory.view[:MIB]), Read(file, 8192, memory.view[MIB : 2 * MIB])]))
    assert memory.view[:5000] == content
    assert reader.statistics().bytes_read == 5000


def test_a_file_cut_short_before_it_is_opened(make_reader, make_file, memory):
    file, _ = make_file(MIB)
    os.truncate(file.path, 4096)
    reader = make_reader()
    before = open_descriptors()
    with pytest.raises(FileChangedError, match="wanted bytes 1048576"):
        reader.submit([Read(file, 0, memory.view[:MIB])])
    assert open_descriptors() == before


def test_a_file_cut_short_while_it_is_open(make_reader, make_file, memory):
    file, _ = make_file(MIB)
    reader = make_reader()
    reader.wait(reader.submit([Read(file, 0, memory.view[:4096])]))
    os.truncate(file.path, 123456)
    with pytest.raises(FileChangedError, match="123456"):
        reader.wait(reader.submit([Read(file, 0, memory.view[:MIB])]))


def test_a_file_written_to_in_place(make_reader, make_file, memory):
    file, _ = make_file(MIB)
    reader = make_reader()
    reader.wait(reader.submit([Read(file, 0, memory.view[:4096])]))
    os.utime(file.path, ns=(1, 1))
    with pytest.raises(FileChangedError, match="modified"):
        reader.wait(reader.submit([Read(file, 0, memory.view[:4096])]))


def test_a_file_replaced_by_another_of_the_same_size(make_reader, make_file, memory):
    file, _ = make_file(MIB)
    other, _ = make_file(MIB)
    os.replace(other.path, file.path)
    with pytest.raises(FileChangedError, match="inode"):
        make_reader().submit([Read(file, 0, memory.view[:MIB])])


def test_a_file_that_is_gone(make_reader, make_file, memory):
    file, _ = make_file(MIB)
    file.path.unlink()
    with pytest.raises(FileChangedError, match="gone"):
        make_reader().submit([Read(file, 0, memory.view[:MIB])])


def test_an_unlinked_file_that_is_open_is_still_read(make_file, memory):
    file, content = make_file(MIB)
    for name in ("libaio by system calls", "threads"):
        with BACKENDS[name](64 * KIB) as reader:
            reader.wait(reader.submit([Read(file, 0, memory.view[:4096])]))
            away = file.path.rename(file.path.with_suffix(".away"))
            reader.wait(reader.submit([Read(file, 0, memory.view[:MIB])]))
            away.rename(file.path)
            assert memory.view[:MIB] == content


def test_an_error_belongs_to_its_ticket(make_reader, make_file, memory):
    whole, content = make_file(MIB)
    broken, _ = make_file(MIB)
    reader = make_reader()
    reader.wait(reader.submit([Read(broken, 0, memory.view[:4096])]))
    os.truncate(broken.path, 8192)
    first = reader.submit([Read(whole, 0, memory.view[:MIB])])
    bad = reader.submit([Read(broken, 0, memory.view[MIB : 2 * MIB])])
    last = reader.submit([Read(whole, 0, memory.view[2 * MIB : 3 * MIB])])
    reader.wait(last)
    with pytest.raises(FileChangedError):
        reader.wait(bad)
    reader.wait(first)
    assert memory.view[:MIB] == content
    assert memory.view[2 * MIB : 3 * MIB] == content


def test_a_file_that_delivers_less_than_its_size(make_reader, memory, caplog):
    """Files of sysfs claim 4096 bytes, and refuse O_DIRECT when they are opened."""
    file = identify(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    reader = make_reader()
    with caplog.at_level(logging.WARNING, "penstock.io"):
        ticket = reader.submit([Read(file, 0, memory.view[:4096])])
        with pytest.raises(ReadError, match=r"enabled: delivers fewer .* offset 0, length 4096.*errno 5") as caught:
            reader.wait(ticket)
    assert caught.value.errno == errno.EIO
    assert ["O_DIRECT was refused at open" in record.message for record in caplog.records] == [True]
    assert reader.statistics().bytes_read == 0


def test_memory_that_o_direct_cannot_reach(make_reader, make_file, caplog):
    """The kernel keeps disks off secret memory (EFAULT), as it does for some that drivers allocate; copies work."""
    number = {"x86_64": 447, "aarch64": 447, "riscv64": 447}.get(platform.machine())
    fd = libc.syscall(number, ffi.cast("long", 0)) if number else -1
    if fd < 0:
        pytest.skip("no memfd_secret here")
    os.ftruncate(fd, MIB)
    target = memoryview(mmap.mmap(fd, MIB))
    os.close(fd)
    file, content = make_file(3 * MIB)
    reader = make_reader(128 * KIB)
    with caplog.at_level(logging.WARNING, "penstock.io"):
        reader.wait(reader.submit([Read(file, MIB, target)]))
        reader.wait(reader.submit([Read(file, 2 * MIB, target)]))
    assert target == content[2 * MIB :]
    assert reader.statistics().reads == 16
    assert 8 < reader.statistics().buffered_reads <= 16, "one on its way at the refusal counts as direct"
    assert ["Bad address" in record.message for record in caplog.records] == [True]


def test_too_many_open_files(make_reader, make_file, memory):
    files = [make_file(4096)[0] for _ in range(3)]
    reader = make_reader()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(max(map(int, open_descriptors()))) + 1, hard))
    spare = []
    try:
        with contextlib.suppress(OSError):
            while True:
                spare.append(os.dup(0))
        with pytest.raises(ReadError, match="ulimit -n") as caught:
            reader.submit([Read(file, 0, memory.view[:4096]) for file in files])
        assert caught.value.errno == errno.EMFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in spare:
            os.close(fd)
    reader.wait(reader.submit([Read(file, 0, memory.view[:4096]) for file in files]))


def test_descriptors_are_closed_and_threads_end(make_file, memory):
    files = [make_file(8192)[0] for _ in range(3)]
    before = open_descriptors(), threading.active_count()
    for name in ("libaio by system calls", "threads", "aiofiles"):
        with BACKENDS[name](4096) as reader:
            reader.wait(reader.submit([Read(file, 0, memory.view[:8192]) for file in files]))
            reader.submit([Read(file, 0, memory.view[:8192]) for file in files])
        # Fewer is well: threads of earlier tests may end meanwhile.
        assert open_descriptors() <= before[0]
        assert threading.active_count() <= before[1], threading.enumerate()


def test_close_is_idempotent_and_use_after_it_raises(make_reader, make_file, memory):
    file, _ = make_file(2 * MIB)
    reader = make_reader(4096)
    ticket = reader.submit([Read(file, 0, memory.view[: 2 * MIB])])
    reader.close()
    reader.close()
    for use in (
        lambda: reader.wait(ticket),
        lambda: reader.submit([Read(file, 0, memory.view[:4096])]),
        reader.statistics,
    ):
        with pytest.raises(ClosedError):
            use()


def test_misaligned_reads_are_our_own_mistake(make_reader, make_file, memory):
    file, _ = make_file(MIB)
    reader = make_reader()
    for offset, target in ((1, memory.view[:4096]), (0, memory.view[1:4097]), (0, memory.view[:4095])):
        with pytest.raises(AssertionError):
            reader.submit([Read(file, offset, target)])


def test_tmpfs_delivers_too(make_reader, make_file, memory, shared_memory_directory):
    file, content = make_file(MIB + 5, shared_memory_directory)
    reader = make_reader()
    reader.wait(reader.submit([Read(file, 0, memory.view[: up(file.nbytes)])]))
    assert memory.view[: file.nbytes] == content
