"""What every backend on real files shares: blocks, what to make of a transfer's result, and what was done so far."""

from __future__ import annotations

import errno
import os
import threading
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from penstock.errors import ClosedError, ReadError, WriteError
from penstock.io.files import SourceFile
from penstock.io.libc import address_of
from penstock.io.open_file import REFUSALS, OpenFile, disk_error
from penstock.io.reader import ALIGNMENT, Read, Reader, ReaderStatistics, Ticket, Write

__all__ = ["Block", "DiskReader", "transfer_now"]

_MAX_FRUITLESS_ATTEMPTS = 8
_FIXES = {
    errno.ENOSPC: "Free space on this file system.",
    errno.EDQUOT: "Free space within your disk quota.",
    errno.EFBIG: "Raise the limit on file sizes (`ulimit -f`), or use a file system without this one.",
}


class Block:
    """A piece of a read or write on its way: knows what is still to come, and what to do about every result."""

    __slots__ = (
        "_attempts",
        "_expected",
        "_issued_direct",
        "address",
        "buffered",
        "memory",
        "offset",
        "opened",
        "size",
        "write",
    )

    def __init__(
        self, opened: OpenFile, offset: int, memory: memoryview, address: int, *, expected: int, write: bool = False
    ) -> None:
        self.opened = opened
        self.offset = offset
        self.memory = memory
        self.address = address
        self.write = write
        self.size = expected
        self.buffered = False
        self._expected = expected
        self._issued_direct = opened.direct
        self._attempts = 0

    def issue(self) -> bool:
        """Note how the next attempt is made; return whether it goes around the page cache."""
        self._issued_direct = self.opened.direct
        self.buffered = self.buffered or not self._issued_direct
        return self._issued_direct

    def take(self, result: int) -> bool:
        """Account for one attempt's `result`, a count of bytes or -errno; return whether the block is complete.

        If not, another attempt at the block's new offset and memory is due. Raises ReadError and FileChangedError.
        """
        if result >= self._expected:
            return True
        if result < 0:
            self._take_error(-result)
            return False
        # Started again at an aligned point: O_DIRECT asks for it, and short reads may end anywhere.
        progress = result // ALIGNMENT * ALIGNMENT
        if progress == 0:
            self.opened.check_unchanged()
            self._count_attempt("takes no bytes" if self.write else "delivers fewer bytes than it has", errno.EIO)
        self.offset += progress
        self.memory = self.memory[progress:]
        self.address += progress
        self._expected -= progress
        return False

    def _take_error(self, number: int) -> None:
        if number in {errno.EINTR, errno.EAGAIN}:
            self._count_attempt(self._fault, number)
        elif number in REFUSALS and self._issued_direct:
            self.opened.give_up_direct(number, f"offset {self.offset}")
        else:
            raise self._error(self._fault, number)

    @property
    def _fault(self) -> str:
        return "cannot be written" if self.write else "cannot be read"

    def _count_attempt(self, what: str, number: int) -> None:
        self._attempts += 1
        if self._attempts >= _MAX_FRUITLESS_ATTEMPTS:
            raise self._error(what, number)

    def _error(self, what: str, number: int) -> ReadError | WriteError:
        return disk_error(
            f"{what} at offset {self.offset}, length {self._expected}",
            self.opened.file,
            number,
            write=self.write,
            fix=_FIXES.get(number, "Look at the kernel's log (`dmesg`) and the disk's health."),
        )


def transfer_now(block: Block) -> None:
    """Read or write a whole block in the calling thread, with the GIL released."""
    done = False
    while not done:
        direct = block.issue()
        offset, fd = block.offset, block.opened.fd
        try:
            result = (os.pwritev if block.write else os.preadv)(fd, [block.memory], offset)
        except OSError as error:
            result = -(error.errno or errno.EIO)
        done = block.take(result)
        if not direct and not block.write and result > 0:
            # The bytes now are where they are wanted; a second copy would only push other memory out.
            os.posix_fadvise(fd, offset, result, os.POSIX_FADV_DONTNEED)


