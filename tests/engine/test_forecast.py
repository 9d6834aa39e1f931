"""A forecast makes the passes that a run makes, and adds up what each costs."""

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_plan import make_plan_of

from penstock.engine import passes
from penstock.engine.flops import ModelFlops
from penstock.engine.forecast import Length, forecast
from penstock.engine.llm import LLM
from penstock.engine.sampling_params import SamplingParams
from penstock.errors import BudgetError, ProfileError
from penstock.io.settings import ReadSettings
from penstock.offload.blocks import BLOCK_TOKENS, KVCost
from penstock.offload.cost import (
    COMPUTING,
    HOST_ATTENTION,
    HOST_TO_DEVICE,
    NVME_TO_HOST,
    OUTSIDE_SECONDS,
    PRODUCTS,
    LayerTimes,
    Machine,
)
from penstock.offload.disk_kv import DiskRoom
from penstock.offload.groups import open_kv
from penstock.offload.homes import KVHomes
from penstock.offload.tiers import MemoryTiers, Tier

MACHINE = Machine(host_to_device=1e9, nvme_to_host=1e9, flops=1e12, device_memory=1e12)
COST = KVCost(10, 0, 4)


def model(**values):
    usual = {"parameters": 1, "per_token": 10**9, "per_row": 0, "per_pair": {None: 0}}
    return ModelFlops(**(usual | {"shared_nbytes": 0, "expert_nbytes": 0, "expert_share": 0.0} | values))


def test_one_request_by_hand():
    """A prompt in two passes, the second of which gives the first token; then a pass for each other token."""
    plan = make_plan_of(kv_nbytes=10**6, host_nbytes=10**7, pass_tokens=64)
    found = forecast(plan, MACHINE, model(), [Length(100, 5)], cost=COST)
    assert (found.passes, found.generated_tokens, found.peak_sequences) == (6, 5, 1)
    # 64 and 36 ms of arithmetic, then 10 ms of the bus.
    assert found.seconds == pytest.approx((0.064 + 0.036) / PRODUCTS + 4 * 0.010 + 6 * OUTSIDE_SECONDS)
    assert found.busy_seconds[HOST_TO_DEVICE] == pytest.approx(0.060)
    assert found.waits_for[HOST_TO_DEVICE] == pytest.approx(4 * (0.010 + OUTSIDE_SECONDS) / found.seconds)


def test_places_are_taken_again():
    """Keys and values of two at a time: three waves of two and one of one."""
    plan = make_plan_of(kv_nbytes=2 * COST.of(12), host_nbytes=10**9)
    found = forecast(plan, MACHINE, model(), [Length(8, 4)] * 7, cost=COST)
    assert (found.passes, found.peak_sequences) == (16, 2)
    assert found.bottleneck == HOST_TO_DEVICE
    assert found.tokens_per_second == pytest.approx(28 / 16 / (1 + OUTSIDE_SECONDS))


def test_layers_with_windows_leave_room_for_more():
    """Half of what a token keeps is kept for two blocks at most: 32 tokens take 8 blocks and 2."""
    windowed = KVCost(10, 0, 4, ((5, 5),))
    plan = make_plan_of(kv_nbytes=4 * COST.of(32), host_nbytes=10**9)
    peaks = [
        forecast(plan, MACHINE, model(), [Length(28, 4)] * 12, cost=cost).peak_sequences for cost in (COST, windowed)
    ]
    assert peaks == [4, 6]


def test_attention_in_host_ram_by_hand():
    """Room for one request on the device and for two in host RAM, whose single tokens are attended to there."""
    plan = make_plan_of(kv_nbytes=COST.of(12), kv_host_nbytes=2 * COST.of(12) + 39, host_nbytes=10**6)
    machine = replace(MACHINE, host_read=1e3)
    found = forecast(plan, machine, model(per_token=0), [Length(8, 4)] * 3, cost=COST)
    assert (found.passes, found.peak_sequences) == (4, 3)
    # Two that see 9, 10 and 11 tokens and store 11, at what a full-rate link leaves of the rate.
    assert found.busy_seconds[HOST_ATTENTION] == pytest.approx(2 * (30 + 11) * 10 / 1e3 / 0.6)
    assert found.bottleneck == HOST_ATTENTION
    with pytest.raises(ProfileError, match="host memory"):
        forecast(plan, MACHINE, model(), [Length(8, 4)] * 3, cost=COST)


