"""The passes of a run before it runs: the real scheduler makes them, over lengths of requests and room in numbers.

What they cost depends on the machine; which they are does not. So plans that differ in what is where, or machines in
their rates, often have the same passes, which need making once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

from penstock.engine.batch import Span
from penstock.engine.sampling_params import SamplingParams
from penstock.engine.scheduler import Scheduler
from penstock.engine.sequence import Sequence
from penstock.offload.blocks import KVCost
from penstock.offload.plan import Plan
from penstock.offload.tiers import Tier

__all__ = ["Batches", "KnownPasses", "Length", "Step", "passes_of"]

Batches = Items[Items[Span]]

_MOST_RUNS = 8
"""Runs whose passes are kept: some megabytes each."""


@dataclass(frozen=True, slots=True)
class Length:
    """Tokens of one request: of its prompt, and to be generated."""

    prompt: int
    generated: int


@dataclass(frozen=True, slots=True)
class Step:
    """A pass: its micro-batches by home, `rows` of whose tokens go through the head, and `ended` sequences end with it.

    `running` sequences take part. Then come `count` passes like it, which differ in the length of what is attended to
    only; `last` is the last of these, with which `ended_later` sequences end.
    """

    homes: Mapping[Tier, Batches]
    rows: int
    running: int
    ended: int
    count: int = 0
    last: Mapping[Tier, Batches] | None = None
    ended_later: int = 0


class _Store:
    """What a store of blocks would have, in numbers: bytes that are free, and what each sequence holds."""

    def __init__(self, nbytes: int, cost: KVCost, *, most_blocks: int | None = None) -> None:
        self.nbytes = nbytes
        self._cost = cost
        self._most_blocks = most_blocks
        self._free = nbytes
        self._held: dict[Hashable, int] = {}
        self._known: dict[int, int] = {}  # the same lengths come again and again

    def _nbytes(self, num_tokens: int) -> int:
        if num_tokens not in self._known:
            self._known[num_tokens] = self._cost.of(num_tokens) - self._cost.sequence_nbytes
        return self._known[num_tokens]

    def fits(self, num_tokens: int) -> bool:
        return self._nbytes(num_tokens) <= self._free

    def could_hold(self, num_tokens: int) -> bool:
        enough = self._most_blocks is None or self._cost.blocks_of(num_tokens) <= self._most_blocks
        return enough and self._nbytes(num_tokens) <= self.nbytes

    def acquire(self, sequence: Hashable, *, num_tokens: int) -> None:
        self._held[sequence] = nbytes = self._nbytes(num_tokens)
        self._free -= nbytes

    def extend(self, sequence: Hashable, *, num_tokens: int) -> bool:
        more = max(self._nbytes(num_tokens) - self._held[sequence], 0)
        if more > self._free:
            return False
        self._held[sequence] += more
        self._free -= more
        return True

    def release(self, sequence: Hashable) -> None:
        self._free += self._held.pop(sequence)


class _Homes:
    """The room that the homes of keys and values would have, in numbers; `KVHomes` is the real one.

    Host RAM and NVMe have whole blocks, in which layers with windows keep all tokens. What sequences have besides is on
    the device, wherever they are at home.
    """

    def __init__(self, plan: Plan, cost: KVCost, lengths: list[int]) -> None:
        self._cost = cost
        self._limit = plan.kv_nbytes
        landing = plan.kv_landing_nbytes // max(cost.stride_nbytes, 1)  # blocks of a sequence that can be read at once
        beside = (
            (Tier.HOST, cost.in_host, plan.kv_host_nbytes, None),
            (Tier.NVME, cost.on_disk, plan.kv_nvme_nbytes, landing),
        )
        elsewhere = {
            tier: _Store(nbytes // max(each.block_nbytes, 1) * each.block_nbytes, each, most_blocks=most)
            for tier, each, nbytes, most in beside
        }
        num_blocks = sum(nbytes // max(each.block_nbytes, 1) for _, each, nbytes, _ in beside)
        mean = sum(map(cost.in_host.blocks_of, lengths)) / len(lengths)
        self._besides = cost.besides(plan.kv_nbytes, lengths, num_elsewhere=int(num_blocks / max(mean, 1)))
        if not cost.windows and cost.block_nbytes:  # what no whole block fits in serves sequences too
            self._besides += (plan.kv_nbytes - self._besides) % cost.block_nbytes
        self._stores = {Tier.DEVICE: _Store(plan.kv_nbytes - self._besides, cost), **elsewhere}
        self._homes: dict[Hashable, Tier] = {}

    def prepare(self, lengths: Items[int], *, least: Items[int]) -> None:
        pass

    def _find(self, num_tokens: int, most: int) -> Tier | None:
        if (len(self._homes) + 1) * self._cost.sequence_nbytes > self._besides:
            return None
        for tier, store in self._stores.items():
            could = self._cost.of(most) <= self._limit if tier is Tier.DEVICE else store.could_hold(most)
            if could and store.fits(num_tokens):
                return tier
        return None

    def fits(self, num_tokens: int, *, most: int) -> bool:
        return self._find(num_tokens, most) is not None

    def check(self, num_tokens: int, what: str) -> None:
        if not any(self._stores[tier].could_hold(num_tokens) for tier in (Tier.HOST, Tier.NVME)):
            self._cost.check(self._limit, num_tokens, what)

    def acquire(self, sequence: Hashable, *, num_tokens: int, most: int) -> None:
        home = self._find(num_tokens, most)
        assert home is not None, "sequences start only when they fit"
        self._stores[home].acquire(sequence, num_tokens=num_tokens)
        self._homes[sequence] = home

    def extend(self, sequence: Hashable, *, num_tokens: int) -> bool:
        return self._stores[self._homes[sequence]].extend(sequence, num_tokens=num_tokens)

    def home_of(self, sequence: Hashable) -> Tier:
        return self._homes[sequence]

    def release(self, sequence: Hashable) -> None:
        self._stores[self._homes.pop(sequence)].release(sequence)


class KnownPasses:
    """The passes of the last few runs that were looked at."""

    def __init__(self) -> None:
        self._runs: OrderedDict[Hashable, tuple[Step, ...]] = OrderedDict()

    def of(
        self,
        plan: Plan,
        lengths: tuple[Length, ...],
        *,
        cost: KVCost,
        splits_prompts: bool,
        split_tokens: int | None,
        max_passes: int,
    ) -> tuple[Step, ...]:
        """Return what `passes_of` yields."""
        room = (plan.kv_nbytes, plan.kv_host_nbytes, plan.kv_nvme_nbytes, plan.kv_landing_nbytes)
        sizes = (plan.micro_batch_tokens, plan.pass_tokens, split_tokens, splits_prompts, max_passes)
        key = (room, sizes, cost, lengths)
        if key not in self._runs:
            made = passes_of(
                plan,
                lengths,
                cost=cost,
                splits_prompts=splits_prompts,
                split_tokens=split_tokens,
                max_passes=max_passes,
            )
            self._runs[key] = tuple(made)
        self._runs.move_to_end(key)
        while len(self._runs) > _MOST_RUNS:
            self._runs.popitem(last=False)
        return self._runs[key]


def passes_of(
    plan: Plan,
    lengths: Items[Length],
    *,
    cost: KVCost,
    splits_prompts: bool,
    split_tokens: int | None,
    max_passes: int,
) -> Iterator[Step]:
    """Yield the passes of a run over requests of these lengths, in this order, until there are `max_passes`.

    Raises BudgetError for a request that can never run.
    """
    room = _Homes(plan, cost, [length.prompt + length.generated for length in lengths])
    scheduler = Scheduler(
        room,
        micro_batch_tokens=plan.micro_batch_tokens,
        pass_tokens=plan.pass_tokens,
        splits_prompts=splits_prompts,
        split_tokens=split_tokens,
    )
    scheduler.feed(_sequences(lengths))
    made = 0
    while made < max_passes:
        schedule = scheduler.schedule()
        if not schedule.micro_batches:
            return
        running = len(scheduler.running)
        ready = scheduler.computed(schedule)
        homes = _by_home(room, schedule.micro_batches)
        ended = _append(scheduler, ready, 1)
        count, last, later = 0, None, 0
        if len(ready) == len(scheduler.running) == schedule.num_tokens:
            count = _alike(scheduler)
        if count:
            spans = [[Span(one.sequence, one.start + count, 1) for one in batch] for batch in schedule.micro_batches]
            last = _by_home(room, spans)
            later = _append(scheduler, scheduler.running, count)
        yield Step(homes, len(ready), running, ended, count, last, later)
        made += 1 + count


def _sequences(lengths: Iterable[Length]) -> Iterator[Sequence]:
    params = SamplingParams(ignore_eos=True)  # their lengths are known
    for number, length in enumerate(lengths):
        yield Sequence(number, None, (0,) * length.prompt, params, length.prompt + length.generated)


def _alike(scheduler: Scheduler) -> int:
    """Return how many passes differ in the length of what they attend to only, until the next sequence finishes."""
    return max(min(sequence.capacity - sequence.num_tokens for sequence in scheduler.running) - 1, 0)


def _append(scheduler: Scheduler, sequences: Iterable[Sequence], count: int) -> int:
    """Give sequences so many tokens; return how many have ended."""
    ended = 0
    for sequence in sequences:
        sequence.output_ids += [0] * count
        num_tokens = sequence.num_tokens
        sequence.num_computed = num_tokens - 1
        if num_tokens == sequence.capacity:
            scheduler.finish(sequence)
            ended += 1
    return ended


def _by_home(room: _Homes, batches: Batches) -> dict[Tier, list[Items[Span]]]:
    homes: dict[Tier, list[Items[Span]]] = {tier: [] for tier in Tier}
    for batch in batches:
        homes[room.home_of(batch[0].sequence)].append(batch)
    return homes
