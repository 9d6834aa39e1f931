"""What every backend that reads real files shares: checked descriptors, blocks, and what to make of a read's result.

Bytes come from the very file whose header was read, or not at all: its identity is compared when it is opened and again
when a batch has ended. O_DIRECT can be refused late and in several ways (at open; at the first read, with EINVAL; by
memory that a driver allocated, with EFAULT), and some file systems refuse only some files. So being direct or buffered
is a state of each open file: after one refusal the file is buffered for good, and the block in question is read again.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence

from penstock.errors import ClosedError, FileChangedError, ReadError, WriteError
from penstock.io.files import SourceFile
from penstock.io.libc import address_of
from penstock.io.reader import ALIGNMENT, Read, Reader, ReaderStatistics

__all__ = ["Block", "DiskReader", "OpenFile", "disk_error", "read_now"]

_REFUSALS = frozenset({errno.EINVAL, errno.EFAULT, errno.EOPNOTSUPP})
_MAX_FRUITLESS_ATTEMPTS = 8
_READ_AGAIN = "Do not change a checkpoint while it is in use; start again."

logger = logging.getLogger("penstock.io")


def disk_error(
    what: str, file: SourceFile, number: int, *, write: bool = False, fix: str | None = None, got: object = None
) -> ReadError | WriteError:
    """Return a ReadError, or with `write` a WriteError, that carries `number` as its errno."""
    kind = WriteError if write else ReadError
    error = kind(f"{what}: {os.strerror(number)} (errno {number})", file=file.path, got=got, fix=fix)
    error.errno = number
    return error


class OpenFile:
    """A descriptor of the file that `file` names, opened with O_DIRECT if `direct` and the file system agrees.

    A file opened with `write` changes its size and times by our own doing, so only its device and inode are compared.
    """

    def __init__(self, file: SourceFile, *, direct: bool, write: bool = False) -> None:
        self.file = file
        self.direct = direct
        self.write = write
        self._lock = threading.Lock()
        self.fd = -1
        self.fd = self.open_again()

    def open_again(self) -> int:
        """Return a new, checked descriptor with its own position, direct or buffered as this file is now."""
        try:
            fd = self._open()
        except FileNotFoundError as error:
            raise FileChangedError("the file is gone", file=self.file.path, fix=_READ_AGAIN) from error
        except OSError as error:
            number = error.errno or errno.EIO
            full = number in {errno.EMFILE, errno.ENFILE}
            fix = "Raise the limit on open files: `ulimit -n 65536`." if full else "Check the file and its permissions."
            raise disk_error("cannot be opened", self.file, number, write=self.write, fix=fix) from error
        try:
            self.check_unchanged(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _open(self) -> int:
        flags = (os.O_RDWR if self.write else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
        if self.direct:
            try:
                return os.open(self.file.path, flags | os.O_DIRECT)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                self.give_up_direct(error.errno, "open")
        return os.open(self.file.path, flags)

    def check_unchanged(self, fd: int | None = None) -> None:
        """Raise FileChangedError unless the descriptor's file is, still, the one whose header was read."""
        status = os.fstat(self.fd if fd is None else fd)
        got = SourceFile.from_status(self.file.path, status)
        facts = {"device": "device", "inode": "inode"}
        if not self.write:
            facts |= {"bytes": "nbytes", "modified (ns)": "mtime_ns"}
        changed = [(label, field) for label, field in facts.items() if getattr(got, field) != getattr(self.file, field)]
        if not changed:
            return
        raise FileChangedError(
            "the file is not the one whose header was read",
            file=self.file.path,
            wanted=", ".join(f"{label} {getattr(self.file, field)}" for label, field in changed),
            got=", ".join(f"{label} {getattr(got, field)}" for label, field in changed),
            fix=_READ_AGAIN,
        )

    def give_up_direct(self, number: int, where: str) -> None:
        """Go through the page cache from now on, on the same descriptor."""
        with self._lock:
            if self.direct and self.fd >= 0:
                fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            first, self.direct = self.direct, False
        if first:
            logger.warning(
                "%s: O_DIRECT was refused at %s (%s); reading it through the page cache, which is slower",
                self.file.path,
                where,
                os.strerror(number),
            )

    def error(self, what: str, number: int, *, fix: str | None = None) -> ReadError | WriteError:
        """Return what to raise when a transfer ended with `number`."""
        return disk_error(what, self.file, number, write=self.write, fix=fix)

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Block:
    """A piece of a read on its way: knows what is still to come, and what to do about every result."""

    __slots__ = ("_attempts", "_expected", "_issued_direct", "buffered", "memory", "offset", "opened", "size")

    def __init__(self, opened: OpenFile, offset: int, memory: memoryview, expected: int) -> None:
        self.opened = opened
        self.offset = offset
        self.memory = memory
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
            self._count_attempt("delivers fewer bytes than it has", errno.EIO)
        self.offset += progress
        self.memory = self.memory[progress:]
        self._expected -= progress
        return False

    def _take_error(self, number: int) -> None:
        if number in {errno.EINTR, errno.EAGAIN}:
            self._count_attempt("cannot be read", number)
        elif number in _REFUSALS and self._issued_direct:
            self.opened.give_up_direct(number, f"offset {self.offset}")
        else:
            raise self._error("cannot be read", number)

    def _count_attempt(self, what: str, number: int) -> None:
        self._attempts += 1
        if self._attempts >= _MAX_FRUITLESS_ATTEMPTS:
            raise self._error(what, number)

    def _error(self, what: str, number: int) -> ReadError | WriteError:
        place = f"offset {self.offset}, length {self._expected}"
        return self.opened.error(
            f"{what} at {place}",
            number,
            fix="Look at the kernel's log (`dmesg`) and the disk's health.",
        )


