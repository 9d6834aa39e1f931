"""What the links and the arithmetic could do, measured in the process that will be compared with it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from penstock.errors import PenstockError
from penstock.io.choose import open_reader
from penstock.io.files import SourceFile
from penstock.io.memory import HostMemory
from penstock.io.settings import ReadSettings
from penstock.io.statistics import median
from penstock.io.sweep import Deadline
from penstock.io.window import Engine, run_window
from penstock.offload.cost import Machine
from penstock.offload.links import measure_links

__all__ = ["DiskPeak", "Peaks", "measure_peaks"]

_CELLS = ((1 << 20, 32), (1 << 20, 128), (4 << 20, 32))
"""(block bytes, requests in flight), to which comes what the run is set to."""

_MAX_THREADS = 32
_WINDOW_SECONDS = 0.5
_LIMIT_SECONDS = 30.0
"""Never reached by a machine that is well: a few runs of each link, of at most a second each."""

logger = logging.getLogger("penstock.offload")


class DiskPeak:
    """The rate of plain reads of one file, O_DIRECT where the file system honours it, into memory of the stream's kind.

    The best of a few ways to read is found first; `measure` adds a window read in that way, so that a disk that drifts
    can be looked at before and after. `bytes_per_second` is the median of these.
    """

    def __init__(self, file: SourceFile, *, settings: ReadSettings | None = None, pin: bool = False) -> None:
        self._file = file
        self._settings = settings or ReadSettings()
        self._pin = pin
        self._cell: tuple[int, int] | None = None
        self.rates: list[float] = []

    def measure(self, seconds: float = 1.0) -> None:
        """Read for about so many seconds for each window. Logs why, when the file cannot be measured."""
        own = self._settings.block_nbytes or 1 << 20
        ways = {*_CELLS, (own, max(1, self._settings.in_flight_nbytes // own))} if self._cell is None else {self._cell}
        cells = [(block, depth) for block, depth in sorted(ways) if block <= self._file.nbytes]
        try:
            with HostMemory(max((block * depth for block, depth in cells), default=0), pin=self._pin) as memory:
                rates = {cell: self._window(memory.view, cell, seconds) for cell in cells}
        except PenstockError as error:
            logger.warning("plain reads could not be measured: %s", error)
            return
        if rates and self._cell is None:  # the best of a few is luck too, so it is measured again
            self._cell = max(rates, key=lambda cell: rates[cell])
            self.measure(seconds)
        else:
            self.rates += rates.values()

    def _window(self, memory: memoryview, cell: tuple[int, int], seconds: float) -> float:
        block, depth = cell
        reader, choice = open_reader(self._settings.backend, self._file, memory)
        reader.close()
        engine: Engine = choice.name  # type: ignore[assignment]
        return run_window(
            self._file,
            memory,
            engine=engine,
            block_nbytes=block,
            depth=depth if engine == "libaio" else min(depth, _MAX_THREADS),
            seconds=seconds,
            direct=choice.direct,
        ).bytes_per_second

    @property
    def bytes_per_second(self) -> float | None:
        """The median of the windows; None when nothing was measured."""
        return median(self.rates) if self.rates else None


@dataclass(frozen=True, slots=True)
class Peaks:
    """Bytes per second of the links and FLOP per second of matrix products, by dtype; None or absent when unknown.

    `host_to_device` is pinned copies on CUDA; on the CPU, where the device is host memory too, plain copies, each byte
    counted once. `device_memory` is how fast the device reads and writes its own, `host_read` how fast processors read
    host RAM.
    """

    device: str
    host_to_device: float | None
    device_memory: float | None
    disk: DiskPeak
    matmul: dict[str, float] = field(default_factory=dict)
    host_read: float | None = None

    def machine(self, dtype: str) -> Machine:
        """Return the rates that bound passes of a dtype."""
        return Machine(
            host_to_device=self.host_to_device,
            nvme_to_host=self.disk.bytes_per_second,
            flops=self.matmul.get(dtype),
            device_memory=self.device_memory,
            host_read=self.host_read,
            on_cpu=self.device == "cpu",
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "device": self.device,
            "host_to_device": self.host_to_device,
            "device_memory": self.device_memory,
            "host_read": self.host_read,
            "nvme_to_host": self.disk.bytes_per_second,
            "nvme_to_host_windows": self.disk.rates,
            "matmul": self.matmul,
        }


def measure_peaks(
    file: SourceFile,
    *,
    device: torch.device,
    settings: ReadSettings | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Peaks:
    """Measure what a run on `device` that reads `file` is compared with, in some seconds; keeps no memory."""
    on_cuda = device.type == "cuda"
    with torch.cuda.device(device) if on_cuda else nullcontext():
        links = measure_links(deadline=Deadline(_LIMIT_SECONDS), on_step=on_step, cuda=on_cuda)
    if on_cuda:
        torch.cuda.empty_cache()
    on_step("disk")
    disk = DiskPeak(file, settings=settings, pin=on_cuda)
    disk.measure(_WINDOW_SECONDS)
    to_device, own = links.host_to_device, links.device_memory
    if not on_cuda:
        to_device, own = links.host_copy, links.host_read
    return Peaks(links.device, to_device, own, disk, links.matmul, links.host_read)
