"""A file that is really the one whose header was read, opened around the page cache where that is possible.

Bytes come from the very file whose header was read, or not at all: its identity is compared when it is opened and again
when a batch has ended. O_DIRECT can be refused late and in several ways (at open; at the first read, with EINVAL; by
memory that a driver allocated, with EFAULT), and some file systems refuse only some files. So being direct or buffered
is a state of each open file: after one refusal the file is buffered for good, and the block in question is done again.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading

from penstock.errors import FileChangedError, ReadError, WriteError
from penstock.io.files import SourceFile

__all__ = ["REFUSALS", "OpenFile", "disk_error"]

REFUSALS = frozenset({errno.EINVAL, errno.EFAULT, errno.EOPNOTSUPP})
"""How the kernel says that it cannot go around the page cache; other faults have the same numbers."""

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
                if error.errno not in REFUSALS:
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
                "%s: O_DIRECT was refused at %s (%s); going through the page cache, which is slower",
                self.file.path,
                where,
                os.strerror(number),
            )

    @property
    def nbytes(self) -> int:
        """The file's size: as its header's reader saw it, or of a file that we write to, as it is now."""
        return os.fstat(self.fd).st_size if self.write else self.file.nbytes

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