def read_now(block: Block) -> None:
    """Read a whole block in the calling thread, with the GIL released."""
    done = False
    while not done:
        direct = block.issue()
        offset, fd = block.offset, block.opened.fd
        try:
            result = os.preadv(fd, [block.memory], offset)
        except OSError as error:
            result = -(error.errno or errno.EIO)
        done = block.take(result)
        if not direct and result > 0:
            # The bytes now are where they are wanted; a second copy would only push other memory out.
            os.posix_fadvise(fd, offset, result, os.POSIX_FADV_DONTNEED)


class DiskReader(Reader):
    """Keeps the descriptors, cuts reads into blocks and counts what was done. Safe to count from several threads."""

    def __init__(self, *, block_bytes: int, direct: bool) -> None:
        assert block_bytes > 0
        assert block_bytes % ALIGNMENT == 0
        self._block_bytes = block_bytes
        self._direct = direct
        self._files: dict[SourceFile, OpenFile] = {}
        self._closed = False
        self._lock = threading.Lock()
        self._under_way = 0
        self._busy_since = 0.0
        self._counts = ReaderStatistics(reads=0, bytes_read=0, busy_seconds=0.0, buffered_reads=0)

    def statistics(self) -> ReaderStatistics:
        """Return a snapshot."""
        self._check_open()
        with self._lock:
            return self._counts

    def close(self) -> None:
        """Wait for what is in flight, then close every descriptor."""
        if self._closed:
            return
        self._closed = True
        try:
            self._drain()
        finally:
            for opened in self._files.values():
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
        opened = self._files.get(file)
        if opened is None:
            opened = self._files[file] = OpenFile(file, direct=self._direct)
        return opened

    def _blocks(self, opened: OpenFile, read: Read) -> Iterator[Block]:
        # Checked here, since misaligned reads would only show as a refusal of O_DIRECT.
        assert read.offset >= 0
        assert read.offset % ALIGNMENT == 0
        assert read.memory.nbytes % ALIGNMENT == 0
        assert address_of(read.memory) % ALIGNMENT == 0
        available = min(read.memory.nbytes, opened.file.nbytes - read.offset)
        for start in range(0, max(0, available), self._block_bytes):
            memory = read.memory[start : start + self._block_bytes]
            yield Block(opened, read.offset + start, memory, min(memory.nbytes, available - start))

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
            idle = self._under_way == 0
            counts = self._counts
            self._counts = ReaderStatistics(
                reads=counts.reads + delivered,
                bytes_read=counts.bytes_read + (block.size if delivered else 0),
                busy_seconds=counts.busy_seconds + (time.perf_counter() - self._busy_since if idle else 0.0),
                buffered_reads=counts.buffered_reads + (delivered and block.buffered),
            )
