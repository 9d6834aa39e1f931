import errno
import os
import resource
import stat
import subprocess
import zlib
from types import SimpleNamespace

import pytest

from penstock.errors import NoSpaceError, TargetError
from penstock.io import scratch
from penstock.io.scratch import MIN_BYTES, choose_target, scratch_file, scratch_nbytes

MIB = 1 << 20


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    return path


@pytest.fixture
def no_tmpfile(monkeypatch):
    """A file system without O_TMPFILE: opening the directory itself for writing is refused in the same way."""
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)


def test_the_file_has_no_name_and_leaves_nothing(directory):
    with scratch_file(directory, 48 * MIB) as file:
        assert os.listdir(directory) == []
        assert file.nbytes == os.stat(file.path).st_size == 48 * MIB
        assert os.stat(file.path).st_nlink == 0
        assert stat.S_IMODE(os.stat(file.path).st_mode) == 0o600
    assert os.listdir(directory) == []
    assert not os.path.exists(file.path)


def test_without_o_tmpfile_the_file_is_unlinked_at_once(directory, no_tmpfile):
    with scratch_file(directory, 16 * MIB) as file:
        assert os.listdir(directory) == []
        assert os.stat(file.path).st_nlink == 0


def test_the_bytes_are_written_random_and_nowhere_alike(directory):
    with scratch_file(directory, 32 * MIB) as file:
        content = file.path.read_bytes()
        assert os.stat(file.path).st_blocks * 512 >= 32 * MIB
    blocks = {content[start : start + 4096] for start in range(0, len(content), 4096)}
    assert len(blocks) == len(content) // 4096
    assert len(zlib.compress(content[: 4 * MIB], 1)) > 4 * MIB
    words = b"".join(content[start : start + 8] for start in range(0, len(content), 4096))
    assert len(zlib.compress(words, 1)) > 0.95 * len(words)


def test_it_stops_when_told_with_what_is_enough(directory):
    with scratch_file(directory, 1 << 30, stop=lambda: True) as file:
        assert file.nbytes == MIN_BYTES


def test_it_says_how_far_it_is(directory):
    seen = []
    with scratch_file(directory, 48 * MIB, on_write=seen.append):
        assert seen == [16 * MIB, 32 * MIB, 48 * MIB]


def test_an_error_in_use_leaves_nothing(directory):
    with pytest.raises(ZeroDivisionError), scratch_file(directory, 16 * MIB):
        raise ZeroDivisionError
    assert os.listdir(directory) == []


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, NoSpaceError), (errno.EDQUOT, NoSpaceError), (errno.EIO, TargetError)]
)
def test_a_write_that_fails_is_named_and_leaves_nothing(directory, monkeypatch, number, error):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(scratch.os, "pwrite", fail)
    with pytest.raises(error, match="it was removed") as caught, scratch_file(directory, 16 * MIB):
        pass
    assert type(caught.value) is error
    assert os.listdir(directory) == []


def test_a_refusal_of_o_direct_is_written_through_the_cache(directory, monkeypatch):
    monkeypatch.setattr(scratch, "_set_direct", lambda fd: False)
    with scratch_file(directory, 16 * MIB) as file:
        assert os.stat(file.path).st_blocks * 512 >= 16 * MIB


def test_what_dead_processes_left_is_swept(directory):
    process = subprocess.Popen(["true"])
    process.wait()
    stale = directory / f".penstock-profile-{process.pid}-{'0' * 16}"
    alive = directory / f".penstock-profile-{os.getpid()}-{'0' * 16}"
    other = directory / ".penstock-profile-notes"
    for path in (stale, alive, other):
        path.write_text("")
    with scratch_file(directory, 16 * MIB):
        assert sorted(os.listdir(directory)) == sorted([alive.name, other.name])


