"""The disk lane: one thread that keeps reads from disk under way and copies what has landed to where it belongs.

Fetches are served in order. Their chunks flow through a ring of staging regions, across the borders of fetches, so that
the disk stays busy while chunks are copied and while the computing decides what to fetch next.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from penstock.errors import ClosedError
from penstock.io.memory import HostMemory
from penstock.io.reader import Read, Reader, Ticket
from penstock.offload.checks import Verification
from penstock.offload.chunks import Chunk
from penstock.offload.copies import Copies
from penstock.offload.layout import Layout
from penstock.offload.trace import DISK, FROM_STAGING, Trace

__all__ = ["DiskLane", "Fetch", "Ring"]


@dataclass(slots=True)
class Fetch:
    """Bring one unit from disk to `buffer`, whose first byte is byte `origin` of the unit's buffer.

    With a `layout`, expansions and conversions run on arrival. `verification` sees all bytes first. `after` is a point
    of the computing that copies wait for. `arrived` gets the point after which the unit is there. `name`
    and `lane` are what a trace calls its copies.
    """

    chunks: Sequence[Chunk]
    buffer: Tensor
    origin: int
    copies: Copies
    layout: Layout | None = None
    after: Any = None
    verification: Verification | None = None
    arrived: Future[Any] = field(default_factory=Future)
    name: str = ""
    lane: str = FROM_STAGING


class Ring:
    """Staging regions of equal size over one slab of host memory. The slab's owner closes it."""

    def __init__(self, memory: HostMemory, *, num_regions: int) -> None:
        self.region_nbytes = memory.nbytes // num_regions
        self._view = memory.view
        self._tensor = torch.frombuffer(memory.view, dtype=torch.uint8)
        self._busy: list[tuple[Copies, Any] | None] = [None] * num_regions
        self._next = 0

    @property
    def num_regions(self) -> int:
        """How many chunks can be under way at once."""
        return len(self._busy)

    def take(self) -> int:
        """Return the next region, once the copies out of it have ended. It stays the next one until `advance`."""
        busy = self._busy[self._next]
        if busy is not None:
            copies, mark = busy
            copies.block_until(mark)
            self._busy[self._next] = None
        return self._next

    def advance(self) -> None:
        """Go on to the region after the one that was taken: reads into that one are under way."""
        self._next = (self._next + 1) % len(self._busy)

    def reads(self, chunk: Chunk, region: int) -> list[Read]:
        """Return a chunk's reads, aimed at a region."""
        base = region * self.region_nbytes
        return [
            Read(read.file, read.offset, self._view[base + read.staging : base + read.staging + read.nbytes])
            for read in chunk.reads
        ]

    def verify(self, verification: Verification, chunk: Chunk, region: int) -> None:
        """Compare a chunk that has landed with its checksums. Raises ChecksumError."""
        base = region * self.region_nbytes
        for read in chunk.reads:
            start = base + read.staging
            verification.landed(read.file, read.offset, self._view[start : start + read.nbytes])

    def empty(self, fetch: Fetch, chunk: Chunk, region: int) -> None:
        """Copy a chunk that has landed to its fetch's buffer."""
        base = region * self.region_nbytes
        for copy in chunk.copies:
            start = copy.destination - fetch.origin
            fetch.copies.copy(
                fetch.buffer[start : start + copy.nbytes],
                self._tensor[base + copy.staging : base + copy.staging + copy.nbytes],
            )
        self._busy[region] = (fetch.copies, fetch.copies.mark())

    def release(self) -> None:
        """Wait for all copies and let go of the slab."""
        for _ in self._busy:
            self.take()
            self.advance()
        del self._tensor, self._view


