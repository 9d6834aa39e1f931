"""Checksums of what lands, however it is cut into chunks, and of what no unit reads whole."""

from __future__ import annotations

import random
import zlib

import pytest

from penstock.errors import ChecksumError, ReadError
from penstock.io.files import SourceFile, TensorEntry
from penstock.offload.checks import UnitChecks, verify_by_itself
from penstock.offload.chunks import plan_chunks
from penstock.offload.layout import Extent
from penstock.offload.manifest import Check

SIZES = [5, 0, 4096, 70_001, 1, 20_000, 150_000, 33]


@pytest.fixture
def stored(tmp_path):
    """A file of tensors, one after the other, and their checks."""
    content = random.Random(0).randbytes(100 + sum(SIZES))
    path = tmp_path / "file"
    path.write_bytes(content)
    file, checks, at = SourceFile.identify(path), [], 100
    for number, size in enumerate(SIZES):
        entry = TensorEntry(f"t{number}", file, at, size, "U8", (size,))
        checks.append(Check(entry, zlib.crc32(content[at : at + size])))
        at += size
    return content, checks


def extents(checks, names):
    return [
        Extent(check.entry.file, check.entry.offset, check.entry.nbytes, check.entry.offset)
        for check in checks
        if check.entry.name in names
    ]


def arrive(unit, chunks, content):
    verification = unit.begin()
    for chunk in chunks:
        for read in chunk.reads:
            landed = content[read.offset : read.offset + read.nbytes].ljust(read.nbytes, b"\0")
            verification.landed(read.file, read.offset, memoryview(landed))
    verification.finish()


@pytest.mark.parametrize("chunk_nbytes", [4096, 8192, 65536, 1 << 20])
def test_every_byte_of_a_unit_is_compared_once(stored, chunk_nbytes):
    content, checks = stored
    mine = {"t0", "t2", "t3", "t5", "t6"}
    wanted = extents(checks, mine)
    chunks = plan_chunks(wanted, chunk_nbytes=chunk_nbytes)
    unit = UnitChecks(wanted, chunks, checks)
    assert not unit.partial
    arrive(unit, chunks, content)
    assert unit.verified
    assert unit.begin() is None
    chance = random.Random(chunk_nbytes)
    for check in checks:
        if check.entry.name not in mine or not check.entry.nbytes:
            continue
        at = chance.randrange(check.entry.offset, check.entry.offset + check.entry.nbytes)
        damaged = bytearray(content)
        damaged[at] ^= 1 << chance.randrange(8)
        again = UnitChecks(wanted, chunks, checks)
        with pytest.raises(ChecksumError, match=repr(check.entry.name)):
            arrive(again, chunks, bytes(damaged))
        assert not again.verified
        arrive(again, chunks, content)
        assert again.verified


@pytest.mark.parametrize(("begin", "nbytes"), [(0, 60_000), (50_000, 60_000), (50_000, 100_000)])
def test_a_tensor_that_is_read_in_part_is_named(stored, begin, nbytes):
    content, checks = stored
    part = [Extent(checks[6].entry.file, checks[6].entry.offset + begin, nbytes, 0)]
    unit = UnitChecks(part, plan_chunks(part, chunk_nbytes=8192), checks)
    assert unit.verified
    assert unit.partial == {checks[6]}
    verify_by_itself(checks[6])
    path = checks[6].entry.file.path
    path.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
    with pytest.raises(ChecksumError, match="t6"):
        verify_by_itself(checks[6])
    path.unlink()
    with pytest.raises(ReadError, match="No such file"):
        verify_by_itself(checks[6])
