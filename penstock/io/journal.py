"""A journal: finished work, one entry per line, in a file that survives whatever ends the process.

An entry is acknowledged when `commit` has returned: it is on the disk then. The first line names the job, so that
entries of two jobs never mix. Every line carries a checksum, because what a crash leaves after the last commit may be
anything: a part of a line, zeros, a later line without the one before it. `open` cuts that off.

After a failed write or fsync nothing is tried again: the kernel may have dropped the pages and call them clean
(Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020). The file is cut back to what was
acknowledged.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import zlib
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from penstock.errors import ClosedError, JournalError, OutputError
from penstock.io.atomic import sync_directory

__all__ = ["Journal"]

_MAGIC = "penstock journal"
_BUFFER_NBYTES = 1 << 20
_MAX_DIGITS = 12
"""A number with more is none of ours: noting it would take a byte for each below it."""

logger = logging.getLogger("penstock.io")


class Journal:
    """Entries (number, payload) of one job; a context manager. `number` is at least 1 and occurs once.

    Entries are buffered until `commit`. One process has a journal open at a time. `len` counts all entries, committed
    or not, and `number in journal` asks for one; both take a byte of memory per number.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        """Use `Journal.open`."""
        self.path = path
        self._descriptor = descriptor
        self._done = bytearray()
        self._count = 0
        self._start = 0
        self._end = 0
        self._committed = 0
        self._buffer: list[bytes] = []
        self._buffered = 0
        self._keep_empty = False
        self.finished = False

    @classmethod
    def open(cls, path: Path, job: Mapping[str, Any], *, keep_empty: bool = False) -> Self:
        """Begin the journal of a job, or go on with it; `job` is what must be equal for that, as JSON has it.

        One without entries leaves no file, unless `keep_empty` says that there is more whose job it names. Raises
        JournalError when the file is another job's, or no journal, or open elsewhere; OutputError when it cannot be
        written.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError("cannot open the journal", file=path, got=error.strerror) from error
        journal = cls(path, descriptor)
        try:
            journal._lock()
            journal._begin(job)
            journal._keep_empty = keep_empty
        except OSError as error:
            journal.close()
            if isinstance(error, OutputError):
                raise
            raise OutputError("cannot use the journal", file=path, got=error.strerror) from error
        except BaseException:
            journal.close()
            raise
        return journal

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError("another process is running this job", file=self.path, fix="Wait for it.") from None
        if os.fstat(self._descriptor).st_nlink == 0:
            raise JournalError("another process has just finished this job", file=self.path, fix="Look at its output.")

    def _begin(self, job: Mapping[str, Any]) -> None:
        header = _line(0, json.dumps({"format": _MAGIC, "version": 1, "job": job}).encode())
        with os.fdopen(os.dup(self._descriptor), "rb") as stream:
            first = stream.readline()
            if header.startswith(first.rstrip(b"\0")) and first != header:  # new, or it died while being made
                self._make(header)
            elif first != header:
                raise self._not_ours(first, job)
            self._start = self._end = self._committed = len(header)
            stream.seek(len(header))
            for line in stream:
                if not self._take(line):
                    break
                self._end += len(line)
        if cut := os.fstat(self._descriptor).st_size - self._end:
            logger.warning("%s: the last %d bytes were never acknowledged, and are cut off", self.path, cut)
            os.ftruncate(self._descriptor, self._end)
        self._sync()

    def _make(self, header: bytes) -> None:
        try:
            os.ftruncate(self._descriptor, 0)
            self._write(header)
            self._sync()
            sync_directory(self.path.parent)
        except OSError:
            with suppress(OSError):
                self.path.unlink()
            raise

    def _not_ours(self, first: bytes, job: Mapping[str, Any]) -> JournalError:
        entry = _parse(first)
        theirs = None
        if entry is not None and entry[0] == 0:
            with suppress(ValueError, AttributeError):
                theirs = json.loads(entry[1]).get("job")
        if not isinstance(theirs, dict):
            return JournalError("not a journal of this program", file=self.path, fix="Name another output.")
        name = next((name for name in {**theirs, **job} if theirs.get(name) != job.get(name)), "version")
        return JournalError(
            f"this journal belongs to a job with another {name}",
            file=self.path,
            wanted=json.dumps(theirs.get(name)),
            got=json.dumps(job.get(name)),
            fix="Run the same command to go on, name another output, or remove the journal to begin again.",
        )

    def _take(self, line: bytes) -> bool:
        """Note an entry that was read; say whether it is whole."""
        entry = _parse(line)
        if entry is None:
            return False
        if entry[0] == 0:
            self.finished = True
        elif entry[0] in self:
            raise JournalError(f"entry {entry[0]} is there twice", file=self.path, fix="Remove the journal.")
        else:
            self._note(entry[0])
        return True

    def _note(self, number: int) -> None:
        if number >= len(self._done):
            self._done.extend(bytes(max(number + 1 - len(self._done), len(self._done))))
        self._done[number] = 1
        self._count += 1

    def __contains__(self, number: int) -> bool:
        return number < len(self._done) and bool(self._done[number])

    def __len__(self) -> int:
        return self._count

    def append(self, number: int, payload: bytes) -> None:
        """Add an entry, a payload without line ends. Raises OutputError."""
        assert number > 0
        assert number not in self, f"entry {number} is there already"
        self._note(number)
        self._append(_line(number, payload))

    def _append(self, line: bytes) -> None:
        self._check_open()
        self._buffer.append(line)
        self._buffered += len(line)
        if self._buffered > _BUFFER_NBYTES:
            self._guarded(self._flush)

    def commit(self) -> None:
        """Return when every entry is on the disk. Raises OutputError; what was acknowledged before stays."""
        self._check_open()
        if self._buffer or self._end > self._committed:
            self._guarded(self._flush, self._sync)

    def finish(self) -> None:
        """Commit, and note for good that the job is done, so that its output may be put in place."""
        if not self.finished:
            self._append(_line(0, b"{}"))
            self.commit()
            self.finished = True

    def _flush(self) -> None:
        self._write(b"".join(self._buffer))
        self._buffer.clear()
        self._buffered = 0

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, self._end)
            self._end += written
            view = view[written:]

    def _sync(self) -> None:
        os.fdatasync(self._descriptor)
        self._committed = self._end
        logger.debug("%d entries acknowledged", self._count)

    def _guarded(self, *steps: Any) -> None:
        try:
            for step in steps:
                step()
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._committed)
            self.close()
            raise OutputError(
                "the journal cannot be written",
                file=self.path,
                got=error.strerror,
                fix="Everything acknowledged is kept: make room, or mend the disk, and run the same command again.",
            ) from error

    def in_order(self) -> Iterator[bytes]:
        """Yield the payloads by number; takes 8 bytes of memory per number."""
        offsets = array("q", bytes(8 * max(len(self._done), 1)))
        with os.fdopen(os.dup(self._descriptor), "rb") as stream:
            offset = stream.seek(self._start)
            for line in stream:
                offsets[int(line[: line.index(b" ")])] = offset
                offset += len(line)
            for offset in offsets[1:]:
                if offset:
                    if stream.tell() != offset:
                        stream.seek(offset)
                    entry = _parse(stream.readline())
                    if entry is None:
                        raise JournalError("an entry has changed on the disk", file=self.path, fix="Check the disk.")
                    yield entry[1]

    def remove(self) -> None:
        """Delete the file and close. Raises OutputError."""
        self._check_open()
        try:
            self.path.unlink()
        except OSError as error:
            raise OutputError("the journal cannot be removed", file=self.path, got=error.strerror) from error
        self.close()

    def _check_open(self) -> None:
        if self._descriptor < 0:
            raise ClosedError("the journal is closed")

    def close(self) -> None:
        """Give the file back; what was not committed is dropped."""
        if self._descriptor >= 0:
            if self._start and not self._count and not self.finished and not self._keep_empty:
                with suppress(OSError):  # it only says whose job it was
                    self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _line(number: int, payload: bytes) -> bytes:
    assert b"\n" not in payload
    prefix = b"%d " % number
    return b"%b%08x %b\n" % (prefix, zlib.crc32(payload, zlib.crc32(prefix)), payload)


def _parse(line: bytes) -> tuple[int, bytes] | None:
    """Return number and payload of a line that is whole."""
    number, _, rest = line.partition(b" ")
    if not number.isdigit() or len(number) > _MAX_DIGITS or not line.endswith(b"\n"):
        return None
    payload = rest[9:-1]
    entry = int(number), payload
    return entry if _line(*entry) == line else None
