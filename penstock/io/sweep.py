"""Find out how a disk wants to be read: block size × queue depth, coarsely at first, then the finalists in turns.

A disk's rate wanders, by more than the differences that matter, so visits that are to be compared lie next to each other
in time: the finalists are visited in rounds, each round in a new random order, and every rate is divided by what its
round was like. One cell is visited twice a round; how far the two differ is the noise. What is recommended is the
plateau, not the luckiest sample: the least bytes in flight that surely come within 3 % of the best.

Nothing here knows files or engines: a cell is measured by the function that is passed in.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from penstock.io.statistics import interval, median

if TYPE_CHECKING:
    from penstock.io.window import Window

__all__ = [
    "PLATEAU", "Cell", "CellRates", "Choice", "Confidence", "Deadline", "Measure", "Schedule", "Sweep", "Visits",
    "choose", "finalists", "grid", "knee", "noise_of", "run_coarse", "run_rounds", "run_sweep", "with_gil_rule",
]  # fmt: skip

PLATEAU = 0.97
"""A setting that surely reaches this share of the best is as good as the best."""

KNEE = 0.90
HIGH_CONFIDENCE = 0.03
GIL_SECONDS = 0.010
"""A thread that wants the GIL back may wait twice the interpreter's switch interval of 5 ms."""

_NEAR = 0.80
_MIN_VISIT_SECONDS = 0.1
Confidence = Literal["high", "noisy", "single visits"]


class Deadline:
    """A moment after which nothing more is begun. `clock` returns seconds."""

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends = clock() + seconds

    def left(self) -> float:
        """Return the seconds that are left; never negative."""
        return max(0.0, self._ends - self._clock())

    def passed(self) -> bool:
        """Return whether the time is up."""
        return self._clock() >= self._ends

    def part(self, seconds: float) -> Deadline:
        """Return a deadline so many seconds from now that is not later than this one."""
        return Deadline(min(seconds, self.left()), clock=self._clock)


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One way to read: `depth` requests of `block_nbytes` in flight, as a sliding window or in whole layers."""

    engine: Literal["libaio", "threads", "aiofiles"]
    pattern: Literal["window", "layer"]
    block_nbytes: int
    depth: int

    @property
    def in_flight_nbytes(self) -> int:
        """Bytes that are under way at any time."""
        return self.block_nbytes * self.depth


Measure = Callable[[Cell, float], "Window"]
"""Measures a cell for so many seconds; may end early when the deadline passes."""

Visits = dict[Cell, list["Window"]]


@dataclass(frozen=True, slots=True)
class CellRates:
    """What was measured of a cell. Rates in bytes per second, latencies in seconds, CPU in seconds per 10^9 bytes.

    `rates` has one value per visit, in order, as they were. `median`, `lower` and `upper` (one-sided 95 % bounds) are of
    those of the last stage that visited the cell.
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


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long each stage's visits take, in seconds, and how many there are."""

    coarse_seconds: float
    num_finalists: int
    num_rounds: int
    final_seconds: float
    num_extra_rounds: int
    extra_seconds: float
    sustained_seconds: float
    ramp_seconds: float

    @classmethod
    def fit(cls, seconds: float, num_cells: int) -> Schedule:
        """Divide `seconds`: 40 % to the coarse sweep, 38 to the finalists, 12 to what is asked of the winner, 7 to a run."""
        num_finalists, num_rounds, num_extra = (4, 3, 2) if seconds < 20 else (8, 5, 3) if seconds < 120 else (12, 9, 5)
        ramp = 0.04 if seconds < 20 else 0.1

        def visit(share: float, visits: int) -> float:
            return max(_MIN_VISIT_SECONDS, share * seconds / max(1, visits) - ramp)

        return cls(
            coarse_seconds=min(1.5, visit(0.40, num_cells)),
            num_finalists=num_finalists,
            num_rounds=num_rounds,
            final_seconds=min(2.0, visit(0.38, (num_finalists + 1) * num_rounds)),
            num_extra_rounds=num_extra,
            extra_seconds=min(2.0, visit(0.12, 4 * num_extra)),
            sustained_seconds=max(0.3, 0.07 * seconds),
            ramp_seconds=ramp,
        )


@dataclass(frozen=True, slots=True)
class Sweep:
    """All that a sweep found; what there was no time for is None, and then `complete` is False.

    `knee` is the least bytes in flight with 90 % of the best rate. Rates are bytes per second, at the recommended cell
    unless said otherwise: `depth_one` with its block alone in flight, `layer` in the runtime's pattern, `threads` without
    Linux AIO, `sustained` over `sustained_seconds`, `again_ratio` the second reading of the same bytes ÷ the first.
    """

    cells: tuple[CellRates, ...]
    repeats: tuple[tuple[float, float], ...]
    choice: Choice | None
    knee: Cell | None
    depth_one: float | None
    layer: float | None
    threads: float | None
    sustained: float | None
    sustained_seconds: float | None
    complete: bool


