"""Choose the plan under which a run ends soonest: plans are made, forecast and compared; nothing is allocated.

What there is to choose: how many layers stay on the device, which leaves less room for keys and values and so fewer
sequences at work, and how many tokens go through a layer in one call and in one pass, which need room too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from penstock.engine.flops import ModelFlops
from penstock.engine.forecast import Forecast, Length, forecast
from penstock.errors import BudgetError
from penstock.offload.cost import Machine
from penstock.offload.plan import ModelShape, PassLimits, Plan, make_plan
from penstock.offload.tiers import MemoryTiers

__all__ = ["Choice", "choose_plan"]

MAX_REQUESTS = 1024
MAX_PASSES = 256
"""How much of a run is forecast to compare plans."""


_LEAST_GAIN = 1.005
"""A plan must be this much better to take another's place: the first one tried is the usual one."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The plan that was chosen, what is expected of it, and how many were compared."""

    plan: Plan
    forecast: Forecast
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
) -> Choice:
    """Return the best plan that was found for requests of these lengths, starting from the usual one within `limits`.

    Fields of `limits` that are named in `fixed` stay. Raises BudgetError when nothing fits, ProfileError when a
    rate that it depends on is not known.
    """
    sample = lengths[:: -(-len(lengths) // MAX_REQUESTS)]
    share = len(lengths) / len(sample)
    known: dict[PassLimits, Choice | None] = {}

    def look(candidate: PassLimits) -> Choice | None:
        if candidate not in known:
            known[candidate] = None
            try:
                plan = make_plan(shape, tiers, candidate)
                found = forecast(
                    plan,
                    machine,
                    model,
                    sample,
                    cost=shape.kv_cost,
                    splits_prompts=splits_prompts,
                    max_passes=MAX_PASSES,
                )
            except BudgetError:
                if candidate == limits:
                    raise
            else:
                known[candidate] = Choice(plan, found, len(known))
        return known[candidate]

    best, at = look(limits), limits
    assert best is not None
    improved = True
    while improved:
        improved = False
        for candidate in _neighbours(at, len(shape.layer_nbytes), fixed):
            other = look(candidate)
            if other and best.forecast.seconds > _LEAST_GAIN * other.forecast.seconds:
                best, at, improved = other, candidate, True
    return replace(best, forecast=best.forecast.scaled(share), num_compared=len(known))


def _neighbours(at: PassLimits, num_layers: int, fixed: Collection[str]) -> Iterator[PassLimits]:
    """Yield limits that differ in one thing, in large steps and small ones."""
    if "device_layers" not in fixed:
        step = max(num_layers // 2, 1)
        here = at.device_layers or 0
        while step:
            for count in {here - step, here, here + step} & set(range(num_layers + 1)):
                yield replace(at, device_layers=count)
            step //= 2
    if "pass_tokens" not in fixed:
        for factor in (0.25, 0.5, 2, 4):
            yield replace(at, pass_tokens=max(int(at.pass_tokens * factor), at.micro_batch_tokens))
    if "micro_batch_tokens" not in fixed:
        for factor in (2, 4):  # smaller ones are worse than arithmetic and bytes can tell
            yield replace(at, micro_batch_tokens=min(at.micro_batch_tokens * factor, at.pass_tokens))
