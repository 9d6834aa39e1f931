"""Linux AIO's four calls, through libaio where it is installed and through the C library's `syscall` otherwise.

libaio is libaio.so.1 on most systems and libaio.so.1t64 on Debian 13 and Ubuntu 24.04; minimal containers have neither.
The raw system calls need nothing but the kernel. The structures are those of <linux/aio_abi.h>, little-endian.
"""

from __future__ import annotations

import platform
import sys
from traceback import clear_frames
from typing import Any, Protocol

import cffi

from penstock.errors import ReadError
from penstock.io.libc import ffi as libc_ffi
from penstock.io.libc import libc

__all__ = [
    "IOCB_CMD_PREAD",
    "IOCB_CMD_PWRITE",
    "AioCalls",
    "LibraryCalls",
    "SystemCalls",
    "available_calls",
    "ffi",
]

IOCB_CMD_PREAD = 0
IOCB_CMD_PWRITE = 1

ffi: Any = cffi.FFI()
ffi.cdef(
    """
    struct iocb {
        uint64_t data; uint32_t key; int32_t rw_flags; uint16_t opcode; int16_t priority; uint32_t fd;
        uint64_t buffer; uint64_t nbytes; int64_t offset; uint64_t reserved; uint32_t flags; uint32_t eventfd;
    };
    struct io_event { uint64_t data; uint64_t iocb; int64_t result; int64_t result2; };
    int io_setup(int events, uintptr_t *context);
    int io_submit(uintptr_t context, long count, uintptr_t *iocbs);
    int io_getevents(uintptr_t context, long at_least, long at_most, struct io_event *events, void *timeout);
    int io_destroy(uintptr_t context);
    """
)

_LIBRARIES = ("libaio.so.1", "libaio.so.1t64")
_GENERIC_NUMBERS = {"setup": 0, "destroy": 1, "submit": 2, "getevents": 4}
_NUMBERS = {
    "x86_64": {"setup": 206, "destroy": 207, "submit": 209, "getevents": 208},
    "aarch64": _GENERIC_NUMBERS,
    "riscv64": _GENERIC_NUMBERS,
}


class AioCalls(Protocol):
    """The calls, with io_submit(3)'s and io_getevents(3)'s meanings; all return a count, or -errno."""

    name: str

    def setup(self, events: int, context: Any) -> int:
        """Make a context for at least `events` requests in flight."""

    def submit(self, context: int, count: int, iocbs: Any) -> int:
        """Start requests; may start fewer than `count`."""

    def getevents(self, context: int, at_least: int, at_most: int, events: Any) -> int:
        """Wait for events."""

    def destroy(self, context: int) -> int:
        """Wait for everything in flight and free the context."""


class LibraryCalls:
    """The calls of libaio, whose io_getevents reads the completion ring without entering the kernel when it can."""

    def __init__(self, library: str) -> None:
        self.name = library
        try:
            self._library: Any = ffi.dlopen(library)
        except OSError as error:
            # cffi keeps the error in a local variable, so that the error and its frames, down to ours with views of the
            # caller's memory, would hold each other until the garbage collector comes.
            clear_frames(error.__traceback__)
            raise ReadError(f"{library} is not installed") from None

    def setup(self, events: int, context: Any) -> int:
        """Make a context."""
        return int(self._library.io_setup(events, context))

    def submit(self, context: int, count: int, iocbs: Any) -> int:
        """Start requests."""
        return int(self._library.io_submit(context, count, iocbs))

    def getevents(self, context: int, at_least: int, at_most: int, events: Any) -> int:
        """Wait for events."""
        return int(self._library.io_getevents(context, at_least, at_most, events, ffi.NULL))

    def destroy(self, context: int) -> int:
        """Free the context."""
        return int(self._library.io_destroy(context))


class SystemCalls:
    """The system calls themselves."""

    name = "system calls"

    def __init__(self) -> None:
        machine = platform.machine()
        if machine not in _NUMBERS or sys.byteorder != "little" or sys.maxsize < 1 << 32:
            raise ReadError("Linux AIO's system call numbers are not known here", got=machine)
        self._numbers = _NUMBERS[machine]

    def setup(self, events: int, context: Any) -> int:
        """Make a context."""
        return self._call("setup", events, _address(context))

    def submit(self, context: int, count: int, iocbs: Any) -> int:
        """Start requests."""
        return self._call("submit", context, count, _address(iocbs))

    def getevents(self, context: int, at_least: int, at_most: int, events: Any) -> int:
        """Wait for events."""
        return self._call("getevents", context, at_least, at_most, _address(events), 0)

    def destroy(self, context: int) -> int:
        """Free the context."""
        return self._call("destroy", context)

    def _call(self, name: str, *arguments: int) -> int:
        # `syscall` is variadic, so each argument must be given its C type.
        typed = [libc_ffi.cast("long", argument) for argument in arguments]
        result = int(libc.syscall(self._numbers[name], *typed))
        return -libc_ffi.errno if result < 0 else result


def available_calls() -> list[AioCalls]:
    """Return every way to call Linux AIO on this machine, best first; raise ReadError when there is none."""
    calls: list[AioCalls] = []
    faults: list[str] = []
    for library in _LIBRARIES:
        try:
            calls.append(LibraryCalls(library))
        except ReadError as error:
            faults.append(error.what)
    try:
        calls.append(SystemCalls())
    except ReadError as error:
        faults.append(error.what)
    if not calls:
        raise ReadError("Linux AIO cannot be called", got="; ".join(faults), fix="Choose the reader 'threads'.")
    return calls


def _address(pointer: Any) -> int:
    return int(ffi.cast("uintptr_t", pointer))


assert ffi.sizeof("struct iocb") == 64
assert ffi.sizeof("struct io_event") == 32
