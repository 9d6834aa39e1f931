"""A file of lines, read as a stream: a million lines never are in memory, nor is one that does not end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["MAX_LINE_NBYTES", "Survey", "read_lines", "survey"]

MAX_LINE_NBYTES = 16 << 20
"""A prompt of a million token ids has less than half of this."""

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Survey:
    """What a file holds: lines that are not blank, bytes, and the SHA-256 of those."""

    num_lines: int
    nbytes: int
    sha256: str


def survey(path: Path) -> Survey:
    """Read a file once. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        num_lines = sum(1 for _ in read_lines(stream, digest=digest))
        return Survey(num_lines, stream.tell(), digest.hexdigest())


def read_lines(
    stream: BinaryIO, *, digest: Any = None, max_nbytes: int = MAX_LINE_NBYTES
) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number from 1, line without its end) of every line that is not blank; None for one that is too long.

    Blank lines count, as an editor counts them. All bytes go into `digest`, a hash object, where one is given.
    """
    number = 0
    while piece := stream.readline(max_nbytes + 1):
        number += 1
        line: bytes | None = piece.removeprefix(_BOM) if number == 1 else piece
        if len(piece) > max_nbytes:
            line = None
        while True:
            if digest is not None:
                digest.update(piece)
            if line is not None or piece.endswith(b"\n") or not (piece := stream.readline(max_nbytes)):
                break
        if line is None:
            yield number, None
        elif stripped := line.strip():
            yield number, stripped
