"""A run before it runs: the real scheduler makes its passes, and the cost of each is added up instead of computed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from penstock.engine.batch import Span
from penstock.engine.flops import ModelFlops
from penstock.engine.sampling_params import SamplingParams
from penstock.engine.scheduler import Scheduler
from penstock.engine.sequence import Sequence
from penstock.offload.blocks import KVCost
from penstock.offload.cost import ISSUING, PACKED_ROWS, Machine, PassCost, pass_cost
from penstock.offload.plan import Plan
from penstock.offload.tiers import Tier

__all__ = ["Forecast", "Length", "expected_length", "forecast"]

Batches = Items[Items[Span]]

MAX_PASSES = 2000
"""Passes that are made one by one; what is left then goes on at the pace of the last half of them."""


@dataclass(frozen=True, slots=True)
class Length:
    """Tokens of one request: of its prompt, and to be generated."""

    prompt: int
    generated: int


def expected_length(prompt: Any, params: SamplingParams) -> Length:
    """Guess a request's length before there is a tokenizer: tokens as they are, 4 characters of text for one."""
    num_tokens = len(prompt) if isinstance(prompt, Items) and not isinstance(prompt, str) else 0
    if isinstance(prompt, str) or (num_tokens and not isinstance(prompt[0], int)):
        num_tokens = -(-len(str(prompt)) // 4)
    return Length(max(num_tokens, 1), params.max_tokens)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run will take. `busy_seconds` is each resource's, `waits_for` the share of time that it sets the pace.

    `mean_seconds` is when a request ends, on average, from the start of the run.
    """

    seconds: float
    passes: int
    generated_tokens: int
    peak_sequences: int
    busy_seconds: dict[str, float]
    waits_for: dict[str, float]
    mean_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of the whole run."""
        return self.generated_tokens / self.seconds

    @property
    def bottleneck(self) -> str:
        """The resource that sets the pace for most of the time."""
        return max(self.waits_for, key=lambda name: self.waits_for[name])

    def explain(self) -> str:
        """Say it in one line."""
        return (
            f"forecast {self.tokens_per_second:.1f} tokens/s in {self.passes} passes, {self.seconds:.1f} s, up to "
            f"{self.peak_sequences} sequences at once; the pace is set by {self.bottleneck.replace('_', ' ')}"
        )

    def scaled(self, factor: float) -> Forecast:
        """Return the forecast of a run that is so many times as long."""
        return replace(
            self,
            seconds=self.seconds * factor,
            passes=round(self.passes * factor),
            generated_tokens=round(self.generated_tokens * factor),
            mean_seconds=self.mean_seconds * factor,
            busy_seconds={name: seconds * factor for name, seconds in self.busy_seconds.items()},
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the forecast for JSON."""
        return {
            "seconds": self.seconds,
            "passes": self.passes,
            "generated_tokens": self.generated_tokens,
            "tokens_per_second": self.tokens_per_second,
            "mean_seconds": self.mean_seconds,
            "peak_sequences": self.peak_sequences,
            "busy_seconds": self.busy_seconds,
            "waits_for": self.waits_for,
            "bottleneck": self.bottleneck,
        }


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


def forecast(
    plan: Plan,
    machine: Machine,
    model: ModelFlops,
    lengths: Iterable[Length],
    *,
    cost: KVCost,
    splits_prompts: bool = True,
    max_passes: int = MAX_PASSES,
) -> Forecast:
    """Return what a run over requests of these lengths, in this order, will take.

    Raises ProfileError for a rate that is not known, BudgetError for a request that can never run.
    """
    every = list(lengths)
    room = _Homes(plan, cost, [length.prompt + length.generated for length in every])
    scheduler = Scheduler(
        room,
        micro_batch_tokens=plan.micro_batch_tokens,
        pass_tokens=plan.pass_tokens,
        splits_prompts=splits_prompts,
        split_tokens=None if machine.on_cpu else plan.split_tokens(cost.token_nbytes),
    )
    scheduler.feed(_sequences(every))
    return _Tally(every, room, _Costs(plan, machine, model, cost)).run(scheduler, max_passes)


def _sequences(lengths: list[Length]) -> Iterator[Sequence]:
    params = SamplingParams(ignore_eos=True)  # their lengths are known
    for number, length in enumerate(lengths):
        yield Sequence(number, None, (0,) * length.prompt, params, length.prompt + length.generated)


@dataclass(frozen=True, slots=True)
class _Costs:
    """What passes cost."""

    plan: Plan
    machine: Machine
    model: ModelFlops
    kept: KVCost

    def of(self, device: Batches, in_host: Batches, on_disk: Batches, *, rows: int) -> PassCost:
        """Return the cost of a pass over micro-batches of each home, of which `rows` tokens go through the head."""
        hosted = [*in_host, *on_disk]
        batches = [*device, *hosted]
        flops = self.model.of(chain.from_iterable(batches), rows=rows)
        weights = sum(self.model.weights_read(sum(span.length for span in batch)) for batch in batches)
        layers = self._layers(batches)
        if layers:
            weights, flops = 0, flops - self.model.per_token * sum(span.length for batch in batches for span in batch)
        packed = self._reads_packed(batches)
        if packed:
            weights *= 1 - self.plan.device_share
        there = [span for span in chain.from_iterable(hosted) if span.length > 1 or self.plan.kv_dtype == "int4"]
        return pass_cost(
            self.plan,
            self.machine,
            flops=flops,
            layers_seconds=layers,
            weight_nbytes=weights + self._seen(chain.from_iterable(device)),
            num_calls=0 if self.recording(device, hosted) else len(batches) * len(self.plan.tiers),
            num_packed=packed,
            num_parked=sum(any(span.length == 1 for span in batch) for batch in hosted),
            host_kv_nbytes=0 if self.plan.kv_dtype == "int4" else self._seen(chain.from_iterable(hosted)),
            copied_kv_nbytes=sum(span.start for span in there) * self.kept.token_nbytes,
            stored_kv_nbytes=sum(span.length for span in chain.from_iterable(in_host)) * self.kept.token_nbytes,
            disk_kv_nbytes=self._on_disk(chain.from_iterable(on_disk)),
        )

    def _reads_packed(self, batches: Batches) -> int:
        """Return how often a pass reads the packed weights that rest on the device, 0 where it expands them."""
        sizes = [sum(span.length for span in batch) for batch in batches]
        packed = sum(sizes) <= self.plan.packed_tokens
        return sum(-(-size // PACKED_ROWS) for size in sizes) if packed else 0

    def recording(self, device: Batches, hosted: Batches) -> tuple[int, int] | None:
        """Return what a pass is recorded for where a GPU plays it by itself (`engine/recorder.py`), else None.

        Whether a model lets itself be recorded shows when it runs; most do, but those with windows or experts may not.
        """
        if self.machine.on_cpu or hosted or len(device) != 1 or self.kept.windows or self.model.expert_nbytes:
            return None
        (batch,) = device
        if any(span.length > 1 for span in batch):
            return None
        return self.plan.recording(len(batch), max(span.end for span in batch))

    def making(self) -> float:
        """Seconds that a recording takes at first: it is issued twice, once to run and once to be recorded."""
        return 2 * len(self.plan.tiers) * self.machine.call_seconds

    def _layers(self, batches: Batches) -> float:
        """Return what the layers take for all micro-batches, where that has been measured; else 0."""
        times = self.machine.layer_times
        if times is None:
            return 0.0
        sizes = ((sum(span.length for span in batch), all(span.length == 1 for span in batch)) for batch in batches)
        return len(self.plan.tiers) * sum(times.of(size, single=single) for size, single in sizes)

    def _on_disk(self, spans: Iterable[Span]) -> float:
        """Bytes that are read of tokens that were there before, and written of new ones, in whole blocks."""
        seen = ((span.end if span.length == 1 else span.start, span.length) for span in spans)
        whole = self.kept.on_disk
        padded = whole.token_nbytes / max(self.kept.token_nbytes, 1)
        return sum(padded * self.kept.seen_nbytes(known) + whole.of(new) for known, new in seen)

    def _seen(self, spans: Iterable[Span]) -> int:
        """Bytes of keys and values that single tokens read; prompts have theirs at hand."""
        ends = [span.end for span in spans if span.length == 1]
        return sum(map(self.kept.seen_nbytes, ends)) if self.kept.windows else sum(ends) * self.kept.token_nbytes


class _Tally:
    """Adds up passes."""

    def __init__(self, lengths: list[Length], room: _Homes, costs: _Costs) -> None:
        self._total = sum(length.generated for length in lengths)
        self._num_requests = len(lengths)
        self._room = room
        self._costs = costs
        self._seconds = [0.0]
        self._generated = [0]
        self._busy: dict[str, float] = {}
        self._waits: dict[str, float] = {}
        self._peak = 0
        self._ended = 0
        self._ended_seconds = 0.0
        self._recordings: set[tuple[int, int]] = set()

    def run(self, scheduler: Scheduler, max_passes: int) -> Forecast:
        while len(self._seconds) <= max_passes:
            schedule = scheduler.schedule()
            if not schedule.micro_batches:
                break
            self._peak = max(self._peak, len(scheduler.running))
            ready = scheduler.computed(schedule)
            homes = self._by_home(schedule.micro_batches)
            cost = self._cost_of(homes, rows=len(ready))
            self._add(cost, generated=len(ready))
            self._record(homes)
            self._append(scheduler, ready, 1)
            if len(ready) == len(scheduler.running) == schedule.num_tokens:
                self._skip(scheduler, schedule.micro_batches, cost)
        return self._forecast()

    def _append(self, scheduler: Scheduler, sequences: Iterable[Sequence], count: int) -> None:
        for sequence in sequences:
            sequence.output_ids += [0] * count
            num_tokens = sequence.num_tokens
            sequence.num_computed = num_tokens - 1
            if num_tokens == sequence.capacity:
                scheduler.finish(sequence)
                self._ended += 1
                self._ended_seconds += self._seconds[-1]

    def _skip(self, scheduler: Scheduler, batches: Batches, cost: PassCost) -> None:
        """Until the next sequence finishes, passes differ from this one in the length of what they attend to only."""
        count = min(sequence.capacity - sequence.num_tokens for sequence in scheduler.running) - 1
        if count > 0:
            later = [[Span(span.sequence, span.start + count, 1) for span in batch] for batch in batches]
            rows = len(scheduler.running)
            last = self._cost_of(self._by_home(later), rows=rows)
            for number in range(1, count + 1):
                self._add(cost.towards(last, number / count), generated=rows)
            self._append(scheduler, scheduler.running, count)

    def _cost_of(self, homes: Mapping[Tier, Batches], *, rows: int) -> PassCost:
        return self._costs.of(homes[Tier.DEVICE], homes[Tier.HOST], homes[Tier.NVME], rows=rows)

    def _by_home(self, batches: Batches) -> dict[Tier, list[Items[Span]]]:
        homes: dict[Tier, list[Items[Span]]] = {tier: [] for tier in Tier}
        for batch in batches:
            homes[self._room.home_of(batch[0].sequence)].append(batch)
        return homes

    def _record(self, homes: Mapping[Tier, Batches]) -> None:
        """Add what it takes to make a recording, if the pass is the first that one is made for."""
        found = self._costs.recording(homes[Tier.DEVICE], [*homes[Tier.HOST], *homes[Tier.NVME]])
        if found is not None and found not in self._recordings:
            self._recordings.add(found)
            seconds = self._costs.making()
            self._seconds[-1] += seconds
            for sums in (self._busy, self._waits):
                sums[ISSUING] = sums.get(ISSUING, 0.0) + seconds

    def _add(self, cost: PassCost, *, generated: int) -> None:
        self._seconds.append(self._seconds[-1] + cost.seconds)
        self._generated.append(self._generated[-1] + generated)
        for name, seconds in cost.busy.items():
            self._busy[name] = self._busy.get(name, 0.0) + seconds
        self._waits[cost.bottleneck] = self._waits.get(cost.bottleneck, 0.0) + cost.seconds

    def _forecast(self) -> Forecast:
        """Return the sums; what was left out goes on at the pace of the last half."""
        passes, seconds, generated = len(self._seconds) - 1, self._seconds[-1], self._generated[-1]
        grow = 1.0
        if left := self._total - generated:
            half = passes // 2
            pace = (generated - self._generated[half]) / (seconds - self._seconds[half])
            grow = 1 + left / pace / seconds
        going_on = (self._num_requests - self._ended) * seconds * (1 + grow) / 2
        return Forecast(
            seconds=seconds * grow,
            passes=round(passes * grow),
            generated_tokens=self._total,
            peak_sequences=self._peak,
            busy_seconds={name: busy * grow for name, busy in self._busy.items()},
            waits_for={name: waited / seconds for name, waited in self._waits.items()},
            mean_seconds=(self._ended_seconds + going_on) / self._num_requests,
        )
