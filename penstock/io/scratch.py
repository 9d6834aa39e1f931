"""What is read to measure a disk: a file that is there already, or one that is written, has no name, and never stays.

The scratch file is made with O_TMPFILE: it has no name in any directory, so that even SIGKILL leaves nothing. Where the
file system refuses that, the file has a name for the moment between being made and being unlinked; what a killed
process may have left in that moment is swept by the next. The data are random: drives that compress or deduplicate
would else read them faster than weights, and blocks that were allocated but not written are read without any I/O.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import resource
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from penstock.errors import NoSpaceError, TargetError
from penstock.io.facts import MEMORY_FILE_SYSTEMS, mount_of
from penstock.io.files import SourceFile

__all__ = [
    "DEFAULT_BYTES",
    "MIN_BYTES",
    "Sink",
    "Target",
    "check_directory",
    "check_file_limit",
    "choose_target",
    "nameless_file",
    "scratch_file",
    "scratch_nbytes",
]

MIN_BYTES = 16 << 20
"""A smaller file says nothing about a disk."""

DEFAULT_BYTES = 4 << 30
_PIECE = 16 << 20
_RESERVE_SHARE = 0.05
_RESERVE_BYTES = 2 << 30
_NAME = ".penstock-profile-"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL})
_FILESYSTEM_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class Target:
    """What is measured: `file` is read as it is and nothing is written; None means a scratch file in `directory`."""

    kind: Literal["model", "file", "directory"]
    path: Path
    directory: Path
    file: SourceFile | None


def choose_target(path: str | os.PathLike[str], *, root: Path = _FILESYSTEM_ROOT) -> Target:
    """Decide what to read: a model directory's largest shard, a regular file itself, or else a scratch file.

    Raises TargetError for what is not there, is neither a file nor a directory, lies in memory, or is too small. A
    block device is refused whatever is to be done with it. `root` is where /proc is looked up.
    """
    path = Path(path)
    try:
        status = path.stat()
    except OSError as error:
        raise TargetError(
            f"cannot be profiled: {error.strerror}", file=path, fix="Name a directory on the disk, or a large file."
        ) from error
    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
        raise TargetError(
            "is neither a file nor a directory",
            file=path,
            got=_kind(status.st_mode),
            fix="Name a directory on that disk; Penstock never opens devices.",
        )
    _refuse_memory(path, status.st_dev, root)
    if stat.S_ISREG(status.st_mode):
        return Target("file", path, path.parent, _readable(path))
    shards = [(shard.stat().st_size, shard) for shard in path.glob("*.safetensors") if shard.is_file()]
    if shards:
        return Target("model", path, path, _readable(max(shards)[1]))
    return Target("directory", path, path, None)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFBLK: "a block device", stat.S_IFCHR: "a character device", stat.S_IFIFO: "a pipe"}
    return kinds.get(stat.S_IFMT(mode), "a socket")


def _refuse_memory(path: Path, device: int, root: Path, *, purpose: str = "measure") -> None:
    mount = mount_of(Path(os.path.realpath(path)), device=device, root=root)
    if mount and mount.file_system in MEMORY_FILE_SYSTEMS:
        raise TargetError(
            f"lies in memory ({mount.file_system}), so there is no disk to {purpose}",
            file=path,
            fix="Name a directory on the disk that holds the models.",
        )


def _readable(path: Path) -> SourceFile:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise TargetError(f"cannot be read: {error.strerror}", file=path, fix="Check its permissions.") from error
    try:
        file = SourceFile.from_status(path, os.fstat(fd))
    finally:
        os.close(fd)
    if file.nbytes < MIN_BYTES:
        raise TargetError(
            "the file is too small to measure a disk with",
            file=path,
            wanted=f"at least {MIN_BYTES} bytes",
            got=file.nbytes,
            fix="Name a directory; a scratch file is written there and removed.",
        )
    return file


def check_directory(directory: Path, nbytes: int, *, root: Path = _FILESYSTEM_ROOT) -> None:
    """Check that a file of `nbytes` can be written there and read from a disk.

    Raises TargetError for what is no directory or lies in memory, NoSpaceError when there is too little space.
    """
    if not directory.is_dir():
        raise TargetError("is not a directory", file=directory, fix="Name a directory on the disk.")
    _refuse_memory(directory, directory.stat().st_dev, root, purpose="read from")
    space = os.statvfs(directory)
    free = space.f_bavail * space.f_frsize
    if nbytes > free:
        raise NoSpaceError(
            "there is no space for the file",
            file=directory,
            wanted=f"{nbytes} bytes",
            got=f"{free} bytes free",
            fix="Free some space, ask for less, or name a directory on another disk.",
        )


def scratch_nbytes(directory: Path, *, size: int | None, max_write: int) -> int:
    """Return how many bytes to write there: `size`, or 4 GiB and at most 10 % of what is free; never over `max_write`.

    Raises NoSpaceError when 5 % of the free space, at most 2 GiB, would not remain, or a limit of this process forbids
    it; TargetError when the file system is read-only.
    """
    space = os.statvfs(directory)
    if space.f_flag & os.ST_RDONLY:
        raise TargetError(
            "the file system is mounted read-only",
            file=directory,
            fix="Name a large file on it; it will only be read.",
        )
    free = space.f_bavail * space.f_frsize
    nbytes = min(size if size is not None else min(DEFAULT_BYTES, free // 10), max_write) // _PIECE * _PIECE
    if nbytes < MIN_BYTES and min(size or MIN_BYTES, max_write) < MIN_BYTES:
        raise TargetError(
            "so small a scratch file says nothing about a disk", wanted=f"at least {MIN_BYTES} bytes", got=nbytes
        )
    room = free - min(_RESERVE_BYTES, int(_RESERVE_SHARE * free))
    if nbytes < MIN_BYTES or nbytes > room:
        raise NoSpaceError(
            "there is no space for the scratch file",
            file=directory,
            wanted=f"{max(nbytes, MIN_BYTES)} bytes",
            got=f"{free} bytes free, of which {max(0, room)} may be used",
            fix="Free some space, lower --size, or name a large file, which will only be read.",
        )
    check_file_limit(directory, nbytes)
    return nbytes


def check_file_limit(directory: Path, nbytes: int) -> None:
    """Raise NoSpaceError when this process may not write a file of that size."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit not in (resource.RLIM_INFINITY, -1) and nbytes > limit:
        raise NoSpaceError(
            "this process may not write a file of that size",
            file=directory,
            wanted=f"{nbytes} bytes",
            got=f"{limit} bytes (RLIMIT_FSIZE)",
            fix="Raise the limit with `ulimit -f unlimited`, or ask for less.",
        )


