"""Plans of which a test cares for a few fields only."""

from dataclasses import fields
from typing import Any

from penstock.offload.plan import Plan

_USUAL: dict[str, Any] = {"tiers": (), "num_slots": 2, "micro_batch_tokens": 64, "pass_tokens": 256}


def make_plan_of(**values: Any) -> Plan:
    """Return a plan with these fields; sizes are 0 where nothing is said."""
    return Plan(**({field.name: 0 for field in fields(Plan)} | _USUAL | values))
