"""Compare our own measurement with fio's: same file, block, depth and page size, in turns, and say whether they agree.

A comparison on unequal pages is worthless: the same reads into 4 KiB pages can run at 0.4 of the rate into 2 MiB pages.
fio cannot ask for transparent huge pages, but the C library can for it (GLIBC_TUNABLES, since 2.35), with no need for
hugetlb pages that others may take meanwhile. Where that does not work, both sides use 4 KiB pages.
Order matters too, since disks drift: a round is ours, fio's, fio's, ours, and the next one begins and ends with fio.
"""

from __future__ import annotations

import json
import mmap
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from penstock.errors import ConfigError, ReadError
from penstock.io.cells import Cell
from penstock.io.statistics import interval
from penstock.io.sweep import Deadline

__all__ = [
    "AGREEMENT", "FioCell", "FioVerdict", "Pages", "check_installed", "comparable_cells", "fio_argv", "pages_for",
    "parse_rate", "run_fio", "small_pages", "verify",
]  # fmt: skip

AGREEMENT = (0.95, 1.05)
"""Two measurements agree when the interval of their ratio meets this one."""

MIN_ROUNDS = 7
RAMP_SECONDS = 0.2
_HUGE_MALLOC = "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"
_TUNABLE_SINCE = [2, 35]
_HUGE_PAGE = 2 << 20

Pages = Literal["2 MiB", "4 KiB"]


@dataclass(frozen=True, slots=True)
class FioCell:
    """One cell's comparison. `ratio` is ours ÷ fio's, the median over `rounds`, with its 95 % interval.

    `ours` and `fio` are medians in bytes per second; `fio_to_itself` is the median of fio's faster ÷ its slower
    run of a round, the noise to judge by.
    """

    cell: Cell
    rounds: int
    ratio: float
    lower: float
    upper: float
    ours: float
    fio: float
    fio_to_itself: float
    agrees: bool


@dataclass(frozen=True, slots=True)
class FioVerdict:
    """What the comparison says. `argv` is of the last cell; `pages` is what lies under both sides' buffers."""

    version: str
    argv: tuple[str, ...]
    pages: Pages
    cells: tuple[FioCell, ...]
    verdict: Literal["agrees", "differs", "incomplete"]


Run = Callable[[Sequence[str]], str]
"""Runs a command and returns what it prints to stdout."""

_Round = tuple[tuple[float, float], tuple[float, float]]
"""Two rates of ours and two of fio's."""


def fio_argv(path: Path, cell: Cell, *, seconds: float, pages: Pages) -> list[str]:
    """Return the command that makes fio read like `cell`; nothing in it can write."""
    pages_option = ["env", _HUGE_MALLOC] if pages == "2 MiB" else []
    return [
        *pages_option, "fio", "--name=penstock", f"--filename={path}", "--readonly", "--rw=read", "--direct=1",
        "--ioengine=libaio", f"--bs={cell.block_nbytes}", f"--iodepth={cell.depth}", "--thread", "--norandommap",
        "--time_based", f"--runtime={round(seconds * 1000)}ms", f"--ramp_time={round(RAMP_SECONDS * 1000)}ms",
        "--mem=malloc", "--output-format=json",
    ]  # fmt: skip


