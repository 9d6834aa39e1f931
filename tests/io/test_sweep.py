import random

import pytest
from fake_disk import FakeDisk, window

from penstock.io.cells import Cell, grid
from penstock.io.plateau import choose, knee, levelled, noise_of, revised, with_gil_rule
from penstock.io.sweep import Deadline, Schedule, finalists, run_coarse, run_rounds, run_sweep

MIB = 1 << 20
BLOCKS = [1 << power for power in range(17, 25)]
DEPTHS = [1, 2, 4, 8, 16, 32, 64]
MAX = 256 * MIB
CELLS = grid(BLOCKS, DEPTHS, engine="libaio", max_nbytes=MAX)


def cell(block_mib, depth, engine="libaio", pattern="window"):
    return Cell(engine, pattern, int(block_mib * MIB), depth)


def saturating(peak, knee_mib):
    """The rate grows with the bytes in flight up to the knee."""
    return lambda each: peak * min(1.0, each.in_flight_nbytes / (knee_mib * MIB))


def sweep(disk, seconds=60.0, cells=CELLS, seed=3):
    deadline = Deadline(seconds, clock=disk.clock)
    schedule = Schedule.fit(0.95 * seconds, len(cells))
    return run_sweep(disk.measure, cells, schedule, max_nbytes=MAX, deadline=deadline, rng=random.Random(seed))


def test_the_grid_leaves_out_what_does_not_fit():
    assert len(CELLS) == 53
    assert max(each.in_flight_nbytes for each in CELLS) == MAX
    assert grid([MIB], [1, 2], engine="threads", max_nbytes=MIB) == [cell(1, 1, "threads")]


@pytest.mark.parametrize("seed", range(5))
def test_the_plateau_is_found_and_not_the_maximum(seed):
    found = sweep(FakeDisk(saturating(2e9, 32), noise=0.01, seed=seed), seed=seed)
    assert found.complete
    assert found.choice.cell.in_flight_nbytes == 32 * MIB
    assert found.choice.confidence == "high"
    assert found.choice.noise < 0.03
    assert found.choice.share_of_best >= 0.97
    assert found.choice.bytes_per_second == pytest.approx(2e9, rel=0.02)


def test_equal_bytes_in_flight_are_had_with_the_larger_block():
    rates = {cell(1, 32): [2e9] * 5, cell(4, 8): [2e9] * 5, cell(16, 2): [2e9] * 5, cell(16, 8): [2e9] * 5}
    assert choose(rates, [(2e9, 2e9)]).cell == cell(16, 2)


def test_a_drifting_disk_gives_the_same_answer():
    found = sweep(FakeDisk(saturating(2e9, 32), noise=0.005, drift=-0.003))
    assert found.choice.cell.in_flight_nbytes == 32 * MIB
    assert found.choice.confidence == "high"


def test_drift_is_taken_out_round_by_round():
    first, second = cell(1, 32), cell(1, 64)
    visits = {first: [window(100), window(50), window(200)], second: [window(110), window(55), window(220)]}
    rates = levelled(visits)
    assert rates[first] == pytest.approx([100] * 3)
    assert rates[second] == pytest.approx([110] * 3)


def test_noise_is_said_and_the_medians_decide():
    found = sweep(FakeDisk(saturating(2e9, 32), noise=0.4))
    assert found.choice.confidence == "noisy"
    assert found.choice.noise > 0.03
    assert "no bound" in found.choice.why or found.choice.share_of_best >= 0.97
    assert noise_of([(1.0, 0.9), (1.0, 1.0), (0.5, 1.0)]) == pytest.approx(0.1)
    assert noise_of([]) is None


def test_one_lucky_sample_is_not_believed():
    rates = {cell(4, 8): [1.0, 1.0, 1.0, 1.0, 1.0], cell(1, 64): [0.9, 0.9, 3.0, 0.9, 0.9]}
    choice = choose(rates, [(1.0, 1.0)])
    assert choice.best == choice.cell == cell(4, 8)


def test_a_lower_bound_below_97_percent_is_not_enough():
    rates = {cell(1, 16): [1.0, 0.9, 1.0, 1.0, 1.0], cell(1, 64): [1.0] * 5}
    assert choose(rates, [(1.0, 1.0)]).cell == cell(1, 64)


def test_the_gil_rule_raises_what_is_in_flight_and_says_why():
    found = sweep(FakeDisk(saturating(14e9, 4)))
    assert found.choice.cell.in_flight_nbytes >= 14e9 * 0.010
    assert "10 ms" in found.choice.why or found.choice.cell in CELLS
    small = choose({cell(0.25, 4): [2e9] * 5}, [])
    raised = with_gil_rule(small, max_nbytes=MAX)
    assert raised.cell == cell(1, 32)
    assert "raised to 32 MiB" in raised.why
    assert "20 MB" in raised.why
    assert with_gil_rule(raised, max_nbytes=MAX) == raised
    assert with_gil_rule(small, max_nbytes=4 * MIB).cell == cell(1, 4)


def test_the_plateau_is_preferred_where_the_gil_rule_is_met():
    rates = {cell(1, 4): [2e9] * 5, cell(1, 32): [2e9] * 5, cell(1, 64): [2e9] * 5}
    assert choose(rates, []).cell == cell(1, 32)


