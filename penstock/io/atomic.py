"""Files that appear whole under their name or not at all."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

from penstock.errors import OutputError

__all__ = ["sync_directory", "write_whole"]

_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def write_whole(path: Path, text: str) -> None:
    """Write a hidden sibling, flush it to the disk, and rename it. Raises OutputError and leaves nothing behind.

    Signals that would end the process wait until it is done, since one between making the sibling and noting its name
    would leave it there.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    hidden: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        hidden = Path(name)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        hidden.chmod(0o666 & ~umask)
        hidden.replace(path)
        hidden = None
        sync_directory(path.parent)
    except OSError as error:
        raise OutputError("cannot be written", file=path, got=error.strerror or str(error)) from error
    finally:
        if hidden is not None:
            hidden.unlink(missing_ok=True)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def sync_directory(directory: Path) -> None:
    """Make renames in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
