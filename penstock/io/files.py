"""Names for bytes on disk: a file whose identity is known, and a tensor's place in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

__all__ = ["DTYPE_BITS", "SourceFile", "TensorEntry"]

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits per element of every dtype of the safetensors format."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was when its header was read.

    `device`, `inode`, `nbytes` and `mtime_ns` are compared whenever the file is opened again, so that bytes never come
    from another file of the same name.
    """

    path: Path
    nbytes: int
    device: int
    inode: int
    mtime_ns: int

    @classmethod
    def from_status(cls, path: Path, status: os.stat_result) -> Self:
        """Return the identity of the file at `path` that `os.stat` or `os.fstat` described."""
        return cls(path, status.st_size, status.st_dev, status.st_ino, status.st_mtime_ns)

    @classmethod
    def identify(cls, path: Path) -> Self:
        """Return the identity of the file that `path` names now; raises OSError."""
        return cls.from_status(path, path.stat())


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint: `nbytes` bytes at absolute `offset` of `file`, row-major, little-endian."""

    name: str
    file: SourceFile
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
