import json
import mmap
from pathlib import Path

import pytest

from penstock.errors import ConfigError, ReadError
from penstock.io.cells import Cell
from penstock.io.fio import comparable_cells, compare, fio_argv, pages_for, parse_rate, run_fio, small_pages, verify
from penstock.io.sweep import Deadline

CELL = Cell("libaio", "window", 1 << 20, 16)
DEEP = Cell("libaio", "window", 1 << 20, 64)


def output(rate, seconds=2.0):
    read = {"io_bytes": int(rate * seconds), "runtime": int(seconds * 1000), "bw": 1}
    return json.dumps({"fio version": "fio-3.33", "jobs": [{"read": read}]})


class FakeFio:
    """Answers with scripted rates and notes every run, ours too."""

    def __init__(self, rates):
        self.log = []
        self._rates = iter(rates)

    def run(self, argv):
        if "--version" in argv:
            return "fio-3.33\n"
        self.log.append("fio")
        return "fio: a warning\n" + output(next(self._rates))

    def ours(self, cell, seconds):
        self.log.append("ours")
        return 1e9


def check(rates, cells=(CELL,), **options):
    fake = FakeFio(rates)
    values = {"pages": "2 MiB", "seconds": 1.0, "deadline": Deadline(1e9)} | options
    return fake, verify(cells, fake.ours, Path("/file"), run=fake.run, **values)


def test_the_command_can_only_read():
    argv = fio_argv(Path("/proc/7/fd/3"), CELL, seconds=1.5, pages="2 MiB")
    assert argv[:3] == ["env", "GLIBC_TUNABLES=glibc.malloc.hugetlb=1", "fio"]
    wanted = "--readonly --rw=read --direct=1 --ioengine=libaio --bs=1048576 --iodepth=16 --thread --runtime=1500ms"
    assert {*wanted.split(), "--mem=malloc", "--filename=/proc/7/fd/3", "--output-format=json"} <= set(argv)
    assert fio_argv(Path("/f"), CELL, seconds=1, pages="4 KiB")[0] == "fio"


def test_the_rate_is_bytes_by_time_and_warnings_are_skipped():
    assert parse_rate("note: fio is old\n" + output(2e9)) == 2e9
    for broken in ("", "{", "no json", "{}", '{"jobs": []}', '{"jobs": [{"read": {"io_bytes": 1, "runtime": 0}}]}'):
        with pytest.raises(ReadError, match="not understood"):
            parse_rate(broken)


def test_equal_rates_agree_in_rounds_of_alternating_order():
    fake, verdict = check([1e9] * 100)
    assert fake.log[:8] == ["ours", "fio", "fio", "ours", "fio", "ours", "ours", "fio"]
    assert len(fake.log) == 7 * 4
    (cell,) = verdict.cells
    assert (cell.rounds, cell.ratio, cell.agrees, verdict.verdict) == (7, 1.0, True, "agrees")
    assert verdict.version == "fio-3.33"
    assert "--iodepth=16" in verdict.argv


@pytest.mark.parametrize(
    ("rate", "verdict"), [(1.04e9, "agrees"), (1.2e9, "differs"), (0.97e9, "agrees"), (0.8e9, "differs")]
)
def test_the_verdict_is_the_intervals(rate, verdict):
    assert check([rate] * 100)[1].verdict == verdict


def test_noise_widens_the_interval():
    rounds = [((1.0, 1.0), (rate, rate)) for rate in (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4)]
    cell = compare(CELL, rounds)
    assert cell.lower < 0.95 < cell.upper
    assert cell.agrees
    assert compare(CELL, [((1.0, 1.0), (1.0, 1.1))] * 7).fio_to_itself == pytest.approx(1.1)


def test_one_cell_that_differs_is_enough():
    _, verdict = check([1e9] * 14 + [2e9] * 14, cells=(CELL, DEEP))
    assert [cell.agrees for cell in verdict.cells] == [True, False]
    assert verdict.verdict == "differs"


def test_a_deadline_leaves_it_incomplete():
    now = iter(range(1000))
    _, verdict = check([1e9] * 100, cells=(CELL, DEEP), deadline=Deadline(5, clock=lambda: next(now)))
    assert verdict.verdict == "incomplete"


@pytest.mark.parametrize(
    ("setting", "libc", "pages"),
    [
        ("madvise", "glibc 2.36", "2 MiB"), ("always", "glibc 3.0", "2 MiB"), ("never", "glibc 2.36", "4 KiB"),
        ("madvise", "glibc 2.31", "4 KiB"), ("madvise", "", "4 KiB"), ("madvise", "musl 3.0", "4 KiB"),
        (None, "x", "4 KiB"),
    ],
)  # fmt: skip
def test_pages_are_equal_on_both_sides(setting, libc, pages):
    assert pages_for(setting, libc) == pages


def test_cells_fill_a_huge_page():
    small = Cell("libaio", "window", 256 << 10, 2)
    assert [(cell.block_nbytes >> 10, cell.depth) for cell in comparable_cells(CELL, small)] == [
        (2048, 1), (256, 8), (1024, 16),
    ]  # fmt: skip
    assert len(comparable_cells(CELL, CELL)) == 2
    assert comparable_cells(CELL, None)[-1] == CELL


def test_small_pages():
    with small_pages(1 << 20) as memory:
        assert memory.nbytes == 1 << 20
        assert memory[mmap.PAGESIZE] == 1


def test_fio_that_is_missing_or_fails(monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="not installed"):
        patched.setenv("PATH", "")
        run_fio(["fio"])
    monkeypatch.setattr("penstock.io.fio.check_installed", lambda: None)
    with pytest.raises(ReadError, match="fio failed"):
        run_fio(["false"])
