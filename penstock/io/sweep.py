"""Find out how a disk wants to be read: block size × queue depth, coarsely at first, then the finalists in turns.

A disk's rate wanders, by more than the differences that matter, so visits that are to be compared lie next to each
other in time: the finalists are visited in rounds, each round in a new random order, and every rate is divided by what
its round was like. One cell is visited twice a round; how far the two differ is the noise.

Nothing here knows files or engines: a cell is measured by the function that is passed in.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from penstock.io.cells import Cell, CellRates, Visits, cost, median_rate, summaries
from penstock.io.plateau import Choice, choose, knee, levelled, revised, with_gil_rule
from penstock.io.window import Window

__all__ = ["Deadline", "Measure", "Rounds", "Schedule", "Sweep", "finalists", "run_coarse", "run_rounds", "run_sweep"]

_NEAR = 0.80
_MIN_VISIT_SECONDS = 0.1
_VISIT_OVERHEAD = 0.06
_MAX_THREADS = 32
_MAX_FLIGHT_SECONDS = 0.5
_COARSE_SHARE, _FINAL_SHARE = 0.5, 0.65


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


Measure = Callable[[Cell, float], Window]
"""Measures a cell for so many seconds; may end early when the deadline passes."""


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
        """Divide `seconds`: 40 % to the coarse sweep, 38 to finalists, 12 to the winner's extras, 7 to one long run."""
        num_finalists, num_rounds, num_extra = (3, 3, 2) if seconds < 20 else (8, 5, 3) if seconds < 120 else (12, 9, 5)
        ramp = 0.04 if seconds < 20 else 0.1

        def visit(share: float, visits: int) -> float:
            return max(_MIN_VISIT_SECONDS, share * seconds / max(1, visits) - ramp - _VISIT_OVERHEAD)

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
    unless said otherwise: `depth_one` with its block alone in flight, `layer` in the runtime's pattern, `threads`
    without Linux AIO, `sustained` over `sustained_seconds`. `repeats` are the rates of the cell visited twice a round.
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


def run_sweep(
    measure: Measure,
    cells: Sequence[Cell],
    schedule: Schedule,
    *,
    max_nbytes: int,
    deadline: Deadline,
    rng: random.Random,
    on_step: Callable[[str], None] = lambda _: None,
) -> Sweep:
    """Run all stages, or as many as there is time for. `max_nbytes` is the memory that there is to read into."""
    coarse_deadline = deadline.part(_COARSE_SHARE * deadline.left())
    coarse = run_coarse(measure, cells, schedule.coarse_seconds, deadline=coarse_deadline, rng=rng, on_step=on_step)
    all_visited = not coarse_deadline.passed()
    final_cells = finalists(coarse, schedule.num_finalists)
    finals = run_rounds(
        measure, final_cells, schedule.num_rounds, schedule.final_seconds, repeat=next(iter(final_cells), None),
        deadline=deadline.part(_FINAL_SHARE * deadline.left()), rng=rng, on_step=on_step,
    )  # fmt: skip
    rates = levelled(finals.visits) or {cell: [windows[0].bytes_per_second] for cell, windows in coarse.items()}
    choice = choose(rates, finals.repeats)
    if choice is None:
        return Sweep((), (), None, None, None, None, None, None, None, complete=False)
    choice = with_gil_rule(choice, max_nbytes=max_nbytes)
    extra_cells = _extra_cells(choice, measured=rates)
    extras = run_rounds(
        measure, list(extra_cells.values()), schedule.num_extra_rounds, schedule.extra_seconds,
        deadline=deadline, rng=rng, on_step=lambda step: on_step(f"the recommended setting, {step}"),
    )  # fmt: skip
    found = {name: extras.visits.get(cell, []) for name, cell in extra_cells.items()}
    if found.get("raised"):
        choice = revised(choice, *([window.bytes_per_second for window in found[name]] for name in ("raised", "best")))
    on_step("sustained rate")
    sustained = _visit(measure, choice.cell, schedule.sustained_seconds, deadline)
    rounds_done = len(finals.repeats) == schedule.num_rounds and all(found.values())
    return Sweep(
        cells=summaries(coarse, finals.visits, extras.visits),
        repeats=tuple(finals.repeats),
        choice=choice,
        knee=knee(coarse),
        depth_one=median_rate(found.get("depth one", [])),
        layer=median_rate(found.get("layer", [])),
        threads=median_rate(found.get("threads", [])),
        sustained=sustained.bytes_per_second if sustained else None,
        sustained_seconds=sustained.seconds if sustained else None,
        complete=all_visited and rounds_done and sustained is not None,
    )


def _extra_cells(choice: Choice, measured: Iterable[Cell]) -> dict[str, Cell]:
    """Return what else to ask of the recommended cell."""
    cell = choice.cell
    extra = {"depth one": Cell(cell.engine, "window", cell.block_nbytes, 1)}
    if cell not in measured:
        extra["raised"], extra["best"] = cell, choice.best
    if cell.engine == "libaio":
        extra["layer"] = Cell("libaio", "layer", cell.block_nbytes, max(2, cell.depth))
        extra["threads"] = Cell("threads", "window", cell.block_nbytes, min(cell.depth, _MAX_THREADS))
    return extra


def run_coarse(
    measure: Measure,
    cells: Sequence[Cell],
    seconds: float,
    *,
    deadline: Deadline,
    rng: random.Random,
    on_step: Callable[[str], None],
) -> Visits:
    """Visit every cell once, in random order, so that a deadline leaves a sample of the whole and not a corner.

    Cells that keep more in flight than the disk reads in half a second are passed over: they cost more time than they
    are given, and no disk needs that much.
    """
    visits: Visits = {}
    best = 0.0
    for number, cell in enumerate(rng.sample(list(cells), len(cells)), start=1):
        if cell.in_flight_nbytes > _MAX_FLIGHT_SECONDS * best > 0.0:
            continue
        window = _visit(measure, cell, seconds, deadline)
        if window is None:
            break
        visits[cell] = [window]
        best = max(best, window.bytes_per_second)
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
    near.sort(key=cost)
    return chosen + near[: count - len(chosen)]


@dataclass(slots=True)
class Rounds:
    """Whole rounds: `visits[cell][r]` is the cell's visit in round r, `repeats[r]` the repeated cell's two rates."""

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
    """Visit all cells once a round, and `repeat` twice, in random order; an unfinished round does not count."""
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
