"""Disks that really fail: a file system that is full, a device with a hole. Only root can make them."""

import errno
import os
import shutil
import subprocess

import pytest
from reader_backends import identify

from penstock.errors import ReadError, WriteError
from penstock.io.reader import Read, Write

KIB = 1 << 10
MIB = 1 << 20


def root_runs(*command):
    """Run a command that only root may; skip the test where it does not work."""
    if os.geteuid() != 0:
        pytest.skip("not root")
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout.strip()


@pytest.fixture(scope="module")
def small_file_system(tmp_path_factory):
    """A directory on a tmpfs that holds 2 MiB."""
    directory = tmp_path_factory.mktemp("full")
    root_runs("mount", "-t", "tmpfs", "-o", "size=2m", "none", directory)
    yield directory
    root_runs("umount", "--lazy", directory)


@pytest.fixture(scope="module")
def holed_file_system(tmp_path_factory):
    """An ext4 with a file of 16 MiB, on a loop device whose backing file is then cut in that file's middle."""
    directory = tmp_path_factory.mktemp("holed")
    image, mounted = directory / "image", directory / "mounted"
    mounted.mkdir()
    with open(image, "wb") as file:
        file.truncate(48 * MIB)
    device = root_runs("losetup", "--find", "--show", image)
    try:
        root_runs("mkfs.ext4", "-q", "-O", "^has_journal", device)
        root_runs("mount", device, mounted)
        try:
            content = os.urandom(16 * MIB)
            path = mounted / "data"
            with open(path, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            yield image, path, content
        finally:
            root_runs("umount", "--lazy", mounted)
    finally:
        root_runs("losetup", "--detach", device)


def test_a_full_file_system(make_any, small_file_system, memory):
    path, good = small_file_system / "scratch", small_file_system / "good"
    good.write_bytes(bytes(64 * KIB))
    path.write_bytes(b"")
    memory.view[:] = os.urandom(memory.nbytes)
    writer = make_any(256 * KIB)
    bad = writer.submit_writes([Write(identify(path), 0, memory.view)])
    fine = writer.submit_writes([Write(identify(good), 0, memory.view[: 64 * KIB])])
    with pytest.raises(WriteError) as caught:
        writer.wait(bad)
    writer.wait(fine)
    assert caught.value.errno == errno.ENOSPC
    assert good.read_bytes() == memory.view[: 64 * KIB]


def test_a_device_with_a_hole(make_any, holed_file_system, memory):
    image, path, content = holed_file_system
    file = identify(path)
    whole = image.read_bytes()
    start = whole.index(content[:4096])
    reader = make_any(64 * KIB)
    try:
        os.truncate(image, start + 4 * MIB)
        with open(path, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        good = reader.submit([Read(file, 0, memory.view[: 2 * MIB])])
        bad = reader.submit([Read(file, 8 * MIB, memory.view[2 * MIB : 4 * MIB])])
        again = reader.submit([Read(file, 2 * MIB, memory.view[4 * MIB : 5 * MIB])])
        with pytest.raises(ReadError) as caught:
            reader.wait(bad)
        reader.wait(again)
        reader.wait(good)
    finally:
        image.write_bytes(whole)
    assert caught.value.errno == errno.EIO
    assert memory.view[: 2 * MIB] == content[: 2 * MIB]
    assert memory.view[4 * MIB : 5 * MIB] == content[2 * MIB : 3 * MIB]