def grid(
    blocks: Sequence[int], depths: Sequence[int], *, engine: Literal["libaio", "threads", "aiofiles"], max_nbytes: int
) -> list[Cell]:
    """Return every cell with at most `max_nbytes` in flight."""
    cells = [Cell(engine, "window", block, depth) for block in blocks for depth in depths]
    return [cell for cell in cells if cell.in_flight_nbytes <= max_nbytes]


def run_coarse(
    measure: Measure,
    cells: Sequence[Cell],
    seconds: float,
    *,
    deadline: Deadline,
    rng: random.Random,
    on_step: Callable[[str], None],
) -> Visits:
    """Visit every cell once, in random order, so that a deadline leaves a sample of the whole and not a corner."""
    visits: Visits = {}
    for number, cell in enumerate(rng.sample(list(cells), len(cells)), start=1):
        window = _visit(measure, cell, seconds, deadline)
        if window is None:
            break
        visits[cell] = [window]
        on_step(f"coarse sweep, {number} of {len(cells)}")
    return visits


def finalists(coarse: Visits, count: int) -> list[Cell]:
    """Return half of `count` as the fastest cells, and the rest as the cheapest of those that are not far behind."""
    rates = {cell: windows[0].bytes_per_second for cell, windows in coarse.items()}
    fastest = sorted(rates, key=lambda cell: -rates[cell])
    if not fastest:
        return []
    chosen = fastest[: max(1, count // 2)]
    near = [cell for cell in fastest if rates[cell] >= _NEAR * rates[fastest[0]] and cell not in chosen]
    near.sort(key=_cost)
    return chosen + near[: count - len(chosen)]


@dataclass(slots=True)
class Rounds:
    """Whole rounds of visits: `visits[cell][r]` is the cell's in round r; `repeats[r]` the repeated cell's two rates."""

    visits: Visits = field(default_factory=dict)
    repeats: list[tuple[float, float]] = field(default_factory=list)


def run_rounds(
    measure: Measure,
    cells: Sequence[Cell],
    num_rounds: int,
    seconds: float,
    *,
    repeat: Cell | None = None,
    deadline: Deadline,
    rng: random.Random,
    on_step: Callable[[str], None],
) -> Rounds:
    """Visit all cells once a round, and `repeat` twice, in a new random order each time; unfinished rounds do not count."""
    rounds = Rounds()
    for number in range(1, num_rounds + 1):
        order = [*cells, *([repeat] if repeat else [])]
        rng.shuffle(order)
        this: Visits = {}
        for cell in order:
            window = _visit(measure, cell, seconds, deadline)
            if window is None:
                return rounds
            this.setdefault(cell, []).append(window)
            on_step(f"round {number} of {num_rounds}")
        if repeat:
            first, second = (window.bytes_per_second for window in this[repeat])
            rounds.repeats.append((first, second))
        for cell, windows in this.items():
            rounds.visits.setdefault(cell, []).append(windows[0])
    return rounds


def _visit(measure: Measure, cell: Cell, seconds: float, deadline: Deadline) -> Window | None:
    """Measure; None when the time was up before, or when it cut the visit to less than half."""
    if deadline.passed():
        return None
    window = measure(cell, seconds)
    cut = deadline.passed() and window.seconds < seconds / 2
    return None if cut or window.nbytes == 0 else window


def levelled(visits: Visits) -> dict[Cell, list[float]]:
    """Return the rates in bytes per second with what is common to a round taken out: its median ÷ that of all rounds."""
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


def choose(rates: dict[Cell, list[float]], repeats: Sequence[tuple[float, float]]) -> Choice | None:
    """Choose the plateau: the least bytes in flight, then the larger block, whose lower bound reaches 97 % of the best.

    Where the noise leaves no cell such a bound, medians are compared instead, and the confidence says so.
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
    cell = min(candidates, key=_cost)
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


def with_gil_rule(choice: Choice) -> Choice:
    """Return the choice with more in flight if a busy Python thread could starve the disk otherwise.

    Whoever waits for requests gets the GIL back up to 10 ms late; as many bytes must be in flight as the disk reads in
    that time. The raised cell keeps its block, and a depth that is a power of two. Its rates are still the old ones.
    """
    needed = choice.bytes_per_second * GIL_SECONDS
    if choice.cell.in_flight_nbytes >= needed:
        return choice
    depth = 1
    while depth * choice.cell.block_nbytes < needed:
        depth *= 2
    raised = Cell(choice.cell.engine, choice.cell.pattern, choice.cell.block_nbytes, depth)
    why = (
        f"{choice.why} was depth {choice.cell.depth}; raised to {depth}, because beside a busy Python thread completions "
        f"wait up to 10 ms, in which the disk reads {needed / 1e6:.0f} MB"
    )
    return _replace(choice, raised, why)


def _replace(choice: Choice, cell: Cell, why: str, values: Sequence[float] = ()) -> Choice:
    middle, lower, upper = interval(values) if values else (choice.bytes_per_second, choice.lower, choice.upper)
    return Choice(
        cell, middle, lower, upper, middle / choice.best_bytes_per_second, choice.best, choice.best_bytes_per_second,
        choice.confidence, choice.noise, why,
    )  # fmt: skip


def knee(coarse: Visits) -> Cell | None:
    """Return the cheapest cell with 90 % of the best rate in the coarse sweep."""
    rates = {cell: windows[0].bytes_per_second for cell, windows in coarse.items()}
    best = max(rates.values(), default=0.0)
    return min((cell for cell, rate in rates.items() if rate >= KNEE * best), key=_cost, default=None)


def run_sweep(
    measure: Measure,
    cells: Sequence[Cell],
    schedule: Schedule,
    *,
    deadline: Deadline,
    rng: random.Random,
    on_step: Callable[[str], None] = lambda _: None,
) -> Sweep:
    """Run all stages, or as many as there is time for."""
    stages = {"deadline": deadline, "rng": rng, "on_step": on_step}
    coarse = run_coarse(measure, cells, schedule.coarse_seconds, **stages)  # type: ignore[arg-type]
    final_cells = finalists(coarse, schedule.num_finalists)
    finals = run_rounds(
        measure, final_cells, schedule.num_rounds, schedule.final_seconds, repeat=next(iter(final_cells), None),
        deadline=deadline, rng=rng, on_step=on_step,
    )  # fmt: skip
    rates = levelled(finals.visits) or {cell: [windows[0].bytes_per_second] for cell, windows in coarse.items()}
    choice = choose(rates, finals.repeats)
    if choice is None:
        return Sweep((), (), None, None, None, None, None, None, None, complete=False)
    choice = with_gil_rule(choice)
    extra_cells = _extra_cells(choice, measured=rates)
    extras = run_rounds(
        measure, list(extra_cells.values()), schedule.num_extra_rounds, schedule.extra_seconds,
        deadline=deadline, rng=rng, on_step=lambda step: on_step(f"the recommended setting, {step}"),
    )  # fmt: skip
    found = {name: extras.visits.get(cell, []) for name, cell in extra_cells.items()}
    if found.get("raised"):
        choice = _replace(choice, choice.cell, choice.why, [w.bytes_per_second for w in found["raised"]])
    on_step("sustained rate")
    sustained = _visit(measure, choice.cell, schedule.sustained_seconds, deadline)
    rounds_done = len(finals.repeats) == schedule.num_rounds and all(found.values())
    return Sweep(
        cells=_summaries(coarse, finals.visits, extras.visits),
        repeats=tuple(finals.repeats),
        choice=choice,
        knee=knee(coarse),
        depth_one=_median_rate(found.get("depth one", [])),
        layer=_median_rate(found.get("layer", [])),
        threads=_median_rate(found.get("threads", [])),
        sustained=sustained.bytes_per_second if sustained else None,
        sustained_seconds=sustained.seconds if sustained else None,
        complete=len(coarse) == len(cells) and rounds_done and sustained is not None,
    )


def _extra_cells(choice: Choice, measured: Iterable[Cell]) -> dict[str, Cell]:
    """Return what else to ask of the recommended cell."""
    cell = choice.cell
    extra = {"depth one": Cell(cell.engine, "window", cell.block_nbytes, 1)}
    if cell not in measured:
        extra["raised"] = cell
    if cell.engine == "libaio":
        extra["layer"] = Cell("libaio", "layer", cell.block_nbytes, max(2, cell.depth))
        extra["threads"] = Cell("threads", "window", cell.block_nbytes, cell.depth)
    return extra


def _summaries(*stages: Visits) -> tuple[CellRates, ...]:
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


def _median_rate(windows: Sequence[Window]) -> float | None:
    return median([window.bytes_per_second for window in windows]) if windows else None


def _cost(cell: Cell) -> tuple[int, int]:
    return cell.in_flight_nbytes, -cell.block_nbytes
