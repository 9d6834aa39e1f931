"""Decide what to recommend: the plateau, not the luckiest sample.

The fastest of fifty settings is the one that was lucky. What is recommended is the least bytes in flight that surely
come within 3 % of the best, and more than that only where Python's lock asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from penstock.io.cells import Cell, Visits, cost
from penstock.io.statistics import interval, median

__all__ = ["PLATEAU", "Choice", "Confidence", "choose", "knee", "levelled", "noise_of", "revised", "with_gil_rule"]

PLATEAU = 0.97
"""A setting that surely reaches this share of the best is as good as the best."""

KNEE = 0.90
"""The knee has this share of the best rate."""

HIGH_CONFIDENCE = 0.03
"""Up to this much noise, the confidence is high."""

GIL_SECONDS = 0.010
"""A thread that wants the GIL back may wait twice the interpreter's switch interval of 5 ms."""

_RAISED_BLOCK = 1 << 20

Confidence = Literal["high", "noisy", "single visits"]


@dataclass(frozen=True, slots=True)
class Choice:
    """The recommended cell, its rate in bytes per second with 95 % bounds, the share of the best, and the reason.

    `noise` is the typical difference between two visits of one cell in one round, as a share; None when there was no
    time for any.
    """

    cell: Cell
    bytes_per_second: float
    lower: float
    upper: float
    share_of_best: float
    best: Cell
    best_bytes_per_second: float
    confidence: Confidence
    noise: float | None
    why: str


def levelled(visits: Visits) -> dict[Cell, list[float]]:
    """Return the rates in bytes per second with what all cells of a round have in common taken out.

    That is the round's median rate ÷ the median of all rounds' medians.
    """
    rates = {cell: [window.bytes_per_second for window in windows] for cell, windows in visits.items()}
    levels = [median([values[r] for values in rates.values()]) for r in range(min(map(len, rates.values()), default=0))]
    usual = median(levels) if levels else 0.0
    return {
        cell: [rate * usual / level for rate, level in zip(values, levels, strict=True)]
        for cell, values in rates.items()
    }


def noise_of(repeats: Sequence[tuple[float, float]]) -> float | None:
    """Return by which share two visits of one cell in one round differ, typically (the median)."""
    return median([abs(first - second) / max(first, second) for first, second in repeats]) if repeats else None


def choose(rates: Mapping[Cell, Sequence[float]], repeats: Sequence[tuple[float, float]]) -> Choice | None:
    """Choose the plateau: the least bytes in flight, then the larger block, whose lower bound reaches 97 % of the best.

    Cells that the GIL rule would raise (see `with_gil_rule`) give way to others of the plateau. Where the noise leaves
    no cell such a bound, medians are compared instead, and the confidence says so.
    """
    if not rates:
        return None
    bounds = {cell: interval(values) for cell, values in rates.items()}
    best = max(bounds, key=lambda cell: bounds[cell][0])
    wanted = PLATEAU * bounds[best][0]
    noise = noise_of(repeats)
    single = min(map(len, rates.values())) < 2
    sure = [] if single else [cell for cell, (_, lower, _) in bounds.items() if lower >= wanted]
    candidates = sure or [cell for cell, (middle, _, _) in bounds.items() if middle >= wanted]
    # Where the plateau reaches as far as the GIL rule asks, nothing need be raised.
    enough = [cell for cell in candidates if cell.in_flight_nbytes >= bounds[cell][0] * GIL_SECONDS]
    cell = min(enough or candidates, key=cost)
    middle, lower, upper = bounds[cell]
    confidence: Confidence = (
        "single visits" if single else "high" if sure and noise is not None and noise <= HIGH_CONFIDENCE else "noisy"
    )
    proof = "whose lower 95 % bound" if sure else "whose median (the noise leaves no bound)"
    if single:
        proof = "that in a single visit"
    why = f"the least bytes in flight {proof} reaches {PLATEAU:.0%} of the best median"
    share = middle / bounds[best][0]
    return Choice(cell, middle, lower, upper, share, best, bounds[best][0], confidence, noise, why)


def with_gil_rule(choice: Choice, *, max_nbytes: int) -> Choice:
    """Return the choice with more in flight if a busy Python thread could starve the disk otherwise.

    Whoever waits for requests gets the GIL back up to 10 ms late; as many bytes must be in flight as the disk reads in
    that time. The raised cell has blocks of at least 1 MiB, which cost little CPU time, a depth that is a power of two,
    and at most `max_nbytes` in flight. Its rates are still those of the cell that it replaces.
    """
    cell = choice.cell
    needed = choice.bytes_per_second * GIL_SECONDS
    if cell.in_flight_nbytes >= needed:
        return choice
    block = min(max(cell.block_nbytes, _RAISED_BLOCK), max_nbytes)
    depth = 1
    while depth * block < needed and 2 * depth * block <= max_nbytes:
        depth *= 2
    if depth * block <= cell.in_flight_nbytes:
        return choice
    why = (
        f"{choice.why}: {cell.in_flight_nbytes / 2**20:g} MiB; "
        f"raised to {depth * block / 2**20:g} MiB, because beside a busy "
        f"Python thread completions wait up to 10 ms, in which the disk reads {needed / 1e6:.0f} MB"
    )
    return replace(choice, cell=replace(cell, block_nbytes=block, depth=depth), why=why)


def revised(choice: Choice, rates: Sequence[float], best: Sequence[float]) -> Choice:
    """Return the choice with the rates, in bytes per second, that its cell and the best one had in the same rounds."""
    middle, lower, upper = interval(rates)
    level = median(best)
    return replace(
        choice,
        bytes_per_second=middle,
        lower=lower,
        upper=upper,
        share_of_best=middle / level,
        best_bytes_per_second=level,
    )


def knee(coarse: Visits) -> Cell | None:
    """Return the cheapest cell with 90 % of the best rate in the coarse sweep."""
    rates = {cell: windows[0].bytes_per_second for cell, windows in coarse.items()}
    best = max(rates.values(), default=0.0)
    return min((cell for cell, rate in rates.items() if rate >= KNEE * best), key=cost, default=None)