def parse_rate(output: str) -> float:
    """Return the bytes per second in fio's JSON: bytes ÷ time, since `bw` is in KiB. Warnings before it are skipped."""
    try:
        read = json.loads(output[output.index("{") :])["jobs"][0]["read"]
        return int(read["io_bytes"]) / (int(read["runtime"]) / 1000)
    except (ValueError, KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise ReadError(
            "fio's output is not understood", got=output[:200].strip() or "nothing", fix="Run the printed command."
        ) from error


def comparable_cells(recommended: Cell, knee: Cell | None) -> list[Cell]:
    """Return up to three cells to compare at: one block in flight, the knee, and what is recommended.

    Each has at least 2 MiB in flight, since less than a huge page of buffers would lie on small pages on fio's side.
    """
    knee = knee or recommended
    block = max(recommended.block_nbytes, _HUGE_PAGE)
    pairs = [
        (block, 1),
        (knee.block_nbytes, max(knee.depth, _HUGE_PAGE // knee.block_nbytes)),
        (recommended.block_nbytes, max(recommended.depth, _HUGE_PAGE // recommended.block_nbytes)),
    ]
    return [Cell("libaio", "window", *pair) for pair in dict.fromkeys(pairs)]


def check_installed() -> None:
    """Raise ConfigError unless fio can be run."""
    if shutil.which("fio") is None:
        raise ConfigError("--verify-fio needs fio, which is not installed", fix="Install the package fio.")


def run_fio(argv: Sequence[str]) -> str:
    """Run fio; raises ConfigError when it is not installed, and ReadError when it fails."""
    check_installed()
    done = subprocess.run(argv, capture_output=True, text=True, check=False)  # noqa: S603 - a list, no shell
    if done.returncode:
        raise ReadError("fio failed", got=(done.stderr or done.stdout).strip()[-300:], fix=" ".join(argv))
    return done.stdout


def pages_for(transparent_huge_pages: str | None, libc_version: str) -> Pages:
    """Return which pages both sides can have, by the kernel's setting and a text such as "glibc 2.36"."""
    name, _, version = libc_version.partition(" ")
    numbers = [int(part) for part in version.split(".")[:2] if part.isdigit()]
    tunable = name == "glibc" and numbers >= _TUNABLE_SINCE
    return "2 MiB" if tunable and transparent_huge_pages in {"always", "madvise"} else "4 KiB"


@contextmanager
def small_pages(nbytes: int) -> Iterator[memoryview]:
    """Lend memory on 4 KiB pages, whatever the system's setting for huge ones."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    view = memoryview(memory)
    for offset in range(0, nbytes, mmap.PAGESIZE):
        view[offset] = 1
    try:
        yield view
    finally:
        view.release()
        memory.close()


def verify(
    cells: Sequence[Cell],
    measure: Callable[[Cell, float], float],
    path: Path,
    *,
    pages: Pages,
    seconds: float,
    deadline: Deadline,
    run: Run = run_fio,
    num_rounds: int = MIN_ROUNDS,
    on_step: Callable[[str], None] = lambda _: None,
) -> FioVerdict:
    """Measure each cell in rounds of ours, fio, fio, ours, alternately the other way round.

    `measure` returns our rate in bytes per second. "agrees" when the interval of every cell's ratio meets [0.95, 1.05];
    "incomplete" when the deadline left a cell fewer rounds than asked for.
    """
    version = run(["fio", "--version"]).strip()
    found: list[FioCell] = []
    argv: list[str] = []
    for cell in cells:
        argv = fio_argv(path, cell, seconds=seconds, pages=pages)
        rounds: list[_Round] = []
        while len(rounds) < num_rounds and not deadline.passed():
            rounds.append(_round(cell, measure, argv, run, seconds, ours_first=len(rounds) % 2 == 0))
            on_step(f"fio, {cell.block_nbytes >> 10} KiB × {cell.depth}, round {len(rounds)} of {num_rounds}")
        if rounds:
            found.append(compare(cell, rounds))
    return FioVerdict(version, tuple(argv), pages, tuple(found), _verdict(found, len(cells), num_rounds))


def _verdict(found: Sequence[FioCell], num_cells: int, num_rounds: int) -> Literal["agrees", "differs", "incomplete"]:
    if len(found) < num_cells or any(each.rounds < num_rounds for each in found):
        return "incomplete"
    return "agrees" if all(each.agrees for each in found) else "differs"


def _round(
    cell: Cell,
    measure: Callable[[Cell, float], float],
    argv: Sequence[str],
    run: Run,
    seconds: float,
    *,
    ours_first: bool,
) -> _Round:
    def ours() -> float:
        return measure(cell, seconds)

    def fio() -> float:
        return parse_rate(run(argv))

    outer, inner = (ours, fio) if ours_first else (fio, ours)
    first, second, third, last = outer(), inner(), inner(), outer()
    return ((first, last), (second, third)) if ours_first else ((second, third), (first, last))


def compare(cell: Cell, rounds: Sequence[_Round]) -> FioCell:
    """Return what rounds of ours and fio's rates, in bytes per second, say."""
    ratio, lower, upper = interval([sum(ours) / sum(theirs) for ours, theirs in rounds], tail=0.025)
    return FioCell(
        cell=cell,
        rounds=len(rounds),
        ratio=ratio,
        lower=lower,
        upper=upper,
        ours=interval([sum(ours) / 2 for ours, _ in rounds])[0],
        fio=interval([sum(theirs) / 2 for _, theirs in rounds])[0],
        fio_to_itself=interval([max(theirs) / min(theirs) for _, theirs in rounds])[0],
        agrees=lower <= AGREEMENT[1] and upper >= AGREEMENT[0],
    )
