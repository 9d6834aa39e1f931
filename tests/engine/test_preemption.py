"""Sequences that start with what they are expected to need, grow, and give way: schedules without a model."""

import sys
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_room import made_room

from penstock.engine.sampling_params import SamplingParams
from penstock.engine.scheduler import Scheduler
from penstock.engine.sequence import Sequence
from penstock.offload.blocks import KVCost


@dataclass(frozen=True)
class Job:
    """A request of `prompt` tokens that may generate `most` and ends after `new`."""

    prompt: int
    most: int
    new: int

    def sequence(self, number):
        params = SamplingParams(max_tokens=self.most, ignore_eos=self.new == self.most and number % 2 == 0)
        ids = tuple((number * 31 + place) % 97 for place in range(self.prompt))
        return Sequence(number, None, ids, params, self.prompt + self.most)

    def completion(self, number):
        """What the model below answers to the whole sequence, token by token."""
        tokens = list(self.sequence(number).prompt_ids)
        for _ in range(self.new):
            tokens.append(next_token(tokens))
        return tokens[self.prompt :]


def next_token(tokens):
    return hash(tuple(tokens)) % 1009


@st.composite
def jobs(draw):
    most = draw(st.integers(1, 24))
    share = draw(st.sampled_from([0.1, 0.3, 1.0]))
    return Job(draw(st.integers(1, 16)), most, draw(st.integers(1, max(1, int(most * share)))))


class Run:
    """A fake model, which keeps what it has seen of each sequence, and answers to that."""

    def __init__(self, every, room, **limits):
        self.jobs = every
        self.room = room
        self.scheduler = Scheduler(room, **limits)
        self.scheduler.feed(job.sequence(number) for number, job in enumerate(every))
        self.seen = {}
        self.first_starts = []
        self.starts = Counter()
        self.done = {}
        self.oldest = None
        self.most_at_once = 0
        self.num_passes = 0

    def step(self):
        """Make a pass; say whether there was one."""
        schedule = self.scheduler.schedule()
        self.room.check_integrity()
        known = set(self.starts)
        for span in (span for spans in schedule.micro_batches for span in spans):
            self.see(span)
        self.first_starts += sorted(self.starts.keys() - known)  # within a pass homes have an order
        self.oldest = min(self.seen.keys() - self.done.keys(), default=None)
        self.most_at_once = max(self.most_at_once, len(self.scheduler.running))
        for sequence in self.scheduler.computed(schedule):
            sequence.output_ids.append(next_token(self.seen[sequence.number]))
            if len(sequence.output_ids) == self.jobs[sequence.number].new:
                self.scheduler.finish(sequence)
                self.done[sequence.number] = sequence
        self.num_passes += bool(schedule.micro_batches)
        return schedule

    def see(self, span):
        if span.start == 0:
            self.starts[span.sequence] += 1
            self.seen[span.sequence] = []
        tokens = self.seen[span.sequence]
        assert span.start == len(tokens), "tokens of a sequence run in order"
        tokens += self.scheduler[span.sequence].tokens(span.start, span.end)

    def finish(self):
        while self.step().micro_batches:
            assert self.num_passes < 20_000, "it comes to an end"
        return self


def store(num_blocks, *, size=1, besides=0):
    cost = KVCost(10, besides, size)
    return made_room(num_blocks * cost.block_nbytes + 3 * besides, cost=cost)


def check(run):
    """Everything came out as it would have alone, in order, and nothing is left behind."""
    assert run.first_starts == sorted(run.first_starts) == list(range(len(run.jobs))), "requests start in order"
    for number, job in enumerate(run.jobs):
        assert run.done[number].output_ids == job.completion(number)
        assert run.seen[number] == [*run.done[number].prompt_ids, *run.done[number].output_ids[:-1]]
    assert sum(run.starts.values()) == len(run.jobs) + run.scheduler.num_preemptions, "what was preempted comes back"
    statistics = run.room.statistics()
    for home in filter(None, (statistics.device, statistics.host, statistics.nvme)):
        assert home.num_sequences == home.nbytes == 0
        assert home.num_free_blocks == home.num_blocks


