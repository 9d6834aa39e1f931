"""Host memory that disks and GPUs read and write at full rate: exact size, huge pages, pinned when asked.

Why not `torch.empty(pin_memory=True)`: it rounds up to powers of two and takes 0.39 s/GiB where this takes 0.064.
Huge pages matter most: a 1 MiB read into scattered 4 KiB pages has 256 segments, more than many disks take at once, and
ran at 0.37 of the rate into 2 MiB pages. The mapping must be private: for shared anonymous memory, which is what
`mmap.mmap(-1, n)` gives, MADV_HUGEPAGE does nothing.
"""

from __future__ import annotations

import errno
import gc
import logging
import mmap
import os
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from penstock.errors import BudgetError, ClosedError
from penstock.io.libc import address_of, madvise, memset
from penstock.io.limits import available_memory, memory_limit

__all__ = ["HUGE_PAGE", "HostMemory", "HostMemoryStatistics"]

HUGE_PAGE = 2 << 20
_PAGE = mmap.PAGESIZE
_MADV_POPULATE_WRITE = 23
_PIECE = 32 * HUGE_PAGE
_MAX_THREADS = 16
_CUDA_HOST_REGISTER_PORTABLE = 1

logger = logging.getLogger("penstock.io")


@dataclass(frozen=True, slots=True)
class HostMemoryStatistics:
    """What a slab is made of, in bytes, and what it cost, in seconds.

    `resident_nbytes` is `nbytes` in whole pages. `huge_nbytes` is how much of it lies on 2 MiB pages, as the kernel
    counts them: None where it does not say, an estimate where it keeps the slab together with its neighbours.
    """

    nbytes: int
    resident_nbytes: int
    huge_nbytes: int | None
    pinned: bool
    populate_seconds: float
    pin_seconds: float


class HostMemory:
    """One slab of `nbytes` bytes of zeroed, resident memory on 2 MiB pages; a context manager, close is idempotent.

    The owner closes it when no read, copy or kernel uses it any more: close waits for none of them. Views (memoryviews,
    numpy arrays, torch tensors made of `view`) may outlive it: they are never unmapped under their users. Close takes
    the pinning away at once; the pages go when the last view goes, and a warning says so if any is left.

    Raises BudgetError, before anything is allocated, when the machine or its control group has too little left.
    """

    def __init__(self, nbytes: int, *, pin: bool = False) -> None:
        assert nbytes >= 0
        self.nbytes = nbytes
        unit = HUGE_PAGE if nbytes >= HUGE_PAGE else _PAGE
        resident = -(-nbytes // unit) * unit
        _check_budget(nbytes, resident)
        self._resident = resident
        self._mapping = _map(resident + HUGE_PAGE)
        self._view: memoryview | None = _aligned(self._mapping, nbytes)
        self._address = address_of(self._view) if nbytes else 0
        began = time.perf_counter()
        _populate(self._address, resident)
        populated = time.perf_counter()
        self._unpin: weakref.finalize[..., HostMemory] | None = None
        if pin and nbytes:
            self._unpin = _pin(self, self._address, resident)
        self._populate_seconds = populated - began
        self._pin_seconds = time.perf_counter() - populated

    @property
    def view(self) -> memoryview:
        """The bytes: writable, format "B"; may be sliced. Starts on a multiple of 2 MiB."""
        if self._view is None:
            raise ClosedError("host memory was used after close")
        return self._view

    @property
    def address(self) -> int:
        """The address of the first byte."""
        if self._view is None:
            raise ClosedError("host memory was used after close")
        return self._address

    @property
    def pinned(self) -> bool:
        """Whether CUDA has it registered, so that copies to and from it run asynchronously at full rate."""
        return self._unpin is not None and self._unpin.alive

    def statistics(self) -> HostMemoryStatistics:
        """Return a snapshot."""
        return HostMemoryStatistics(
            nbytes=self.nbytes,
            resident_nbytes=self._resident,
            huge_nbytes=_huge_bytes(self.address, self._resident),
            pinned=self.pinned,
            populate_seconds=self._populate_seconds,
            pin_seconds=self._pin_seconds,
        )

    def close(self) -> None:
        """Unpin, and give the pages back now or, with a warning, when the last view of them is gone."""
        if self._view is None:
            return
        if self._unpin is not None:
            self._unpin()
        # Dropped, not released: torch.frombuffer keeps the memoryview alive but does not count as an export of it, so
        # release() would succeed under a live tensor. As long as the object lives, the mapping refuses to close.
        self._view = None
        if not _unmap(self._mapping):
            gc.collect()  # frames of errors that are over may hold views, in cycles
            if not _unmap(self._mapping):
                logger.warning("host memory of %d bytes was closed while views of it exist; they keep it", self.nbytes)
        del self._mapping

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _unmap(mapping: mmap.mmap) -> bool:
    """Give the pages back; False when there are views of them."""
    try:
        mapping.close()
    except BufferError:
        return False
    return True


def _check_budget(nbytes: int, resident: int) -> None:
    available = available_memory()
    if resident > available:
        raise BudgetError(
            "host memory does not suffice",
            wanted=f"{nbytes} bytes",
            got=f"{available} bytes available to this process ({_describe_limits()})",
            fix="Lower the host memory budget, or raise the container's memory limit.",
        )


def _map(nbytes: int) -> mmap.mmap:
    try:
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise BudgetError(
            f"the kernel refused to map host memory: {error.strerror}",
            wanted=f"{nbytes} bytes",
            fix="Look at `ulimit -v` and vm.overcommit_memory, or lower the host memory budget.",
        ) from error
    # After a fork, copy-on-write could give this process new pages while a disk still writes to the old ones.
    mapping.madvise(mmap.MADV_DONTFORK)
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        logger.warning("no huge pages for host memory (%s): reads from disk will be slower", error.strerror)
    return mapping


def _aligned(mapping: mmap.mmap, nbytes: int) -> memoryview:
    """Return so many bytes of a mapping, from its first multiple of 2 MiB on."""
    # Not released by hand: a signal's exception may hold parts of it, and the refusal to release would take its place.
    whole = memoryview(mapping)
    start = -address_of(whole) % HUGE_PAGE
    return whole[start : start + nbytes]


def _populate(address: int, nbytes: int) -> None:
    """Make all pages resident, from several threads, since the kernel zeroes them one by one."""
    pieces = [(address + offset, min(_PIECE, nbytes - offset)) for offset in range(0, nbytes, _PIECE)]
    if not pieces:
        return
    threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)), len(pieces))
    with ThreadPoolExecutor(threads, thread_name_prefix="penstock-populate") as pool:
        for future in [pool.submit(_populate_piece, *piece) for piece in pieces]:
            future.result()


