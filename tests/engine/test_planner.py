"""The plan that is chosen is no worse than what it was compared with, and fits."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine.flops import ModelFlops
from penstock.engine.forecast import Length, forecast
from penstock.engine.planner import choose_plan
from penstock.errors import BudgetError
from penstock.offload.blocks import BLOCK_TOKENS, KVCost
from penstock.offload.cost import HOST_ATTENTION, Machine
from penstock.offload.plan import ModelShape, PassLimits, make_plan
from penstock.offload.tiers import MemoryTiers, Tier

GB = 10**9
LAYERS = 24
SHAPE = ModelShape(
    resident_nbytes=GB,
    fixed_nbytes=1 << 20,
    layer_nbytes=(GB,) * LAYERS,
    wire_nbytes=(GB,) * LAYERS,
    workspace_nbytes=200_000,
    held_nbytes=10_000,
    kv_token_nbytes=600_000,
    kv_sequence_nbytes=0,
)
MODEL = ModelFlops(12 * GB, 24 * GB, GB, {None: 500_000}, LAYERS * GB, 0, 0.0)
MACHINE = Machine(host_to_device=50e9, nvme_to_host=3e9, flops=300e12, device_memory=1e12)
LIMITS = PassLimits(3, 2048, 16384)
COST = KVCost(SHAPE.kv_token_nbytes, 0, BLOCK_TOKENS)


def choose(device, lengths, *, host="100GB", limits=LIMITS, fixed=(), machine=MACHINE, kv_host=None):
    tiers = MemoryTiers(device=device, host=host, kv_host=kv_host)
    return choose_plan(SHAPE, tiers, limits, machine=machine, model=MODEL, lengths=lengths, fixed=fixed)


def test_few_requests_leave_room_for_layers():
    assert len(choose("20GB", [Length(512, 32)] * 4).plan.layers_in(Tier.DEVICE)) > 8


def test_many_requests_want_it_for_keys_and_values():
    assert len(choose("20GB", [Length(64, 256)] * 4000).plan.layers_in(Tier.DEVICE)) < 3


def test_what_fits_wholly_stays_on_the_device():
    assert choose("40GB", [Length(512, 32)] * 4).plan.layers_in(Tier.DEVICE) == tuple(range(LAYERS))


def test_what_was_fixed_stays():
    limits = PassLimits(3, 1024, 3000, device_layers=5)
    fixed = {"device_layers", "pass_tokens", "micro_batch_tokens"}
    plan = choose("20GB", [Length(512, 32)] * 4, limits=limits, fixed=fixed).plan
    assert (len(plan.layers_in(Tier.DEVICE)), plan.micro_batch_tokens, plan.pass_tokens) == (5, 1024, 3000)


READS = replace(MACHINE, host_read=200e9)
MANY = [Length(512, 512)] * 300


def test_what_layers_leave_of_host_ram_takes_keys_and_values():
    """Ten sequences fit the device; each pass takes as long with two hundred."""
    without, chosen = choose("12GB", MANY), choose("12GB", MANY, machine=READS)
    assert without.plan.kv_host_nbytes == 0
    assert 10 * GB < chosen.plan.kv_host_nbytes <= 100 * GB - chosen.plan.host_nbytes
    assert chosen.forecast.seconds < without.forecast.seconds / 2
    assert chosen.forecast.peak_sequences > 2 * without.forecast.peak_sequences
    assert chosen.forecast.busy_seconds[HOST_ATTENTION] > 0


@pytest.mark.parametrize("kv_host", [0, 5 * GB])
def test_a_size_that_was_asked_for_stays(kv_host):
    assert choose("12GB", MANY, machine=READS, kv_host=kv_host).plan.kv_host_nbytes == kv_host


def test_slow_host_ram_takes_none():
    assert choose("12GB", MANY, machine=replace(MACHINE, host_read=1e9)).plan.kv_host_nbytes == 0


def test_a_request_that_only_host_ram_can_hold_runs():
    plan = choose("9GB", [Length(20_000, 32)], machine=READS).plan
    assert plan.kv_nbytes < COST.of(20_032) <= plan.kv_host_nbytes


def test_the_forecast_is_that_of_the_whole_run():
    few, many = (choose("20GB", [Length(64, 32)] * count).forecast for count in (1000, 8000))
    assert (few.generated_tokens, many.generated_tokens) == (32_000, 256_000)
    assert many.seconds == pytest.approx(8 * few.seconds, rel=0.1)


def test_nothing_fits():
    with pytest.raises(BudgetError, match="device budget is too small"):
        choose("1500MB", [Length(64, 32)])
    with pytest.raises(BudgetError, match="keys and values of prompt 0"):
        choose("5GB", [Length(100_000, 32)])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(4, 30),
    st.lists(st.builds(Length, st.integers(1, 600), st.integers(1, 64)), min_size=1, max_size=60),
    st.integers(0, LAYERS + 20),
    st.sampled_from([MACHINE, READS]),
)
def test_it_is_at_least_as_good_as_the_usual_plan_and_fits(device, lengths, host, machine):
    tiers = MemoryTiers(device=f"{device}GB", host=host * GB)
    usual = forecast(make_plan(SHAPE, tiers, LIMITS), machine, MODEL, lengths, cost=COST)
    chosen = choose(f"{device}GB", lengths, host=host * GB, machine=machine)
    assert chosen.plan.device_nbytes <= device * GB
    assert chosen.plan.host_nbytes + chosen.plan.kv_host_nbytes <= host * GB
    assert chosen.forecast.seconds <= 1.02 * usual.seconds
