from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_plan import make_plan_of

from penstock.errors import ProfileError
from penstock.offload.cost import (
    COMPUTING,
    EXPANDING,
    HOST_ATTENTION,
    HOST_TO_DEVICE,
    NVME_TO_HOST,
    OUTSIDE_SECONDS,
    PRODUCTS,
    STORING,
    HostAttention,
    LayerTimes,
    Machine,
    PassCost,
    pass_cost,
)

MACHINE = Machine(host_to_device=50e9, nvme_to_host=2e9, flops=100e12, device_memory=1e12)


def test_each_resource_by_itself():
    plan = make_plan_of(host_nbytes=40 * 10**9, nvme_nbytes=10 * 10**9)
    cost = pass_cost(plan, MACHINE, flops=PRODUCTS * 200e12, weight_nbytes=1e12)
    assert cost.busy == {COMPUTING: 3.0, HOST_TO_DEVICE: 1.0, NVME_TO_HOST: 5.0}
    assert (cost.bottleneck, cost.seconds) == (NVME_TO_HOST, 5.0 + OUTSIDE_SECONDS)


def test_computing_multiplies_and_reads():
    plan = make_plan_of()
    assert pass_cost(plan, MACHINE, flops=0, weight_nbytes=3e12).busy[COMPUTING] == 3.0
    assert pass_cost(plan, MACHINE, flops=PRODUCTS * 400e12, weight_nbytes=3e12).busy[COMPUTING] == 7.0


def test_keys_and_values_in_host_ram():
    """A processor reads them beside the link, and a processor that is the device computes nothing meanwhile."""
    machine = replace(MACHINE, host_read=100e9)
    busy = pass_cost(make_plan_of(), machine, flops=PRODUCTS * 100e12, weight_nbytes=0, host_kv_nbytes=200e9).busy
    assert (busy[COMPUTING], busy[HOST_ATTENTION]) == (1.0, 2.0)
    streaming = make_plan_of(host_nbytes=1)
    busy = pass_cost(streaming, machine, flops=0, weight_nbytes=0, host_kv_nbytes=60e9, copied_kv_nbytes=50e9).busy
    assert busy[HOST_ATTENTION] == pytest.approx(1.0)
    assert busy[HOST_TO_DEVICE] == pytest.approx(1.0)
    measured = replace(machine, attention=HostAttention(alone=100e9, beside_link=80e9, turn_seconds=0.25))
    for plan, rate in ((make_plan_of(), 100e9), (streaming, 80e9)):
        turns = len(plan.tiers) * 0.25
        busy = pass_cost(plan, measured, flops=0, weight_nbytes=0, host_kv_nbytes=rate).busy
        assert busy[HOST_ATTENTION] == 1.0 + turns
        busy = pass_cost(plan, measured, flops=0, weight_nbytes=0, stored_kv_nbytes=rate).busy
        assert busy[HOST_ATTENTION] == 1.0, "what is only stored has no turns"
    stored = pass_cost(plan, replace(machine, on_cpu=True), flops=0, weight_nbytes=0, stored_kv_nbytes=60e9).busy
    assert stored[COMPUTING] == pytest.approx(STORING * 1.0), "a processor reads and writes what it stores"
    on_cpu = replace(machine, on_cpu=True)
    busy = pass_cost(make_plan_of(), on_cpu, flops=100e12, weight_nbytes=0, host_kv_nbytes=200e9).busy
    assert busy[COMPUTING] == 3.0
    assert HOST_ATTENTION not in busy


def test_what_layers_take_lies_between_measurements_and_goes_on_beyond_them():
    times = LayerTimes(singles=((1, 2.0), (8, 2.0), (16, 4.0)), prompts=((64, 3.0),))
    assert [times.of(count, single=True) for count in (1, 4, 8, 12, 16, 32)] == [2.0, 2.0, 2.0, 3.0, 4.0, 8.0]
    assert [times.of(count, single=False) for count in (2, 64, 640)] == [3.0, 3.0, 3.0]
    noisy = LayerTimes(singles=((1, 2.0), (8, 1.0)), prompts=((8, 1.0), (64, 8.0)))
    assert [noisy.of(count, single=True) for count in (1, 8, 80)] == [2.0, 2.0, 2.0], "more tokens never take less"
    assert noisy.of(1, single=False) == 1.0


def test_a_processor_that_is_the_device_copies_itself():
    on_cpu = replace(MACHINE, on_cpu=True)
    busy = pass_cost(
        make_plan_of(host_nbytes=50 * 10**9), on_cpu, flops=100e12, weight_nbytes=0, layers_seconds=0.5
    ).busy
    assert (busy[COMPUTING], busy[HOST_TO_DEVICE]) == (2.5, 1.0)


def test_expanding_what_is_packed_takes_the_device_s_memory():
    plan = replace(make_plan_of(), expanded_nbytes=10**12)
    assert pass_cost(plan, MACHINE, flops=PRODUCTS * 100e12, weight_nbytes=0).busy[COMPUTING] == 1.0 + EXPANDING


def test_keys_and_values_on_nvme():
    plan = make_plan_of(nvme_nbytes=10 * 10**9)
    busy = pass_cost(plan, MACHINE, flops=0, weight_nbytes=0, disk_kv_nbytes=2e9).busy
    assert busy[NVME_TO_HOST] == 6.0


@pytest.mark.parametrize("missing", ["host_to_device", "nvme_to_host", "flops", "device_memory"])
def test_a_rate_that_is_needed_and_not_known_is_named(missing):
    machine = Machine(**{name: None if name == missing else 1e9 for name in Machine.__dataclass_fields__})
    with pytest.raises(ProfileError, match=r"is not known.*penstock profile"):
        pass_cost(make_plan_of(host_nbytes=1, nvme_nbytes=1), machine, flops=1, weight_nbytes=1)


def test_rates_that_are_not_needed_may_be_unknown():
    machine = Machine(host_to_device=None, nvme_to_host=None, flops=1e12, device_memory=1e12)
    assert pass_cost(make_plan_of(), machine, flops=1e12, weight_nbytes=0).bottleneck == COMPUTING


@given(st.floats(0, 1), st.floats(0, 10), st.floats(0, 10))
def test_between_two_costs(share, first, second):
    between = PassCost({COMPUTING: first}).towards(PassCost({COMPUTING: second}), share).seconds
    assert min(first, second) - 1e-9 <= between <= max(first, second) + 1e-9
