import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_room import made_room

from penstock.engine.sampling_params import SamplingParams
from penstock.engine.scheduler import Scheduler
from penstock.engine.sequence import Sequence
from penstock.errors import BudgetError, RequestError
from penstock.offload.tiers import Tier


def sequence(number, prompt, new):
    return Sequence(number, None, tuple(range(prompt)), SamplingParams(max_tokens=new), prompt + new)


jobs = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=12)


@given(jobs, st.integers(1, 20), st.integers(1, 60), st.integers(52, 200), st.booleans())
def test_every_token_of_every_sequence_runs_once_and_in_order(jobs, micro, total, room, splits):
    """Random jobs through random limits, with a fake model that ends each sequence after its own number of tokens."""
    micro = micro if splits else max(micro, 40)
    kv = made_room(room)
    scheduler = Scheduler(kv, micro_batch_tokens=micro, pass_tokens=total, splits_prompts=splits)
    sequences = [sequence(number, prompt, new) for number, (prompt, new) in enumerate(jobs)]
    for one in sequences:
        scheduler.add(one)
    seen = {one.number: 0 for one in sequences}
    started = []
    for _ in range(10_000):
        schedule = scheduler.schedule()
        if not schedule.micro_batches:
            break
        kv.check_integrity()
        decoding = sum(bool(one.output_ids) for one in scheduler.running)
        if splits:
            assert schedule.num_tokens <= max(total, decoding)
        for spans in schedule.micro_batches:
            assert spans
            length = sum(span.length for span in spans)
            assert length <= micro
            for span in spans:
                assert span.start == seen[span.sequence], "tokens run in order, once"
                seen[span.sequence] = span.end
                if span.start == 0:
                    started.append(span.sequence)
        for one in scheduler.computed(schedule):
            one.output_ids.append(7)
            if one.num_tokens == one.capacity:
                scheduler.finish(one)
    assert started == sorted(seen), "requests start in order"
    assert all(len(one.output_ids) == one.params.max_tokens for one in sequences)
    assert all(seen[one.number] == one.capacity - 1 for one in sequences), "the last token is never run"
    assert kv.statistics().device.nbytes == 0


class TwoHomes:
    """Room for so many sequences on the device, and any number in host RAM."""

    def __init__(self, on_device):
        self.on_device = on_device
        self.homes = {}

    def prepare(self, lengths, *, least):
        assert not self.homes

    def fits(self, num_tokens, *, most):
        return True

    def check(self, num_tokens, what):
        pass

    def acquire(self, sequence, *, num_tokens, most):
        there = sum(home is Tier.DEVICE for home in self.homes.values())
        self.homes[sequence] = Tier.DEVICE if there < self.on_device else Tier.HOST

    def home_of(self, sequence):
        return self.homes[sequence]

    def release(self, sequence):
        del self.homes[sequence]


@given(jobs, st.integers(1, 20), st.integers(1, 60), st.integers(0, 4), st.booleans())
def test_a_micro_batch_has_one_home_and_host_ram_comes_first(jobs, micro, total, on_device, splits):
    micro = micro if splits else max(micro, 40)
    room = TwoHomes(on_device)
    scheduler = Scheduler(room, micro_batch_tokens=micro, pass_tokens=total, splits_prompts=splits)
    for number, (prompt, new) in enumerate(jobs):
        scheduler.add(sequence(number, prompt, new))
    seen = dict.fromkeys(range(len(jobs)), 0)
    while (schedule := scheduler.schedule()).micro_batches:
        order = []
        decoding = sum(bool(one.output_ids) for one in scheduler.running)
        if splits:
            assert schedule.num_tokens <= max(total, decoding)
        for spans in schedule.micro_batches:
            (home,) = {room.homes[span.sequence] for span in spans}
            order.append(home is Tier.DEVICE)
            assert sum(span.length for span in spans) <= micro
            for span in spans:
                assert span.start == seen[span.sequence], "tokens run in order, once"
                seen[span.sequence] = span.end
        assert order == sorted(order)
        for one in scheduler.computed(schedule):
            one.output_ids.append(7)
            if one.num_tokens == one.capacity:
                scheduler.finish(one)
    assert all(seen[number] == prompt + new - 1 for number, (prompt, new) in enumerate(jobs))
    assert not room.homes


def test_single_tokens_of_host_ram_do_not_share_with_prompts():
    room = TwoHomes(on_device=1)
    scheduler = Scheduler(room, micro_batch_tokens=16, pass_tokens=30, splits_prompts=True)
    for number in range(3):
        scheduler.add(sequence(number, 3, 5))
    for one in scheduler.computed(scheduler.schedule()):
        one.output_ids.append(1)
    scheduler.add(sequence(3, 9, 5))
    batches = [[span.sequence for span in spans] for spans in scheduler.schedule().micro_batches]
    assert batches == [[1, 2], [3], [0]]


def decoded(on_device, lengths, *, split_tokens):
    """Return the numbers of the sequences in each micro-batch of a pass in which all have one new token."""
    room = TwoHomes(on_device)
    limits = {"micro_batch_tokens": 64, "pass_tokens": 64, "splits_prompts": True}
    scheduler = Scheduler(room, **limits, split_tokens=split_tokens)
    for number, length in enumerate(lengths):
        scheduler.add(sequence(number, length - 1, 5))
    for one in scheduler.computed(scheduler.schedule()):
        one.output_ids.append(1)
    return [[span.sequence for span in spans] for spans in scheduler.schedule().micro_batches]