@contextlib.contextmanager
def scratch_file(
    directory: Path,
    nbytes: int,
    *,
    stop: Callable[[], bool] = lambda: False,
    on_write: Callable[[int], None] | None = None,
) -> Iterator[SourceFile]:
    """Write `nbytes` of random data that are on the disk when this yields; the file is gone when it ends, in any way.

    Ends early, with a shorter file, when `stop` returns True after the first `MIN_BYTES`. Path and errors are those of
    `nameless_file`.
    """
    with nameless_file(directory, nbytes, lambda sink: _fill(sink, nbytes, stop, on_write)) as file:
        yield file


@contextlib.contextmanager
def nameless_file(directory: Path, nbytes: int, fill: Callable[[Sink], None]) -> Iterator[SourceFile]:
    """Let `fill` write a file of about `nbytes` that is on the disk when this yields, and gone when it ends, anyhow.

    The file's path leads through /proc/self/fd and is of use to this process and, as /proc/<pid>/fd, to its children
    while the context lives. Raises TargetError when the directory cannot be written, and NoSpaceError when the disk is
    full.
    """
    sweep_stale(directory)
    fd = _open_nameless(directory)
    try:
        try:
            sink = Sink(fd)
            fill(sink)
            sink.sync()
        except OSError as error:
            kind = NoSpaceError if error.errno in _FULL else TargetError
            raise kind(
                f"the scratch file cannot be written: {error.strerror}; it was removed",
                file=directory,
                wanted=f"{nbytes} bytes",
                fix="Free some space, or ask for less.",
            ) from error
        path = Path(f"/proc/{os.getpid()}/fd/{fd}")
        yield SourceFile.from_status(path, os.fstat(fd))
    finally:
        os.close(fd)


def sweep_stale(directory: Path) -> None:
    """Remove what processes that are dead by now left when they were killed between making and unlinking a file."""
    for path in directory.glob(f"{_NAME}*"):
        match = re.fullmatch(re.escape(_NAME) + r"(\d+)-[0-9a-f]{16}", path.name)
        if match and not Path("/proc", match[1]).exists():
            with contextlib.suppress(OSError):
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                    path.unlink()


def _open_nameless(directory: Path) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        try:
            return os.open(directory, flags | os.O_TMPFILE, 0o600)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
        path = directory / f"{_NAME}{os.getpid()}-{secrets.token_hex(8)}"
        try:
            return os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise TargetError(
            f"the directory cannot be written: {error.strerror}",
            file=directory,
            fix="Name a directory that you may write to, or a large file, which will only be read.",
        ) from error


def _fill(sink: Sink, nbytes: int, stop: Callable[[], bool], on_write: Callable[[int], None] | None) -> None:
    """Write pieces; each is on the disk before the next, so that stopping is quick."""
    import numpy as np  # noqa: PLC0415 - plans import this file, and have no use for it

    random = np.frombuffer(os.urandom(_PIECE), dtype=np.uint64)
    # Mapped memory, since it begins on a page.
    memory = mmap.mmap(-1, _PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    piece = np.frombuffer(memory, dtype=np.uint64)
    done = 0
    while done < nbytes and not (done >= MIN_BYTES and stop()):
        # The same random bytes under another key: no block is like any other, at the speed of memory.
        np.bitwise_xor(random, np.uint64(secrets.randbits(64)), out=piece)
        with memoryview(memory) as view:
            sink.write(view)
        done += _PIECE
        if on_write:
            on_write(done)


class Sink:
    """Writes a file from its start on, around the page cache where the file system lets us."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._offset = 0
        self._direct = _set_direct(fd)

    def reserve(self, nbytes: int) -> None:
        """Have the disk set space aside for a file of so many bytes, where the file system can. Raises OSError."""
        try:
            os.posix_fallocate(self._fd, 0, nbytes)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
                raise
            os.ftruncate(self._fd, nbytes)

    def write(self, data: memoryview) -> None:
        """Append bytes of page-aligned memory; only the last may be no whole number of pages. Raises OSError."""
        if self._direct and len(data) % mmap.PAGESIZE:
            self._stop_direct()
        written = 0
        while written < len(data):
            try:
                written += os.pwrite(self._fd, data[written:], self._offset + written)
            except OSError as error:
                if not self._direct or error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
                    raise
                self._stop_direct()
        self._offset += written
        if not self._direct:
            os.fdatasync(self._fd)

    def sync(self) -> None:
        """Bring everything to the disk and out of the page cache."""
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, self._offset, os.POSIX_FADV_DONTNEED)

    def _stop_direct(self) -> None:
        fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        self._direct = False


def _set_direct(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:
        return False
    return True
