"""Plans for machines that are not there: within their budgets, no slower with more, and refusals that help."""

from dataclasses import replace

import pytest

from penstock.engine.anatomy import anatomy_of, shape_directory
from penstock.engine.forecast import Length
from penstock.engine.proposal import Question, budgets_of, nearest_that_fits, what_ifs
from penstock.errors import BudgetError
from penstock.offload.machines import find_hardware
from penstock.offload.plan import PassLimits, make_plan
from penstock.offload.tiers import MemoryTiers, Tier

GIB = 1 << 30
LENGTHS = [Length(128, 32)] * 24
MODELS = {"llama-3-8b": 24, "mixtral-8x7b": 48, "opt-30b": 48}
"""And the device memory, in GiB, up to which they are tried."""


def question(
    shape="llama-3-8b", *, device, host=20 * GIB, nvme=None, lengths=LENGTHS, objective="throughput", on="a6000"
):
    tiers = MemoryTiers(device=device, host=host, nvme=nvme)
    return Question(anatomy_of(shape_directory(shape)), find_hardware(on), tiers, lengths, objective)


@pytest.mark.parametrize("shape", MODELS)
def test_twenty_budgets(shape):
    """Planned bytes stay within them, more of one is never forecast more than a percent slower, and what is refused
    says with how much it would work."""
    most, last = MODELS[shape] * GIB, float("inf")
    for step in range(1, 21):
        asked = question(shape, device=most * step // 20)
        try:
            made = asked.answer()
        except BudgetError:
            assert last == float("inf"), "what fits less fits more"
            continue
        assert made.plan.device_nbytes <= asked.tiers.device
        assert made.plan.host_nbytes + made.plan.kv_host_nbytes <= asked.tiers.host
        assert made.plan.kv_nbytes >= 0
        assert made.forecast.seconds <= 1.01 * last
        last = made.forecast.seconds
    assert last < float("inf")


@pytest.mark.parametrize("shape", MODELS)
@pytest.mark.parametrize("device", [1, 1 * GIB, 2 * GIB])
def test_a_refused_budget_names_one_that_works(shape, device):
    asked = question(shape, device=device)
    model = asked.anatomy.shape(on_cpu=False)
    with pytest.raises(BudgetError) as refused:
        make_plan(model, MemoryTiers(device=1, host=0), PassLimits(1, 16, 16))
    minimum = int(refused.value.wanted.split()[2])
    make_plan(model, MemoryTiers(device=minimum, host=0), PassLimits(1, 16, 16))
    with pytest.raises(BudgetError):
        make_plan(model, MemoryTiers(device=minimum - 1, host=0), PassLimits(1, 16, 16))
    if device < minimum:
        nearest = nearest_that_fits(asked)
        assert minimum <= nearest.tiers.device <= minimum + GIB
        assert replace(asked, tiers=nearest.tiers, lengths=LENGTHS[:1]).answer()


def test_what_may_not_be_left_on_disk_wants_host_memory():
    asked = question("opt-30b", device=8 * GIB, host=10 * GIB, nvme=20 * GIB)
    with pytest.raises(BudgetError, match="more than may be left on NVMe"):
        asked.answer()
    nearest = nearest_that_fits(asked)
    assert (nearest.tiers.host or 0) + (nearest.tiers.device or 0) > 18 * GIB
    assert nearest.choice.plan.nvme_nbytes <= 20 * GIB


def test_keys_and_values_that_fit_nowhere_want_device_memory():
    asked = question("opt-30b", device=6 * GIB, lengths=[Length(1000, 10_000)])
    with pytest.raises(BudgetError, match="no room for the keys and values"):
        asked.answer()
    assert nearest_that_fits(asked).choice.plan.kv_nbytes > 11_000 * 48 * 4 * 7168


def test_what_fits_is_not_streamed():
    asked = question(device=22 * GIB, lengths=[Length(512, 256)] * 2000)
    assert asked.answer().plan.layers_in(Tier.DEVICE) == tuple(range(32))
    assert len(question("opt-30b", device=22 * GIB).answer().plan.layers_in(Tier.DEVICE)) < 48


def test_latency_is_no_worse_for_latency():
    lengths = [Length(256, 64)] * 64
    soonest, whole = (
        question("opt-30b", device=16 * GIB, host=80 * GIB, lengths=lengths, objective=objective).answer().forecast
        for objective in ("latency", "throughput")
    )
    assert soonest.mean_seconds <= 1.005 * whole.mean_seconds
    assert whole.seconds <= 1.005 * soonest.seconds


def test_what_buys_most_comes_first():
    """A model whose layers come from disk gains from disks, and nothing from a bus that waits for them."""
    asked = question("opt-30b", device=8 * GIB, host=2 * GIB)
    changes = what_ifs(asked, asked.answer())
    speeds = [one.speedup or 0.0 for one in changes]
    assert speeds == sorted(speeds, reverse=True)
    by_name = {one.name: one for one in changes}
    assert by_name["second_nvme"].speedup == pytest.approx(2, rel=0.05)
    assert by_name["next_pcie"].speedup == pytest.approx(1, rel=0.02)
    assert by_name["int4"].speedup > by_name["int8"].speedup > 1.5
    assert "float16" in by_name["exact"].why_not
    assert all(one.speedup >= 0.99 for one in changes if one.speedup)


def test_budgets_are_the_shares_that_a_run_takes():
    gpu, cpu = find_hardware("a6000"), find_hardware("cpu")
    tiers = budgets_of(gpu)
    assert (tiers.device, tiers.host) == (gpu.device_nbytes * 9 // 10, gpu.host_nbytes * 8 // 10)
    tiers = budgets_of(cpu)
    assert (tiers.device, tiers.host) == (cpu.host_nbytes // 2, cpu.host_nbytes // 2 * 8 // 10)
    said = budgets_of(gpu, device="1GiB", host="2GiB", nvme="0", kv_host="1GiB")
    assert (said.nvme, said.kv_host) == (0, GIB)
    for more in ({"device": "49GiB"}, {"host": "129GB"}):
        with pytest.raises(BudgetError, match="more than there is for it"):
            budgets_of(gpu, **more)
    with pytest.raises(BudgetError, match="is not known"):
        budgets_of(replace(gpu, device_nbytes=None))
    assert budgets_of(replace(gpu, device_nbytes=None), device="80GiB").device == 80 * GIB
