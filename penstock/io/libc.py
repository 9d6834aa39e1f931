"""The C library through cffi's ABI mode: no compiler is needed, and every call releases the GIL."""

from __future__ import annotations

import errno
import os
from typing import Any

import cffi

__all__ = ["address_of", "ffi", "libc", "madvise", "memset"]

ffi: Any = cffi.FFI()
ffi.cdef(
    """
    int madvise(void *address, size_t length, int advice);
    void *memset(void *address, int value, size_t length);
    int mincore(void *address, size_t length, unsigned char *pages);
    int statx(int directory, const char *path, int flags, unsigned int mask, void *result);
    int statfs(const char *path, void *result);
    long syscall(long number, ...);
    """
)
libc: Any = ffi.dlopen(None)


def address_of(memory: memoryview) -> int:
    """Return the address of the first byte of writable, contiguous `memory`."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(memory, require_writable=True)))


def madvise(address: int, nbytes: int, advice: int) -> None:
    """Advise the kernel about [address, address + nbytes); raises OSError."""
    while libc.madvise(ffi.cast("void *", address), nbytes, advice) != 0:
        # MADV_POPULATE_WRITE is interrupted by signals and goes on where it stopped.
        if ffi.errno not in {errno.EINTR, errno.EAGAIN}:
            raise OSError(ffi.errno, os.strerror(ffi.errno))


def memset(address: int, nbytes: int) -> None:
    """Write zeros to [address, address + nbytes)."""
    libc.memset(ffi.cast("void *", address), 0, nbytes)
