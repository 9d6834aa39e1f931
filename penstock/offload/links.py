"""Measure the links that are not the disk: host memory, host ↔ device, both at once, and the device's arithmetic.

Each figure is the best of a few short runs on buffers far larger than any cache: a link's peak is what plans count
with, and everything that disturbs a run makes it slower. A GPU's products are timed after a second of them: by then the
card is as slow as its power makes it (an H200 goes from 787 to 659 TFLOP/s of bfloat16), and a large pass takes longer.
Without a GPU only host memory and the CPU's products are measured.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from penstock.errors import PenstockError
from penstock.io.blockdev import PcieLink, pcie_link, read_line
from penstock.io.choose import open_reader
from penstock.io.files import SourceFile
from penstock.io.limits import available_memory
from penstock.io.memory import HostMemory
from penstock.io.plateau import Choice
from penstock.io.reader import ALIGNMENT, Read, Reader
from penstock.io.sweep import Deadline
from penstock.kernels.fp8_linear import product as fp8_product
from penstock.kernels.fp8_linear import why_no_fp8
from penstock.offload.hardware import UNKNOWN_LINKS, Links

__all__ = ["measure_links"]

_HOST_BYTES, _HASTY_HOST_BYTES = 512 << 20, 128 << 20
_PAGEABLE_BYTES = 256 << 20
_COPY_BYTES = 1 << 30
_REPEATS = 5
_CPU_DTYPES = (torch.float32, torch.bfloat16)
_CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CPU_SIDE = 1024
_CUDA_SIDE = 8192
_WARM_SECONDS, _WINDOW_SECONDS = 1.0, 0.2
_RING = 3

logger = logging.getLogger("penstock.offload")


def measure_links(
    *,
    deadline: Deadline,
    disk: tuple[SourceFile, Choice] | None = None,
    on_step: Callable[[str], None] = lambda _: None,
    cuda: bool | None = None,
) -> Links:
    """Measure until the deadline, the figures that plans need most first; what is left out is None.

    `disk` is a file and how to read it, for the path from disk to device; None leaves that out. `cuda` False measures
    what there is without a GPU; None looks for one. Of several it is torch's current one.
    """
    cuda = torch.cuda.is_available() if cuda is None else cuda
    found: dict[str, Any] = {}
    steps: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("host memory", lambda: _host(deadline)),
        ("matrix products", lambda: {"matmul": _matmul(deadline, cuda=cuda)}),
    ]
    if cuda:
        copies = _Copies(deadline)
        steps = [("pinning", copies.pin), ("copies", copies.run), ("device memory", _device_memory), *steps[::-1]]
        if disk:
            steps.append(("disk to device", lambda: _read_and_copy(*disk, deadline)))
    complete = True
    with contextlib.ExitStack() as stack:
        if cuda:
            stack.callback(copies.close)
        for name, step in steps:
            if deadline.passed():
                complete = False
                break
            on_step(name)
            try:
                found |= step()
            except (PenstockError, RuntimeError) as error:
                # torch says RuntimeError when the GPU's memory is taken.
                logger.warning("%s could not be measured: %s", name, error)
    return replace(UNKNOWN_LINKS, **_device(cuda=cuda), **found, complete=complete)


def _device(*, cuda: bool) -> dict[str, Any]:
    if not cuda:
        return {"device": "cpu", "device_pcie": None, "device_numa_node": None}
    number = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(number)
    pcie, node = _bus(properties)
    return {
        "device": torch.cuda.get_device_name(number),
        "device_pcie": pcie,
        "device_numa_node": node,
        "device_memory_nbytes": properties.total_memory,
    }


def _bus(properties: Any) -> tuple[PcieLink | None, int | None]:
    """Look the GPU up in /sys by its bus address, which torch tells since 2.8."""
    try:
        address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    except AttributeError:
        return None, None
    directory = Path("/sys/bus/pci/devices", address)
    node = read_line(directory / "numa_node") or ""
    return pcie_link(directory), int(node) if node.isdigit() else None


def _fastest(run: Callable[[], Any], deadline: Deadline, *, seconds: float = 1.0) -> float:
    """Return the seconds of the fastest of at least two runs; more as long as `seconds` last."""
    limit = deadline.part(seconds)
    best = float("inf")
    for number in range(_REPEATS):
        if number >= 2 and limit.passed():
            break
        best = min(best, _timed(run))
    return best


def _host(deadline: Deadline) -> dict[str, Any]:
    nbytes = _fitting(_HOST_BYTES if deadline.left() > 5 else _HASTY_HOST_BYTES)
    with HostMemory(2 * nbytes) as memory:
        read, copy = _read_and_copy_seconds(memory.view, deadline)
    return {"host_read": nbytes / read, "host_copy": nbytes / copy}


def _read_and_copy_seconds(view: memoryview, deadline: Deadline) -> tuple[float, float]:
    source, target = torch.frombuffer(view, dtype=torch.int64).chunk(2)
    return (
        _fastest(source.sum, deadline, seconds=0.4),
        _fastest(lambda: target.copy_(source), deadline, seconds=0.4),
    )


def _device_memory() -> dict[str, Any]:
    """Return the rate at which the device's own memory is read and written; a copy does both."""
    nbytes = min(_COPY_BYTES, torch.cuda.mem_get_info()[0] // 4)
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2))

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    return {"device_memory": 2 * nbytes / min(_timed(copy) for _ in range(_REPEATS))}


