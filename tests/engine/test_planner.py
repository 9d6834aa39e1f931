"""The plan that is chosen is no worse than what it was compared with, and fits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine.flops import ModelFlops
from penstock.engine.forecast import Length, forecast
from penstock.engine.planner import choose_plan
from penstock.errors import BudgetError
from penstock.offload.blocks import BLOCK_TOKENS, KVCost
from penstock.offload.cost import Machine
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


def choose(device, lengths, *, host="100GB", limits=LIMITS, fixed=()):
    tiers = MemoryTiers(device=device, host=host)
    return choose_plan(SHAPE, tiers, limits, machine=MACHINE, model=MODEL, lengths=lengths, fixed=fixed)


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
    st.integers(0, LAYERS),
)
def test_it_is_at_least_as_good_as_the_usual_plan_and_fits(device, lengths, host):
    tiers = MemoryTiers(device=f"{device}GB", host=host * GB)
    usual = forecast(make_plan(SHAPE, tiers, LIMITS), MACHINE, MODEL, lengths, cost=COST)
    chosen = choose(f"{device}GB", lengths, host=host * GB)
    assert chosen.plan.device_nbytes <= device * GB
    assert chosen.plan.host_nbytes <= host * GB
    assert chosen.forecast.seconds <= 1.02 * usual.seconds
