"""The measuring loop: keep so many positioned reads or writes in flight for a while, and count what arrives.

What it measures is the disk and the way to it; nothing here knows a model. The same engines carry the readers: `libaio`
with one context, `threads` with preadv and pwritev, `aiofiles` with readinto and write.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from penstock.errors import PenstockError, ReadError
from penstock.io.files import SourceFile
from penstock.io.libc import address_of
from penstock.io.open_file import OpenFile, disk_error
from penstock.io.reader import ALIGNMENT

__all__ = ["Engine", "Job", "Meter", "Pattern", "Window", "run_window"]

Engine = Literal["libaio", "threads", "aiofiles"]
Pattern = Literal["window", "layer"]

_SAMPLES = 1 << 14
_MAX_ERRORS = 16


@dataclass(frozen=True, slots=True)
class Window:
    """What happened in one measured stretch of time: bytes and seconds, latencies in seconds.

    `cpu_seconds` is the CPU time, user and system, of the threads that did the transfers. Latencies are those of single
    requests, or with the pattern "layer" of whole layers; p50 and p99 come from the last 16,384. `errors` counts the
    requests that failed, `short_reads` those that moved fewer bytes than asked for.
    """

    nbytes: int
    seconds: float
    requests: int
    cpu_seconds: float
    latency_p50: float
    latency_p99: float
    latency_max: float
    short_reads: int
    errors: int

    @property
    def bytes_per_second(self) -> float:
        """The rate; 0.0 when it was stopped before anything could be measured."""
        return self.nbytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Job:
    """What an engine has to do: `depth` requests of `block_nbytes` in flight, each with its own piece of `memory`."""

    opened: OpenFile
    memory: memoryview
    block_nbytes: int
    depth: int
    offset: int
    layer_nbytes: int

    def piece(self, index: int) -> memoryview:
        """Return the memory of request `index`."""
        return self.memory[index * self.block_nbytes : (index + 1) * self.block_nbytes]

    def error(self, what: str, number: int) -> PenstockError:
        """Return what to raise for a transfer that ended with -`number`."""
        return disk_error(what, self.opened.file, number, write=self.opened.write)

    def offsets(self) -> Iterator[int]:
        """Yield the file's whole blocks, for ever: from `offset` to the last, then from 0."""
        block = self.block_nbytes
        end = self.opened.file.nbytes // block * block
        offset = self.offset if self.offset + block <= end else 0
        while True:
            yield offset
            offset += block
            if offset + block > end:
                offset = 0


class Meter:
    """Counts requests between two moments at which some of them ended. Its user serialises the calls.

    `cpu` returns the CPU seconds that the transferring threads have used so far.
    """

    def __init__(
        self,
        job: Job,
        *,
        seconds: float,
        ramp_seconds: float,
        stop: Callable[[], bool] | None,
        cpu: Callable[[], float],
    ) -> None:
        self.done = False
        self._job = job
        self._block_nbytes = job.block_nbytes
        self._seconds = seconds
        self._stop = stop
        self._cpu = cpu
        self._samples = array("d", bytes(8 * _SAMPLES))
        self._begins = time.perf_counter() + ramp_seconds
        self._ends = float("inf")
        self._began = self._ended = 0.0
        self._cpu_seconds = 0.0
        self._reset()

    def _reset(self) -> None:
        self._nbytes = self._requests = self._short = self._errors = self._timed = 0
        self._longest = 0.0

    def count(self, result: int) -> None:
        """Count one request that ended with `result`, bytes or -errno; raise when there are too many errors."""
        if result == self._block_nbytes:
            self._nbytes += result
            self._requests += 1
        else:
            self._count_fault(result)

    def _count_fault(self, result: int) -> None:
        self._requests += 1
        if result >= 0:
            self._nbytes += result
            self._short += 1
            return
        self._errors += 1
        if self._errors >= _MAX_ERRORS:
            raise self._job.error(f"{self._errors} requests failed, the last", -result)

    def count_timed(self, result: int, seconds: float) -> None:
        """Count one request that took so long."""
        if result == self._block_nbytes:
            self._nbytes += result
            self._requests += 1
        else:
            self._count_fault(result)
        self._samples[self._timed % _SAMPLES] = seconds
        self._timed += 1
        if seconds > self._longest:  # noqa: PLR1730 - a call of max() would cost as much as all the rest
            self._longest = seconds

    def time(self, seconds: float) -> None:
        """Note how long one request, or one layer, took."""
        self._samples[self._timed % _SAMPLES] = seconds
        self._timed += 1
        self._longest = max(self._longest, seconds)

    def goes_on(self, now: float) -> bool:
        """Begin or end the measured stretch if it is time, after all that ended until `now` was counted."""
        if self._ends == float("inf"):
            if now >= self._begins:
                self._reset()
                self._began = self._ended = now
                self._ends = now + self._seconds
                self._cpu_seconds = -self._cpu()
        else:
            self._ended = now
            self.done = now >= self._ends
        if self._stop is not None and self._stop():
            self.done = True
        if self.done and self._ends != float("inf"):
            self._cpu_seconds += self._cpu()
        return not self.done

    def extend(self, now: float) -> None:
        """Move the end of the measured stretch to `now`."""
        if self._ends != float("inf"):
            self._ended = now

    def window(self) -> Window:
        """Return what was measured; all zeros when the measured stretch never began."""
        if self._ends == float("inf"):
            self._reset()
        samples = sorted(self._samples[: min(self._timed, _SAMPLES)])
        return Window(
            nbytes=self._nbytes,
            seconds=self._ended - self._began,
            requests=self._requests,
            cpu_seconds=self._cpu_seconds,
            latency_p50=_quantile(samples, 0.5),
            latency_p99=_quantile(samples, 0.99),
            latency_max=self._longest,
            short_reads=self._short,
            errors=self._errors,
        )