def test_hosted_layers_with_windows_keep_all_and_read_what_they_see():
    windowed = KVCost(10, 0, 4, ((5, 4),))
    assert [windowed.seen_nbytes(length) for length in (3, 5, 8)] == [30, 50, 80 - 3 * 4]
    plan = make_plan_of(kv_nbytes=1, kv_host_nbytes=3 * COST.of(12) - 1, host_nbytes=10**6)
    machine = replace(MACHINE, host_read=1e3)
    found = forecast(plan, machine, model(per_token=0), [Length(8, 4)] * 2, cost=windowed)
    assert found.peak_sequences == 2, "two have room for all of their tokens"
    read = 2 * sum(map(windowed.seen_nbytes, (9, 10, 11)))
    assert found.busy_seconds[HOST_ATTENTION] == pytest.approx((read + 2 * 11 * 10) / 1e3 / 0.6)


def test_keys_and_values_on_nvme_by_hand():
    """They are read on the disk, padded, beside the weights; and then the processor reads them."""
    cost = KVCost(10, 0, 4, layers=(6, 4))
    assert (cost.on_disk.block_nbytes, cost.stride_nbytes) == (2 * 4096, 4096)
    plan = make_plan_of(kv_nbytes=1, kv_nvme_nbytes=6 * 8192, kv_landing_nbytes=3 * 4096, nvme_nbytes=10**6)
    machine = replace(MACHINE, host_read=1e3, nvme_to_host=1e6)
    found = forecast(plan, machine, model(per_token=0), [Length(8, 4)] * 3, cost=cost)
    assert found.peak_sequences == 2, "a block of four tokens is two pages there"
    padded = sum(9 + 10 + 11 for _ in range(3)) * 2048
    written = 3 * 2 * 8192 + 3 * 3 * 8192
    assert found.busy_seconds[NVME_TO_HOST] == pytest.approx((found.passes * 10**6 + padded + written) / 1e6)
    assert found.busy_seconds[HOST_ATTENTION] == pytest.approx(3 * 30 * 10 / 1e3 / 0.6)
    with pytest.raises(BudgetError, match="13 tokens"):
        forecast(plan, machine, model(), [Length(9, 4)], cost=cost)


def test_four_bit_rows_in_host_ram_are_copied_to_the_device():
    plan = make_plan_of(kv_nbytes=1, kv_host_nbytes=COST.of(12), kv_dtype="int4")
    machine = replace(MACHINE, host_to_device=1e3, host_read=1e6)
    found = forecast(plan, machine, model(per_token=0), [Length(8, 4)], cost=COST)
    assert found.busy_seconds[HOST_TO_DEVICE] == pytest.approx((8 + 9 + 10) * 10 / 1e3)
    assert found.busy_seconds[HOST_ATTENTION] == pytest.approx(11 * 10 / 1e6)


def test_micro_batches_read_the_weights_again():
    plan = make_plan_of(kv_nbytes=10**6, micro_batch_tokens=16, pass_tokens=64)
    quick = Machine(host_to_device=1e9, nvme_to_host=1e9, flops=1e21, device_memory=1e9)
    found = forecast(plan, quick, model(shared_nbytes=10**6), [Length(64, 1)], cost=COST)
    assert found.seconds == pytest.approx(4e-3 + OUTSIDE_SECONDS)


