"""How a unit is read from disk: aligned reads into staging memory, and the copies that then put each byte in its place.

Safetensors offsets are only 8-byte aligned and O_DIRECT reads are 4 KiB aligned, so reads are aligned supersets of what
is needed, and placement is left to the copies, which exist anyway on the way to a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from penstock.io.files import SourceFile
from penstock.io.reader import ALIGNMENT
from penstock.offload.layout import Extent

__all__ = ["Chunk", "Copy", "StagedRead", "plan_chunks"]

MERGE_GAP = 64 * 1024
"""Reading over a gap of this many bytes is cheaper than another request."""


@dataclass(frozen=True, slots=True)
class StagedRead:
    """Read `nbytes` bytes at `offset` of `file` to `staging` of the chunk; all three are aligned."""

    file: SourceFile
    offset: int
    nbytes: int
    staging: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy `nbytes` bytes from `staging` of the chunk to `destination` of the unit's buffer."""

    staging: int
    destination: int
    nbytes: int


@dataclass(slots=True)
class Chunk:
    """As much of a unit as fits one staging region."""

    reads: list[StagedRead] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    staging_nbytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that end in the unit's buffer."""
        return sum(copy.nbytes for copy in self.copies)

    @property
    def read_nbytes(self) -> int:
        """Bytes that the disk delivers: a read may reach past its file's end, where there are none."""
        return sum(min(read.nbytes, read.file.nbytes - read.offset) for read in self.reads)


def plan_chunks(extents: Sequence[Extent], *, chunk_nbytes: int) -> tuple[Chunk, ...]:
    """Cut a unit's extents into chunks of at most `chunk_nbytes` staged bytes, a multiple of the alignment.

    Every byte of every extent is copied exactly once; no byte of a file is read twice, but for pages that two chunks
    share.
    """
    assert chunk_nbytes % ALIGNMENT == 0
    assert chunk_nbytes > 0
    chunks = [Chunk()]
    for run in _runs(extents):
        start = _down(run[0].source)
        end = _up(max(extent.source + extent.nbytes for extent in run))
        while start < end:
            if chunks[-1].staging_nbytes == chunk_nbytes:
                chunks.append(Chunk())
            chunk = chunks[-1]
            nbytes = min(end - start, chunk_nbytes - chunk.staging_nbytes)
            copies = list(_copies(run, start, nbytes, chunk.staging_nbytes))
            if copies:
                chunk.reads.append(StagedRead(run[0].file, start, nbytes, chunk.staging_nbytes))
                chunk.copies.extend(copies)
                chunk.staging_nbytes += nbytes
            start += nbytes
    return tuple(chunk for chunk in chunks if chunk.reads)


def _down(offset: int) -> int:
    return offset // ALIGNMENT * ALIGNMENT


def _up(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _runs(extents: Sequence[Extent]) -> Iterator[list[Extent]]:
    """Group extents that lie next to each other on disk."""
    ordered = sorted((e for e in extents if e.nbytes), key=lambda extent: (str(extent.file.path), extent.source))
    for _, of_file in groupby(ordered, key=lambda extent: extent.file):
        run: list[Extent] = []
        end = 0
        for extent in of_file:
            if run and extent.source > end + MERGE_GAP:
                yield run
                run = []
            run.append(extent)
            end = max(end, extent.source + extent.nbytes) if len(run) > 1 else extent.source + extent.nbytes
        if run:
            yield run


def _copies(run: Sequence[Extent], start: int, nbytes: int, staging: int) -> Iterator[Copy]:
    """Yield what of a run's extents lies in [start, start + nbytes) of the file, which is staged at `staging`."""
    for extent in run:
        begin = max(extent.source, start)
        end = min(extent.source + extent.nbytes, start + nbytes)
        if begin < end:
            yield Copy(staging + begin - start, extent.destination + begin - extent.source, end - begin)
