from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import BudgetError
from penstock.offload import plan
from penstock.offload.plan import ModelShape, PassLimits, make_plan
from penstock.offload.tiers import MemoryTiers, Tier


def shape(layers=(100,) * 8, **changes):
    values = dict(
        resident_nbytes=50,
        fixed_nbytes=3,
        layer_nbytes=tuple(layers),
        wire_nbytes=tuple(n // 2 for n in layers),
        workspace_nbytes=1,
        held_nbytes=1,
        kv_token_nbytes=2,
        kv_sequence_nbytes=5,
    )
    return ModelShape(**(values | changes))


SCORES = plan.SCORE_NBYTES * plan.SCORES[0]
"""What any budget keeps for attention scores, at least."""

LIMITS = PassLimits(num_slots=3, micro_batch_tokens=64, pass_tokens=256)

shapes = st.builds(
    shape,
    st.lists(st.integers(1, 500), min_size=1, max_size=30),
    resident_nbytes=st.integers(1, 1000),
    fixed_nbytes=st.integers(0, 50),
    workspace_nbytes=st.integers(0, 20),
    held_nbytes=st.integers(0, 20),
    kv_token_nbytes=st.integers(0, 20),
    kv_sequence_nbytes=st.integers(0, 50),
)


@given(shapes, st.integers(0, 100_000), st.integers(0, 10_000))
def test_every_plan_keeps_its_budgets_and_places_every_layer(shape, device, host):
    try:
        made = make_plan(shape, MemoryTiers(device=device, host=host), LIMITS)
    except BudgetError:
        return
    assert made.device_nbytes <= device
    assert made.host_nbytes <= host
    assert len(made.tiers) == len(shape.layer_nbytes)
    assert made.kv_nbytes >= shape.kv_sequence_nbytes + 16 * shape.kv_token_nbytes
    streamed = made.layers_in(Tier.HOST) + made.layers_in(Tier.NVME)
    assert (made.num_slots > 0) == bool(streamed or made.device_packed)
    through_slots = range(len(made.tiers)) if made.device_packed else streamed
    assert all(shape.layer_nbytes[index] <= made.slot_nbytes for index in through_slots)
    assert 1 <= made.micro_batch_tokens <= made.pass_tokens
    assert made.host_nbytes == sum(shape.wire_nbytes[index] for index in made.layers_in(Tier.HOST))


@given(shapes, st.integers(0, 100_000), st.integers(0, 400_000), st.integers(0, 9000), st.integers(0, 300_000))
def test_keys_and_values_on_nvme_and_what_reads_them_keep_their_budgets(shape, device, host, kv_host, kv_nvme):
    shape = replace(shape, kv_layers=(shape.kv_token_nbytes // 3, shape.kv_token_nbytes - shape.kv_token_nbytes // 3))
    try:
        made = make_plan(shape, MemoryTiers(device=device, host=host, kv_host=kv_host, kv_nvme=kv_nvme), LIMITS)
    except BudgetError:
        return
    cost = shape.kv_cost
    assert made.device_nbytes <= device
    assert made.host_nbytes + made.kv_host_nbytes + made.kv_landing_nbytes <= host
    assert (made.kv_nvme_nbytes > 0) == (made.kv_landing_nbytes > 0) == bool(kv_nvme and cost.block_nbytes)
    assert made.kv_landing_nbytes <= host // 8
    if made.kv_nvme_nbytes:
        assert 0 <= kv_nvme - made.kv_nvme_nbytes < cost.on_disk.block_nbytes
        assert made.kv_nvme_nbytes % cost.on_disk.block_nbytes == made.kv_landing_nbytes % cost.stride_nbytes == 0
        assert made.workspace_nbytes >= 2 * shape.workspace_nbytes * made.micro_batch_tokens


def keeping(made: ModelShape, shares: list[int]) -> ModelShape:
    """The same model whose layers keep a part of their buffers, in hundredths."""
    kept = (-(-nbytes * shares[index % len(shares)] // 100) for index, nbytes in enumerate(made.layer_nbytes))
    return replace(made, kept_nbytes=tuple(kept))


@given(
    shapes, st.lists(st.integers(1, 100), min_size=1, max_size=5), st.integers(0, 9000), st.none() | st.integers(0, 30)
)
def test_what_layers_keep_on_the_device_is_counted_and_so_is_loading_them(shape, shares, room, most):
    """In budgets that are little more than the least."""
    shape = keeping(shape, shares)
    limits = replace(LIMITS, device_layers=most)
    device = SCORES + room
    try:
        made = make_plan(shape, MemoryTiers(device=device, host=0), limits)
    except BudgetError:
        return
    on_device = made.layers_in(Tier.DEVICE)
    assert made.device_nbytes <= device
    assert made.kv_nbytes >= shape.kv_sequence_nbytes + 16 * shape.kv_token_nbytes
    kept = shape.wire_nbytes if made.device_packed else shape.kept_nbytes
    assert made.device_layer_nbytes == sum(kept[index] for index in on_device)
    loading = max((shape.layer_nbytes[i] for i in on_device if kept[i] < shape.layer_nbytes[i]), default=0)
    assert loading <= (made.slot_nbytes if made.num_slots else made.workspace_nbytes)


def test_layers_on_the_device_leave_what_one_sequence_needs():
    tight = shape((1, 125, 390, 89, 1, 1, 473, 105, 1, 1, 1), resident_nbytes=1, fixed_nbytes=0, kv_token_nbytes=17)
    tight = replace(tight, workspace_nbytes=0, held_nbytes=0)
    made = make_plan(tight, MemoryTiers(device=SCORES + 861, host=0), LIMITS)
    assert made.kv_nbytes >= 5 + 16 * 17


def test_more_layers_stay_on_the_device_when_they_keep_less():
    tiers = MemoryTiers(device=SCORES + 1500, host=0)
    plain = shape((100,) * 20, wire_nbytes=(100,) * 20)
    whole = make_plan(plain, tiers, LIMITS)
    half = make_plan(keeping(plain, [50]), tiers, LIMITS)
    assert len(half.layers_in(Tier.DEVICE)) >= 2 * len(whole.layers_in(Tier.DEVICE)) > 0


def test_packed_layers_stay_packed_on_the_device_unless_all_fit_whole():
    """Then they need slots, all of them, though none may come from anywhere else."""
    packs = shape((100,) * 20, wire_nbytes=(30,) * 20)
    some = make_plan(packs, MemoryTiers(device=SCORES + 1200, host="1MiB"), LIMITS)
    assert some.device_packed
    assert some.device_layer_nbytes == 30 * len(some.layers_in(Tier.DEVICE)) > 0
    assert some.host_nbytes == 30 * len(some.layers_in(Tier.HOST)) > 0
    assert some.expanded_nbytes == 20 * 100
    every = make_plan(packs, MemoryTiers(device=SCORES + 2000, host=0), LIMITS)
    assert every.layers_in(Tier.DEVICE) == tuple(range(20))
    assert (every.num_slots, every.device_packed, every.device_layer_nbytes) == (3, True, 600)
    whole = make_plan(packs, MemoryTiers(device=SCORES + 3500, host=0), LIMITS)
    assert (whole.num_slots, whole.device_packed, whole.expanded_nbytes) == (0, False, 0)
    assert whole.device_layer_nbytes == 2000


@given(shapes)
def test_a_refusal_names_a_minimum_that_is_enough_and_one_byte_less_is_not(shape):
    with pytest.raises(BudgetError) as caught:
        make_plan(shape, MemoryTiers(device=0, host=0), LIMITS)
    minimum = int(str(caught.value.wanted).split()[2])
    make_plan(shape, MemoryTiers(device=minimum, host=0), LIMITS)
    with pytest.raises(BudgetError, match="too small for one layer plus the resident unit"):
        make_plan(shape, MemoryTiers(device=minimum - 1, host=0), LIMITS)


def test_a_model_that_fits_stays_on_the_device():
    made = make_plan(shape(), MemoryTiers(device=SCORES + 5000, host=0), LIMITS)
    assert set(made.tiers) == {Tier.DEVICE}
    assert made.num_slots == 0


def test_resident_layers_are_spread_between_streamed_ones():
    made = make_plan(shape((100,) * 12), MemoryTiers(device=SCORES + 1500, host=200), LIMITS)
    on_device = made.layers_in(Tier.DEVICE)
    assert len(on_device) >= 2
    gaps = [b - a for a, b in pairwise(on_device)]
    assert max(gaps) - min(gaps) <= 1
    assert len(made.layers_in(Tier.HOST)) == 4


def test_what_may_be_left_on_disk_is_a_limit_too():
    with pytest.raises(BudgetError, match="more than may be left on NVMe") as caught:
        make_plan(shape(), MemoryTiers(device=SCORES + 800, host=0, nvme=100), LIMITS)
    assert "Give the host" in str(caught.value)


def test_keys_and_values_in_host_ram_come_before_layers_there():
    plain = make_plan(shape(), MemoryTiers(device=SCORES + 1000, host=200), LIMITS)
    made = make_plan(shape(), MemoryTiers(device=SCORES + 1000, host=200, kv_host=120), LIMITS)
    assert (plain.kv_host_nbytes, plain.host_nbytes) == (0, 200)
    assert (made.kv_host_nbytes, made.host_nbytes) == (120, 50)
    assert "host    1 layers, 50 B; keys and values 120 B" in made.explain()
    assert made.as_dict()["kv_host_nbytes"] == 120
    assert "keys and values" not in plain.explain().splitlines()[1]


@given(shapes, st.integers(0, 100_000), st.integers(0, 10_000), st.integers(0, 10_000))
def test_the_host_budget_is_for_layers_and_keys_together(shape, device, host, kv_host):
    try:
        made = make_plan(shape, MemoryTiers(device=device, host=host, kv_host=kv_host), LIMITS)
    except BudgetError:
        return
    assert made.kv_host_nbytes == kv_host
    assert made.host_nbytes + kv_host <= host
    assert made.device_nbytes <= device
    if kv_host:
        parked = shape.workspace_nbytes * made.micro_batch_tokens
        scores = plan.SCORE_NBYTES * made.max_scores
        assert made.workspace_nbytes == shape.workspace_of(made.micro_batch_tokens, made.pass_tokens) + parked + scores


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_is_of_what_layers_leave_and_a_size_that_was_asked_for_comes_first(share):
    limits = replace(LIMITS, kv_host_share=share)
    made = make_plan(shape(), MemoryTiers(device=SCORES + 1000, host=2000), limits)
    assert made.kv_host_nbytes == int((2000 - made.host_nbytes) * share)
    assert made.nvme_nbytes == 0
    full = make_plan(shape(), MemoryTiers(device=SCORES + 1000, host=100), limits)
    assert (full.host_nbytes, full.kv_host_nbytes) == (100, 0)
    asked = make_plan(shape(), MemoryTiers(device=SCORES + 1000, host=2000, kv_host=30), limits)
    assert asked == make_plan(shape(), MemoryTiers(device=SCORES + 1000, host=2000, kv_host=30), LIMITS)


def test_more_keys_and_values_than_host_memory_are_refused():
    with pytest.raises(BudgetError, match=r"wanted at most 100 B, got 101 B\. Raise the host memory"):
        make_plan(shape(), MemoryTiers(device=SCORES + 1000, host=100, kv_host=101), LIMITS)


def test_a_plan_explains_itself():
    made = make_plan(shape(), MemoryTiers(device=SCORES + 800, host=100), LIMITS)
    text = made.explain()
    assert "2 layers, 100 B" in text
    assert "read in every pass" in text
    assert made.as_dict()["tiers"].count("host") == 2


@given(shapes, st.integers(0, 100_000), st.integers(0, 30))
def test_layers_on_the_device_may_be_bounded(shape, device, most):
    limits = PassLimits(num_slots=3, micro_batch_tokens=64, pass_tokens=256, device_layers=most)
    try:
        made = make_plan(shape, MemoryTiers(device=device, host=0), limits)
        free = make_plan(shape, MemoryTiers(device=device, host=0), LIMITS)
    except BudgetError:
        return
    assert made.device_nbytes <= device
    assert len(made.layers_in(Tier.DEVICE)) <= most
    assert made.kv_nbytes >= shape.kv_sequence_nbytes + 16 * shape.kv_token_nbytes
    if len(free.layers_in(Tier.DEVICE)) < len(shape.layer_nbytes):
        assert len(made.layers_in(Tier.DEVICE)) >= min(most, len(free.layers_in(Tier.DEVICE)))
