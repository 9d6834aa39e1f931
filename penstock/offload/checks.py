"""Compare the bytes of a packed checkpoint with their checksums, when they first land in staging memory.

So a flipped bit is found before anything is computed with it, whichever tier its layer lives in, and without reading
anything twice. Later passes read the same bytes again and are not compared: CRC-32 runs at RAM speed, but not for free.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from penstock.errors import ChecksumError, ReadError
from penstock.io.files import SourceFile, TensorEntry
from penstock.offload.chunks import Chunk
from penstock.offload.layout import Extent
from penstock.offload.manifest import Check

__all__ = ["UnitChecks", "Verification", "compare", "verify_by_itself"]

_PIECE = 1 << 20


class UnitChecks:
    """The checks of the stored tensors that fill one unit. `partial` are those of which its chunks read a part only."""

    def __init__(self, extents: Sequence[Extent], chunks: Sequence[Chunk], checks: Iterable[Check]) -> None:
        ordered = sorted(checks, key=lambda check: (str(check.entry.file.path), check.entry.offset, check.entry.nbytes))
        needed, whole = _Cursor(ordered), _Cursor(ordered)
        used = {one for extent in extents for one, _, _ in needed.advance(extent.file, extent.source, extent.nbytes)}
        brought: dict[Check, int] = defaultdict(int)
        for read in (read for chunk in chunks for read in chunk.reads):
            for check, begin, end in whole.advance(read.file, read.offset, read.nbytes):
                brought[check] += end - begin
        self.partial = frozenset(check for check in used if brought[check] < check.entry.nbytes)
        self._whole = [check for check in ordered if check in used and check not in self.partial]
        self.verified = not self._whole

    def begin(self) -> Verification | None:
        """Return what follows one arrival of the unit, or None once an arrival has been verified."""
        return None if self.verified else Verification(self, self._whole)


class Verification:
    """One arrival of a unit: its bytes go through `landed` in the order of its chunks, then `finish` is called."""

    def __init__(self, unit: UnitChecks, checks: Sequence[Check]) -> None:
        self._unit = unit
        self._cursor = _Cursor(checks)
        self._sums: dict[Check, int] = defaultdict(int)

    def landed(self, file: SourceFile, offset: int, memory: memoryview) -> None:
        """Take bytes of `file` from `offset` on. Raises ChecksumError with the name of the tensor that is damaged."""
        for check, begin, end in self._cursor.advance(file, offset, memory.nbytes):
            self._sums[check] = zlib.crc32(memory[begin - offset : end - offset], self._sums[check])
            if end == _end(check.entry):
                compare(check, self._sums.pop(check))

    def finish(self) -> None:
        """Note that the unit has arrived whole and right."""
        self._unit.verified = True


def verify_by_itself(check: Check) -> None:
    """Read one tensor and compare it, for those that no unit reads whole. Raises ChecksumError, ReadError."""
    found = 0
    try:
        with check.entry.file.path.open("rb") as stream:
            stream.seek(check.entry.offset)
            for begin in range(0, check.entry.nbytes, _PIECE):
                found = zlib.crc32(stream.read(min(_PIECE, check.entry.nbytes - begin)), found)
    except OSError as error:
        raise ReadError(f"cannot be read: {error.strerror}", file=check.entry.file.path) from error
    compare(check, found)


class _Cursor:
    """Says which bytes of which tensors a read brings that no read before it has brought."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self._checks: dict[SourceFile, list[Check]] = defaultdict(list)
        for check in checks:
            if check.entry.nbytes:
                self._checks[check.entry.file].append(check)
        self._reached: dict[Check, int] = {}

    def advance(self, file: SourceFile, offset: int, nbytes: int) -> Iterator[tuple[Check, int, int]]:
        """Yield (check, first byte, end) of each tensor that goes on in a read; reads come in order of their bytes."""
        checks = self._checks.get(file, [])
        first = bisect_right(checks, offset, key=lambda check: _end(check.entry))
        for check in checks[first:]:
            if check.entry.offset >= offset + nbytes:
                break
            begin = max(self._reached.get(check, check.entry.offset), offset)
            end = min(_end(check.entry), offset + nbytes)
            if begin < end:
                self._reached[check] = end
                yield check, begin, end


def _end(entry: TensorEntry) -> int:
    return entry.offset + entry.nbytes


def compare(check: Check, found: int) -> None:
    """Raise ChecksumError, with the name of the tensor, unless `found` is its checksum."""
    if found != check.crc32:
        raise ChecksumError(
            f"tensor {check.entry.name!r} is damaged",
            file=check.entry.file.path,
            wanted=f"checksum {check.crc32:08x}",
            got=f"{found:08x}",
            fix="Pack the model again, or copy the file again.",
        )
