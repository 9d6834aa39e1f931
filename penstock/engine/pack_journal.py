"""Where a pack stands, so that it can be killed at any moment and go on.

A pack is made in `OUT.part` and renamed when it is whole. Its journal has an entry for each finished tensor, which is
written after the tensor's bytes have reached the disk. What lies behind them is written again, and comes out the same.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from penstock.errors import JournalError, NoSpaceError, OutputError
from penstock.io.atomic import naming, sync_directory
from penstock.io.journal import Journal
from penstock.io.shard import StoredTensor
from penstock.offload.codec import Coding, PackOptions
from penstock.offload.manifest import SourceRecord, read_manifest
from penstock.offload.records import RecordError, from_plain, to_plain
from penstock.offload.tiers import format_size

__all__ = ["Finished", "Job", "Workplace", "check_space"]

_JOURNAL = "penstock.journal"


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

    `is_whole` says that nothing but the rename is left to do. Raises OutputError where the output exists already or
    another process is at it, JournalError where what was begun is another job.
    """

    def __init__(self, out: Path, job: Job) -> None:
        self.out = out
        self.directory = out.with_name(f"{out.name}.part")
        self.finished: dict[str, Finished] = {}
        self.is_whole = False
        with ExitStack() as cleanup:
            with naming(out):
                self._enter(job, cleanup)
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
        path = self.directory / _JOURNAL
        if not path.exists():
            manifest = read_manifest(self.directory)
            self.is_whole = manifest is not None and (manifest.options, manifest.source) == (job.options, job.source)
            if self.is_whole:  # it was killed right before the rename
                return
            if any(self.directory.iterdir()):
                raise OutputError("it holds something else than a pack", file=self.directory, fix="Remove it.")
        self._journal = cleanup.enter_context(Journal.open(path, to_plain(job), keep_empty=True))
        try:
            done = [from_plain(Finished, json.loads(payload)) for payload in self._journal.in_order()]
        except (ValueError, RecordError) as error:
            raise JournalError(f"no pack's journal: {error}", file=path, fix=f"Remove {self.directory}.") from error
        self.finished = {one.name: one for one in done}

    def note(self, done: Sequence[Finished]) -> None:
        """Write that these tensors are on disk, which they must be. Raises OutputError."""
        for one in done:
            self._journal.append(len(self._journal) + 1, json.dumps(to_plain(one)).encode())
        self._journal.commit()
        self.finished |= {one.name: one for one in done}

    def publish(self) -> None:
        """Give the whole directory its name. Raises OutputError."""
        with naming(self.out):
            sync_directory(self.directory)
            if not self.is_whole:
                self._journal.remove()
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
