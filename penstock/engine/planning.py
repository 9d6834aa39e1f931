"""The plan of a run: the best by forecast where the machine was measured and the work is known, else the usual one."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from penstock.engine.flops import ModelFlops
from penstock.engine.forecast import Forecast, Length
from penstock.engine.planner import Objective, choose_plan
from penstock.errors import BudgetError, ProfileError
from penstock.offload.cost import Machine
from penstock.offload.hardware import HardwareProfile, profile_path
from penstock.offload.plan import ModelShape, PassLimits, Plan, make_plan
from penstock.offload.tiers import MemoryTiers

__all__ = ["USUAL_WORK", "kept_profile", "plan_run"]

USUAL_WORK = (Length(512, 128),) * 64
"""What is planned for when a run does not say what will come."""

logger = logging.getLogger("penstock.engine")


def plan_run(
    shape: ModelShape,
    tiers: MemoryTiers,
    limits: PassLimits,
    *,
    machine: Machine | None,
    flops: ModelFlops | None,
    expects: Sequence[Length],
    fixed: Collection[str],
    splits_prompts: bool,
    objective: Objective,
) -> tuple[Plan, Forecast | None, str]:
    """Return the plan, what is forecast of it, and why there is no forecast or how many plans were compared.

    Raises BudgetError where not even the usual plan fits.
    """
    reason = _obstacle(machine, flops, expects)
    if machine is not None and flops is not None and expects:
        try:
            choice = choose_plan(
                shape,
                tiers,
                limits,
                machine=machine,
                model=flops,
                lengths=expects,
                fixed=fixed,
                splits_prompts=splits_prompts,
                objective=objective,
            )
        except (BudgetError, ProfileError) as error:  # a request that does not fit is refused when its turn comes
            reason = f"no forecast: {error}"
        else:
            logger.info("the best of %d plans: %s", choice.num_compared, choice.forecast.explain())
            return choice.plan, choice.forecast, f"the best of {choice.num_compared} plans"
    logger.info("planned as usual, %s", reason)
    return make_plan(shape, tiers, limits), None, reason


def kept_profile() -> HardwareProfile | None:
    """Return what `penstock profile` has kept of this machine, if it has; one of no use is said and left alone."""
    path = profile_path(None)
    if not path.exists():
        return None
    try:
        return HardwareProfile.load(path)
    except ProfileError as error:
        logger.warning("the profile of this machine is not used: %s", error)
        return None


def _obstacle(machine: Machine | None, flops: ModelFlops | None, expects: Sequence[Length]) -> str:
    if machine is None:
        return "no forecast: `penstock profile` has not measured this machine"
    if not expects:
        return "no forecast: how many requests come, and how long they are, is not known"
    return "no forecast: which experts a token meets is not known" if flops is None else ""