def _timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _fitting(nbytes: int) -> int:
    """Return a size that leaves most of the memory alone."""
    return max(ALIGNMENT, min(nbytes, available_memory() // 8) // ALIGNMENT * ALIGNMENT)


class _Copies:
    """Copies between pinned or pageable host memory and the current CUDA device."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._nbytes = _fitting(_COPY_BYTES)
        self._memory: HostMemory | None = None

    def pin(self) -> dict[str, Any]:
        """Take pinned memory, and say how long that takes per GiB; None when the system refuses to pin."""
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        began = time.perf_counter()
        self._memory = HostMemory(2 * self._nbytes, pin=True)
        seconds = time.perf_counter() - began
        return {"pin_seconds_per_gib": seconds / (2 * self._nbytes / 2**30) if self._memory.pinned else None}

    def run(self) -> dict[str, Any]:
        """Measure both directions alone, at once, and from pageable memory."""
        if self._memory is None or not self._memory.pinned:
            return {"pageable_to_device": self._pageable()}
        whole = torch.frombuffer(self._memory.view, dtype=torch.uint8)
        here, there = whole[: self._nbytes], whole[self._nbytes :]
        first, second = (torch.empty(self._nbytes, dtype=torch.uint8, device="cuda") for _ in range(2))
        down, up = torch.cuda.Stream(), torch.cuda.Stream()

        def copy(*, to_device: bool, to_host: bool) -> None:
            if to_device:
                with torch.cuda.stream(down):
                    first.copy_(here, non_blocking=True)
            if to_host:
                with torch.cuda.stream(up):
                    there.copy_(second, non_blocking=True)
            torch.cuda.synchronize()

        torch.cuda.synchronize()
        seconds = [
            _fastest(lambda ways=ways: copy(to_device=ways[0], to_host=ways[1]), self._deadline)  # type: ignore[misc]
            for ways in ((True, False), (False, True), (True, True))
        ]
        return {
            "host_to_device": self._nbytes / seconds[0],
            "device_to_host": self._nbytes / seconds[1],
            "both_directions": 2 * self._nbytes / seconds[2],
            "pageable_to_device": self._pageable(),
        }

    def _pageable(self) -> float:
        source = torch.ones(_PAGEABLE_BYTES, dtype=torch.uint8)
        target = torch.empty(_PAGEABLE_BYTES, dtype=torch.uint8, device="cuda")

        def copy() -> None:
            target.copy_(source)
            torch.cuda.synchronize()

        return _PAGEABLE_BYTES / _fastest(copy, self._deadline, seconds=0.5)

    def close(self) -> None:
        """Give the memory back."""
        if self._memory is not None:
            self._memory.close()


def _read_and_copy(file: SourceFile, choice: Choice, deadline: Deadline) -> dict[str, Any]:
    """Read batches of the recommended size into a ring of pinned memory, and copy each to the device as it lands."""
    region = min(choice.cell.in_flight_nbytes, file.nbytes) // ALIGNMENT * ALIGNMENT
    with HostMemory(_RING * region, pin=True) as memory:
        try:
            reader, _ = open_reader("auto", file, memory.view[:region])
        except PenstockError:
            return {"read_and_copy": None}
        with reader:
            return {"read_and_copy": _run_ring(reader, file, memory.view, region, deadline.part(3.0))}


def _run_ring(reader: Reader, file: SourceFile, memory: memoryview, region: int, limit: Deadline) -> float:
    """Return bytes per second from the disk through all regions of `memory` to the device."""
    pieces = [memory[index * region : (index + 1) * region] for index in range(_RING)]
    sources = [torch.frombuffer(piece, dtype=torch.uint8) for piece in pieces]
    target = torch.empty(region, dtype=torch.uint8, device="cuda")
    offsets = itertools.cycle(range(0, file.nbytes - region + 1, region))
    began = time.perf_counter()
    tickets = [reader.submit([Read(file, next(offsets), piece)]) for piece in pieces]
    done = 0
    for index in itertools.cycle(range(_RING)):
        reader.wait(tickets[index])
        target.copy_(sources[index], non_blocking=True)
        # Read into it again once its copy has ended; the other regions' reads are under way meanwhile.
        torch.cuda.current_stream().synchronize()
        done += region
        if limit.passed():
            break
        tickets[index] = reader.submit([Read(file, next(offsets), pieces[index])])
    return done / (time.perf_counter() - began)


def _matmul(deadline: Deadline, *, cuda: bool) -> dict[str, float]:
    """Return FLOP per second by dtype; products of squares, as large as the device needs to be busy."""
    device, side, dtypes = ("cuda", _CUDA_SIDE, _CUDA_DTYPES) if cuda else ("cpu", _CPU_SIDE, _CPU_DTYPES)
    rates: dict[str, float] = {}
    for dtype in dtypes:
        if deadline.passed():
            break
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty(side, side, device=device, dtype=dtype)

        def product(left: torch.Tensor = left, right: torch.Tensor = right, out: torch.Tensor = out) -> None:
            torch.mm(left, right, out=out)

        product()
        seconds = _sustained(product, deadline) if cuda else _fastest(product, deadline, seconds=0.4)
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / seconds
    if cuda and not deadline.passed() and why_no_fp8(torch.device("cuda", torch.cuda.current_device())) is None:
        left, right = (torch.randn(side, side, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
        ones = torch.ones(side, device="cuda")
        seconds = _sustained(lambda: fp8_product(left, ones[:, None], right, ones), deadline)
        rates["float8_e4m3fn"] = 2 * side**3 / seconds
    return rates


def _sustained(run: Callable[[], Any], deadline: Deadline) -> float:
    """Return the seconds that a GPU takes for a run once it has been busy with them for a while."""

    def window() -> None:
        for _ in range(count):
            run()
        torch.cuda.synchronize()

    count = 1
    window()
    count = max(1, round(_WINDOW_SECONDS / _timed(window)))
    limit = deadline.part(min(_WARM_SECONDS, deadline.left() / 10))
    while True:
        warm = limit.passed()
        seconds = _timed(window) / count
        if warm:
            return seconds