@settings(max_examples=800)
@given(
    st.lists(jobs(), min_size=1, max_size=16),
    st.integers(40, 90),
    st.sampled_from([1, 4]),
    st.sampled_from([0, 25]),
    st.integers(1, 20),
    st.integers(1, 50),
    st.booleans(),
)
def test_every_request_finishes_as_if_alone(every, room, size, besides, micro, total, splits):
    """Random jobs that may end early, through random limits and memory for one to a few of them."""
    micro = micro if splits else micro + 16  # some can go through the model again as one prompt, others cannot
    kv = store(-(-room // size), size=size, besides=besides)
    run = Run(every, kv, micro_batch_tokens=micro, pass_tokens=total, splits_prompts=splits)
    while True:
        schedule = run.step()
        if not schedule.micro_batches:
            break
        spans = [span for batch in schedule.micro_batches for span in batch]
        assert all(sum(span.length for span in batch) <= micro for batch in schedule.micro_batches)
        if splits:
            assert run.oldest in {span.sequence for span in spans}, "the oldest always goes on"
        else:
            assert all(span.end - span.start == 1 or span.start == 0 for span in spans), "prompts stay whole"
    check(run)


@settings(max_examples=200)
@given(
    st.lists(jobs(), min_size=1, max_size=16),
    st.integers(40, 90),
    st.integers(1, 90),
    st.sampled_from([0, 25]),
    st.integers(1, 20),
    st.integers(1, 50),
)
def test_every_request_finishes_where_there_are_two_homes(
    kernel_directory, every, on_device, in_host_ram, besides, micro, total
):
    """Either may be too small for a sequence that grows there, and the other one not."""
    cost = KVCost(1, besides)
    with made_room(on_device + 3 * besides, cost=cost, host_nbytes=in_host_ram, kernels=kernel_directory) as room:
        check(Run(every, room, micro_batch_tokens=micro, pass_tokens=total, splits_prompts=True).finish())


@pytest.fixture(scope="module")
def three_homes(kernel_directory):
    with made_room(50, host_nbytes=30, disk_blocks=70, kernels=kernel_directory) as room:
        yield room


@settings(max_examples=60)
@given(st.lists(jobs(), min_size=1, max_size=16), st.integers(1, 20), st.integers(1, 50))
def test_every_request_finishes_where_there_are_three_homes(three_homes, every, micro, total):
    check(Run(every, three_homes, micro_batch_tokens=micro, pass_tokens=total, splits_prompts=True).finish())


def test_who_gives_way_has_what_is_short(kernel_directory):
    """Of two that run in host RAM the younger one gives way, not the last to start, which is on the device."""
    every = [Job(8, 40, 2)] * 3 + [Job(8, 40, 40)] * 3
    with made_room(48, host_nbytes=60, kernels=kernel_directory) as room:
        run = Run(every, room, micro_batch_tokens=64, pass_tokens=64, splits_prompts=True).finish()
    check(run)
    assert run.scheduler.num_preemptions <= 2


def early_then_late():
    """Jobs from which a run learns that little is needed, before some come that need all."""
    return [Job(4, 40, 2)] * 30 + [Job(4, 40, 40)] * 12


def test_a_run_learns_and_gives_way_where_it_was_wrong():
    run = Run(early_then_late(), store(100), micro_batch_tokens=8, pass_tokens=64, splits_prompts=True).finish()
    check(run)
    assert run.scheduler.num_preemptions > 0
    assert run.most_at_once > 100 // 44, "more at once than have room for all they may generate"


def test_the_youngest_gives_way_and_is_the_first_to_come_back():
    """By hand: three of the late jobs run; when there is no block left, the last one of them goes."""
    run = Run(early_then_late(), store(100), micro_batch_tokens=8, pass_tokens=64, splits_prompts=True)
    while not run.scheduler.num_preemptions:
        before = [sequence.number for sequence in run.scheduler.running]
        run.step()
    running = [sequence.number for sequence in run.scheduler.running]
    assert running == before[: len(running)], "the oldest stay"
    gone = before[len(running)]
    while gone not in [sequence.number for sequence in run.scheduler.running]:
        assert run.first_starts[-1] == before[-1], "nobody new starts before it"
        run.step()
    check(run.finish())


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 16), st.integers(1, 24)), min_size=1, max_size=12), st.integers(40, 90))
def test_what_never_ends_early_is_never_preempted(every, room):
    every = [Job(prompt, most, most) for prompt, most in every]
    run = Run(every, store(room), micro_batch_tokens=8, pass_tokens=30, splits_prompts=True).finish()
    check(run)
    assert run.scheduler.num_preemptions == 0


