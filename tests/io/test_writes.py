"""What every backend, and the fake, must do when it writes: the bytes, or an error that names what to do."""

import errno
import os
import random
import resource
from pathlib import Path

import pytest
from reader_backends import identify

from penstock.errors import ClosedError, FileChangedError, WriteError
from penstock.io.fake import FakeReader, Fault, fake_file
from penstock.io.reader import Read, Write

KIB = 1 << 10
MIB = 1 << 20


@pytest.fixture
def filled(memory):
    """4 MiB of random bytes in aligned memory, and a copy of them."""
    content = os.urandom(4 * MIB)
    memory.view[: 4 * MIB] = content
    return memory.view[: 4 * MIB], content


def test_a_file_is_overwritten_in_pieces_and_batches(make_any, make_file, filled):
    file, _ = make_file(4 * MIB)
    view, content = filled
    writer = make_any(96 * KIB)
    pieces = [slice(start, start + 128 * KIB) for start in range(0, 4 * MIB, 128 * KIB)]
    random.Random(5).shuffle(pieces)
    tickets = [writer.submit_writes([Write(file, p.start, view[p]) for p in pieces[first::3]]) for first in range(3)]
    for ticket in reversed(tickets):
        writer.wait(ticket)
    writer.sync(file)
    assert file.path.read_bytes() == content
    statistics = writer.statistics()
    assert (statistics.bytes_written, statistics.bytes_read) == (4 * MIB, 0)
    assert statistics.writes >= 32


def test_a_file_grows(make_any, make_file, filled):
    file, before = make_file(64 * KIB)
    view, content = filled
    writer = make_any(64 * KIB)
    writer.wait(writer.submit_writes([Write(file, 128 * KIB, view[: 128 * KIB])]))
    assert file.path.read_bytes() == before + bytes(64 * KIB) + content[: 128 * KIB]


def test_what_was_written_is_read_back_although_size_and_times_have_changed(make_any, make_file, filled, memory):
    file, _ = make_file(4096)
    view, content = filled
    writer = make_any(64 * KIB)
    target = memory.view[4 * MIB : 6 * MIB]
    for start in range(0, 2 * MIB, MIB):
        writer.wait(writer.submit_writes([Write(file, 0, view[start : start + MIB])]))
        writer.wait(writer.submit([Read(file, 0, target)]))
        assert target[:MIB] == content[start : start + MIB]


def test_a_file_that_was_replaced_is_not_written(make_any, make_file, filled):
    file, _ = make_file(MIB)
    other, content = make_file(MIB)
    os.replace(other.path, file.path)
    with pytest.raises(FileChangedError, match="inode"):
        writer = make_any()
        writer.wait(writer.submit_writes([Write(file, 0, filled[0][:MIB])]))
    assert file.path.read_bytes() == content


def test_a_file_larger_than_the_limit(make_any, make_file, filled):
    """RLIMIT_FSIZE is a real fault that needs no root: what fits is written, then EFBIG."""
    file, _ = make_file(64 * KIB)
    good, _ = make_file(64 * KIB)
    view, content = filled
    writer = make_any(64 * KIB)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        bad = writer.submit_writes([Write(file, MIB - 64 * KIB, view[: 256 * KIB])])
        fine = writer.submit_writes([Write(good, 0, view[: 64 * KIB])])
        with pytest.raises(WriteError) as caught:
            writer.wait(bad)
        writer.wait(fine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert str(file.path) in str(caught.value)
    assert good.path.read_bytes() == content[: 64 * KIB]


def test_a_full_disk_names_what_to_do(make_reader, filled):
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("no /dev/full")
    file = identify(Path("/dev/full"))
    writer = make_reader()
    with pytest.raises(WriteError, match=r"cannot be written at offset 0, length 65536.*Free space") as caught:
        writer.wait(writer.submit_writes([Write(file, 0, filled[0][: 64 * KIB])]))
    assert caught.value.errno == errno.ENOSPC


def test_misaligned_writes_are_our_own_mistake(make_reader, make_file, filled):
    file, content = make_file(MIB)
    writer, view = make_reader(), filled[0]
    for offset, source in ((1, view[:4096]), (0, view[1:4097]), (0, view[:4095])):
        with pytest.raises(AssertionError):
            writer.submit_writes([Write(file, offset, source)])
    assert file.path.read_bytes() == content


def test_closing_waits_for_writes_and_ends_them(make_any, make_file, filled):
    file, _ = make_file(2 * MIB)
    view, _ = filled
    writer = make_any(4096)
    writer.submit_writes([Write(file, 0, view[: 2 * MIB])])
    writer.close()
    written = file.path.read_bytes()
    assert len(written) == 2 * MIB
    for use in (lambda: writer.submit_writes([]), lambda: writer.sync(file)):
        with pytest.raises(ClosedError):
            use()
    view[:] = bytes(view.nbytes)
    assert file.path.read_bytes() == written


class TestFake:
    """The fake's scripts, in memory."""

    FILE = fake_file("journal", bytes(8192))

    def fake(self, **script):
        return FakeReader({self.FILE.path: bytes(8192)}, **script)

    def test_memory_is_looked_at_when_the_batch_completes(self):
        source, target = memoryview(bytearray(b"a" * 4096)), memoryview(bytearray(4096))
        with self.fake() as writer:
            ticket = writer.submit_writes([Write(self.FILE, 4096, source)])
            source[:] = b"b" * 4096
            writer.wait(ticket)
            writer.wait(writer.submit([Read(self.FILE, 4096, target)]))
            writer.sync(self.FILE)
            assert writer.synchronised == [self.FILE]
            assert (writer.statistics().writes, writer.statistics().bytes_written) == (1, 4096)
        assert target == b"b" * 4096

    @pytest.mark.parametrize(
        ("fault", "number"), [(Fault("errno", errno.ENOSPC), errno.ENOSPC), (Fault("short"), errno.EIO)]
    )
    def test_faults_hit_the_nth_request(self, fault, number):
        source = memoryview(bytearray(b"a" * 4096))
        with self.fake(faults={1: fault}) as writer:
            tickets = [writer.submit_writes([Write(self.FILE, offset, source)]) for offset in (0, 4096)]
            with pytest.raises(WriteError) as caught:
                writer.wait(tickets[1])
            writer.wait(tickets[0])
            assert caught.value.errno == number
            assert writer.statistics().writes == 1
