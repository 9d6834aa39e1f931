"""Choose the plan under which a run ends soonest: plans are made, forecast and compared; nothing is allocated.

What there is to choose: how many layers stay on the device, which leaves less room for keys and values and so fewer
sequences at work; how many slots the others stream through; how many layers rest in host RAM, and how much of what they
leave there takes keys and values of further sequences, whose attention is computed there; and how many tokens go
through a layer in one call and in one pass, which need room too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from penstock.engine.flops import ModelFlops
from penstock.engine.forecast import Forecast, Length, forecast
from penstock.engine.passes import KnownPasses
from penstock.errors import BudgetError
from penstock.offload.cost import Machine, pass_cost
from penstock.offload.plan import ModelShape, PassLimits, Plan, make_plan
from penstock.offload.tiers import MemoryTiers, Tier

__all__ = ["LIMITS", "Choice", "Objective", "choose_plan"]

LIMITS = {"cpu": PassLimits(2, 512, 4096), "cuda": PassLimits(3, 2048, 16384)}
"""Where planning starts, by device."""

Objective = Literal["throughput", "latency"]

MAX_REQUESTS = 1024
MAX_PASSES = 256
"""How much of a run is forecast to compare plans."""

_LEAST_GAIN = 1.005
"""A plan must be this much better to take another's place: the first one tried is the usual one."""

_FEW_SLOTS = 1.01
"""What a plan with fewer slots than usual must be better by: they make up for late layers, which no forecast sees."""

_HOSTED = 1.01
"""What a plan with sequences at home in host RAM must be better by: micro-batches wait, which no forecast sees."""

_HOST_SHARES = (0.0, 0.25, 0.5, 1.0)

_MOST_WAVES = 4
_FEW_TOKENS = 256

_LARGE_TOKENS = 16384
"""Micro-batches need not be larger: reading the weights once for so many takes a percent of their arithmetic."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The plan that was chosen, its forecast, the limits that it was made within, and how many were compared."""

    plan: Plan
    forecast: Forecast
    limits: PassLimits
    num_compared: int


