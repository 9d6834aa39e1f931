"""A reader for tests of what lies above: scripted order, virtual time and faults; no disk and no threads are needed."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from penstock.errors import ClosedError, FileChangedError, PenstockError
from penstock.io.disk import OpenFile, disk_error
from penstock.io.files import SourceFile
from penstock.io.reader import ALIGNMENT, Read, Reader, ReaderStatistics, Ticket

__all__ = ["Completion", "FakeReader", "Fault", "fake_file"]

Completion = Literal["at once", "when waited for", "newest first"]
"""When a batch's bytes arrive: in `submit`; in `wait` for it, the latest moment allowed; or in any `wait`, after those
of all batches submitted later."""

_POISON = 0xA5


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with one read: an errno, a read that ends half-way, or a file that was changed."""

    kind: Literal["errno", "short", "changed"] = "errno"
    errno: int = errno.EIO


def fake_file(name: str, content: bytes) -> SourceFile:
    """Return an identity for a file that exists in a FakeReader's `contents` only, under the same name."""
    return SourceFile(Path(name), len(content), device=0, inode=0, mtime_ns=0)


class FakeReader(Reader):
    """Delivers `contents` by path, or with None the real files' bytes, on a schedule.

    Submitted memory is filled with 0xA5 until its bytes arrive, so that use before completion shows. `faults` maps the
    index of a read, counted from 0 over all batches, to what goes wrong with it. `submitted` and `completed` list
    tickets in order. Each batch adds `latency_seconds` and its bytes over `bytes_per_second` to the virtual busy time.
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
        self._contents = contents
        self._completion = completion
        self._faults = dict(faults or {})
        self._latency_seconds = latency_seconds
        self._bytes_per_second = bytes_per_second
        self._outstanding: dict[Ticket, list[tuple[int, Read]]] = {}
        self._errors: dict[Ticket, PenstockError | None] = {}
        self._num_reads = 0
        self._closed = False
        self._counts = ReaderStatistics(reads=0, bytes_read=0, busy_seconds=0.0, buffered_reads=0)

    def submit(self, reads: Sequence[Read]) -> Ticket:
        """Start a batch, and with completion "at once" end it too."""
        self._check_open()
        for read in reads:
            assert read.offset % ALIGNMENT == 0
            assert read.memory.nbytes % ALIGNMENT == 0
            self._content(read.file, 0, 0)
        for read in reads:
            read.memory[:] = bytes([_POISON]) * read.memory.nbytes
        ticket = len(self.submitted)
        self.submitted.append(ticket)
        self._outstanding[ticket] = list(enumerate(reads, self._num_reads))
        self._num_reads += len(reads)
        if self._completion == "at once":
            self._complete(ticket)
        return ticket

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
        errors: list[PenstockError] = []
        nbytes = 0
        reads = self._outstanding.pop(ticket)
        for index, read in reads:
            try:
                nbytes += self._deliver(index, read)
            except PenstockError as error:
                errors.append(error)
        self.completed.append(ticket)
        self._errors[ticket] = errors[0] if errors else None
        self._counts = ReaderStatistics(
            reads=self._counts.reads + len(reads) - len(errors),
            bytes_read=self._counts.bytes_read + nbytes,
            busy_seconds=self._counts.busy_seconds + self._latency_seconds + nbytes / self._bytes_per_second,
            buffered_reads=0,
        )

    def _deliver(self, index: int, read: Read) -> int:
        fault = self._faults.get(index)
        if fault is not None and fault.kind == "changed":
            raise FileChangedError("the file is not the one whose header was read", file=read.file.path)
        content = self._content(read.file, read.offset, read.memory.nbytes)
        if fault is not None:
            number = fault.errno
            if fault.kind == "short":
                number, half = errno.EIO, len(content) // 2
                read.memory[:half] = content[:half]
            place = f"offset {read.offset}, length {read.memory.nbytes}"
            raise disk_error(f"cannot be read at {place}", read.file, number)
        read.memory[: len(content)] = content
        return len(content)

    def _content(self, file: SourceFile, offset: int, nbytes: int) -> bytes:
        if self._contents is not None:
            return self._contents[file.path][offset : offset + nbytes]
        opened = OpenFile(file, direct=False)
        try:
            return os.pread(opened.fd, nbytes, offset)
        finally:
            opened.close()
