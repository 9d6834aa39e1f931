"""Shards on a disk that fails: what is noted is there, whatever went wrong after it or before."""

from __future__ import annotations

import os
import resource
from contextlib import contextmanager

import pytest
import torch

from penstock.engine import pack_writer
from penstock.engine.pack_journal import Finished
from penstock.engine.pack_writer import ShardWriter, StoredPart

KIB = 1024


@contextmanager
def no_file_longer_than(nbytes):
    """What a full disk does, for every file system: writes end there, in the middle if need be, and then fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def put(writer: ShardWriter, name: str, at: int, nbytes: int) -> None:
    part = StoredPart(name, "U8", (nbytes,), at)
    writer.write(part, torch.full((nbytes,), 7, dtype=torch.uint8))
    writer.finish(lambda: Finished(name, None, (part.frozen(part.shape),), (part.crc32,), None))


def test_after_a_failed_write_nothing_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_writer, "_SYNC_NBYTES", 1)
    noted: list[str] = []
    with (
        no_file_longer_than(64 * KIB),
        pytest.raises(OSError, match="File too large"),
        ShardWriter(tmp_path / "shard", lambda done: noted.extend(one.name for one in done)) as writer,
    ):
        put(writer, "first", 8 * KIB, 8 * KIB)
        put(writer, "beyond", 60 * KIB, 8 * KIB)
        put(writer, "after", 32 * KIB, 8 * KIB)
        writer.seal(lambda: b"header", 68 * KIB)
    assert noted == ["first"]


def test_a_header_is_written_whole_or_fails(tmp_path):
    with (
        no_file_longer_than(64 * KIB),
        pytest.raises(OSError, match="File too large"),
        ShardWriter(tmp_path / "shard", lambda _: None) as writer,
    ):
        writer.seal(lambda: b"x" * 65 * KIB, 64 * KIB)


def test_a_shard_has_its_name_on_the_disk_before_anything_in_it_is_noted(tmp_path, monkeypatch):
    """Else a power cut could leave a journal that speaks of a file that is gone."""
    happened: list[str] = []
    real = os.fsync

    def fsync(descriptor):
        happened.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with ShardWriter(tmp_path / "shard", lambda _: happened.append("noted")) as writer:
        put(writer, "one", 0, 8)
        writer.seal(lambda: b"", 8)
    assert happened.index(str(tmp_path)) < happened.index("noted")
