"""The reader contract: many positioned reads into the caller's memory, at once, off the caller's thread.

Every backend is a file beside this one with a class that derives from `Reader`; every backend test runs on all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Self

from penstock.io.files import SourceFile

__all__ = ["ALIGNMENT", "Read", "Reader", "ReaderStatistics", "Ticket"]

ALIGNMENT = 4096
"""Offsets, lengths and addresses of reads are multiples of this many bytes: enough for O_DIRECT on common disks."""

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
class ReaderStatistics:
    """What a reader has done so far.

    `reads` counts reads as they were given to the kernel, after cutting into blocks, and `buffered_reads` those of them
    that went through the page cache. `bytes_read` counts bytes delivered. `busy_seconds` is
    the time during which at least one read was under way; a backend that learns of the end of a read only in `wait`
    counts until then.
    """

    reads: int
    bytes_read: int
    busy_seconds: float
    buffered_reads: int


class Reader(ABC):
    """Reads batches of extents. One thread at a time may drive it. A context manager; close is idempotent."""

    name: ClassVar[str]

    @abstractmethod
    def submit(self, reads: Sequence[Read]) -> Ticket:
        """Start a batch of reads and return at once. Raises ReadError or FileChangedError when nothing was started."""

    @abstractmethod
    def wait(self, ticket: Ticket) -> None:
        """Block, with the GIL released, until every read of the batch has ended; each ticket is waited for once.

        Batches may complete in any order. Raises the first error of the batch after all of its reads have ended (their
        memory is the caller's again): ReadError names file, offset, length and errno; FileChangedError a file that was
        cut short or replaced.
        """

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
