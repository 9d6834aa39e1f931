import itertools
import os

import pytest

from penstock.io import profiler
from penstock.io.cells import Cell
from penstock.io.profiler import ProfileOptions, doubts, open_disk
from penstock.io.scratch import choose_target
from penstock.io.sweep import Deadline, Sweep

MIB = 1 << 20
CELL = Cell("libaio", "window", MIB, 4)
NOTHING = Sweep((), (), None, None, None, None, None, None, None, complete=False)


@pytest.fixture
def disk(tmp_path):
    options = ProfileOptions(blocks=(MIB,), depths=(4,), size=32 * MIB, max_write=32 * MIB, scratch_seconds=10)
    with open_disk(choose_target(tmp_path), options, deadline=Deadline(60), on_step=lambda _: None) as disk:
        yield disk


def count_as_moved(monkeypatch, amounts):
    """Let the disk's counter show so many bytes more after each visit."""
    readings = itertools.accumulate(itertools.chain.from_iterable((0, amount) for amount in amounts))
    monkeypatch.setattr(profiler, "sectors", lambda _: (next(readings), 0))


def test_a_quiet_visit_counts(disk, monkeypatch):
    count_as_moved(monkeypatch, [0])
    assert disk.measure(CELL, 0.02).nbytes > 0
    assert disk.repeated == 0


def test_a_visit_beside_others_is_repeated(disk, monkeypatch):
    count_as_moved(monkeypatch, [1 << 40, 0])
    assert disk.measure(CELL, 0.02).nbytes > 0
    assert disk.repeated == 1


def test_it_is_not_repeated_for_ever(disk, monkeypatch):
    count_as_moved(monkeypatch, [1 << 40] * 10)
    disk.measure(CELL, 0.02)
    assert disk.repeated == 2


def test_bytes_are_read_in_turn(disk):
    disk.device = "no such device"
    offsets = []
    for _ in range(4):
        disk.measure(CELL, 0.001)
        offsets.append(disk._offset)
    assert len(set(offsets)) > 1
    assert all(0 <= offset < disk.file.nbytes for offset in offsets)


def test_the_scratch_file_goes_with_the_disk(disk):
    assert os.path.exists(disk.file.path)
    assert os.listdir(disk.target.directory) == []


def test_doubts():
    codes = [warning.code for warning in doubts(NOTHING, again=1.5, foreign=1e9, written=0)]
    assert codes == ["foreign_io", "cache_below"]
    assert list(doubts(NOTHING, again=1.0, foreign=0.0, written=0)) == []