def test_sizes(directory, monkeypatch):
    def free(nbytes):
        space = SimpleNamespace(f_bavail=nbytes // 4096, f_frsize=4096, f_flag=0)
        monkeypatch.setattr(scratch.os, "statvfs", lambda _: space)

    free(1 << 40)
    assert scratch_nbytes(directory, size=None, max_write=1 << 40) == 4 << 30
    assert scratch_nbytes(directory, size=None, max_write=100 * MIB) == 96 * MIB
    assert scratch_nbytes(directory, size=1 << 33, max_write=1 << 40) == 1 << 33
    free(1 << 30)
    assert scratch_nbytes(directory, size=None, max_write=1 << 40) == 96 * MIB
    with pytest.raises(NoSpaceError, match=f"wanted {1 << 30} bytes, got {1 << 30} bytes free"):
        scratch_nbytes(directory, size=1 << 30, max_write=1 << 40)
    with pytest.raises(TargetError, match="so small a scratch file"):
        scratch_nbytes(directory, size=MIB, max_write=1 << 40)
    free(32 * MIB)
    with pytest.raises(NoSpaceError):
        scratch_nbytes(directory, size=None, max_write=1 << 40)


def test_a_limit_on_file_sizes_is_named_before_anything_is_written(directory):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * MIB, hard))
    try:
        with pytest.raises(NoSpaceError, match="RLIMIT_FSIZE"):
            scratch_nbytes(directory, size=64 * MIB, max_write=1 << 40)
        with pytest.raises(NoSpaceError, match="it was removed"), scratch_file(directory, 64 * MIB):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(directory) == []


def test_a_directory_gets_a_scratch_file_and_a_file_is_read(directory):
    assert choose_target(directory).file is None
    path = directory / "large"
    path.write_bytes(bytes(MIN_BYTES))
    target = choose_target(path)
    assert (target.kind, target.file.path, target.file.nbytes) == ("file", path, MIN_BYTES)


def test_a_model_is_its_largest_shard(directory):
    (directory / "a.safetensors").write_bytes(bytes(MIN_BYTES))
    (directory / "blob").write_bytes(bytes(MIN_BYTES + 1))
    (directory / "b.safetensors").symlink_to(directory / "blob")
    target = choose_target(directory)
    assert (target.kind, target.file.path.name) == ("model", "b.safetensors")


def test_what_cannot_be_profiled(directory, shared_memory_directory):
    (directory / "small").write_bytes(b"x")
    os.mkfifo(directory / "pipe")
    (directory / "device").symlink_to("/dev/null")
    (directory / "loop").symlink_to(directory / "loop")
    for name, what in {
        "none": "No such file", "small": "too small", "pipe": "got a pipe", "device": "got a character device",
        "loop": "Too many levels",
    }.items():  # fmt: skip
        with pytest.raises(TargetError, match=what) as caught:
            choose_target(directory / name)
        assert str(directory / name) in str(caught.value)
    with pytest.raises(TargetError, match=r"lies in memory \(tmpfs\)"):
        choose_target(shared_memory_directory)


def test_a_block_device_is_refused(tmp_path):
    device = next(
        (path for path in ("/dev/vda", "/dev/sda", "/dev/nvme0n1", "/dev/loop0") if os.path.exists(path)), None
    )
    if device is None:
        pytest.skip("no block device")
    with pytest.raises(TargetError, match="a block device"):
        choose_target(device)


def test_a_directory_that_may_not_be_written(directory):
    if os.geteuid() != 0:
        directory.chmod(0o500)
        with (
            pytest.raises(TargetError, match="cannot be written: Permission denied"),
            scratch_file(directory, MIN_BYTES),
        ):
            pass
        return
    with pytest.raises(TargetError, match="cannot be written"), scratch_file(scratch.Path("/proc/self"), MIN_BYTES):
        pass


@pytest.fixture
def small_disk(tmp_path):
    """A real ext4 of 48 MiB on a loop device, where root may make one."""
    image, point = tmp_path / "image", tmp_path / "mounted"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(48 * MIB)
    for command in (["mkfs.ext4", "-q", image], ["mount", "-o", "loop", image, point]):
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no loop-mounted ext4 here")
    yield point
    subprocess.run(["umount", point], check=True)


def test_a_real_disk_that_runs_full_and_one_that_is_read_only(small_disk):
    with (
        pytest.raises(NoSpaceError, match="No space left on device; it was removed"),
        scratch_file(small_disk, 64 * MIB),
    ):
        pass
    assert os.listdir(small_disk) == ["lost+found"]
    with pytest.raises(NoSpaceError, match="no space for the scratch file"):
        scratch_nbytes(small_disk, size=None, max_write=1 << 40)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(TargetError, match="read-only"):
        scratch_nbytes(small_disk, size=None, max_write=1 << 40)
    with pytest.raises(TargetError, match="Read-only file system"), scratch_file(small_disk, 16 * MIB):
        pass
