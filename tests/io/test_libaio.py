"""What the kernel may do to Linux AIO, scripted on top of real calls, and a system that has none left."""

import errno

import pytest
from mean_disks import MeanCalls
from reader_backends import identify

from penstock.errors import FileChangedError, ReadError
from penstock.io.aio_calls import SystemCalls, available_calls, ffi
from penstock.io.disk import Block
from penstock.io.libaio import LibaioReader
from penstock.io.open_file import OpenFile
from penstock.io.reader import Read

KIB = 1 << 10
MIB = 1 << 20


class OrderlessCalls(SystemCalls):
    """Real AIO that tells of one request at a time, the last one first, and of none before all have ended."""

    def __init__(self):
        super().__init__()
        self._held, self._in_flight = [], 0

    def submit(self, context, count, iocbs):
        taken = super().submit(context, count, iocbs)
        self._in_flight += max(0, taken)
        return taken

    def getevents(self, context, at_least, at_most, events):
        if not self._held:
            while len(self._held) < self._in_flight:
                count = super().getevents(context, 1, at_most, events)
                self._held += [(events[index].data, events[index].result) for index in range(count)]
            self._in_flight = 0
        events[0].data, events[0].result = self._held.pop()
        return 1


@pytest.fixture
def read(make_file, memory):
    """Read 1 MiB in 16 KiB blocks with the given calls; return whether it arrived, and the statistics."""

    def run(calls):
        file, content = make_file(MIB)
        memory.view[:MIB] = bytes(MIB)
        with LibaioReader(block_bytes=16 * KIB, calls=calls) as reader:
            reader.wait(reader.submit([Read(file, 0, memory.view[:MIB])]))
            return memory.view[:MIB] == content, reader.statistics()

    return run


@pytest.mark.parametrize(
    "submits",
    [
        [1] * 64,
        [3, 1, 5],
        [-errno.EINTR, 7, -errno.EINTR],
        [10, -errno.EAGAIN, 10, -errno.EAGAIN],
        [-errno.EAGAIN, -errno.EAGAIN],
        [0, 4, 0],
    ],
    ids=["one by one", "short", "interrupted", "full", "full from the start", "nothing taken"],
)
def test_submissions_that_stop_early(read, submits):
    arrived, statistics = read(MeanCalls(submits))
    assert arrived
    assert (statistics.reads, statistics.bytes_read, statistics.buffered_reads) == (64, MIB, 0)


@pytest.mark.parametrize(
    "results",
    [
        [lambda _: 8192],
        [lambda _: 5000] * 20,
        [lambda _: 0, lambda _: 100],
        [lambda _: -errno.EINTR, lambda _: -errno.EAGAIN],
    ],
    ids=["short", "short and unaligned, often", "nothing at first", "interrupted"],
)
def test_results_that_need_another_attempt(read, results):
    arrived, statistics = read(MeanCalls(results=results))
    assert arrived
    assert (statistics.reads, statistics.bytes_read) == (64, MIB)


def test_completions_in_reverse_order_one_by_one(make_file, memory):
    file, content = make_file(MIB)
    with LibaioReader(block_bytes=16 * KIB, calls=OrderlessCalls()) as reader:
        tickets = [reader.submit([Read(file, 0, memory.view[start : start + MIB])]) for start in range(0, 3 * MIB, MIB)]
        for ticket in tickets:
            reader.wait(ticket)
    assert memory.view[: 3 * MIB] == 3 * content


@pytest.mark.parametrize("result", [0, 4095, -errno.EAGAIN])
def test_attempts_are_bounded(read, result):
    with pytest.raises(ReadError, match=r"offset \d+, length 16384"):
        read(MeanCalls(results=[lambda _: result] * 1000))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EFAULT, errno.EOPNOTSUPP])
def test_a_refusal_makes_the_file_buffered(read, number, caplog):
    arrived, statistics = read(MeanCalls(results=[lambda _: -number]))
    assert arrived
    assert (statistics.reads, statistics.bytes_read, statistics.buffered_reads) == (64, MIB, 1)
    assert sum("O_DIRECT was refused" in record.message for record in caplog.records) == 1