def test_known_lengths_teach_nothing_and_reserve_all():
    scheduler = Scheduler(store(200), micro_batch_tokens=8, pass_tokens=64, splits_prompts=True)
    params = SamplingParams(max_tokens=40)
    for number in range(4):
        scheduler.add(Sequence(number, None, (1, 2, 3), params, 43))
    for _ in range(4):
        for sequence in scheduler.computed(scheduler.schedule()):
            sequence.output_ids.append(7)
            if sequence.number < 3:
                scheduler.finish(sequence)
    assert scheduler[3].num_reserved == 43, "it had started before anything was known"
    scheduler.finish(scheduler[3])
    for number, known in ((4, True), (5, False)):
        params = SamplingParams(max_tokens=40, ignore_eos=known)
        scheduler.add(Sequence(number, None, (1, 2, 3), params, 43))
    scheduler.add(Sequence(6, None, (1, 2, 3), SamplingParams(max_tokens=40, ignore_eos=True, stop="x"), 43))
    scheduler.schedule()
    assert scheduler[4].num_reserved == 43
    assert scheduler[5].num_reserved == scheduler[6].num_reserved < 43


def test_what_could_not_come_back_whole_reserves_all_and_stays():
    """Prompts that must stay whole: only what fits one micro-batch, generated tokens included, may be preempted."""
    every = [Job(4, 40, 2)] * 30 + [Job(4, 40, 40), Job(4, 10, 10)] * 8
    run = Run(every, store(100), micro_batch_tokens=20, pass_tokens=64, splits_prompts=False).finish()
    check(run)
    assert all(run.starts[number] == 1 for number, job in enumerate(every) if job.most == 40)


def test_scores_are_not_taken_twice():
    sequence = Sequence.to_score(0, None, range(9), num_known=1)
    sequence.num_computed = 5
    sequence.scores += [(-1.0, 1)] * 5
    sequence.restart()
    assert (sequence.num_computed, sequence.num_repeated, sequence.scores) == (0, 5, [])
    sequence.num_computed = 2
    sequence.restart()
    assert sequence.num_repeated == 5


def test_a_sequence_longer_than_the_pool_gets_the_memory_when_it_is_alone():
    """The pool was divided for short ones, which keep much besides; a long one was thought to be short, too."""
    cost = KVCost(10, 300, 1)
    kv = made_room(3000, cost=cost)
    every = [Job(2, 8, 1)] * 8 + [Job(2, 200, 190)] + [Job(2, 8, 8)] * 3
    run = Run(every, kv, micro_batch_tokens=64, pass_tokens=64, splits_prompts=True).finish()
    check(run)
    assert run.starts[8] == 2, "it outgrew the pool, and came back when that had been divided for it"


def calls_of_passes(num_waiting):
    """Count the calls that 20 passes make with so many sequences in the queue, growth and preemption among them."""
    scheduler = Scheduler(store(60), micro_batch_tokens=8, pass_tokens=64, splits_prompts=True)
    for number in range(num_waiting):
        scheduler.add(Job(4, 40, 30).sequence(number))
    for _ in range(10):
        scheduler._expectation.finished(1, most=40)
    calls = Counter()
    sys.setprofile(lambda frame, event, argument: calls.update([event]))
    try:
        for _ in range(20):
            for sequence in scheduler.computed(scheduler.schedule()):
                sequence.output_ids.append(7)
    finally:
        sys.setprofile(None)
    assert scheduler.num_preemptions
    return calls


def test_a_pass_does_the_same_work_however_many_wait():
    assert calls_of_passes(10_000) == calls_of_passes(2_000)
