"""Measure one disk from start to end: what to read, with which engine, the sweep, and what puts it in doubt."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from penstock.errors import PenstockError
from penstock.io import fio
from penstock.io.advice import Warn, file_warnings, target_warnings
from penstock.io.blockdev import sectors
from penstock.io.cells import Cell, grid
from penstock.io.facts import DirectFacts, FileFacts, HostFacts, TargetFacts, direct_facts, file_facts, target_facts
from penstock.io.files import SourceFile
from penstock.io.limits import available_memory
from penstock.io.memory import HostMemory
from penstock.io.scratch import Target, scratch_file, scratch_nbytes
from penstock.io.sweep import Deadline, Schedule, Sweep, run_sweep
from penstock.io.window import Engine, Window, run_window

__all__ = ["Disk", "DiskProfile", "ProfileOptions", "open_disk"]

_MEMORY_BYTES = 256 << 20
_MIN_MEMORY_BYTES = 16 << 20
_QUIET_SECONDS = 0.2
_FOREIGN_SHARE = 0.02
_FOREIGN_VISIT_SHARE = 0.25
_FOREIGN_BYTES = 16 << 20
_MAX_REPEATS = 2
_AGAIN_FASTER = 1.15
_AGAIN_SECONDS = 1.0
_BUSY_CORE = 0.8
_FIO_SECONDS = 300.0
_ALIGN = 1 << 20


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """What to sweep: bytes per block, requests in flight, and the scratch file's size and upper bound in bytes."""

    blocks: tuple[int, ...]
    depths: tuple[int, ...]
    size: int | None
    max_write: int
    scratch_seconds: float


@dataclass(frozen=True, slots=True)
class DiskProfile:
    """One disk, measured. `again_ratio`: the rate of the second reading of the same bytes ÷ the first's.

    `engine` is what the sweep read with, and `engine_reason` why.
    """

    target: TargetFacts
    file: FileFacts
    engine: Engine
    engine_reason: str
    sweep: Sweep
    again_ratio: float | None
    fio: fio.FioVerdict | None
    warnings: tuple[Warn, ...]