def test_passes_that_only_decode_are_issued_twice_and_then_played():
    """Layers that stay on a GPU: one prompt, then decode of up to 512 tokens, then of more."""
    plan = make_plan_of(kv_nbytes=10**6, num_slots=0, tiers=(Tier.DEVICE,) * 10, pass_tokens=512)
    issuing = replace(MACHINE, call_seconds=0.05)
    found = forecast(plan, issuing, model(per_token=0), [Length(500, 20)], cost=COST)
    prompt = 500 / 64  # its micro-batches, which are issued
    assert found.seconds == pytest.approx(10 * 0.05 * (-(-prompt // 1) + 2 + 2) + 20 * OUTSIDE_SECONDS, rel=1e-3)
    moving = replace(plan, num_slots=2)
    assert forecast(moving, issuing, model(per_token=0), [Length(500, 20)], cost=COST).seconds > 2 * found.seconds


@given(st.integers(1, 300), st.integers(1, 300))
def test_experts_are_read_when_somebody_chooses_them(fewer, more):
    some = model(shared_nbytes=10, expert_nbytes=1000, expert_share=1 / 16)
    assert 10 + 1000 / 16 - 1e-9 <= some.weights_read(min(fewer, more)) <= some.weights_read(max(fewer, more)) <= 1010


def test_a_request_that_never_fits():
    with pytest.raises(BudgetError, match="no room for the keys and values of prompt 1"):
        forecast(make_plan_of(kv_nbytes=200), MACHINE, model(), [Length(8, 4), Length(100, 4)], cost=COST)


def test_the_rest_of_a_long_run_goes_on_at_the_same_pace(monkeypatch):
    plan = make_plan_of(kv_nbytes=8 * COST.of(32), host_nbytes=10**8)
    lengths = [Length(8 + number % 9, 6 + number % 5) for number in range(400)]
    whole = forecast(plan, MACHINE, model(), lengths, cost=COST)
    part = forecast(plan, MACHINE, model(), lengths, cost=COST, max_passes=whole.passes // 4)
    assert part.generated_tokens == whole.generated_tokens
    assert part.seconds == pytest.approx(whole.seconds, rel=0.05)


LENGTHS = st.lists(st.builds(Length, st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=12)


@given(LENGTHS)
def test_passes_that_are_alike_are_not_made_one_by_one(lengths):
    """Skipping them changes nothing but the rounding."""
    plan = make_plan_of(kv_nbytes=3 * COST.of(60), host_nbytes=10**7, pass_tokens=64)
    skipping = forecast(plan, MACHINE, model(per_pair={None: 10**6}), lengths, cost=COST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_alike", lambda _: 0)
        plodding = forecast(plan, MACHINE, model(per_pair={None: 10**6}), lengths, cost=COST)
    assert skipping.passes == plodding.passes
    assert skipping.seconds == pytest.approx(plodding.seconds)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@settings(max_examples=30, deadline=None)
@example([Length(1, 8), Length(1, 12), Length(9, 20), Length(17, 20)], 840, 400, 0, 1, 30, ())
@given(
    LENGTHS, st.integers(0, 2000), st.integers(0, 2000), st.sampled_from([0, 0, 0, 9, 30]), st.integers(1, 20),
    st.sampled_from([0, 30]), st.sampled_from([(), ((5, 6),), ((5, 3), (9, 7))]),
)  # fmt: skip
def test_its_homes_take_what_the_real_ones_take(kernels, lengths, device, host, disk, landing, besides, windows):
    cost = KVCost(10, besides, 4, windows, layers=(6, 4))
    ends = [one.prompt + one.generated for one in lengths]
    sizes = disk * cost.on_disk.block_nbytes, landing * cost.stride_nbytes
    plan = make_plan_of(
        kv_nbytes=device, kv_host_nbytes=host, kv_nvme_nbytes=sizes[0], kv_landing_nbytes=sizes[1] if disk else 0
    )
    on_disk = DiskRoom(*sizes, directory=kernels, settings=ReadSettings(backend="threads")) if disk else None
    numbers = {layer: window for layer, (window, _) in enumerate(windows)}
    store = open_kv(limit_nbytes=device, cost=cost, windows=numbers)
    with KVHomes(store, cost=cost, host_nbytes=host, nvme=on_disk, kernel_directory=kernels) as real:
        real.prepare(ends)
        room = passes._Homes(plan, cost, ends)
        for number, length in enumerate(ends):
            refused = [isinstance(refusal(one, length), BudgetError) for one in (room, real)]
            assert refused[0] == refused[1]
            if not real.fits(length, most=length):
                continue
            if number == 0 or not windows:  # how stores of windows share a limit is not foreseen to the block
                assert room.fits(length, most=length)
            if room.fits(length, most=length):
                for one in (room, real):
                    one.acquire(number, num_tokens=length, most=length)
                if not windows:
                    assert room.home_of(number) is real.home_of(number)
        for number in room._homes:
            real.release(number)


def refusal(room, length):
    try:
        room.check(length, "it")
    except BudgetError as error:
        return error


@pytest.fixture(scope="module")
def llm(tiny_llama):
    tiers = MemoryTiers(device="1MiB", host="200KiB")
    with LLM(tiny_llama, device="cpu", tiers=tiers, micro_batch_tokens=16) as made:
        yield made


SHORT = st.lists(st.builds(Length, st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=6)


@settings(max_examples=5, deadline=None)
@given(SHORT)
def test_it_makes_the_passes_that_the_engine_makes(llm, lengths):
    params = [SamplingParams(max_tokens=one.generated, temperature=0.0, ignore_eos=True) for one in lengths]
    llm._kv.limit(llm.plan.kv_nbytes)  # what was nearly right for the run before is not what a forecast assumes
    llm.generate([[7] * one.prompt for one in lengths], params)
    cost = KVCost(llm._shape.kv_token_nbytes, llm._shape.kv_sequence_nbytes, BLOCK_TOKENS)
    found = forecast(llm.plan, MACHINE, model(), lengths, cost=cost)
    run = llm.last_run
    assert (found.passes, found.peak_sequences) == (run.num_passes, run.peak_sequences)
    assert found.generated_tokens == run.generated_tokens


@pytest.mark.parametrize("kv_nvme", [0, "4MiB"])
def test_it_makes_the_passes_that_the_homes_make(tiny_llama, kernels, kv_nvme):
    lengths = [Length(5 + 7 * number % 30, 3 + number % 5) for number in range(14)]
    tiers = MemoryTiers(device="520KiB", host="400KiB", kv_host="150KiB", kv_nvme=kv_nvme)
    with LLM(tiny_llama, device="cpu", tiers=tiers, micro_batch_tokens=16, kernel_directory=kernels) as llm:
        params = [SamplingParams(max_tokens=one.generated, temperature=0.0, ignore_eos=True) for one in lengths]
        llm.generate([[7] * one.prompt for one in lengths], params)
        found = llm.foresee(replace(MACHINE, host_read=1e9), lengths)
        run = llm.last_run
        hosted = llm._homes.statistics().attention_seconds
        assert (run.peak_on_nvme > 0) == bool(kv_nvme)
    assert hosted > 0
    assert (found.passes, found.peak_sequences) == (run.num_passes, run.peak_sequences)


def test_layers_take_what_was_measured_and_the_rest_what_rates_say():
    """Two layers; a prompt of 8 tokens, then three single ones of each request, in one micro-batch."""
    times = LayerTimes(singles=((1, 0.5), (2, 1.0)), prompts=((16, 4.0),))
    machine = replace(MACHINE, on_cpu=True, layer_times=times)
    plan = make_plan_of(kv_nbytes=2 * COST.of(12), tiers=(Tier.DEVICE,) * 2)
    found = forecast(plan, machine, model(per_token=10**9, per_row=0), [Length(8, 4)] * 2, cost=COST)
    assert found.passes == 4
    read = 2 * (9 + 10 + 11) * 10 / machine.device_memory
    assert found.busy_seconds[COMPUTING] == pytest.approx(2 * (4.0 + 3 * 1.0) + read)
