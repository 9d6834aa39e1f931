"""The measuring loop: what it counts, what it touches, and that nothing is in flight when it returns or raises."""

import errno
import itertools
import os
import signal
import threading
from pathlib import Path

import pytest
from mean_disks import MeanCalls
from reader_backends import identify

from penstock.errors import FileChangedError, ReadError, WriteError
from penstock.io.aio_calls import SystemCalls
from penstock.io.memory import HostMemory
from penstock.io.open_file import OpenFile
from penstock.io.window import Job, Meter, run_window
from penstock.io.window_libaio import run_libaio

KIB = 1 << 10
MIB = 1 << 20
BLOCK = 64 * KIB
ENGINES = ["libaio", "threads", "aiofiles"]


@pytest.fixture(params=ENGINES)
def measure(request, memory):
    """Measure with one engine for as short as can be: 8 blocks of 64 KiB in flight."""

    def run(file, **settings):
        settings = {"block_nbytes": BLOCK, "depth": 8, "seconds": 0.02, "ramp_seconds": 0.0} | settings
        return run_window(file, memory.view, engine=request.param, **settings)

    return run


def open_descriptors():
    return sorted(os.listdir("/proc/self/fd"))


def blocks_of(content):
    return [bytes(content[start : start + BLOCK]) for start in range(0, len(content), BLOCK)]


def test_it_counts_what_was_read(measure, make_file):
    file, _ = make_file(4 * MIB)
    window = measure(file)
    assert window.nbytes == window.requests * BLOCK
    assert window.requests > 0
    assert window.seconds >= 0.02
    assert window.bytes_per_second == window.nbytes / window.seconds
    assert (window.errors, window.short_reads) == (0, 0)
    assert 0 < window.latency_p50 <= window.latency_p99 <= window.latency_max
    assert window.cpu_seconds > 0


def test_whole_blocks_of_the_file_in_turn(measure, make_file, memory):
    """The file has as many whole blocks as are in flight, and a tail that is never read."""
    file, content = make_file(8 * BLOCK + 5000)
    memory.view[:] = bytes(memory.nbytes)
    measure(file, offset=3 * BLOCK)
    assert set(blocks_of(memory.view[: 8 * BLOCK])) <= set(blocks_of(content)[:8])
    assert bytes(memory.view[8 * BLOCK :]) == bytes(memory.nbytes - 8 * BLOCK)


