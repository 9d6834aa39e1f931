"""How the runtime reads a disk: values that `penstock profile` recommends and users can set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from penstock.errors import ConfigError
from penstock.io.reader import ALIGNMENT

__all__ = ["NUM_REGIONS", "ReadSettings", "ReaderName"]

ReaderName = Literal["auto", "libaio", "threads", "aiofiles"]

_MAX_BLOCK_NBYTES = 64 << 20
_MAX_IN_FLIGHT_NBYTES = 1 << 30
_REGION_STEP = 2 << 20
NUM_REGIONS = 4
"""Staging regions that reads land in, in turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSettings:
    """Which reader, the size of a request, and how many bytes are to be under way at any time.

    `block_nbytes` None leaves the size of requests to the reader. `in_flight_nbytes` also sets how much pinned host
    memory the reads land in: a third more. The default keeps a disk of 10 GB/s busy for 10 ms, for which the thread
    that drives it may have to wait for the interpreter. Raises ConfigError for values out of range.
    """

    backend: ReaderName = "auto"
    block_nbytes: int | None = None
    in_flight_nbytes: int = 96 << 20

    def __post_init__(self) -> None:
        block = self.block_nbytes
        if block is not None and not (ALIGNMENT <= block <= _MAX_BLOCK_NBYTES and block % ALIGNMENT == 0):
            raise ConfigError(
                "the read block size is out of range",
                wanted=f"a multiple of {ALIGNMENT} bytes, at most {_MAX_BLOCK_NBYTES}",
                got=block,
            )
        if not (block or ALIGNMENT) <= self.in_flight_nbytes <= _MAX_IN_FLIGHT_NBYTES:
            raise ConfigError(
                "the bytes in flight are out of range",
                wanted=f"one block up to {_MAX_IN_FLIGHT_NBYTES} bytes",
                got=self.in_flight_nbytes,
            )

    @property
    def region_nbytes(self) -> int:
        """Bytes of one staging region: while one of them is emptied, the others hold what is in flight."""
        share = -(-self.in_flight_nbytes // (NUM_REGIONS - 1))
        return -(-share // _REGION_STEP) * _REGION_STEP

    @property
    def staging_nbytes(self) -> int:
        """The most host memory that reads land in; less where no unit fills a region."""
        return NUM_REGIONS * self.region_nbytes
