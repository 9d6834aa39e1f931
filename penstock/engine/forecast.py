"""A run before it runs: the real scheduler makes its passes, and the cost of each is added up instead of computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from penstock.engine.batch import Span
from penstock.engine.flops import ModelFlops
from penstock.engine.passes import Batches, KnownPasses, Length, Step, passes_of
from penstock.engine.sampling_params import SamplingParams
from penstock.offload.blocks import KVCost
from penstock.offload.cost import ISSUING, PACKED_ROWS, Machine, PassCost, pass_cost
from penstock.offload.plan import Plan
from penstock.offload.tiers import Tier

__all__ = ["Forecast", "Length", "expected_length", "forecast"]

MAX_PASSES = 2000
"""Passes that are made one by one; what is left then goes on at the pace of the last half of them."""


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


def forecast(
    plan: Plan,
    machine: Machine,
    model: ModelFlops,
    lengths: Iterable[Length],
    *,
    cost: KVCost,
    splits_prompts: bool = True,
    max_passes: int = MAX_PASSES,
    known: KnownPasses | None = None,
) -> Forecast:
    """Return what a run over requests of these lengths, in this order, will take.

    Passes that are `known` are not made again. Raises ProfileError for a rate that is not known, BudgetError for a
    request that can never run.
    """
    every = tuple(lengths)
    split_tokens = None if machine.on_cpu else plan.split_tokens(cost.token_nbytes)
    passes = passes_of if known is None else known.of
    options: dict[str, Any] = {"splits_prompts": splits_prompts, "split_tokens": split_tokens, "max_passes": max_passes}
    return _Tally(every, _Costs(plan, machine, model, cost)).run(passes(plan, every, cost=cost, **options))


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

    def __init__(self, lengths: Items[Length], costs: _Costs) -> None:
        self._total = sum(length.generated for length in lengths)
        self._num_requests = len(lengths)
        self._costs = costs
        self._seconds = [0.0]
        self._generated = [0]
        self._busy: dict[str, float] = {}
        self._waits: dict[str, float] = {}
        self._peak = 0
        self._ended = 0
        self._ended_seconds = 0.0
        self._recordings: set[tuple[int, int]] = set()

    def run(self, steps: Iterable[Step]) -> Forecast:
        for step in steps:
            self._peak = max(self._peak, step.running)
            cost = self._cost_of(step.homes, rows=step.rows)
            self._add(cost, generated=step.rows)
            self._record(step.homes)
            self._end(step.ended)
            if step.last is not None:
                last = self._cost_of(step.last, rows=step.rows)
                self._add_alike(cost, last, step.count, generated=step.rows)
                self._end(step.ended_later)
        return self._forecast()

    def _end(self, count: int) -> None:
        self._ended += count
        self._ended_seconds += count * self._seconds[-1]

    def _cost_of(self, homes: Mapping[Tier, Batches], *, rows: int) -> PassCost:
        return self._costs.of(homes[Tier.DEVICE], homes[Tier.HOST], homes[Tier.NVME], rows=rows)

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
        self._sum_up(cost, 1)

    def _add_alike(self, first: PassCost, last: PassCost, count: int, *, generated: int) -> None:
        """Add passes whose cost goes evenly from the first's, which is not one of them, to the last's."""
        if first.bottleneck != last.bottleneck or not first.overlaps:
            for number in range(1, count + 1):
                self._add(first.towards(last, number / count), generated=generated)
            return
        step = (last.seconds - first.seconds) / count  # what sets the pace at both ends does so between them
        for number in range(1, count + 1):
            self._seconds.append(self._seconds[-1] + first.seconds + number * step)
            self._generated.append(self._generated[-1] + generated)
        self._sum_up(first.towards(last, (count + 1) / (2 * count)), count)

    def _sum_up(self, cost: PassCost, count: int) -> None:
        for name, seconds in cost.busy.items():
            self._busy[name] = self._busy.get(name, 0.0) + count * seconds
        self._waits[cost.bottleneck] = self._waits.get(cost.bottleneck, 0.0) + count * cost.seconds

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