def test_a_refused_submission_makes_the_file_buffered(read):
    arrived, statistics = read(MeanCalls([2, -errno.EINVAL]))
    assert arrived
    assert statistics.buffered_reads == 62


def test_an_error_of_the_disk(read):
    with pytest.raises(ReadError, match="Input/output error") as caught:
        read(MeanCalls(results=[None, None, lambda _: -errno.EIO]))
    assert caught.value.errno == errno.EIO
    assert isinstance(caught.value, OSError)


def test_a_bad_request_hits_its_own_batch_only(make_file, memory):
    file, content = make_file(MIB)
    with LibaioReader(block_bytes=16 * KIB, calls=MeanCalls([64, 5, -errno.EBADF])) as reader:
        good = reader.submit([Read(file, 0, memory.view[:MIB])])
        bad = reader.submit([Read(file, 0, memory.view[MIB : 2 * MIB])])
        after = reader.submit([Read(file, 0, memory.view[2 * MIB : 3 * MIB])])
        with pytest.raises(ReadError, match="Bad file descriptor"):
            reader.wait(bad)
        reader.wait(after)
        reader.wait(good)
        assert memory.view[:MIB] == content
        assert memory.view[2 * MIB : 3 * MIB] == content


def test_no_requests_left_in_the_system():
    calls = SystemCalls()
    taken = []
    try:
        for events in (8192, 1024, 64, 16, 1):
            context = ffi.new("uintptr_t *")
            while len(taken) < 500 and calls.setup(events, context) == 0:
                taken.append(context[0])
                context[0] = 0
        if len(taken) == 500:
            pytest.skip("aio-max-nr is too high to be used up quickly")
        with pytest.raises(ReadError, match=r"aio-max-nr.*sysctl -w fs\.aio-max-nr") as caught:
            LibaioReader(calls=calls)
        assert caught.value.errno == errno.EAGAIN
    finally:
        for context in taken:
            calls.destroy(context)
    LibaioReader(calls=calls).close()


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_forbidden_by_the_container(number, monkeypatch):
    calls = SystemCalls()
    monkeypatch.setattr(calls, "setup", lambda *_: -number)
    with pytest.raises(ReadError, match="seccomp") as caught:
        LibaioReader(calls=calls)
    assert caught.value.errno == number


def test_raw_system_calls_are_always_there(monkeypatch):
    assert available_calls()[-1].name == "system calls"
    monkeypatch.setattr("platform.machine", lambda: "s390x")
    with pytest.raises(ReadError, match="s390x"):
        SystemCalls()


class TestBlock:
    """What is made of results, without any reading."""

    @pytest.fixture
    def opened(self, make_file):
        opened = OpenFile(make_file(10_000)[0], direct=True)
        yield opened
        opened.close()

    def test_goes_on_at_an_aligned_point(self, opened):
        block = Block(opened, 0, memoryview(bytearray(12288)), 1 << 20, expected=10_000)
        assert not block.take(9000)
        assert (block.offset, block.memory.nbytes, block.address) == (8192, 4096, (1 << 20) + 8192)
        assert block.take(1808)

    def test_a_file_that_shrank(self, opened):
        with open(opened.file.path, "r+b") as file:
            file.truncate(100)
        block = Block(opened, 0, memoryview(bytearray(12288)), 1 << 20, expected=10_000)
        with pytest.raises(FileChangedError, match="got bytes 100"):
            block.take(100)

    def test_a_file_that_grew(self, opened):
        with open(opened.file.path, "ab") as file:
            file.write(b"x")
        assert Block(opened, 0, memoryview(bytearray(12288)), 1 << 20, expected=10_000).take(10_001)
        with pytest.raises(FileChangedError, match="10001"):
            opened.check_unchanged()
        assert identify(opened.file.path).nbytes == 10_001
