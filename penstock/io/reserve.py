"""A file on a disk that is there while a process works, and only for it: space that is set aside, without a name."""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from penstock.errors import TargetError
from penstock.io.files import SourceFile
from penstock.io.scratch import Sink, check_directory, check_file_limit, nameless_file

__all__ = ["check_reserve", "choose_directory", "reserved_file"]

ELSEWHERE = Path("/var/tmp")  # noqa: S108 - a name on a disk, not in memory, as /tmp may be; the file itself has none
_FIRST_NBYTES = 1 << 20

logger = logging.getLogger("penstock.io")


def choose_directory(beside: Path, nbytes: int) -> Path:
    """Return where a scratch file goes: into the directory `beside`, if there is a disk to be written, or /var/tmp."""
    try:
        _check_writable(beside)
        check_directory(beside, nbytes)
    except TargetError as error:
        logger.info("scratch directory %s, because of %s", ELSEWHERE, error)
        return ELSEWHERE
    logger.info("scratch directory %s: it is on the model's disk", beside)
    return beside


def check_reserve(directory: Path, nbytes: int) -> None:
    """Raise TargetError for a directory that cannot have such a file or lies in memory, NoSpaceError for too little."""
    check_directory(directory, nbytes)
    _check_writable(directory)
    check_file_limit(directory, nbytes)


def _check_writable(directory: Path) -> None:
    if not os.access(directory, os.W_OK | os.X_OK):  # also where the file system is mounted read-only
        raise TargetError("the directory cannot be written", file=directory, fix="Name another one on a disk.")


@contextmanager
def reserved_file(directory: Path, nbytes: int) -> Iterator[SourceFile]:
    """Set `nbytes` of a disk aside for a file; it is gone when this ends, or the process, in whatever way.

    Path and errors are those of `nameless_file`.
    """
    check_reserve(directory, nbytes)

    def fill(sink: Sink) -> None:
        sink.reserve(nbytes)
        with mmap.mmap(-1, min(_FIRST_NBYTES, nbytes)) as zeros, memoryview(zeros) as view:
            sink.write(view)  # something to choose a reader by

    with nameless_file(directory, nbytes, fill) as file:
        yield file
