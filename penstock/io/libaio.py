"""Linux AIO: one thread keeps a whole layer of reads in flight, for next to no CPU.

One `io_submit` for a batch and few `io_getevents`, each for many events: every return to Python may wait for the GIL,
so a small window of requests starves the disk (5.7 to 2.5 GB/s beside one busy Python thread), and a whole layer does
not. The kernel reports trouble in four places, and each is looked at: a short count of `io_submit` (the first request
that was not taken is at fault, or the ring is full), its -errno, every event's result, and a result that is short.
AIO on a descriptor without O_DIRECT blocks in `io_submit`; such files are read and written with plain calls, in `wait`.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from penstock.errors import PenstockError, ReadError
from penstock.io.aio_calls import IOCB_CMD_PREAD, IOCB_CMD_PWRITE, AioCalls, available_calls, ffi
from penstock.io.disk import Block, DiskReader, transfer_now
from penstock.io.open_file import OpenFile
from penstock.io.reader import Ticket

__all__ = ["LibaioReader", "make_context"]

_DEPTHS = (256, 64)


@dataclass(slots=True, eq=False)
class _Batch:
    """One ticket: how many of its blocks have not ended, and the first error among those that have."""

    files: set[OpenFile]
    remaining: int
    in_flight: int = 0
    buffered: list[Block] = field(default_factory=list)
    error: PenstockError | None = None


class LibaioReader(DiskReader):
    """Reads with Linux AIO into one context. `calls` fixes how the kernel is called; by default the best way there is.

    What a batch has beyond the context's capacity (at least 256 blocks, where the system allows) starts in `wait`.
    """

    name: ClassVar[str] = "libaio"

    def __init__(self, *, block_bytes: int | None = None, calls: AioCalls | None = None) -> None:
        super().__init__(block_bytes=block_bytes or 1 << 20, direct=True)
        self._calls = calls or available_calls()[0]
        self._context = make_context(self._calls, _DEPTHS)
        # The kernel copies requests while they are submitted: one array serves for all of them.
        self._capacity = _DEPTHS[0]
        self._iocbs = ffi.new("struct iocb[]", self._capacity)
        first = int(ffi.cast("uintptr_t", self._iocbs))
        size = ffi.sizeof("struct iocb")
        self._pointers = ffi.new("uintptr_t[]", [first + size * index for index in range(self._capacity)])
        self._events = ffi.new("struct io_event[]", self._capacity)
        self._pending: deque[tuple[Block, _Batch]] = deque()
        self._in_flight: dict[int, tuple[Block, _Batch]] = {}
        self._next_key = 0
        self._batches: dict[Ticket, _Batch] = {}
        self._next_ticket = 0

    def _launch(self, blocks: Sequence[Block]) -> Ticket:
        """Start as many of the batch's blocks as the kernel takes, and return at once."""
        batch = _Batch({block.opened for block in blocks}, len(blocks))
        self._begin(len(blocks))
        self._pending.extend((block, batch) for block in blocks)
        ticket = self._next_ticket
        self._next_ticket += 1
        self._batches[ticket] = batch
        self._start()
        return ticket

    def wait(self, ticket: Ticket) -> None:
        """Take in events, other batches' too, until the batch's reads have ended; raise its first error."""
        self._check_open()
        batch = self._batches.pop(ticket)
        while batch.remaining:
            self._start()
            if batch.buffered:
                self._transfer_now(batch, batch.buffered.pop())
            elif batch.remaining and self._in_flight:
                self._reap(self._worth_waiting_for(batch))
        if batch.error is not None:
            raise batch.error
        self._check_unchanged(batch.files)

    def _worth_waiting_for(self, batch: _Batch) -> int:
        """Return how many events to wait for at once: all of the batch's, or enough to refill half of a full ring."""
        wanted = len(self._in_flight) // 2 if self._pending else batch.in_flight
        return max(1, min(wanted, self._capacity))

    def _start(self) -> None:
        """Submit pending blocks until none is left or the kernel takes no more."""
        while chunk := self._next_chunk():
            for index, (block, _) in enumerate(chunk):
                self._fill(index, block)
            taken = self._calls.submit(self._context, len(chunk), self._pointers)
            for block, batch in chunk[: max(0, taken)]:
                batch.in_flight += 1
                self._in_flight[self._next_key] = block, batch
                self._next_key += 1
            self._pending.extendleft(reversed(chunk[max(0, taken) :]))
            if taken <= 0 and not self._go_on_after(-taken):
                return

    def _next_chunk(self) -> list[tuple[Block, _Batch]]:
        """Take up to one array of blocks off the queue that AIO may read; set the others aside or drop them."""
        chunk: list[tuple[Block, _Batch]] = []
        while self._pending and len(chunk) < self._capacity:
            block, batch = self._pending.popleft()
            if batch.error is not None:
                self._finish(block, batch, delivered=False)
            elif block.issue():
                chunk.append((block, batch))
            else:
                batch.buffered.append(block)
        return chunk

    def _fill(self, index: int, block: Block) -> None:
        iocb = self._iocbs[index]
        iocb.data = self._next_key + index
        iocb.opcode = IOCB_CMD_PWRITE if block.write else IOCB_CMD_PREAD
        iocb.fd = block.opened.fd
        iocb.buffer = block.address
        iocb.nbytes = block.memory.nbytes
        iocb.offset = block.offset

    def _go_on_after(self, number: int) -> bool:
        """Judge an `io_submit` that took nothing; return whether to submit again at once."""
        if number == errno.EINTR:
            return True
        if number in {0, errno.EAGAIN} and self._in_flight:
            return False
        # The first request is at fault, or the kernel has no room although nothing of ours is in flight.
        block, batch = self._pending.popleft()
        if number in {0, errno.EAGAIN}:
            self._transfer_now(batch, block)
        else:
            self._take(block, batch, -number)
        return True

    def _reap(self, at_least: int) -> None:
        """Wait for at least so many events, and account for all that came."""
        count = self._calls.getevents(self._context, at_least, self._capacity, self._events)
        if count == -errno.EINTR:
            return
        assert count > 0, f"io_getevents failed: {os.strerror(-count)}"
        for index in range(count):
            event = self._events[index]
            block, batch = self._in_flight.pop(event.data)
            batch.in_flight -= 1
            self._take(block, batch, event.result)

    def _take(self, block: Block, batch: _Batch, result: int) -> None:
        """Account for one result; queue the rest of a block that is not complete."""
        try:
            complete = block.take(result)
        except PenstockError as error:
            batch.error = batch.error or error
            self._finish(block, batch, delivered=False)
            return
        if complete:
            self._finish(block, batch, delivered=True)
        else:
            self._pending.appendleft((block, batch))

    def _transfer_now(self, batch: _Batch, block: Block) -> None:
        """Read or write a block in the calling thread, through the page cache if its file is not direct."""
        try:
            transfer_now(block)
        except PenstockError as error:
            batch.error = batch.error or error
            self._finish(block, batch, delivered=False)
        else:
            self._finish(block, batch, delivered=True)

    def _finish(self, block: Block, batch: _Batch, *, delivered: bool) -> None:
        batch.remaining -= 1
        self._end(block, delivered=delivered)

    def _drain(self) -> None:
        # io_destroy waits for everything in flight, so that the memory is the caller's again when close returns.
        self._calls.destroy(self._context)
        self._in_flight.clear()
        self._pending.clear()
        self._batches.clear()


def make_context(calls: AioCalls, depths: Sequence[int]) -> int:
    """Return a context of the first of `depths` that the system grants; raises ReadError when it grants none."""
    context = ffi.new("uintptr_t *")
    for depth in depths:
        result = calls.setup(depth, context)
        if result == 0:
            return int(context[0])
        if result != -errno.EAGAIN:
            break
    error = _context_error(-result, depths[-1])
    error.errno = -result
    raise error


def _context_error(number: int, depth: int) -> ReadError:
    if number == errno.EAGAIN:
        used, limit = (_sysctl(name) for name in ("aio-nr", "aio-max-nr"))
        return ReadError(
            "the system has no Linux AIO requests left",
            wanted=depth,
            got=f"{used} of {limit} in use (aio-nr of aio-max-nr)",
            fix="Raise the limit with `sysctl -w fs.aio-max-nr=1048576`, or choose the reader 'threads'.",
        )
    return ReadError(
        f"Linux AIO is not available: io_setup: {os.strerror(number)} (errno {number})",
        fix="Choose the reader 'threads'; a container's seccomp profile or the kernel forbids io_setup.",
    )


def _sysctl(name: str) -> str:
    try:
        return Path("/proc/sys/fs", name).read_text().strip()
    except OSError:
        return "?"