class Disk:
    """A file that can be measured, and the memory that it is read into. Made by `open_disk`."""

    def __init__(
        self, target: Target, file: SourceFile, memory: HostMemory, direct: DirectFacts, deadline: Deadline
    ) -> None:
        self.target = target
        self.file = file
        self.memory = memory
        self.direct = direct
        self.deadline = deadline
        self.ramp_seconds = 0.1
        self.device = ""
        self.repeated = 0
        self.engine: Engine
        self.engine, self.engine_reason, self.warnings = self._choose_engine()
        self._offset = 0

    def _choose_engine(self) -> tuple[Engine, str, list[Warn]]:
        if not self.direct.works:
            return "threads", "Linux AIO blocks on files that are read through the page cache", []
        try:
            self._window(Cell("libaio", "window", 1 << 20, 4), 0.02, offset=0)
        except PenstockError as error:
            fix = error.fix or "choose another reader"
            return "threads", f"Linux AIO does not work here: {error.what}", [Warn("no_aio", str(error), fix)]
        return "libaio", "Linux AIO works, and costs the least CPU time", []

    def measure(self, cell: Cell, seconds: float) -> Window:
        """Measure a cell on bytes that were not read for the longest time: where the last measurement ended.

        A visit during which others used the same disk says nothing about it and is repeated, at most twice.
        """
        window, disturbed = self._visit(cell, seconds)
        for _ in range(_MAX_REPEATS):
            if not disturbed or self.deadline.passed():
                break
            self.repeated += 1
            window, disturbed = self._visit(cell, seconds)
        return window

    def _visit(self, cell: Cell, seconds: float) -> tuple[Window, bool]:
        """Measure once; return whether the disk moved clearly more bytes than we asked it for."""
        before = sum(sectors(self.device))
        window = self._window(cell, seconds, offset=self._offset)
        moved = sum(sectors(self.device)) - before
        read = window.nbytes * (1 + self.ramp_seconds / max(window.seconds, self.ramp_seconds))
        self._offset = int(self._offset + read) % self.file.nbytes // _ALIGN * _ALIGN
        return window, moved > (1 + _FOREIGN_VISIT_SHARE) * (read + 2 * cell.in_flight_nbytes) + _FOREIGN_BYTES

    def again_ratio(self, cell: Cell) -> float | None:
        """Return how much faster the same bytes are read at once again; None when there is no time for it."""
        ratios = []
        for _ in range(2):
            offset = self._offset
            first, second = (self._window(cell, 0.15, offset=offset) for _ in range(2))
            self._offset = (offset + self.file.nbytes // 3) % self.file.nbytes // _ALIGN * _ALIGN
            if not first.nbytes or not second.nbytes:
                return None
            ratios.append(second.bytes_per_second / first.bytes_per_second)
        return min(ratios)

    def _window(self, cell: Cell, seconds: float, *, offset: int, memory: memoryview | None = None) -> Window:
        return run_window(
            self.file,
            self.memory.view if memory is None else memory,
            engine=cell.engine,
            pattern=cell.pattern,
            block_nbytes=cell.block_nbytes,
            depth=cell.depth,
            seconds=seconds,
            ramp_seconds=self.ramp_seconds,
            offset=offset,
            direct=self.direct.works,
            stop=self.deadline.passed,
        )

    def cells(self, options: ProfileOptions) -> list[Cell]:
        """Return what to sweep: what fits the memory and the file."""
        limit = min(self.memory.nbytes, self.file.nbytes)
        return grid(options.blocks, options.depths, engine=self.engine, max_nbytes=limit)

    def verify(self, sweep: Sweep, host: HostFacts, on_step: Callable[[str], None]) -> fio.FioVerdict:
        """Compare with fio at depth 1, the knee and the recommended cell; takes two minutes of its own."""
        assert sweep.choice is not None
        self.deadline = Deadline(_FIO_SECONDS)
        self.ramp_seconds = fio.RAMP_SECONDS
        cells = fio.comparable_cells(sweep.choice.cell, sweep.knee)
        pages = fio.pages_for(host.transparent_huge_pages, os.confstr("CS_GNU_LIBC_VERSION") or "")
        if pages == "2 MiB":
            return self._verify(cells, pages, self.memory.view, on_step)
        with fio.small_pages(max(cell.in_flight_nbytes for cell in cells)) as memory:
            return self._verify(cells, pages, memory, on_step)

    def _verify(
        self, cells: list[Cell], pages: fio.Pages, memory: memoryview, on_step: Callable[[str], None]
    ) -> fio.FioVerdict:
        return fio.verify(
            cells,
            lambda cell, seconds: self._window(cell, seconds, offset=0, memory=memory).bytes_per_second,
            self.file.path,
            pages=pages,
            seconds=0.8,
            deadline=self.deadline,
            on_step=on_step,
        )

    def profile(self, options: ProfileOptions, *, seed: int, on_step: Callable[[str], None]) -> DiskProfile:
        """Sweep, and look for what puts the result in doubt."""
        target = target_facts(self.target.path, self.file, self.direct)
        facts = file_facts(self.file, created=self.target.file is None, written_nbytes=self._written())
        self.device = target.devices[0].name if target.devices else ""
        foreign = self._foreign_reads(self.device)
        _, written_before = sectors(self.device)
        cells = self.cells(options)
        schedule = Schedule.fit(max(1.0, 0.95 * self.deadline.left()), len(cells))
        self.ramp_seconds = schedule.ramp_seconds
        sweep = run_sweep(
            self.measure, cells, schedule, max_nbytes=self.memory.nbytes, deadline=self.deadline,
            rng=random.Random(seed), on_step=on_step,  # noqa: S311 - an order, not a secret
        )  # fmt: skip
        again = self.again_ratio(sweep.choice.cell) if sweep.choice and self.deadline.left() > _AGAIN_SECONDS else None
        _, written_after = sectors(self.device)
        warnings = [*self.warnings, *target_warnings(target), *file_warnings(facts)]
        if self.repeated:
            text = f"{self.repeated} visits were repeated, because others used the same disk meanwhile"
            warnings.append(Warn("foreign_visits", text, "stop them and measure again"))
        warnings += doubts(sweep, again=again, foreign=foreign, written=written_after - written_before)
        return DiskProfile(target, facts, self.engine, self.engine_reason, sweep, again, None, tuple(warnings))

    def _written(self) -> int:
        return self.file.nbytes if self.target.file is None else 0

    def _foreign_reads(self, device: str) -> float:
        """Return the bytes per second that others read while we do nothing."""
        before, _ = sectors(device)
        time.sleep(min(_QUIET_SECONDS, self.deadline.left() / 20))
        after, _ = sectors(device)
        return (after - before) / _QUIET_SECONDS


@contextlib.contextmanager
def open_disk(
    target: Target, options: ProfileOptions, *, deadline: Deadline, on_step: Callable[[str], None]
) -> Iterator[Disk]:
    """Write the scratch file if one is needed, take the memory, and find the engine; give all of it back at the end."""
    with contextlib.ExitStack() as stack:
        file = target.file
        if file is None:
            nbytes = scratch_nbytes(target.directory, size=options.size, max_write=options.max_write)
            limit = deadline.part(options.scratch_seconds)
            file = stack.enter_context(
                scratch_file(
                    target.directory,
                    nbytes,
                    stop=limit.passed,
                    on_write=lambda done: on_step(f"writing the scratch file, {done >> 20} of {nbytes >> 20} MiB"),
                )
            )
        memory = stack.enter_context(HostMemory(_memory_nbytes(options, file)))
        # Frames of handled exceptions, which form cycles, may hold views of the memory that is closed next.
        stack.callback(gc.collect)
        yield Disk(target, file, memory, direct_facts(file, memory.view[: 1 << 20]), deadline)


def _memory_nbytes(options: ProfileOptions, file: SourceFile) -> int:
    wanted = min(_MEMORY_BYTES, file.nbytes, max(options.blocks) * max(options.depths))
    return max(_MIN_MEMORY_BYTES, min(wanted, available_memory() // 4))


def doubts(sweep: Sweep, *, again: float | None, foreign: float, written: int) -> Iterator[Warn]:
    """Yield what makes a sweep less than trustworthy; `foreign` is in bytes per second, `written` in bytes."""
    choice = sweep.choice
    rate = choice.bytes_per_second if choice else 0.0
    if foreign > _FOREIGN_SHARE * rate:
        yield Warn(
            "foreign_io",
            f"others read {foreign / 1e9:.2f} GB/s from the same disk before the sweep",
            "stop them and measure again",
        )
    if sweep.sustained_seconds and written > 64 << 20:
        yield Warn(
            "foreign_writes",
            f"others wrote {written / 1e6:.0f} MB to the same disk during the sweep, which only reads",
            "stop them and measure again",
        )
    if again is not None and again > _AGAIN_FASTER:
        yield Warn(
            "cache_below",
            f"the same bytes are read {again:.2f} times as fast the second time: the host or the drive caches them",
            "measure a file larger than that cache with --size, and trust first readings only",
        )
    if choice and choice.confidence == "noisy":
        noise = "" if choice.noise is None else f": two visits of one setting differ by ±{choice.noise:.1%}"
        yield Warn("noisy", f"the rates scatter{noise}", "measure with --thorough while nothing else runs")
    measured = {each.cell: each for each in sweep.cells}
    if choice and choice.cell in measured:
        cores = measured[choice.cell].cpu_seconds_per_gb * rate / 1e9
        if cores > _BUSY_CORE:
            yield Warn("cpu_bound", f"reading takes {cores:.1f} cores", "the reader, not the disk, may be the limit")
    errors = sum(each.errors for each in sweep.cells)
    if errors:
        yield Warn("read_errors", f"{errors} requests failed", "look at the kernel's log (dmesg) and the disk's health")
