"""The same faults in every real backend, for reads and for writes: identical bytes or an error, and never a hang."""

import errno
import os
import threading
from contextlib import ExitStack

import pytest
from mean_disks import MEAN_DISKS

from penstock.errors import ReadError, WriteError
from penstock.io.reader import Read, Write
from penstock.io.threads import ThreadsReader

KIB = 1 << 10
MIB = 1 << 20
BLOCK = 16 * KIB


@pytest.fixture(params=MEAN_DISKS)
def make_mean(request, monkeypatch):
    """Open one backend with a script of answers."""
    with ExitStack() as stack:
        yield lambda answers: stack.enter_context(MEAN_DISKS[request.param](answers, BLOCK, monkeypatch))


@pytest.fixture(params=["read", "write"])
def move(request, make_file, memory):
    """Move 1 MiB between a file and memory; return whether source and target are equal afterwards."""

    def run(reader):
        file, content = make_file(MIB)
        view = memory.view[:MIB]
        if request.param == "read":
            view[:] = bytes(MIB)
            reader.wait(reader.submit([Read(file, 0, view)]))
            return view == content
        view[:] = os.urandom(MIB)
        reader.wait(reader.submit_writes([Write(file, 0, view)]))
        return view == file.path.read_bytes()

    run.error = ReadError if request.param == "read" else WriteError
    return run


@pytest.mark.parametrize(
    "answers",
    [
        [lambda _: 8192],
        [lambda _: 5000] * 20,
        [lambda _: 0, lambda _: 100],
        [lambda _: -errno.EINTR, lambda _: -errno.EAGAIN],
        [None, lambda _: -errno.EINVAL],
    ],
    ids=["short", "short and unaligned, often", "nothing at first", "interrupted", "O_DIRECT refused"],
)
def test_a_transfer_goes_on_where_it_stopped(make_mean, move, answers):
    assert move(make_mean(answers))


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ENODEV])
def test_an_error_is_carried_up_and_the_reader_stays_usable(make_mean, move, number):
    reader = make_mean([None, None, lambda _: -number])
    with pytest.raises(move.error, match=r"offset \d+, length 16384") as caught:
        move(reader)
    assert caught.value.errno == number
    assert move(reader)


@pytest.mark.parametrize("result", [0, -errno.EAGAIN])
def test_attempts_are_bounded(make_mean, move, result):
    with pytest.raises(move.error):
        move(make_mean([lambda _: result] * 1000))


def test_an_error_belongs_to_the_batch_that_it_hit(make_mean, make_file, memory):
    file, content = make_file(MIB)
    reader = make_mean([*[None] * 64, lambda _: -errno.EIO])
    reader.wait(reader.submit([Read(file, 0, memory.view[:MIB])]))
    tickets = [reader.submit([Read(file, 0, memory.view[start : start + BLOCK])]) for start in (MIB, 2 * MIB, 3 * MIB)]
    faults = []
    for start, ticket in zip((MIB, 2 * MIB, 3 * MIB), tickets, strict=True):
        try:
            reader.wait(ticket)
        except ReadError as error:
            faults.append(error.errno)
        else:
            assert memory.view[start : start + BLOCK] == content[:BLOCK]
    assert faults == [errno.EIO]


def test_the_first_request_ends_last(make_file, memory, monkeypatch):
    """A slow request, for as long as all others take; libaio's events come in reverse in test_libaio."""
    file, content = make_file(MIB)
    others, real = threading.Semaphore(0), os.preadv

    def preadv(fd, memories, offset):
        for _ in range(63 if offset == 0 else 0):
            others.acquire()
        result = real(fd, memories, offset)
        others.release()
        return result

    monkeypatch.setattr(os, "preadv", preadv)
    with ThreadsReader(threads=2, block_bytes=BLOCK) as reader:
        reader.wait(reader.submit([Read(file, 0, memory.view[:MIB])]))
    assert memory.view[:MIB] == content