def test_offsets_go_round(make_file):
    opened = OpenFile(make_file(4 * BLOCK + 100)[0], direct=True)
    job = Job(opened, memoryview(b""), BLOCK, 1, 2 * BLOCK, 0)
    assert [offset // BLOCK for offset in itertools.islice(job.offsets(), 7)] == [2, 3, 0, 1, 2, 3, 0]
    opened.close()


def test_writing_stays_inside_the_file(measure, make_file, memory):
    file, _ = make_file(8 * BLOCK + 5000)
    memory.view[:] = os.urandom(memory.nbytes)
    before = bytes(memory.view)
    window = measure(file, write=True)
    assert window.nbytes > 0
    written = file.path.read_bytes()
    assert len(written) == file.nbytes
    assert set(blocks_of(written)[:8]) <= set(blocks_of(before)[:8])
    assert memory.view == before


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_layers_are_whole(make_file, memory, layers):
    file, content = make_file(16 * BLOCK)
    memory.view[:] = bytes(memory.nbytes)
    window = run_window(
        file, memory.view, engine="libaio", block_nbytes=BLOCK, depth=16, seconds=0.02, ramp_seconds=0.0,
        pattern="layer", layer_nbytes=16 * BLOCK // layers,
    )  # fmt: skip
    assert window.nbytes > 0
    assert set(blocks_of(memory.view[: 16 * BLOCK])) == set(blocks_of(content))


def test_stopped_while_it_warms_up(measure, make_file):
    window = measure(make_file(4 * MIB)[0], ramp_seconds=60.0, stop=lambda: True)
    assert (window.nbytes, window.seconds, window.bytes_per_second, window.latency_max) == (0, 0.0, 0.0, 0.0)


def test_stopped_while_it_measures(measure, make_file):
    asked = itertools.count()
    window = measure(make_file(4 * MIB)[0], seconds=60.0, stop=lambda: next(asked) > 20)
    assert window.requests > 0
    assert 0 < window.seconds < 60


def test_nothing_is_left_when_it_is_interrupted(measure, make_file):
    """Ctrl-C: what is in flight ends first, and descriptors and threads are gone."""
    file, _ = make_file(4 * MIB)
    before = open_descriptors(), threading.active_count()
    asked = itertools.count()

    def interrupt():
        if next(asked) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return False

    with pytest.raises(KeyboardInterrupt):
        measure(file, seconds=60.0, stop=interrupt)
    after = open_descriptors(), threading.active_count()
    assert all(now <= then for now, then in zip(after, before, strict=True)), "those of earlier tests may end meanwhile"


def test_memory_is_let_go_of(make_file, caplog):
    """Before the garbage collector comes: the frames of a library's failed search once held it."""
    file, _ = make_file(MIB)
    for engine in ENGINES:
        with HostMemory(MIB) as memory:
            run_window(file, memory.view, engine=engine, block_nbytes=BLOCK, depth=8, seconds=0.01, ramp_seconds=0.0)
    assert caplog.text == ""


def test_a_file_that_was_replaced(measure, make_file):
    file, _ = make_file(MIB)
    os.replace(make_file(MIB)[0].path, file.path)
    with pytest.raises(FileChangedError, match="inode"):
        measure(file)


def test_a_file_without_a_whole_block(measure, make_file):
    with pytest.raises(ReadError, match="too small"):
        measure(make_file(BLOCK - 1)[0])


def test_o_direct_that_is_refused(measure):
    file = identify(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    with pytest.raises(ReadError, match="O_DIRECT was refused") as caught:
        measure(file, block_nbytes=4096)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("engine", ["threads", "aiofiles"])
def test_through_the_page_cache(make_file, memory, engine):
    file, _ = make_file(MIB)
    window = run_window(
        file, memory.view, engine=engine, block_nbytes=BLOCK, depth=4, seconds=0.02, ramp_seconds=0.0, direct=False
    )
    assert window.nbytes == window.requests * BLOCK


class TestFaults:
    """What the kernel may do to Linux AIO."""

    @pytest.fixture
    def run(self, make_file, memory):
        def run(calls, *, write=False, layer_nbytes=0):
            opened = OpenFile(make_file(4 * MIB)[0], direct=True, write=write)
            job = Job(opened, memory.view, BLOCK, 8, 0, layer_nbytes)
            meter = Meter(job, seconds=0.02, ramp_seconds=0.0, stop=None, cpu=lambda: 0.0)
            try:
                run_libaio(job, meter, calls=calls)
            finally:
                opened.close()
            return meter.window()

        return run

    @pytest.mark.parametrize("layer", [0, 4 * BLOCK])
    @pytest.mark.parametrize(
        "submits",
        [[1] * 40, [3, 1, 5], [-errno.EINTR, 7, -errno.EINTR], [4, -errno.EAGAIN, 2, 0]],
        ids=["one by one", "short", "interrupted", "full"],
    )
    def test_submissions_that_stop_early(self, run, submits, layer):
        window = run(MeanCalls(submits), layer_nbytes=layer)
        assert window.nbytes == window.requests * BLOCK > 0

    def test_a_kernel_that_never_has_room(self, run):
        with pytest.raises(ReadError, match="io_submit failed") as caught:
            run(MeanCalls([-errno.EAGAIN]))
        assert caught.value.errno == errno.EAGAIN

    def test_short_reads_and_errors_are_counted(self, run):
        answers = [None] * 8 + [lambda _: 4096, lambda _: -errno.EIO] * 3
        window = run(MeanCalls(results=answers))
        assert (window.short_reads, window.errors) in {(3, 3), (2, 3), (2, 2), (1, 2), (1, 1), (0, 1), (0, 0)}
        assert (
            window.nbytes == (window.requests - window.short_reads - window.errors) * BLOCK + window.short_reads * 4096
        )

    @pytest.mark.parametrize(("write", "error"), [(False, ReadError), (True, WriteError)])
    def test_a_disk_that_only_fails(self, run, write, error):
        with pytest.raises(error, match="16 requests failed") as caught:
            run(MeanCalls(results=itertools.repeat(lambda _: -errno.EIO)), write=write)
        assert caught.value.errno == errno.EIO

    def test_signals_while_waiting(self, run):
        class Interrupted(SystemCalls):
            interrupted = 0

            def getevents(self, *call):
                self.interrupted += 1
                return -errno.EINTR if self.interrupted % 3 == 0 else super().getevents(*call)

        assert run(Interrupted()).nbytes > 0