def choose_plan(
    shape: ModelShape,
    tiers: MemoryTiers,
    limits: PassLimits,
    *,
    machine: Machine,
    model: ModelFlops,
    lengths: Sequence[Length],
    fixed: Collection[str] = (),
    splits_prompts: bool = True,
    objective: Objective = "throughput",
    max_rounds: int | None = None,
    usual_slots: int | None = None,
    known: KnownPasses | None = None,
) -> Choice:
    """Return the best plan that was found for requests of these lengths, starting from the usual one within `limits`.

    For "throughput" the whole run ends soonest, for "latency" a request does, on average. Fields of `limits` that are
    named in `fixed` stay. A model that fits the device is not streamed, unless `device_layers` is fixed. The search
    goes on from the best plan of a round as long as that is a better one, `max_rounds` times at most. Fewer slots than
    the usual ones, those of `limits` unless said, must make it a percent better, and so must keys and values in host
    RAM, which are weighed where `tiers` leave them open and the rate of reading there is known. Passes that are `known`
    are not made again, and others are added. Raises BudgetError when nothing fits, ProfileError when a rate that it
    depends on is not known.
    """
    sample = lengths[:: -(-len(lengths) // MAX_REQUESTS)]
    search = _Search(
        shape,
        tiers,
        machine,
        model,
        sample,
        splits_prompts=splits_prompts,
        objective=objective,
        usual_slots=usual_slots or limits.num_slots,
        known=known or KnownPasses(),
    )
    free = {"device_layers", "pass_tokens", "micro_batch_tokens"} - set(fixed)
    if tiers.kv_host is None and machine.host_read is not None and shape.kv_token_nbytes:
        free |= {"kv_host_share"}
    best = search.first_that_fits(limits, free)
    if not best.plan.num_slots:
        free -= {"device_layers"}
    if "device_layers" in free:
        best = search.better(best, search.waves(best))
    rounds, before = 0, None
    while best != before and rounds != max_rounds:
        rounds, before = rounds + 1, best
        best = search.better(best, search.neighbours(best, free))
    whole = best.forecast.scaled(len(lengths) / len(sample))
    return replace(best, forecast=whole, num_compared=search.num_compared)


class _Search:
    """Plans that were looked at, and what they are worth: seconds, fewer are better."""

    def __init__(
        self,
        shape: ModelShape,
        tiers: MemoryTiers,
        machine: Machine,
        model: ModelFlops,
        lengths: Sequence[Length],
        *,
        splits_prompts: bool,
        objective: Objective,
        usual_slots: int,
        known: KnownPasses,
    ) -> None:
        self._shape = shape
        self._tiers = tiers
        self._machine = machine
        self._model = model
        self._lengths = tuple(lengths)
        self._passes = known
        self._splits_prompts = splits_prompts
        self._objective = objective
        self.usual_slots = usual_slots
        self._cost = shape.kv_cost
        sizes = [self._cost.of(length.prompt + length.generated) for length in lengths]
        self._smallest_nbytes, self._needed_nbytes = min(sizes), sum(sizes)
        self._least_tokens = min(length.prompt + length.generated for length in lengths)
        self._generated = sum(length.generated for length in lengths)
        self._known: dict[PassLimits, Choice | BudgetError] = {}
        self._forecasts: dict[Plan, Forecast] = {}

    @property
    def num_compared(self) -> int:
        """How many plans were looked at."""
        return len(self._known)

    def look(self, limits: PassLimits, than: Choice | None = None) -> Choice | BudgetError | None:
        """Return the plan within limits and its forecast, or why there is none; None if it cannot be better `than`."""
        if limits not in self._known:
            try:
                plan = make_plan(self._shape, self._tiers, limits)
                if than is not None and self._least_seconds(plan) > self.value(than):
                    return None
                self._known[limits] = Choice(plan, self._forecast(plan), limits, 0)
            except BudgetError as error:
                self._known[limits] = error
        return self._known[limits]

    def _forecast(self, plan: Plan) -> Forecast:
        """Return a plan's forecast, which is made once: other limits often come to the same plan."""
        if plan not in self._forecasts:
            self._forecasts[plan] = forecast(
                plan,
                self._machine,
                self._model,
                self._lengths,
                cost=self._cost,
                splits_prompts=self._splits_prompts,
                max_passes=MAX_PASSES,
                known=self._passes,
            )
        return self._forecasts[plan]

    def _least_seconds(self, plan: Plan) -> float:
        """Return what the links take at least, when as many sequences as ever fit get a token in every pass."""
        if self._objective == "latency":
            return 0.0
        at_once = plan.kv_nbytes // max(self._smallest_nbytes, 1)
        at_once += (plan.kv_host_nbytes + plan.kv_nvme_nbytes) // max(self._hosted_nbytes, 1)
        at_once = max(min(at_once, len(self._lengths)), 1)
        return self._generated / at_once * pass_cost(plan, self._machine, flops=0, weight_nbytes=0).seconds

    def value(self, choice: Choice) -> float:
        """Return what a plan is worth."""
        found = choice.forecast
        seconds = found.seconds if self._objective == "throughput" else found.mean_seconds
        seconds *= _FEW_SLOTS if 0 < choice.plan.num_slots < self.usual_slots else 1.0
        return seconds * _HOSTED if choice.plan.kv_host_nbytes and self._tiers.kv_host is None else seconds

    @property
    def _hosted_nbytes(self) -> int:
        """What the shortest request takes of host RAM: less than that is of no use to keys and values."""
        return self._least_tokens * self._shape.kv_token_nbytes

    def better(self, best: Choice, candidates: Iterator[PassLimits]) -> Choice:
        """Return the best of them all; the first one stays unless another is better by more than a little."""
        for candidate in candidates:
            other = self.look(candidate, than=best)
            if isinstance(other, Choice) and self.value(best) > _LEAST_GAIN * self.value(other):
                best = other
        return best

    def first_that_fits(self, limits: PassLimits, free: Collection[str]) -> Choice:
        """Return the usual plan, or one that leaves more to keys and values; if it can be, one that streams nothing.

        Raises the error of the usual one when none fits.
        """
        tried = [limits]
        if "device_layers" in free:
            tried += [replace(limits, device_layers=0), replace(limits, device_layers=0, num_slots=1)]
        if {"pass_tokens", "micro_batch_tokens"} <= set(free):
            tried += [replace(each, pass_tokens=_FEW_TOKENS, micro_batch_tokens=_FEW_TOKENS) for each in tried]
        if "kv_host_share" in free:
            tried += [replace(each, kv_host_share=1.0) for each in tried]
        found = next((made for made in map(self.look, tried) if isinstance(made, Choice)), None)
        if found is None:
            refused = self.look(limits)
            assert isinstance(refused, BudgetError)
            raise refused
        if "device_layers" in free and found.plan.num_slots:
            whole = self.look(replace(found.limits, device_layers=len(self._shape.layer_nbytes)))
            if isinstance(whole, Choice) and not whole.plan.num_slots:
                return whole
        return found

    def neighbours(self, best: Choice, free: Collection[str]) -> Iterator[PassLimits]:
        """Yield limits that differ in one thing or two from those of a plan.

        Keys and values stay on the device where all layers do: little would hide what attention in host RAM takes.
        """
        yield from _neighbours(best, free, self.usual_slots)
        left = (self._tiers.host or 0) - best.plan.host_nbytes - best.plan.kv_landing_nbytes
        if "kv_host_share" in free and best.plan.num_slots:
            for share in _HOST_SHARES:
                if not share or left * share >= self._hosted_nbytes:
                    yield replace(best.limits, kv_host_share=share)
            waiting = best.forecast.peak_sequences < len(self._lengths)
            for count in self._fewer_in_host(best.plan) if waiting else ():
                yield replace(best.limits, kv_host_share=1.0, host_layers=count)

    def _fewer_in_host(self, plan: Plan) -> list[int]:
        """Return numbers of layers in host RAM that leave keys and values more of it; others come from NVMe for that.

        A few less, half, none, and what leaves room for all requests at once, for a half, a third or a quarter of them.
        """
        here = len(plan.layers_in(Tier.HOST))
        needed = (self._needed_nbytes / number - plan.kv_nbytes for number in range(1, _MOST_WAVES + 1))
        roomy = (int(((self._tiers.host or 0) - each) // max(self._shape.wire_nbytes)) for each in needed)
        return sorted({0, here // 2, here - 1, *roomy} & set(range(here)))

    def waves(self, usual: Choice) -> Iterator[PassLimits]:
        """Yield limits that leave room for all requests at once, for a half, a third or a quarter of them.

        The rest goes to layers: between these, room for a few requests more or less changes nothing.
        """
        roomy = self.look(replace(usual.limits, device_layers=0))
        if isinstance(roomy, Choice):
            for number in range(1, _MOST_WAVES + 1):
                left = roomy.plan.kv_nbytes - self._needed_nbytes / number
                count = int(left) // max(self._shape.layer_nbytes)
                if count > 0:
                    yield replace(usual.limits, device_layers=min(count, len(usual.plan.tiers)))


def _neighbours(best: Choice, free: Collection[str], usual_slots: int) -> Iterator[PassLimits]:
    """Yield limits that differ in one thing, in large steps and small ones, or in two by a small step."""
    at = best.limits
    if "device_layers" in free:
        yield from _other_layers(best)
        yield from _other_slots(best, usual_slots)
    if {"device_layers", "pass_tokens"} <= set(free):  # fewer tokens' workspace may be just what one layer more needs
        here = len(best.plan.layers_in(Tier.DEVICE))
        for count in {here - 1, here + 1} & set(range(len(best.plan.tiers) + 1)):
            for factor in (0.5, 2):
                tokens = max(int(at.pass_tokens * factor), at.micro_batch_tokens)
                yield replace(at, device_layers=count, pass_tokens=tokens)
    if "pass_tokens" in free:
        for factor in (0.25, 0.5, 2, 4):
            yield replace(at, pass_tokens=max(int(at.pass_tokens * factor), at.micro_batch_tokens))
    if "micro_batch_tokens" in free:
        for factor in (2, 4):  # smaller ones are worse than arithmetic and bytes can tell
            tokens = min(at.micro_batch_tokens * factor, at.pass_tokens, _LARGE_TOKENS)
            yield replace(at, micro_batch_tokens=max(tokens, at.micro_batch_tokens))


def _other_layers(best: Choice) -> Iterator[PassLimits]:
    num_layers, here = len(best.plan.tiers), len(best.plan.layers_in(Tier.DEVICE))
    step = max(num_layers // 2, 1)
    while step:
        for count in {here - step, here, here + step} & set(range(num_layers + 1)):
            yield replace(best.limits, device_layers=count)
        step //= 2


def _other_slots(best: Choice, usual_slots: int) -> Iterator[PassLimits]:
    """Yield limits with a slot more or less, for room, or for a layer on the device."""
    slots, here = best.plan.num_slots, len(best.plan.layers_in(Tier.DEVICE))
    for count in {slots - 1, slots + 1} & set(range(2, usual_slots + 1)):
        yield replace(best.limits, num_slots=count)
        layers = min(max(here + slots - count, 0), len(best.plan.tiers))
        yield replace(best.limits, num_slots=count, device_layers=layers)
