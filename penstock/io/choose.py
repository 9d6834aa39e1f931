"""Choose a reader once, by what really happens when it reads the checkpoint into the memory that will be used."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from penstock.errors import ConfigError, PenstockError, ReadError
from penstock.io.aiofiles import AiofilesReader
from penstock.io.direct import direct_refusal
from penstock.io.files import SourceFile
from penstock.io.libaio import LibaioReader
from penstock.io.reader import ALIGNMENT, Read, Reader
from penstock.io.settings import ReaderName
from penstock.io.threads import ThreadsReader

__all__ = ["ReaderChoice", "open_reader"]

_PROBE_BYTES = 1 << 20
_INVERSE = bytes(255 - value for value in range(256))

logger = logging.getLogger("penstock.io")


@dataclass(frozen=True, slots=True)
class ReaderChoice:
    """Which reader was opened and why; `rejected` pairs the names of those tried before it with their faults."""

    name: str
    direct: bool
    reason: str
    rejected: tuple[tuple[str, str], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def open_reader(
    name: ReaderName, sample: SourceFile, memory: memoryview, *, block_nbytes: int | None = None
) -> tuple[Reader, ReaderChoice]:
    """Open the reader called `name`, or with "auto" the first of libaio, threads, aiofiles that works here.

    Each is tried by reading the start of `sample` into the start of `memory`, which is overwritten, and comparing with
    a plain read. `memory` is of the kind that will be read into later; its address is a multiple of `ALIGNMENT`, and it
    is at least that long. Requests have `block_nbytes`, or what suits the reader. The caller closes the reader. Raises
    ConfigError when the reader asked for does not work here, and ReadError when none does.
    """
    expected = _plain_read(sample, min(_PROBE_BYTES, memory.nbytes // ALIGNMENT * ALIGNMENT))
    memory = memory[: -(-len(expected) // ALIGNMENT) * ALIGNMENT]
    refusal = direct_refusal(sample, memory) if expected else "the sample file is empty"
    makers: dict[str, Callable[[], Reader]] = {
        "libaio": lambda: _make_libaio(refusal, block_nbytes),
        "threads": lambda: ThreadsReader(direct=refusal is None, block_bytes=block_nbytes),
        "aiofiles": lambda: AiofilesReader(direct=refusal is None, block_bytes=block_nbytes),
    }
    rejected: list[tuple[str, str]] = []
    for candidate in makers if name == "auto" else [name]:
        try:
            reader, direct = _probe(makers[candidate], sample, memory, expected)
        except (PenstockError, OSError) as error:
            rejected.append((candidate, str(error)))
            continue
        choice = ReaderChoice(candidate, direct, _reason(name, candidate, direct, refusal), tuple(rejected))
        logger.info("reader %s: %s", choice.name, choice.reason)
        for other, fault in rejected:
            logger.info("reader %s was rejected: %s", other, fault)
        return reader, choice
    faults = "; ".join(f"{other}: {fault}" for other, fault in rejected)
    if name == "auto":
        raise ReadError(
            "no reader can read it", file=sample.path, got=faults, fix="Check the disk and the file system."
        )
    raise ConfigError(
        f"the reader {name!r} does not work here", file=sample.path, got=faults, fix="Choose the reader 'auto'."
    )


def _plain_read(sample: SourceFile, nbytes: int) -> bytes:
    try:
        with open(sample.path, "rb", buffering=0) as file:
            content = os.pread(file.fileno(), nbytes, 0)
            os.posix_fadvise(file.fileno(), 0, nbytes, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise ReadError(f"cannot be read: {error.strerror}", file=sample.path, fix="Check its permissions.") from error
    return content


def _make_libaio(refusal: str | None, block_nbytes: int | None) -> Reader:
    if refusal is not None:
        raise ReadError(f"Linux AIO blocks without O_DIRECT, and {refusal}")
    return LibaioReader(block_bytes=block_nbytes)


def _probe(make: Callable[[], Reader], sample: SourceFile, memory: memoryview, expected: bytes) -> tuple[Reader, bool]:
    """Return the reader, open, and whether it goes around the page cache; raise when it does not deliver the bytes."""
    reader = make()
    try:
        # Bytes that differ from the file's everywhere, so that nothing left by an earlier attempt can pass for a read.
        memory[: len(expected)] = expected.translate(_INVERSE)
        reader.wait(reader.submit([Read(sample, 0, memory)] if expected else []))
        if memory[: len(expected)] != expected:
            raise ReadError("it delivered other bytes than a plain read", file=sample.path)
        direct = reader.statistics().buffered_reads == 0 and bool(expected)
        if not direct and isinstance(reader, LibaioReader):
            raise ReadError("O_DIRECT was refused for this kind of memory, and Linux AIO blocks without it")
    except BaseException:
        reader.close()
        raise
    return reader, direct


def _reason(name: ReaderName, candidate: str, direct: bool, refusal: str | None) -> str:
    who = "it is the first that read the checkpoint rightly" if name == "auto" else "it was asked for"
    if direct:
        how = "it reads around the page cache (O_DIRECT)"
    else:
        how = f"it reads through the page cache, because {refusal or 'O_DIRECT was refused for this kind of memory'}"
    return f"{candidate} was chosen because {who}; {how}"
