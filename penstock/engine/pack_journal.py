"""Where a pack stands, so that it can be killed at any moment and go on.

A pack is made in `OUT.part` and renamed when it is whole. Its journal names the job in the first line and each finished
tensor in one more; a line is written after the tensor's bytes have reached the disk. What lies behind the last line is
written again, and comes out the same.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from penstock.errors import NoSpaceError, OutputError
from penstock.io.atomic import sync_directory
from penstock.io.shard import StoredTensor
from penstock.offload.codec import Coding, PackOptions
from penstock.offload.manifest import SourceRecord, read_manifest
from penstock.offload.records import RecordError, from_plain, to_plain
from penstock.offload.tiers import format_size

__all__ = ["Finished", "Job", "Workplace", "check_space"]

_JOURNAL = "journal.jsonl"


@dataclass(frozen=True, slots=True)
class Job:
    """What must be equal for a pack to go on."""

    options: PackOptions
    source: tuple[SourceRecord, ...]
    shard_nbytes: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A tensor that is on disk: `stored` in parts, or as it was where `coding` is None; `note` says why."""

    name: str
    coding: Coding | None
    stored: tuple[StoredTensor, ...]
    crc32: tuple[int, ...]
    note: str | None


class Workplace:
    """The unfinished directory and its journal; a context manager that lets one process at a time in.

    `is_whole` says that nothing but the rename is left to do. Raises OutputError where the output exists already,
    another process is at it, or what was begun is another job.
    """

    def __init__(self, out: Path, job: Job) -> None:
        self.out = out
        self.directory = out.with_name(f"{out.name}.part")
        self.finished: dict[str, Finished] = {}
        with ExitStack() as cleanup:
            try:
                self._enter(job, cleanup)
            except OSError as error:
                if isinstance(error, OutputError):
                    raise
                raise OutputError("cannot be written", file=out, got=error.strerror or str(error)) from error
            self._exit = cleanup.pop_all()

    def _enter(self, job: Job, cleanup: ExitStack) -> None:
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise OutputError("it exists already", file=self.out, fix="Name a directory that does not exist yet.")
        self.directory.mkdir(exist_ok=True)
        descriptor = os.open(self.directory, os.O_RDONLY)
        cleanup.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError("another process is packing there", file=self.directory) from None
        self._path = self.directory / _JOURNAL
        first = json.dumps(to_plain(job))
        lines, kept = self._read()
        manifest = None if lines else read_manifest(self.directory)
        self.is_whole = manifest is not None and (manifest.options, manifest.source) == (job.options, job.source)
        if self.is_whole:  # it was killed right before the rename
            return
        if lines[:1] != [first] and (lines or any(path != self._path for path in self.directory.iterdir())):
            raise OutputError(
                "it holds something else than this pack's beginning", file=self.directory, fix="Remove it."
            )
        self._stream = cleanup.enter_context(self._path.open("ab"))
        self._stream.truncate(kept)
        if not lines:
            self._append([first])
            sync_directory(self.directory)
        try:
            done = [from_plain(Finished, json.loads(line)) for line in lines[1:]]
        except (ValueError, RecordError) as error:
            raise OutputError(
                f"a damaged journal: {error}", file=self._path, fix=f"Remove {self.directory}."
            ) from error
        self.finished = {one.name: one for one in done}

    def _read(self) -> tuple[list[str], int]:
        """Return the whole lines of the journal, and how many bytes they are; a broken last line does not count."""
        content = self._path.read_bytes() if self._path.exists() else b""
        kept = content.rfind(b"\n") + 1
        return content[:kept].decode().splitlines(), kept

    def note(self, done: Iterable[Finished]) -> None:
        """Write that these tensors are on disk, which they must be."""
        self._append([json.dumps(to_plain(one)) for one in done])
        self.finished |= {one.name: one for one in done}

    def _append(self, lines: list[str]) -> None:
        self._stream.write("".join(f"{line}\n" for line in lines).encode())
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def publish(self) -> None:
        """Give the whole directory its name."""
        self._path.unlink(missing_ok=True)
        sync_directory(self.directory)
        if self.out.exists():
            self.out.rmdir()
        self.directory.rename(self.out)
        sync_directory(self.out.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()


def check_space(directory: Path, needed: int) -> None:
    """Refuse to fill the disk: one percent of it, at least 64 MiB, stays free. Raises NoSpaceError."""
    usage = shutil.disk_usage(directory)
    kept = max(usage.total // 100, 64 << 20)
    if needed + kept > usage.free:
        raise NoSpaceError(
            "the packed checkpoint does not fit on the disk",
            file=directory,
            wanted=f"{format_size(needed)}, and {format_size(kept)} that stay free",
            got=f"{format_size(usage.free)} free",
            fix="Make room, or name a directory on another disk. A pack that was begun goes on where it stopped.",
        )