def test_single_tokens_beside_the_device_that_see_many_others_make_two_micro_batches():
    lengths = (4, 3, 8, 2, 2, 4)
    assert decoded(1, lengths, split_tokens=None) == [[1, 2, 3, 4, 5], [0]]
    assert decoded(1, lengths, split_tokens=20) == [[1, 2, 3, 4, 5], [0]]
    assert decoded(1, lengths, split_tokens=19) == [[1, 2], [3, 4, 5], [0]], "the longest one is half of all"
    assert decoded(6, lengths, split_tokens=1) == [[0, 1, 2, 3, 4, 5]], "on the device they stay together"
    assert decoded(5, lengths, split_tokens=1) == [[5], [0, 1, 2, 3, 4]]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 60))
def test_halves_lose_nothing(lengths, split_tokens):
    made = decoded(0, [length + 1 for length in lengths], split_tokens=split_tokens)
    assert [number for numbers in made for number in numbers] == list(range(len(lengths)))
    assert all(made)
    assert len(made) <= 2


def test_a_pass_carries_decode_tokens_first_and_prefill_rides_along():
    kv = made_room(1000)
    scheduler = Scheduler(kv, micro_batch_tokens=8, pass_tokens=10, splits_prompts=True)
    scheduler.add(sequence(0, 3, 5))
    first = scheduler.schedule()
    for one in scheduler.computed(first):
        one.output_ids.append(1)
    scheduler.add(sequence(1, 30, 5))
    (one, two) = scheduler.schedule().micro_batches
    assert [(span.sequence, span.length) for span in one] == [(0, 1), (1, 7)]
    assert [(span.sequence, span.start, span.length) for span in two] == [(1, 7, 2)]


@given(jobs, st.integers(1, 20), st.integers(1, 60), st.integers(52, 200))
def test_a_source_is_read_one_sequence_ahead_and_scheduled_like_a_queue(jobs, micro, total, room):
    def scheduler():
        return Scheduler(made_room(room), micro_batch_tokens=micro, pass_tokens=total, splits_prompts=True)

    queued, fed = scheduler(), scheduler()
    pulled = []

    def source():
        for number, (prompt, new) in enumerate(jobs):
            pulled.append(number)
            yield sequence(number, prompt, new)

    for number, (prompt, new) in enumerate(jobs):
        queued.add(sequence(number, prompt, new))
    fed.feed(source())
    finished = 0
    while True:
        one, other = queued.schedule(), fed.schedule()
        assert one == other
        if not one.micro_batches:
            break
        assert len(pulled) <= finished + len(fed.running) + 1
        for each, schedule in ((queued, one), (fed, other)):
            for ready in each.computed(schedule):
                ready.output_ids.append(7)
                if ready.num_tokens == ready.capacity:
                    each.finish(ready)
                    finished += each is fed
    assert finished == len(jobs)


def test_a_small_request_does_not_overtake_a_large_one():
    scheduler = Scheduler(made_room(20), micro_batch_tokens=8, pass_tokens=64, splits_prompts=True)
    for number, prompt in enumerate((8, 15, 1)):
        scheduler.add(sequence(number, prompt, 2))
    scheduler.schedule()
    assert [one.number for one in scheduler.running] == [0]
    scheduler.finish(scheduler[0])
    scheduler.schedule()
    assert [one.number for one in scheduler.running] == [1, 2]


def test_what_a_source_raises_comes_out_of_schedule_and_abort_forgets_it():
    def source():
        yield sequence(0, 8, 8)
        yield sequence(1, 80, 80)

    scheduler = Scheduler(made_room(100), micro_batch_tokens=8, pass_tokens=64, splits_prompts=True)
    scheduler.feed(source())
    with pytest.raises(BudgetError, match="prompt 1"):
        scheduler.schedule()
    scheduler.abort()
    scheduler.feed(sequence(7, 2, 2) for _ in range(2))
    with pytest.raises(RequestError, match="two requests have one number: got 7"):
        scheduler.schedule()


def test_what_can_never_fit_says_what_is_short():
    scheduler = Scheduler(made_room(10), micro_batch_tokens=8, pass_tokens=8, splits_prompts=True)
    with pytest.raises(BudgetError, match=r"prompt 3 and its new tokens \(16 tokens\): wanted 16 bytes, got 10 bytes"):
        scheduler.add(sequence(3, 8, 8))


def test_a_prompt_that_must_stay_whole_has_to_fit_a_micro_batch():
    scheduler = Scheduler(made_room(1000), micro_batch_tokens=8, pass_tokens=8, splits_prompts=False)
    with pytest.raises(BudgetError, match="cannot take prompts in parts"):
        scheduler.add(sequence(0, 9, 1))


def test_abort_gives_everything_back():
    kv = made_room(100)
    scheduler = Scheduler(kv, micro_batch_tokens=8, pass_tokens=8, splits_prompts=True)
    for number in range(3):
        scheduler.add(sequence(number, 8, 8))
    scheduler.schedule()
    scheduler.abort()
    assert kv.statistics().device.num_sequences == kv.statistics().device.nbytes == 0
    assert not scheduler.schedule().micro_batches
