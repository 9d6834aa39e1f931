"""Every disk backend as a factory: name → function of a block size."""

from pathlib import Path

from penstock.io.aio_calls import available_calls
from penstock.io.aiofiles import AiofilesReader
from penstock.io.fake import FakeReader
from penstock.io.files import SourceFile
from penstock.io.libaio import LibaioReader
from penstock.io.threads import ThreadsReader


def identify(path: Path) -> SourceFile:
    return SourceFile.identify(path)


def _libaio(calls):
    return lambda block: LibaioReader(block_bytes=block, calls=calls)


BACKENDS = {
    **{f"libaio by {calls.name}": _libaio(calls) for calls in available_calls()},
    "threads": lambda block: ThreadsReader(threads=4, block_bytes=block),
    "aiofiles": lambda block: AiofilesReader(lanes=3, block_bytes=block),
}
"""libaio by every way to call it that is installed; by system calls always."""

ALL_BACKENDS = {**BACKENDS, "fake": lambda _: FakeReader()}
"""And the fake, on real files."""