def _populate_piece(address: int, nbytes: int) -> None:
    try:
        madvise(address, nbytes, _MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise BudgetError("the kernel ran out of host memory", wanted=f"{nbytes} bytes more") from error
        # Linux before 5.14 does not know the advice.
        memset(address, nbytes)


def _pin(owner: HostMemory, address: int, nbytes: int) -> weakref.finalize[..., HostMemory] | None:
    """Register the pages with CUDA; return what unregisters them, or None after a warning that says why not."""
    import torch  # noqa: PLC0415 - this module is also used where nothing needs torch

    if not torch.cuda.is_available():
        logger.warning("host memory is not pinned: torch sees no CUDA device; copies will be slower")
        return None
    # Said before, too: a process that goes over its control group's limit is killed without a word.
    logger.info("pinning %d bytes of host memory; %d available, %s", nbytes, available_memory(), _describe_limits())
    cudart: Any = torch.cuda.cudart()
    status = cudart.cudaHostRegister(address, nbytes, _CUDA_HOST_REGISTER_PORTABLE)
    if int(status) == 0:
        return weakref.finalize(owner, cudart.cudaHostUnregister, address)
    _forget_cuda_error(torch)
    logger.warning(
        "host memory of %d bytes is not pinned (cudaHostRegister: %s; %d bytes available, %s): copies will be slower. "
        "Lower the host memory budget, or raise the container's memory limit and `ulimit -l`",
        nbytes,
        status,
        available_memory(),
        _describe_limits(),
    )
    return None


def _forget_cuda_error(torch: Any) -> None:
    """Take the error that CUDA remembers, or the next kernel launch would report it as its own."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        logger.debug("the failed registration was reported once more, and forgotten", exc_info=True)


def _describe_limits() -> str:
    """Name the limits on memory that an administrator can change."""
    import resource  # noqa: PLC0415 - needed for messages only

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    locked = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} bytes"
    limit = memory_limit()
    return f"control group's limit {'none' if limit is None else f'{limit} bytes'}, `ulimit -l` {locked}"


def _huge_bytes(address: int, nbytes: int) -> int | None:
    """Return how much of [address, address + nbytes) is on 2 MiB pages; None where the kernel does not say."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return None
    found: int | None = None
    share = 0.0
    for line in lines:
        first, *rest = line.split()
        if first == "AnonHugePages:":
            found = (found or 0) + int(share * int(rest[0]) * 1024)
        elif not first.endswith(":"):
            # Equal neighbours are one mapping to the kernel, which counts for all of it.
            start, end = (int(place, 16) for place in first.split("-"))
            share = max(0, min(end, address + nbytes) - max(start, address)) / (end - start)
    return None if found is None else min(found, nbytes)
