"""Journals on disks that are full, limited, failing or suddenly off: real ones, where this user may make them."""

import fcntl
import os
import resource
import shutil
import struct
import subprocess
from contextlib import contextmanager

import pytest

from penstock.errors import ClosedError, OutputError
from penstock.io.journal import Journal

JOB = {"input": "abc"}
SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, struct.pack("I", 2)
"""The ioctl of ext4 and XFS that stops a mounted file system as a power cut would."""


def mount(*arguments):
    if os.geteuid() != 0:
        pytest.skip("needs root to mount")
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")


@contextmanager
def mounted(*arguments, at):
    mount(*arguments, at)
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


@pytest.fixture
def full_soon(tmp_path):
    """A file system of 64 KiB."""
    at = tmp_path / "small"
    at.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=64k", "tmpfs", at=at):
        yield at


@pytest.fixture
def image(tmp_path):
    """An ext4 file system in a file, and where to mount it."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4")
    file, at = tmp_path / "image", tmp_path / "disk"
    at.mkdir()
    with file.open("wb") as stream:
        stream.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", file], check=True)
    return file, at


def fill(journal):
    """Append and commit one entry at a time until that fails; return the last that was acknowledged, and the error."""
    for number in range(1, 10_000):
        journal.append(number, b"x" * 1000)
        try:
            journal.commit()
        except OutputError as error:
            return number - 1, error
    raise AssertionError("there was always room")


def assert_kept(path, count):
    with Journal.open(path, JOB) as journal:
        assert len(journal) == count
        assert list(journal.in_order()) == [b"x" * 1000] * count


def test_a_full_disk_keeps_everything_acknowledged(full_soon):
    path = full_soon / "out.part"
    journal = Journal.open(path, JOB)
    count, error = fill(journal)
    assert count > 10
    assert "No space left on device" in str(error)
    assert str(path) in str(error)
    assert "run the same command again" in str(error)
    with pytest.raises(ClosedError):
        journal.append(10_000, b"")
    assert_kept(path, count)
    subprocess.run(["mount", "-o", "remount,size=1m", full_soon], check=True)
    with Journal.open(path, JOB) as journal:
        for number in range(count + 1, count + 21):
            journal.append(number, b"x" * 1000)
        journal.commit()
    assert_kept(path, count + 20)


def test_a_disk_that_is_full_at_the_start_keeps_nothing(full_soon):
    (full_soon / "filler").write_bytes(bytes(64 << 10))
    with pytest.raises(OutputError, match="No space left"):
        Journal.open(full_soon / "out.part", JOB)
    assert [file.name for file in full_soon.iterdir()] == ["filler"]


def test_a_file_size_limit_keeps_everything_acknowledged(tmp_path):
    path = tmp_path / "out.part"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        count, error = fill(Journal.open(path, JOB))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in str(error)
    assert count == (50_000 - path.read_bytes().index(b"\n")) // len(b"10 12345678 " + b"x" * 1000 + b"\n")
    assert_kept(path, count)


def test_a_failing_disk_stops_the_journal_at_once(image):
    file, at = image
    with mounted("-o", "loop", file, at=at):
        path = at / "out.part"
        journal = Journal.open(path, JOB)
        for number in (1, 2):
            journal.append(number, b"x" * 1000)
            journal.commit()
        journal.append(3, b"x" * 1000)
        descriptor = os.open(at, os.O_RDONLY)
        fcntl.ioctl(descriptor, SHUTDOWN, NO_LOG_FLUSH)
        os.close(descriptor)
        with pytest.raises(OutputError, match="Input/output error"):
            journal.commit()
        with pytest.raises(ClosedError):
            journal.commit()
    with mounted("-o", "loop", file, at=at):
        assert_kept(path, 2)


def test_a_power_cut_loses_nothing_acknowledged(image):
    file, at = image
    acknowledged = 0
    for turn in range(5):
        with mounted("-o", "loop", file, at=at):
            path = at / "out.part"
            with Journal.open(path, JOB) as journal:
                assert len(journal) == acknowledged
                for _ in range(turn + 1):
                    journal.append(len(journal) + 1, b"x" * 1000)
                journal.commit()
                acknowledged = len(journal)
                journal.append(acknowledged + 1, b"x" * 1000)
                journal._flush()
                descriptor = os.open(at, os.O_RDONLY)
                fcntl.ioctl(descriptor, SHUTDOWN, NO_LOG_FLUSH)
                os.close(descriptor)
    with mounted("-o", "loop", file, at=at):
        assert_kept(path, acknowledged)


def test_a_disk_that_fails_while_a_file_appears_is_named(image):
    from penstock.io.atomic import appearing

    file, at = image
    with mounted("-o", "loop", file, at=at):
        with pytest.raises(OutputError, match="Input/output error"), appearing(at / "out") as stream:
            stream.write("x" * 1000)
            descriptor = os.open(at, os.O_RDONLY)
            fcntl.ioctl(descriptor, SHUTDOWN, NO_LOG_FLUSH)
            os.close(descriptor)
        journal = at / "out.part"
        with pytest.raises(OutputError, match="Input/output error"):
            Journal.open(journal, JOB)


def test_a_journal_that_cannot_be_removed_is_named(image):
    file, at = image
    with mounted("-o", "loop", file, at=at), Journal.open(at / "out.part", JOB) as journal:
        journal.append(1, b"one")
        journal.finish()
        descriptor = os.open(at, os.O_RDONLY)
        fcntl.ioctl(descriptor, SHUTDOWN, NO_LOG_FLUSH)
        os.close(descriptor)
        with pytest.raises(OutputError, match="cannot be removed"):
            journal.remove()
        journal.close()