def run_window(
    file: SourceFile,
    memory: memoryview,
    *,
    engine: Engine,
    block_nbytes: int,
    depth: int,
    seconds: float,
    ramp_seconds: float = 0.1,
    offset: int = 0,
    direct: bool = True,
    write: bool = False,
    pattern: Pattern = "window",
    layer_nbytes: int | None = None,
    drain: bool = False,
    stop: Callable[[], bool] | None = None,
) -> Window:
    """Keep `depth` transfers of `block_nbytes` between `file` and `memory` in flight, and count them for `seconds`.

    They go through the file's whole blocks in order, from `offset` on and round and round; never beyond its end. With
    `write`, what is in `memory` overwrites the file's content. With the pattern "layer", which is the runtime's,
    batches of `layer_nbytes` (half of what is in flight by default) are submitted at once and waited for as a whole;
    `libaio` only. With `drain`, also `libaio` only, what is in flight at the end counts with the time until it has
    ended: fio's way, which favours what was in flight at the beginning; for comparisons. `stop` is asked whenever
    requests end; it must be quick and may be called in any thread.

    `memory` is the caller's, at least `depth` × `block_nbytes` bytes, aligned; nothing touches it any more when this
    returns or raises, also by Ctrl-C. `direct` insists: raises ReadError when the file system refuses O_DIRECT, and
    when 16 requests failed; FileChangedError when the file is not the one that `file` names. Without `direct`, what was
    read is dropped from the page cache again.
    """
    assert memory.nbytes >= depth * block_nbytes > 0
    assert all(value % ALIGNMENT == 0 for value in (block_nbytes, offset, address_of(memory)))
    assert direct or engine != "libaio", "Linux AIO blocks without O_DIRECT"
    assert (pattern == "window" and not drain) or engine == "libaio"
    if file.nbytes < block_nbytes:
        raise ReadError("the file is too small to measure", file=file.path, wanted=block_nbytes, got=file.nbytes)
    opened = OpenFile(file, direct=direct, write=write)
    try:
        if direct and not opened.direct:
            raise disk_error("O_DIRECT was refused", file, errno.EINVAL, write=write)
        layer = (layer_nbytes or block_nbytes * max(1, depth // 2)) if pattern == "layer" else 0
        job = Job(opened, memory, block_nbytes, depth, offset, layer)
        return _run(engine, job, seconds, ramp_seconds, drain=drain, stop=stop)
    finally:
        opened.close()


def _run(
    engine: Engine, job: Job, seconds: float, ramp: float, *, drain: bool, stop: Callable[[], bool] | None
) -> Window:
    clocks: list[int] = []
    meter = Meter(job, seconds=seconds, ramp_seconds=ramp, stop=stop, cpu=lambda: sum(map(time.clock_gettime, clocks)))

    def watch() -> None:
        """Count the calling thread's CPU time."""
        clocks.append(time.pthread_getcpuclockid(threading.get_ident()))

    if engine == "threads":
        _run_threads(job, meter, watch)
    elif engine == "libaio":
        from penstock.io.window_libaio import run_libaio  # noqa: PLC0415 - only where it is used is it needed

        watch()
        run_libaio(job, meter, drain=drain)
    else:
        from penstock.io.window_aiofiles import run_aiofiles  # noqa: PLC0415

        run_aiofiles(job, meter, watch)
    return meter.window()


def _run_threads(job: Job, meter: Meter, watch: Callable[[], None]) -> None:
    """Let `depth` threads transfer one block each, again and again."""
    lock = threading.Lock()
    offsets = job.offsets()
    # Ctrl-C while the pool starts can leave a thread that the pool does not know and will not wait for. No thread
    # touches memory before all are known.
    complete = threading.Event()

    def work(index: int) -> None:
        piece = job.piece(index)
        complete.wait()
        try:
            while not meter.done:
                with lock:
                    offset = next(offsets)
                began = time.perf_counter()
                result = _transfer(job.opened, piece, offset)
                ended = time.perf_counter()
                with lock:
                    if not meter.done:
                        meter.count_timed(result, ended - began)
                        meter.goes_on(ended)
        except BaseException:
            meter.done = True
            raise

    with ThreadPoolExecutor(job.depth, thread_name_prefix="penstock-window", initializer=watch) as pool:
        try:
            futures = [pool.submit(work, index) for index in range(job.depth)]
            complete.set()
            for future in futures:
                future.result()
        finally:
            # Whatever ended this early: the pool's exit waits for the threads, and they must see that it is over.
            meter.done = True
            complete.set()


def _transfer(opened: OpenFile, memory: memoryview, offset: int) -> int:
    """Transfer one block in the calling thread; return bytes or -errno."""
    try:
        if opened.write:
            return os.pwritev(opened.fd, [memory], offset)
        result = os.preadv(opened.fd, [memory], offset)
    except OSError as error:
        return -(error.errno or errno.EIO)
    if not opened.direct and result > 0:
        os.posix_fadvise(opened.fd, offset, result, os.POSIX_FADV_DONTNEED)
    return result


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
