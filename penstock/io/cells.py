"""One way to read a disk, and what was measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.io.statistics import interval, median
from penstock.io.window import Engine, Pattern, Window

__all__ = ["Cell", "CellRates", "Visits", "cost", "grid", "median_rate", "summaries"]


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One way to read: `depth` requests of `block_nbytes` in flight, as a sliding window or in whole layers."""

    engine: Engine
    pattern: Pattern
    block_nbytes: int
    depth: int

    @property
    def in_flight_nbytes(self) -> int:
        """Bytes that are under way at any time."""
        return self.block_nbytes * self.depth


Visits = dict[Cell, list[Window]]
"""The windows of every cell that was visited, in order."""


@dataclass(frozen=True, slots=True)
class CellRates:
    """What was measured of a cell. Rates in bytes per second, latencies in seconds, CPU in seconds per 10^9 bytes.

    `rates` has one value per visit, in order, as they were. `median`, `lower` and `upper` (one-sided 95 % bounds) are
    of those of the last stage that visited the cell.
    """

    cell: Cell
    rates: tuple[float, ...]
    median: float
    lower: float
    upper: float
    cpu_seconds_per_gb: float
    latency_p50: float
    latency_p99: float
    latency_max: float
    short_reads: int
    errors: int


def grid(blocks: Sequence[int], depths: Sequence[int], *, engine: Engine, max_nbytes: int) -> list[Cell]:
    """Return every cell with at most `max_nbytes` in flight."""
    cells = [Cell(engine, "window", block, depth) for block in blocks for depth in depths]
    return [cell for cell in cells if cell.in_flight_nbytes <= max_nbytes]


def summaries(*stages: Visits) -> tuple[CellRates, ...]:
    """Return one summary per cell; the rates of all visits, the statistics of its last stage's."""
    cells = sorted({cell for visits in stages for cell in visits})
    return tuple(_summary(cell, [visits[cell] for visits in stages if visits.get(cell)]) for cell in cells)


def _summary(cell: Cell, stages: list[list[Window]]) -> CellRates:
    windows = [window for stage in stages for window in stage]
    last = stages[-1]
    middle, lower, upper = interval([window.bytes_per_second for window in last])
    return CellRates(
        cell=cell,
        rates=tuple(window.bytes_per_second for window in windows),
        median=middle,
        lower=lower,
        upper=upper,
        cpu_seconds_per_gb=sum(w.cpu_seconds for w in windows) / (sum(w.nbytes for w in windows) / 1e9),
        latency_p50=median([window.latency_p50 for window in last]),
        latency_p99=max(window.latency_p99 for window in last),
        latency_max=max(window.latency_max for window in windows),
        short_reads=sum(window.short_reads for window in windows),
        errors=sum(window.errors for window in windows),
    )


def median_rate(windows: Sequence[Window]) -> float | None:
    """Return the median of the windows' rates in bytes per second; None without windows."""
    return median([window.bytes_per_second for window in windows]) if windows else None


def cost(cell: Cell) -> tuple[int, int]:
    """Order cells by what is to be saved: bytes in flight, and at equal ones, requests."""
    return cell.in_flight_nbytes, -cell.block_nbytes
