"""Files that appear whole under their name or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from penstock.errors import OutputError, PenstockError
from penstock.io.interrupts import held_back

__all__ = ["appearing", "naming", "sync_directory", "write_whole"]


@contextmanager
def appearing(path: Path, *, sibling: Path | None = None) -> Iterator[TextIO]:
    """Open a hidden sibling that takes the name `path` when the block ends, flushed to the disk.

    It is removed when the block fails. Raises OutputError when the sibling cannot be made, flushed or renamed. A caller
    whom no other process can disturb names the `sibling`, so that one which a killed process has left is written over.
    """
    hidden: Path | None = None
    stream: TextIO | None = None
    try:
        with naming(path), held_back():
            if sibling is None:
                descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
                hidden = Path(name)
            else:
                descriptor = os.open(sibling, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                hidden = sibling
            stream = os.fdopen(descriptor, "w", encoding="utf-8")
        yield stream
        with naming(path):
            stream.flush()
            os.fsync(stream.fileno())
        with naming(path), held_back():
            umask = os.umask(0)
            os.umask(umask)
            hidden.chmod(0o666 & ~umask)
            hidden.replace(path)
            hidden = None
            sync_directory(path.parent)
    finally:
        if stream is not None:
            with suppress(OSError):  # what could not be written cannot be flushed now either
                stream.close()
        if hidden is not None:
            with suppress(OSError):  # a disk that fails may refuse this too; its first error is the one to tell
                hidden.unlink()


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all. Raises OutputError and leaves nothing behind."""
    with appearing(path) as stream, naming(path):
        stream.write(text)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the operating system says into an OutputError that names the file."""
    try:
        yield
    except PenstockError:  # it has a name already
        raise
    except OSError as error:
        raise OutputError("cannot write the output", file=path, got=error.strerror or str(error)) from error


def sync_directory(directory: Path) -> None:
    """Make renames in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
