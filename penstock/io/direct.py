"""Whether O_DIRECT really goes around the page cache for a file: it can be refused, and it can be accepted and ignored.

statx reports the alignment that a file asks for since Linux 6.1, on the file systems that were taught to (ext4, xfs,
f2fs, block devices; not btrfs, whose O_DIRECT works, nor tmpfs, whose O_DIRECT is a pretence since 6.6). Where it says
nothing, the file is read, and the page cache is asked with mincore(2) whether the bytes went through it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct

from penstock.io.files import SourceFile
from penstock.io.libc import ffi, libc
from penstock.io.reader import ALIGNMENT

__all__ = ["direct_alignment", "direct_refusal", "resident_pages"]

_STATX_DIOALIGN = 0x2000
_STATX_BYTES = 256
_STATX_MASK_OFFSET = 0
_STATX_DIO_OFFSET = 0x98
_AT_FDCWD = -100
_MEMORY_FILE_SYSTEMS = {0x01021994: "tmpfs", 0x858458F6: "ramfs", 0x958458F6: "hugetlbfs"}


def direct_refusal(file: SourceFile, memory: memoryview) -> str | None:
    """Say in a few words why O_DIRECT does not serve to read `file` into `memory`, or return None if it does.

    Overwrites the start of `memory`, which is as long and as aligned as a read must be.
    """
    return _alignment_refusal(file) or _memory_file_system(file) or _read_refusal(file, memory)


def direct_alignment(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Return the multiples, in bytes, that O_DIRECT asks of memory and of offsets; None where the kernel does not say.

    Zeros mean that the file has no O_DIRECT.
    """
    result = ffi.new("unsigned char[]", _STATX_BYTES)
    if libc.statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_DIOALIGN, result) != 0:
        return None
    (mask,) = struct.unpack_from("=I", ffi.buffer(result), _STATX_MASK_OFFSET)
    if not mask & _STATX_DIOALIGN:
        return None
    memory_alignment, offset_alignment = struct.unpack_from("=II", ffi.buffer(result), _STATX_DIO_OFFSET)
    return memory_alignment, offset_alignment


def resident_pages(fd: int, nbytes: int) -> int:
    """Return how many pages of the first `nbytes` of a file are in the page cache.

    The kernel tells only those who own the file or may write to it; to others every page looks resident.
    """
    with mmap.mmap(fd, nbytes, prot=mmap.PROT_READ) as mapping:
        count = -(-nbytes // mmap.PAGESIZE)
        pages = ffi.new("unsigned char[]", count)
        with ffi.from_buffer(mapping) as start:
            if libc.mincore(ffi.cast("void *", start), nbytes, pages) != 0:
                raise OSError(ffi.errno, os.strerror(ffi.errno))
        return sum(page & 1 for page in ffi.buffer(pages)[:])


def _alignment_refusal(file: SourceFile) -> str | None:
    alignment = direct_alignment(file.path)
    if alignment is None:
        return None
    memory_alignment, offset_alignment = alignment
    if memory_alignment == 0 or offset_alignment == 0:
        return "the file system has no O_DIRECT for it (statx)"
    if ALIGNMENT % memory_alignment or ALIGNMENT % offset_alignment:
        return f"it asks for an alignment of {max(memory_alignment, offset_alignment)} bytes, more than {ALIGNMENT}"
    return None


def _memory_file_system(file: SourceFile) -> str | None:
    result = ffi.new("unsigned char[]", _STATX_BYTES)
    if libc.statfs(os.fsencode(file.path), result) != 0:
        return None
    (kind,) = struct.unpack_from("=q", ffi.buffer(result), 0)
    name = _MEMORY_FILE_SYSTEMS.get(kind & 0xFFFFFFFF)
    return f"{name} keeps its files in the page cache" if name else None


def _read_refusal(file: SourceFile, memory: memoryview) -> str | None:
    """Read the start of the file with O_DIRECT, and see whether that brought it into the page cache."""
    nbytes = min(memory.nbytes, file.nbytes)
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        return f"open refuses O_DIRECT ({_symbol(error)})"
    try:
        os.posix_fadvise(fd, 0, nbytes, os.POSIX_FADV_DONTNEED)
        resident_before = _resident(fd, nbytes)
        os.preadv(fd, [memory[: -(-nbytes // ALIGNMENT) * ALIGNMENT]], 0)
        if resident_before == 0 and _resident(fd, nbytes):
            return "the file system accepts O_DIRECT but reads through the page cache"
    except OSError as error:
        return f"reading with O_DIRECT fails ({_symbol(error)})"
    finally:
        os.close(fd)
    return None


def _resident(fd: int, nbytes: int) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return resident_pages(fd, nbytes)
    return None


def _symbol(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error.errno))
