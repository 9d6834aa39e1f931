"""The reader contract: many positioned reads, and writes, of the caller's memory, at once, off the caller's thread.

Every backend is a file beside this one with a class that derives from `Reader`; every backend test runs on all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Self

from penstock.io.files import SourceFile

__all__ = ["ALIGNMENT", "Read", "Reader", "ReaderStatistics", "Ticket", "Write"]

ALIGNMENT = 4096
"""Offsets, lengths and addresses of transfers are multiples of this many bytes: enough for O_DIRECT on common disks."""

Ticket = int
"""Names one submitted batch."""


@dataclass(frozen=True, slots=True)
class Read:
    """Fill `memory` with the bytes of `file` from `offset` on.

    `memory` is the caller's: writable, contiguous, format "B", alive until the batch was waited for. Offset, length and
    address are multiples of `ALIGNMENT`. A read may reach past the end of the file; only the bytes up to it are filled.
    """

    file: SourceFile
    offset: int
    memory: memoryview


@dataclass(frozen=True, slots=True)
class Write:
    """Put `memory` into `file` from `offset` on.

    `memory` is the caller's: contiguous, format "B", unchanged until the batch was waited for. Offset, length and
    address are multiples of `ALIGNMENT`. The file exists; it grows when the write reaches past its end, which is slow:
    preallocate where that matters.
    """

    file: SourceFile
    offset: int
    memory: memoryview


@dataclass(frozen=True, slots=True)
class ReaderStatistics:
    """What a reader has done so far.

    `reads` and `writes` count requests as they were given to the kernel, after cutting into blocks; `buffered_reads`
    counts those of the reads that went through the page cache. `bytes_read` and `bytes_written` count bytes that have
    arrived. `busy_seconds` is the time during which at least one request was under way; a backend that learns of the
    end of a request only in `wait` counts until then.
    """

    reads: int
    bytes_read: int
    busy_seconds: float
    buffered_reads: int
    writes: int = 0
    bytes_written: int = 0


class Reader(ABC):
    """Reads and writes batches of extents. One thread at a time may drive it. A context manager; close is idempotent.

    A file that was written to through this reader is known by device and inode from then on, no longer by its size and
    times; reads of it see what was written and waited for. Batches in flight at once must not overlap in a file.
    """

    name: ClassVar[str]

    @abstractmethod
    def submit(self, reads: Sequence[Read]) -> Ticket:
        """Start a batch of reads and return at once. Raises ReadError or FileChangedError when nothing was started."""

    @abstractmethod
    def submit_writes(self, writes: Sequence[Write]) -> Ticket:
        """Start a batch of writes. Raises WriteError or FileChangedError when nothing was started."""

    @abstractmethod
    def wait(self, ticket: Ticket) -> None:
        """Block, with the GIL released, until every request of the batch has ended; each ticket is waited for once.

        Batches may complete in any order. Raises the first error of the batch after all of its requests have ended
        (their memory is the caller's again): ReadError and WriteError name file, offset, length and errno;
        FileChangedError a file that was cut short or replaced. What a failed batch has written is undefined.
        """

    @abstractmethod
    def sync(self, file: SourceFile) -> None:
        """Block until what was written to `file`, and waited for, survives a loss of power. Raises WriteError."""

    @abstractmethod
    def statistics(self) -> ReaderStatistics:
        """Return a snapshot."""

    @abstractmethod
    def close(self) -> None:
        """Wait for what is in flight, then release descriptors and threads; later calls raise ClosedError."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
