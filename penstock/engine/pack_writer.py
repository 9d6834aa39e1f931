"""The disk side of `pack`: pieces of tensors come in order, parts of shards go out, each on a thread of its own."""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from penstock.engine.pack_journal import Finished
from penstock.io.atomic import sync_directory
from penstock.io.files import SourceFile
from penstock.io.reader import ALIGNMENT, Read, Reader
from penstock.io.shard import StoredTensor

__all__ = ["PieceReader", "ShardWriter", "StoredPart"]

_SYNC_NBYTES = 128 << 20
"""The journal is brought up to date after this many bytes: what a kill loses at most."""

_QUEUED = 4
"""Pieces that wait to be written at most."""


class PieceReader:
    """Reads (file, offset, nbytes) ranges in order, a few ahead, into `memory`, which the caller owns; for one call."""

    def __init__(self, reader: Reader, memory: memoryview, *, num_regions: int) -> None:
        self._reader = reader
        self._region = memory.nbytes // num_regions // ALIGNMENT * ALIGNMENT
        self._regions = [memory[i * self._region : (i + 1) * self._region] for i in range(num_regions)]

    @staticmethod
    def memory_for(piece_nbytes: int, *, num_regions: int) -> int:
        """Return how many bytes of memory pieces of this size need."""
        return (-(-piece_nbytes // ALIGNMENT) + 2) * ALIGNMENT * num_regions

    def __call__(self, ranges: Iterator[tuple[SourceFile, int, int]]) -> Generator[memoryview, None, None]:
        """Yield each range's bytes; a view is good until the next is asked for. Raises ReadError."""
        free = deque(self._regions)
        under_way: deque[tuple[int, memoryview, int, int]] = deque()
        try:
            for file, offset, nbytes in ranges:
                start = offset % ALIGNMENT
                length = -(-(start + nbytes) // ALIGNMENT) * ALIGNMENT
                region = free.popleft()
                ticket = self._reader.submit([Read(file, offset - start, region[:length])])
                under_way.append((ticket, region, start, nbytes))
                if not free:
                    yield from self._next(under_way, free)
            while under_way:
                yield from self._next(under_way, free)
        finally:
            for ticket, *_ in under_way:
                self._reader.wait(ticket)
            for region in self._regions:
                region.release()

    def _next(
        self, under_way: deque[tuple[int, memoryview, int, int]], free: deque[memoryview]
    ) -> Iterator[memoryview]:
        ticket, region, start, nbytes = under_way.popleft()
        self._reader.wait(ticket)
        with region[start : start + nbytes] as piece:
            yield piece
        free.append(region)


@dataclass(slots=True)
class StoredPart:
    """A tensor of a shard while it is written; its bytes come in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int = 0
    crc32: int = 0

    def frozen(self, shape: tuple[int, ...]) -> StoredTensor:
        """Return what the journal says of it."""
        return StoredTensor(self.name, self.dtype, shape, self.offset, self.nbytes)


class ShardWriter:
    """Writes one shard on a thread of its own and brings it to the disk on another. Errors come with a later call.

    `note` is called, on one of these threads, with tensors whose bytes have reached the disk, and so has the shard's
    name. After an error nothing more is written or noted.
    """

    def __init__(self, path: Path, note: Callable[[Sequence[Finished]], None]) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        sync_directory(path.parent)
        self._note = note
        self._failed = False
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="penstock-write")
        self._syncing = ThreadPoolExecutor(1, thread_name_prefix="penstock-sync")
        self._queue: deque[Future[None]] = deque()
        self._sync: Future[None] | None = None
        self._done: list[Finished] = []
        self._unsynced = 0

    def write(self, part: StoredPart, values: Tensor) -> None:
        """Write the next bytes of `part`; waits while too many are queued. The caller leaves `values` alone then."""
        self._wait(_QUEUED)
        content = memoryview(values.contiguous().view(-1).view(torch.uint8).numpy().data)
        self._submit(self._put, content, part.offset + part.nbytes, part)
        part.nbytes += content.nbytes

    def finish(self, make: Callable[[], Finished]) -> None:
        """Have `make` say what a tensor has become, once its bytes are written."""
        self._submit(self._finish, make)

    def _submit(self, work: Callable[..., None], *arguments: Any) -> None:
        self._queue.append(self._writing.submit(self._unless_failed, work, *arguments))

    def _unless_failed(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do what comes next, unless something before it is missing."""
        if self._failed:
            return
        try:
            work(*arguments)
        except BaseException:
            self._failed = True
            raise

    def seal(self, header: Callable[[], bytes], nbytes: int) -> None:
        """Once all is on the disk and noted, write the header and cut the file to its length."""
        self._wait(0)
        self._flush()
        self._wait_for_sync()
        self._put(memoryview(header()), 0)
        os.ftruncate(self._descriptor, nbytes)
        os.fsync(self._descriptor)

    def _put(self, content: memoryview, at: int, part: StoredPart | None = None) -> None:
        if part is not None:
            part.crc32 = zlib.crc32(content, part.crc32)
        self._unsynced += content.nbytes
        while content.nbytes:
            count = os.pwrite(self._descriptor, content, at)
            content, at = content[count:], at + count

    def _finish(self, make: Callable[[], Finished]) -> None:
        self._done.append(make())
        if self._unsynced >= _SYNC_NBYTES:
            self._flush()

    def _flush(self) -> None:
        """Start to bring finished tensors to the disk and into the journal, after those before them."""
        self._wait_for_sync()
        done, self._done, self._unsynced = self._done, [], 0
        self._sync = self._syncing.submit(self._bring, done)

    def _bring(self, done: Sequence[Finished]) -> None:
        os.fdatasync(self._descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._note(done)

    def _wait_for_sync(self) -> None:
        if self._sync is not None:
            self._sync.result()

    def _wait(self, queued: int) -> None:
        while len(self._queue) > queued:
            self._queue.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writing.shutdown(cancel_futures=True)
        self._syncing.shutdown()
        os.close(self._descriptor)
