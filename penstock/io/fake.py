"""A reader for tests of what lies above: scripted order, virtual time and faults; no disk and no threads are needed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from penstock.errors import ClosedError, FileChangedError, PenstockError
from penstock.io.files import SourceFile
from penstock.io.open_file import OpenFile, disk_error
from penstock.io.reader import ALIGNMENT, Read, Reader, ReaderStatistics, Ticket, Write

__all__ = ["Completion", "FakeReader", "Fault", "fake_file"]

Completion = Literal["at once", "when waited for", "newest first"]
"""When a batch's bytes arrive: in `submit`; in `wait` for it, the latest moment allowed; or in any `wait`, after those
of all batches submitted later."""

_POISON = 0xA5


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with one request: an errno, a transfer that ends half-way, or a file that was changed."""

    kind: Literal["errno", "short", "changed"] = "errno"
    errno: int = errno.EIO


def fake_file(name: str, content: bytes) -> SourceFile:
    """Return an identity for a file that exists in a FakeReader's `contents` only, under the same name."""
    return SourceFile(Path(name), len(content), device=0, inode=0, mtime_ns=0)


class FakeReader(Reader):
    """Delivers `contents` by path, or with None the real files' bytes, on a schedule; writes change them.

    Memory to read into is filled with 0xA5 until its bytes arrive, and memory to write is looked at when the batch
    completes, so that use before completion shows. `faults` maps the index of a request, counted from 0 over all
    batches, to what goes wrong with it. `submitted` and `completed` list tickets in order, `synchronised` files. Each
    batch adds `latency_seconds` and its bytes over `bytes_per_second` to the virtual busy time.
    """

    name: ClassVar[str] = "fake"

    def __init__(
        self,
        contents: Mapping[Path, bytes] | None = None,
        *,
        completion: Completion = "when waited for",
        faults: Mapping[int, Fault] | None = None,
        latency_seconds: float = 0.0,
        bytes_per_second: float = float("inf"),
    ) -> None:
        self.submitted: list[Ticket] = []
        self.completed: list[Ticket] = []
        self.synchronised: list[SourceFile] = []
        self._contents = None if contents is None else {path: bytearray(held) for path, held in contents.items()}
        self._written: set[SourceFile] = set()
        self._completion = completion
        self._faults = dict(faults or {})
        self._latency_seconds = latency_seconds
        self._bytes_per_second = bytes_per_second
        self._outstanding: dict[Ticket, list[tuple[int, Read | Write]]] = {}
        self._errors: dict[Ticket, PenstockError | None] = {}
        self._num_requests = 0
        self._closed = False
        self._counts = ReaderStatistics(reads=0, bytes_read=0, busy_seconds=0.0, buffered_reads=0)

    def submit(self, reads: Sequence[Read]) -> Ticket:
        """Start a batch, and with completion "at once" end it too."""
        ticket = self._accept(reads)
        for read in reads:
            read.memory[:] = bytes([_POISON]) * read.memory.nbytes
        if self._completion == "at once":
            self._complete(ticket)
        return ticket

    def submit_writes(self, writes: Sequence[Write]) -> Ticket:
        """Start a batch, and with completion "at once" end it too."""
        ticket = self._accept(writes)
        self._written.update(write.file for write in writes)
        if self._completion == "at once":
            self._complete(ticket)
        return ticket

    def _accept(self, requests: Sequence[Read | Write]) -> Ticket:
        self._check_open()
        for request in requests:
            assert request.offset % ALIGNMENT == 0
            assert request.memory.nbytes % ALIGNMENT == 0
            self._content(request.file, 0, 0)
        ticket = len(self.submitted)
        self.submitted.append(ticket)
        self._outstanding[ticket] = list(enumerate(requests, self._num_requests))
        self._num_requests += len(requests)
        return ticket

    def sync(self, file: SourceFile) -> None:
        """Note it."""
        self._check_open()
        self.synchronised.append(file)

    def wait(self, ticket: Ticket) -> None:
        """Let the batch arrive, after others if the script says so; raise its first error."""
        self._check_open()
        if self._completion == "newest first":
            for other in sorted(self._outstanding, reverse=True):
                self._complete(other)
        elif ticket in self._outstanding:
            self._complete(ticket)
        error = self._errors.pop(ticket)
        if error is not None:
            raise error

    def statistics(self) -> ReaderStatistics:
        """Return a snapshot."""
        self._check_open()
        return self._counts

    def close(self) -> None:
        """Let everything outstanding arrive."""
        for ticket in sorted(self._outstanding):
            self._complete(ticket)
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the fake reader was used after close")

    def _complete(self, ticket: Ticket) -> None:
        error: PenstockError | None = None
        counts = self._counts
        self._counts = replace(counts, busy_seconds=counts.busy_seconds + self._latency_seconds)
        for index, request in self._outstanding.pop(ticket):
            try:
                self._transfer(request, self._faults.get(index))
            except PenstockError as fault:
                error = error or fault
        self.completed.append(ticket)
        self._errors[ticket] = error

    def _transfer(self, request: Read | Write, fault: Fault | None) -> None:
        if fault is not None and fault.kind == "changed":
            raise FileChangedError("the file is not the one whose header was read", file=request.file.path)
        content = request.memory
        if isinstance(request, Read):
            content = memoryview(self._content(request.file, request.offset, request.memory.nbytes))
        moved = content.nbytes if fault is None else content.nbytes // 2 if fault.kind == "short" else 0
        if isinstance(request, Read):
            request.memory[:moved] = content[:moved]
        else:
            self._store(request.file, request.offset, content[:moved])
        if fault is not None:
            what = "cannot be read" if isinstance(request, Read) else "cannot be written"
            place = f"offset {request.offset}, length {request.memory.nbytes}"
            number = errno.EIO if fault.kind == "short" else fault.errno
            raise disk_error(f"{what} at {place}", request.file, number, write=isinstance(request, Write))
        self._count(moved, written=isinstance(request, Write))

    def _count(self, nbytes: int, *, written: bool) -> None:
        counts = self._counts
        busy = counts.busy_seconds + nbytes / self._bytes_per_second
        if written:
            self._counts = replace(
                counts, busy_seconds=busy, writes=counts.writes + 1, bytes_written=counts.bytes_written + nbytes
            )
        else:
            self._counts = replace(
                counts, busy_seconds=busy, reads=counts.reads + 1, bytes_read=counts.bytes_read + nbytes
            )

    def _content(self, file: SourceFile, offset: int, nbytes: int) -> bytes:
        if self._contents is not None:
            return bytes(self._contents[file.path][offset : offset + nbytes])
        with self._open(file) as fd:
            return os.pread(fd, nbytes, offset)

    def _store(self, file: SourceFile, offset: int, content: memoryview) -> None:
        if self._contents is not None:
            held = self._contents[file.path]
            held.extend(bytes(max(0, offset + content.nbytes - len(held))))
            held[offset : offset + content.nbytes] = content
            return
        with self._open(file) as fd:
            written = 0
            while written < content.nbytes:
                written += os.pwrite(fd, content[written:], offset + written)

    @contextmanager
    def _open(self, file: SourceFile) -> Iterator[int]:
        opened = OpenFile(file, direct=False, write=file in self._written)
        try:
            yield opened.fd
        except OSError as error:
            raise disk_error("failed", file, error.errno or errno.EIO, write=opened.write) from error
        finally:
            opened.close()
