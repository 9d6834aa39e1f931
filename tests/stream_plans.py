"""Plans for tests of the weight stream alone: tiers and slots, and nothing of what else a plan says."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.engine.model.build import StreamedModel
from penstock.offload.plan import Plan
from penstock.offload.tiers import Tier

__all__ = ["stream_plan"]


def stream_plan(model: StreamedModel, tiers: Sequence[Tier], num_slots: int, *, packed: bool = False) -> Plan:
    """Return a plan with each layer in its tier; `packed` says how those on the device are there."""
    layouts = model.layer_layouts
    return Plan(
        tiers=tuple(tiers),
        num_slots=num_slots,
        slot_nbytes=max(layout.nbytes for layout in layouts) if num_slots else 0,
        micro_batch_tokens=1,
        pass_tokens=1,
        max_scores=1,
        resident_nbytes=model.resident.nbytes,
        workspace_nbytes=0,
        kv_nbytes=0,
        device_layer_nbytes=0,
        host_nbytes=sum(layouts[index].wire_nbytes for index, tier in enumerate(tiers) if tier == Tier.HOST),
        nvme_nbytes=0,
        device_packed=packed,
    )