def test_a_raised_cell_is_measured_beside_the_best():
    found = sweep(FakeDisk(saturating(3e9, 1)), cells=grid([MIB], [1, 2, 4], engine="libaio", max_nbytes=MAX))
    assert found.choice.cell == cell(1, 32)
    assert any(each.cell == cell(1, 32) for each in found.cells)
    assert found.choice.share_of_best == pytest.approx(1.0)
    choice = revised(found.choice, [2.0, 2.0], [4.0, 4.0])
    assert (choice.share_of_best, choice.best_bytes_per_second) == (0.5, 4.0)


def test_depth_one_layers_threads_and_the_sustained_rate_are_measured():
    disk = FakeDisk(lambda each: 1e9 if each.engine == "threads" else 3e9 if each.pattern == "layer" else 2e9)
    found = sweep(disk)
    assert (found.threads, found.layer) == pytest.approx((1e9, 3e9))
    assert found.depth_one == found.sustained == pytest.approx(2e9)
    assert found.sustained_seconds > 3
    without = sweep(FakeDisk(saturating(2e9, 32)), cells=[cell(1, 32, "threads"), cell(1, 64, "threads")])
    assert (without.layer, without.threads) == (None, None)
    assert without.complete


def test_the_knee_is_the_cheapest_with_90_percent():
    coarse = {cell(1, 1): [window(10)], cell(1, 8): [window(91)], cell(1, 64): [window(100)]}
    assert knee(coarse) == cell(1, 8)
    assert knee({}) is None


def test_finalists_are_the_fastest_and_the_cheapest_near_them():
    coarse = {cell(1, depth): [window(rate)] for depth, rate in ((1, 50), (2, 81), (4, 90), (32, 99), (64, 100))}
    assert finalists(coarse, 4) == [cell(1, 64), cell(1, 32), cell(1, 2), cell(1, 4)]
    assert finalists({}, 4) == []


def test_what_would_take_a_slow_disk_seconds_is_passed_over():
    disk = FakeDisk(lambda each: 100e6)
    found = sweep(disk)
    first = disk.visits[0]
    assert all(each.in_flight_nbytes <= 50e6 for each in disk.visits if each != first)
    assert found.complete


@pytest.mark.parametrize("seconds", [0.0, 0.3, 2.0, 5.0, 10.0, 20.0, 30.0, 40.0])
def test_a_deadline_ends_it_anywhere(seconds):
    disk = FakeDisk(saturating(2e9, 32))
    schedule = Schedule.fit(60.0, len(CELLS))
    deadline = Deadline(seconds, clock=disk.clock)
    found = run_sweep(disk.measure, CELLS, schedule, max_nbytes=MAX, deadline=deadline, rng=random.Random(0))
    assert disk.now <= seconds + max(schedule.final_seconds, schedule.sustained_seconds) + 0.1
    assert not found.complete
    assert (found.choice is None) == (seconds == 0)
    if found.choice and not found.repeats:
        assert found.choice.confidence == "single visits"


def test_the_planned_stages_fit_the_time():
    for seconds in (8, 15, 60, 90, 300):
        disk = FakeDisk(saturating(2e9, 32))
        found = sweep(disk, seconds=seconds, cells=CELLS if seconds > 20 else CELLS[::4][:12])
        assert found.complete, seconds
        assert disk.now <= seconds


def test_unfinished_rounds_do_not_count():
    disk = FakeDisk(lambda each: 1e9)
    cells = [cell(1, 1), cell(1, 2)]
    rounds = run_rounds(
        disk.measure, cells, 5, 1.0, repeat=cells[0], deadline=Deadline(8, clock=disk.clock), rng=random.Random(0),
        on_step=lambda _: None,
    )  # fmt: skip
    assert [len(visits) for visits in rounds.visits.values()] == [2, 2]
    assert len(rounds.repeats) == 2


def test_the_coarse_order_is_random_and_complete():
    disk = FakeDisk(lambda each: 1e12)
    deadline = Deadline(1000, clock=disk.clock)
    run_coarse(disk.measure, CELLS, 0.1, deadline=deadline, rng=random.Random(0), on_step=lambda _: None)
    assert disk.visits != CELLS
    assert sorted(disk.visits) == sorted(CELLS)


def test_a_visit_that_the_deadline_cut_short_is_dropped():
    disk = FakeDisk(lambda each: 1e9)

    def cut(each, seconds):
        disk.now += 100
        return window(10, seconds / 4)

    visits = run_coarse(
        cut, CELLS, 1.0, deadline=Deadline(1, clock=disk.clock), rng=random.Random(0), on_step=lambda _: None
    )
    assert visits == {}


def test_errors_and_latencies_are_added_up():
    disk = FakeDisk(lambda each: 1e9)
    faulty = lambda each, seconds: window(1e9, 1.0, errors=1, short_reads=2, latency_max=0.5)  # noqa: E731
    deadline = Deadline(1e9, clock=disk.clock)
    schedule = Schedule.fit(60, 1)
    found = run_sweep(faulty, [cell(1, 64)], schedule, max_nbytes=MAX, deadline=deadline, rng=random.Random(0))
    rates = next(each for each in found.cells if each.cell == cell(1, 64))
    assert rates.errors == len(rates.rates) > 1
    assert rates.short_reads == 2 * rates.errors
    assert rates.latency_max == 0.5