class DiskLane:
    """Serves fetches on a thread of its own, which alone drives `reader`.

    Closing it waits for the reads that are under way, and fails fetches that are not done with ClosedError.
    """

    def __init__(self, reader: Reader, ring: Ring, trace: Trace | None = None) -> None:
        self._reader = reader
        self._ring = ring
        self._trace = trace
        self._queue: SimpleQueue[Fetch | None] = SimpleQueue()
        self._closed = False
        self._converter = ThreadPoolExecutor(1, thread_name_prefix="penstock-convert")
        self._thread = Thread(target=self._serve, name="penstock-disk", daemon=True)
        self._thread.start()

    def start(self, fetch: Fetch) -> None:
        """Queue a fetch; its `arrived` is set, or gets the error, when it has ended."""
        if self._closed:
            raise ClosedError("the disk lane is closed")
        if fetch.chunks:
            self._queue.put(fetch)
        else:
            fetch.arrived.set_result(fetch.copies.mark())

    def close(self) -> None:
        """Wait for reads that are under way, drop the rest, and end the thread."""
        self._closed = True
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
            self._converter.shutdown()
            self._ring.release()

    def _serve(self) -> None:
        """Keep as many chunks under way as the ring has regions; land them in order; sleep only when there are none."""
        pending: deque[_Item] = deque()
        landing: deque[_Landing] = deque()
        is_open = True
        while is_open or pending or landing:
            while is_open and not pending:
                try:
                    fetch = self._queue.get(block=not landing)
                except Empty:
                    break
                if fetch is None:
                    is_open = False
                else:
                    pending.extend(_items(fetch))
            while pending and len(landing) < self._ring.num_regions:
                item = pending.popleft()
                with _failing(item.fetch):
                    self._submit(item, landing)
            if landing:
                self._land(*landing.popleft())

    def _submit(self, item: _Item, landing: deque[_Landing]) -> None:
        """Start to read a chunk, unless its fetch has failed already or the lane is closing."""
        if item.fetch.arrived.done():
            return
        if self._closed:  # not raised: a traceback would hold the fetch, and so its buffer, which goes back now
            item.fetch.arrived.set_exception(ClosedError("the disk lane was closed before this unit was read"))
            return
        region = self._ring.take()
        submitted = time.perf_counter()
        ticket = self._reader.submit(self._ring.reads(item.chunk, region))
        self._ring.advance()
        landing.append((item, region, ticket, submitted))

    def _land(self, item: _Item, region: int, ticket: Ticket, submitted: float) -> None:
        fetch, chunk = item.fetch, item.chunk
        with _failing(fetch):
            self._reader.wait(ticket)
            if self._trace is not None:
                now = time.perf_counter()
                self._trace.add(f"{DISK} {region + 1}", fetch.name, submitted, now, bytes=chunk.read_nbytes)
            if fetch.arrived.done():
                return
            if fetch.verification is not None:
                self._ring.verify(fetch.verification, item.chunk, region)
            with fetch.copies.issue():
                if item.is_first:
                    fetch.copies.wait_for_computing(fetch.after)
                with fetch.copies.traced(fetch.lane, fetch.name, bytes=chunk.nbytes):
                    self._ring.empty(fetch, chunk, region)
            if not item.is_last:
                return
            if fetch.verification is not None:
                fetch.verification.finish()
            if fetch.layout is None or fetch.copies.asynchronous:
                _finish(fetch)
            else:  # the CPU does it: go on reading meanwhile
                self._converter.submit(_finish, fetch)


def _finish(fetch: Fetch) -> None:
    """Convert what has arrived, and say that it is there."""
    with _failing(fetch):
        fetch.arrived.set_result(fetch.copies.expand(fetch.layout, fetch.buffer))


@dataclass(frozen=True, slots=True)
class _Item:
    fetch: Fetch
    chunk: Chunk
    is_first: bool
    is_last: bool


_Landing = tuple[_Item, int, Ticket, float]
"""A chunk that is being read: its item, its region, its ticket, and when it was submitted."""


def _items(fetch: Fetch) -> Iterator[_Item]:
    last = len(fetch.chunks) - 1
    for index, chunk in enumerate(fetch.chunks):
        yield _Item(fetch, chunk, is_first=index == 0, is_last=index == last)


@contextmanager
def _failing(fetch: Fetch) -> Iterator[None]:
    """Carry an error to whoever waits for the fetch, once; the lane goes on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        if not fetch.arrived.done():
            fetch.arrived.set_exception(error)
