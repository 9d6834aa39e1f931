"""Choose the plan under which a run ends soonest: plans are made, forecast and compared; nothing is allocated.

What there is to choose: how many layers stay on the device, which leaves less room for keys and values and so fewer
sequences at work, and how many tokens go through a layer in one call and in one pass, which need room too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from penstock.engine.flops import ModelFlops
from penstock.engine.forecast import Forecast, Length, forecast
from penstock.errors import BudgetError
from penstock.offload.blocks import BLOCK_TOKENS, KVCost
from penstock.offload.cost import Machine
from penstock.offload.plan import ModelShape, PassLimits, Plan, make_plan
from penstock.offload.tiers import MemoryTiers, Tier

__all__ = ["LIMITS", "Choice", "Objective", "choose_plan"]

LIMITS = {"cpu": PassLimits(2, 512, 4096), "cuda": PassLimits(3, 2048, 16384)}
"""Where planning starts, by device."""

USUAL_SLOTS = 3

Objective = Literal["throughput", "latency"]

MAX_REQUESTS = 1024
MAX_PASSES = 256
"""How much of a run is forecast to compare plans."""


_LEAST_GAIN = 1.005
"""A plan must be this much better to take another's place: the first one tried is the usual one."""

_FEW_SLOTS = 1.01
"""What a plan with fewer slots than usual must be better by: they make up for late layers, which no forecast sees."""


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
) -> Choice:
    """Return the best plan that was found for requests of these lengths, starting from the usual one within `limits`.

    For "throughput" the whole run ends soonest, for "latency" a request does, on average. Fields of `limits` that are
    named in `fixed` stay. A model that fits the device is not streamed, unless `device_layers` is fixed. The search
    goes on from the best plan of a round as long as that is a better one, `max_rounds` times at most. Raises
    BudgetError when nothing fits, ProfileError when a rate that it depends on is not known.
    """
    cost = KVCost(shape.kv_token_nbytes, shape.kv_sequence_nbytes, BLOCK_TOKENS)
    sample = lengths[:: -(-len(lengths) // MAX_REQUESTS)]
    share = len(lengths) / len(sample)
    known: dict[PassLimits, Choice | BudgetError] = {}

    def look(candidate: PassLimits) -> Choice | BudgetError:
        if candidate not in known:
            try:
                plan = make_plan(shape, tiers, candidate)
                found = forecast(
                    plan, machine, model, sample, cost=cost, splits_prompts=splits_prompts, max_passes=MAX_PASSES
                )
                known[candidate] = Choice(plan, found, candidate, len(known))
            except BudgetError as error:
                known[candidate] = error
        return known[candidate]

    num_layers = len(shape.layer_nbytes)
    best = _first_that_fits(look, limits, num_layers, fixed)
    free = {"device_layers", "pass_tokens", "micro_batch_tokens"} - set(fixed)
    if not best.plan.num_slots:
        free -= {"device_layers"}
    if "device_layers" in free:
        needed = sum(cost.of(length.prompt + length.generated) for length in sample)
        made = map(look, _waves(best, look, needed, max(shape.layer_nbytes)))
        best = min((best, *(one for one in made if isinstance(one, Choice))), key=lambda one: _value(one, objective))
    rounds, improved = 0, True
    while improved and rounds != max_rounds:
        rounds, improved = rounds + 1, False
        for candidate in _neighbours(best, free):
            other = look(candidate)
            if isinstance(other, Choice) and _value(best, objective) > _LEAST_GAIN * _value(other, objective):
                best, improved = other, True
    return replace(best, forecast=best.forecast.scaled(share), num_compared=len(known))


def _first_that_fits(
    look: Callable[[PassLimits], Choice | BudgetError], limits: PassLimits, num_layers: int, fixed: Collection[str]
) -> Choice:
    """Return the usual plan, or else one that leaves all room to keys and values. Raises what the usual one lacks."""
    tried = [limits]
    if "device_layers" not in fixed:
        tried.append(replace(limits, device_layers=0))
        tried.append(replace(limits, device_layers=0, num_slots=1))
    if not {"pass_tokens", "micro_batch_tokens"} & set(fixed):
        tried += [replace(each, pass_tokens=256, micro_batch_tokens=256) for each in tried]
    found = next((made for made in map(look, tried) if isinstance(made, Choice)), None)
    if found is None:
        refused = look(limits)
        assert isinstance(refused, BudgetError)
        raise refused
    if "device_layers" not in fixed and found.plan.num_slots:
        whole = look(replace(found.limits, device_layers=num_layers))
        if isinstance(whole, Choice) and not whole.plan.num_slots:
            return whole
    return found


def _waves(
    usual: Choice, look: Callable[[PassLimits], Choice | BudgetError], needed_nbytes: int, layer_nbytes: int
) -> Iterator[PassLimits]:
    """Yield limits that leave room for all requests at once, for a half, a third or a quarter of them, the rest to layers.

    Between these, room for a few requests more or less changes nothing.
    """
    roomy = look(replace(usual.limits, device_layers=0))
    if isinstance(roomy, Choice):
        for waves in range(1, 5):
            count = int(roomy.plan.kv_nbytes - needed_nbytes / waves) // layer_nbytes
            if count > 0:
                yield replace(usual.limits, device_layers=min(count, len(usual.plan.tiers)))


def _value(choice: Choice, objective: Objective) -> float:
    seconds = choice.forecast.seconds if objective == "throughput" else choice.forecast.mean_seconds
    return seconds * _FEW_SLOTS if 0 < choice.plan.num_slots < USUAL_SLOTS else seconds


def _neighbours(best: Choice, free: Collection[str]) -> Iterator[PassLimits]:
    """Yield limits that differ in one thing, in large steps and small ones, or in two by a small step."""
    at, num_layers = best.limits, len(best.plan.tiers)
    if "device_layers" in free:
        step = max(num_layers // 2, 1)
        here = len(best.plan.layers_in(Tier.DEVICE))
        while step:
            for count in {here - step, here, here + step} & set(range(num_layers + 1)):
                yield replace(at, device_layers=count)
            step //= 2
        if "pass_tokens" in free:  # the workspace of fewer tokens may be just what one layer more needs
            for count in {here - 1, here + 1} & set(range(num_layers + 1)):
                for factor in (0.5, 2):
                    tokens = max(int(at.pass_tokens * factor), at.micro_batch_tokens)
                    yield replace(at, device_layers=count, pass_tokens=tokens)
    if "device_layers" in free:
        for count in {best.plan.num_slots - 1, best.plan.num_slots + 1} & set(range(2, USUAL_SLOTS + 1)):
            yield replace(at, num_slots=count)
            layers = len(best.plan.layers_in(Tier.DEVICE)) + best.plan.num_slots - count
            yield replace(at, num_slots=count, device_layers=min(max(layers, 0), num_layers))
    if "pass_tokens" in free:
        for factor in (0.25, 0.5, 2, 4):
            yield replace(at, pass_tokens=max(int(at.pass_tokens * factor), at.micro_batch_tokens))
    if "micro_batch_tokens" in free:
        for factor in (2, 4):  # smaller ones are worse than arithmetic and bytes can tell
            yield replace(at, micro_batch_tokens=min(at.micro_batch_tokens * factor, at.pass_tokens))
