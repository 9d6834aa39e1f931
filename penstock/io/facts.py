"""What a reader of disk rates must know about the machine, the file system and the file to trust them.

Every function takes the root of the file system under which /proc and /sys are looked up. What cannot be found out is
None, never a guess.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import resource
import struct
from dataclasses import dataclass
from pathlib import Path

from penstock.io.blockdev import BlockDevice, devices_under, read_line
from penstock.io.direct import direct_alignment, direct_refusal, resident_pages
from penstock.io.files import SourceFile
from penstock.io.limits import available_memory, memory_limit

__all__ = [
    "MEMORY_FILE_SYSTEMS", "DirectFacts", "FileFacts", "HostFacts", "Mount", "TargetFacts", "direct_facts",
    "file_facts", "host_facts", "mount_of", "target_facts",
]  # fmt: skip

_FILESYSTEM_ROOT = Path("/")
MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "hugetlbfs", "devtmpfs"})
_FS_IOC_FIEMAP = 0xC020660B
_FIEMAP = struct.Struct("=QQIIII")
_RESIDENCY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The machine. `memlock_nbytes` and `cgroup_limit_nbytes` are None when unlimited."""

    kernel: str
    python: str
    cpus: int
    numa_nodes: int
    memory_nbytes: int
    available_nbytes: int
    cgroup_limit_nbytes: int | None
    memlock_nbytes: int | None
    aio_nr: int | None
    aio_max_nr: int | None
    io_uring_disabled: int | None
    transparent_huge_pages: str | None
    free_huge_pages: int


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    point: str
    file_system: str
    source: str
    options: str


@dataclass(frozen=True, slots=True)
class DirectFacts:
    """Whether O_DIRECT goes around the page cache, why not, and what it asks of memory and offsets, in bytes."""

    works: bool
    reason: str | None
    memory_alignment: int | None
    offset_alignment: int | None


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """Where the measured bytes lie. `device` is the file system's device number as "major:minor"."""

    path: str
    file_system: str
    mount_point: str
    mount_options: str
    device: str
    total_nbytes: int
    free_nbytes: int
    devices: tuple[BlockDevice, ...]
    direct: DirectFacts


@dataclass(frozen=True, slots=True)
class FileFacts:
    """The file that is read; `created` when it is a scratch file of ours, of which nothing is left afterwards.

    `extents` is how many pieces it has on the disk, `cached_share` how much of its first GiB was in the page cache.
    """

    created: bool
    nbytes: int
    written_nbytes: int
    extents: int | None
    cached_share: float | None


def host_facts(*, root: Path = _FILESYSTEM_ROOT) -> HostFacts:
    """Describe the machine and this process's limits."""
    memory = _meminfo(root)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return HostFacts(
        kernel=platform.release(),
        python=platform.python_version(),
        cpus=len(os.sched_getaffinity(0)),
        numa_nodes=max(1, len(list((root / "sys/devices/system/node").glob("node[0-9]*")))),
        memory_nbytes=memory.get("MemTotal", 0) * 1024,
        available_nbytes=available_memory(root=root),
        cgroup_limit_nbytes=memory_limit(root=root),
        memlock_nbytes=None if soft == resource.RLIM_INFINITY else soft,
        aio_nr=_number(root / "proc/sys/fs/aio-nr"),
        aio_max_nr=_number(root / "proc/sys/fs/aio-max-nr"),
        io_uring_disabled=_number(root / "proc/sys/kernel/io_uring_disabled"),
        transparent_huge_pages=_bracketed(root / "sys/kernel/mm/transparent_hugepage/enabled"),
        free_huge_pages=memory.get("HugePages_Free", 0),
    )


def mount_of(path: Path, *, device: int | None = None, root: Path = _FILESYSTEM_ROOT) -> Mount | None:
    """Return the mount that `path`, which is real, lies in: the deepest one, the last when several cover each other.

    `device`, if given, is preferred to the path, since bind mounts and unnamed files may tell another story.
    """
    best: Mount | None = None
    best_key = (-1, -1)
    try:
        lines = (root / "proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 6 or len(kind) < 2:
            continue
        point = _unescape(fields[4])
        inside = path == Path(point) or Path(point) in path.parents
        same = device is not None and fields[2] == _device_text(device)
        key = (int(same), len(point) if inside else -1)
        if (inside or same) and key >= best_key:
            best_key = key
            best = Mount(point, kind[0], _unescape(kind[1]), fields[5])
    return best


def target_facts(path: Path, file: SourceFile, direct: DirectFacts, *, root: Path = _FILESYSTEM_ROOT) -> TargetFacts:
    """Describe where `file` lies; `path` is what the user named."""
    real = Path(os.path.realpath(path))
    mount = mount_of(real, device=file.device, root=root)
    space = os.statvfs(real)
    return TargetFacts(
        path=str(path),
        file_system=mount.file_system if mount else "unknown",
        mount_point=mount.point if mount else "unknown",
        mount_options=mount.options if mount else "",
        device=_device_text(file.device),
        total_nbytes=space.f_blocks * space.f_frsize,
        free_nbytes=space.f_bavail * space.f_frsize,
        devices=devices_under(file.device, mount.source if mount else None, root=root),
        direct=direct,
    )


def direct_facts(file: SourceFile, memory: memoryview) -> DirectFacts:
    """Find out whether O_DIRECT serves to read `file` into `memory`, whose start is overwritten."""
    refusal = direct_refusal(file, memory)
    alignment = direct_alignment(file.path) or (None, None)
    return DirectFacts(refusal is None, refusal, *alignment)


def file_facts(file: SourceFile, *, created: bool, written_nbytes: int) -> FileFacts:
    """Describe the file that will be read."""
    extents = cached = None
    with contextlib.suppress(OSError):
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            cached = _cached_share(fd, file.nbytes)
            extents = _count_extents(fd)
        finally:
            os.close(fd)
    return FileFacts(created, file.nbytes, written_nbytes, extents, cached)


def _count_extents(fd: int) -> int:
    """Ask FIEMAP how many extents the file has; raises OSError where the file system does not know."""
    request = _FIEMAP.pack(0, (1 << 64) - 1, 0, 0, 0, 0)
    answer: bytes = fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
    mapped: int = _FIEMAP.unpack(answer)[3]
    return mapped


def _cached_share(fd: int, nbytes: int) -> float | None:
    status = os.fstat(fd)
    if nbytes == 0 or status.st_uid != os.geteuid():
        # To those who do not own the file every page looks resident.
        return None
    nbytes = min(nbytes, _RESIDENCY_BYTES)
    page = resource.getpagesize()
    return resident_pages(fd, nbytes) / -(-nbytes // page)


def _meminfo(root: Path) -> dict[str, int]:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (re.match(r"(\w+):\s+(\d+)", line) for line in lines)
    return {match[1]: int(match[2]) for match in pairs if match}


def _number(path: Path) -> int | None:
    text = read_line(path)
    return int(text) if text is not None and text.isdigit() else None


def _bracketed(path: Path) -> str | None:
    match = re.search(r"\[(\w+)\]", read_line(path) or "")
    return match[1] if match else None


def _device_text(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _unescape(text: str) -> str:
    """Undo mountinfo's octal escapes of blanks and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