class DiskReader(Reader):
    """Keeps the descriptors, cuts requests into blocks and counts what was done. Safe to count from several threads.

    A backend adds how blocks are launched and waited for.
    """

    def __init__(self, *, block_bytes: int, direct: bool) -> None:
        assert block_bytes > 0
        assert block_bytes % ALIGNMENT == 0
        self._block_bytes = block_bytes
        self._direct = direct
        self._files: dict[SourceFile, OpenFile] = {}
        self._written: dict[SourceFile, OpenFile] = {}
        self._closed = False
        self._lock = threading.Lock()
        self._under_way = 0
        self._busy_since = 0.0
        self._counts = _Counts()

    def submit(self, reads: Sequence[Read]) -> Ticket:
        """Cut reads into blocks and launch them; return at once."""
        return self._launch(self._cut(reads))

    def submit_writes(self, writes: Sequence[Write]) -> Ticket:
        """Cut writes into blocks and launch them; return at once."""
        self._check_open()
        opened = {write.file: self._open_to_write(write.file) for write in writes}
        return self._launch([block for write in writes for block in self._blocks_of(opened[write.file], write)])

    def sync(self, file: SourceFile) -> None:
        """Flush a file's data, its size and the disk's own cache."""
        self._check_open()
        opened = self._open_to_write(file)
        try:
            os.fdatasync(opened.fd)
        except OSError as error:
            number = error.errno or errno.EIO
            raise disk_error("cannot be synchronised", file, number, write=True, fix=_FIXES.get(number)) from error

    @abstractmethod
    def _launch(self, blocks: Sequence[Block]) -> Ticket:
        """Start a batch."""

    def statistics(self) -> ReaderStatistics:
        """Return a snapshot."""
        self._check_open()
        with self._lock:
            counts = asdict(self._counts)
            if self._under_way:
                counts["busy_seconds"] += time.perf_counter() - self._busy_since
            return ReaderStatistics(**counts)

    def close(self) -> None:
        """Wait for what is in flight, then close every descriptor."""
        if self._closed:
            return
        self._closed = True
        try:
            self._drain()
        finally:
            for opened in (*self._files.values(), *self._written.values()):
                opened.close()

    @abstractmethod
    def _drain(self) -> None:
        """Wait for what is in flight and release what only this backend has."""

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the {self.name} reader was used after close")

    def _cut(self, reads: Sequence[Read]) -> list[Block]:
        """Open the files and return the blocks that hold any bytes of them."""
        self._check_open()
        opened = {read.file: self._open(read.file) for read in reads}
        return [block for read in reads for block in self._blocks(opened[read.file], read)]

    def _open(self, file: SourceFile) -> OpenFile:
        opened = self._written.get(file) or self._files.get(file)
        if opened is None:
            opened = self._files[file] = OpenFile(file, direct=self._direct)
        return opened

    def _open_to_write(self, file: SourceFile) -> OpenFile:
        opened = self._written.get(file)
        if opened is None:
            opened = self._written[file] = OpenFile(file, direct=self._direct, write=True)
        return opened

    def _blocks(self, opened: OpenFile, read: Read) -> Iterator[Block]:
        address = _aligned_address(read.offset, read.memory)
        available = min(read.memory.nbytes, opened.nbytes - read.offset)
        for start in range(0, max(0, available), self._block_bytes):
            memory = read.memory[start : start + self._block_bytes]
            yield Block(
                opened, read.offset + start, memory, address + start, expected=min(memory.nbytes, available - start)
            )

    def _blocks_of(self, opened: OpenFile, write: Write) -> Iterator[Block]:
        address = _aligned_address(write.offset, write.memory)
        for start in range(0, write.memory.nbytes, self._block_bytes):
            memory = write.memory[start : start + self._block_bytes]
            yield Block(opened, write.offset + start, memory, address + start, expected=memory.nbytes, write=True)

    def _check_unchanged(self, files: Iterable[OpenFile]) -> None:
        for opened in files:
            opened.check_unchanged()

    def _begin(self, blocks: int) -> None:
        """Count blocks as under way."""
        with self._lock:
            if self._under_way == 0:
                self._busy_since = time.perf_counter()
            self._under_way += blocks

    def _end(self, block: Block, *, delivered: bool) -> None:
        """Count one block's end."""
        with self._lock:
            self._under_way -= 1
            if self._under_way == 0:
                self._counts.busy_seconds += time.perf_counter() - self._busy_since
            if delivered:
                self._counts.add(block)


@dataclass(slots=True)
class _Counts:
    """ReaderStatistics that grow in place: a new value per block would cost more than the rest of a block's way."""

    reads: int = 0
    bytes_read: int = 0
    busy_seconds: float = 0.0
    buffered_reads: int = 0
    writes: int = 0
    bytes_written: int = 0

    def add(self, block: Block) -> None:
        if block.write:
            self.writes += 1
            self.bytes_written += block.size
        else:
            self.reads += 1
            self.bytes_read += block.size
            self.buffered_reads += block.buffered


def _aligned_address(offset: int, memory: memoryview) -> int:
    # Checked here, since a misaligned request would only show as a refusal of O_DIRECT.
    assert offset >= 0
    assert offset % ALIGNMENT == 0
    assert memory.nbytes % ALIGNMENT == 0
    address = address_of(memory)
    assert address % ALIGNMENT == 0
    return address
