"""A plan for people and for JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from penstock.engine.anatomy import parameters_in
from penstock.engine.forecast import Forecast
from penstock.engine.planner import Choice
from penstock.engine.proposal import Nearest, Question, WhatIf
from penstock.errors import BudgetError
from penstock.offload.cost import HOST_ATTENTION
from penstock.offload.plan import Plan
from penstock.offload.tiers import MemoryTiers, Tier, format_size

__all__ = ["as_dict", "explain", "refusal", "refusal_as_dict"]

_BAR = 32
_NAMES = {HOST_ATTENTION: "attention in host RAM"}
"""What resources are called where underscores as spaces would not say it."""


def explain(question: Question, chosen: Choice, changes: list[WhatIf]) -> str:
    """Return the whole answer as text."""
    parts = [_title(question), _places(question, chosen.plan), _pass(chosen.forecast), _job(question, chosen)]
    return "\n\n".join([*parts, _changes(changes)])


def _title(question: Question) -> str:
    anatomy, hardware = question.anatomy, question.hardware
    units = (anatomy.resident, *anatomy.layers)
    number = parameters_in(units)
    stored = anatomy.resident.nbytes + sum(unit.wire_nbytes for unit in anatomy.layers)
    expert = anatomy.flops
    active = "" if not expert.expert_nbytes else f", of which a token meets {expert.per_token // 2:,} in the layers"
    quantised = f", quantised with {anatomy.quantised}" if anatomy.quantised else ""
    return (
        f"{anatomy.name}: {number:,} parameters{active}; {format_size(stored)} of weights, "
        f"{anatomy.dtype}{quantised}\non {hardware.title}\n({hardware.source})"
    )


def _places(question: Question, plan: Plan) -> str:
    """Say where every byte is."""
    counts = {tier: len(plan.layers_in(tier)) for tier in Tier}
    shape = question.anatomy.shape(on_cpu=question.hardware.on_cpu)
    token = f"{format_size(shape.kv_token_nbytes)} a token"
    token += "" if plan.kv_dtype == "auto" else f", as {plan.kv_dtype}"
    windows = sum(layer.token_nbytes for layer in shape.kv_windows)
    here = f"{token}, {format_size(windows)} of them only in a window" if windows else token
    slots = plan.num_slots * plan.slot_nbytes
    rows = [
        ("device", "embedding, head, norms", plan.resident_nbytes, ""),
        (
            "",
            _layers(counts[Tier.DEVICE]),
            plan.device_layer_nbytes,
            f"stay there{', packed' if plan.device_packed else ''}",
        ),
        ("", f"{plan.num_slots} slot{'' if plan.num_slots == 1 else 's'}", slots, "that layers stream through"),
        ("", "keys and values", plan.kv_nbytes, here),
        (
            "",
            "workspace",
            plan.workspace_nbytes,
            f"passes of {plan.pass_tokens} tokens, {plan.micro_batch_tokens} at a time",
        ),
        ("", "all", plan.device_nbytes, f"of a budget of {format_size(question.tiers.device or 0)}"),
        (
            "host",
            _layers(counts[Tier.HOST]),
            plan.host_nbytes,
            f"of a budget of {format_size(question.tiers.host or 0)}",
        ),
        *([("", "keys and values", plan.kv_host_nbytes, f"{token}, attended to there")] if plan.kv_host_nbytes else []),
        *([("", "room to read", plan.kv_landing_nbytes, "keys and values on NVMe")] if plan.kv_landing_nbytes else []),
        ("nvme", _layers(counts[Tier.NVME]), plan.nvme_nbytes, "read in every pass" if plan.nvme_nbytes else ""),
        *(
            [("", "keys and values", plan.kv_nvme_nbytes, f"{token}, read in every pass")]
            if plan.kv_nvme_nbytes
            else []
        ),
    ]
    lines = [f"{where:8}{what:24}{format_size(nbytes):>12}  {more}".rstrip() for where, what, nbytes, more in rows]
    return "\n".join(lines)


def _layers(count: int) -> str:
    return f"{count} layer" + "s" * (count != 1)


def _pass(forecast: Forecast) -> str:
    """Say how long each resource is busy in a pass, on average."""
    busy = {name: seconds / forecast.passes for name, seconds in forecast.busy_seconds.items()}
    most = max(busy.values()) or 1.0
    lines = [f"seconds of a pass, on average of {forecast.passes}"]
    for name, seconds in sorted(busy.items(), key=lambda item: -item[1]):
        bar = "█" * round(_BAR * seconds / most)
        lines.append(f"{_name(name):22}{seconds:10.3g}  {bar}".rstrip())
    return "\n".join(lines)


def _name(resource: str) -> str:
    return _NAMES.get(resource, resource.replace("_", " "))


def _job(question: Question, chosen: Choice) -> str:
    found, length = chosen.forecast, question.lengths[0]
    work = f"{len(question.lengths)} requests of {length.prompt} + {length.generated} tokens"
    return (
        f"{work}: {_duration(found.seconds)}, {found.tokens_per_second:.4g} tokens/s, up to {found.peak_sequences} at "
        f"once; a request ends after {_duration(found.mean_seconds)} on average\n"
        f"the pace is set by {_name(found.bottleneck)}; the best of {chosen.num_compared} plans for "
        f"{question.objective}"
    )


def _changes(changes: list[WhatIf]) -> str:
    known = [one for one in changes if one.speedup is not None]
    lines = ["what if: times as fast, and what then sets the pace"]
    lines += [f"{one.speedup:6.2f} ×  {one.text}; {_name(one.bottleneck or '')}" for one in known]
    lines += [f"{'':6}    {one.text}: not possible, {one.why_not}" for one in changes if one.speedup is None]
    if known and (known[0].speedup or 0) > 1.01:
        lines.append(f"most is bought by {known[0].text}")
    else:
        lines.append("none of these buys anything")
    return "\n".join(lines)


def as_dict(question: Question, chosen: Choice, changes: list[WhatIf]) -> dict[str, Any]:
    """Return the whole answer for JSON: bytes and seconds."""
    return {
        **_asked(question),
        "fits": True,
        "plan": chosen.plan.as_dict(),
        "forecast": chosen.forecast.as_dict(),
        "seconds_per_pass": {
            name: seconds / chosen.forecast.passes for name, seconds in chosen.forecast.busy_seconds.items()
        },
        "plans_compared": chosen.num_compared,
        "what_if": [one.as_dict() for one in changes],
    }


def _asked(question: Question) -> dict[str, Any]:
    anatomy, hardware, length = question.anatomy, question.hardware, question.lengths[0]
    shape = anatomy.shape(on_cpu=hardware.on_cpu)
    return {
        "model": {
            "name": anatomy.name,
            "family": anatomy.family,
            "dtype": anatomy.dtype,
            "parameters": parameters_in((anatomy.resident, *anatomy.layers)),
            "resident_bytes": shape.resident_nbytes,
            "layer_bytes": list(shape.layer_nbytes),
            "wire_bytes": list(shape.wire_nbytes),
            "quantised": anatomy.quantised,
            "kv_dtype": anatomy.kv_dtype,
            "kv_bytes_per_token": shape.kv_token_nbytes,
            "kv_windows": [asdict(layer) for layer in shape.kv_windows],
            "flops_per_token": anatomy.flops.per_token,
        },
        "hardware": {"title": hardware.title, "source": hardware.source, "measured": hardware.measured},
        "budgets": _tiers(question.tiers),
        "work": {"prompt_len": length.prompt, "gen_len": length.generated, "requests": len(question.lengths)},
        "objective": question.objective,
    }


def _tiers(tiers: MemoryTiers) -> dict[str, int | None]:
    return {
        "device": tiers.device,
        "host": tiers.host,
        "nvme": tiers.nvme,
        "kv_host": tiers.kv_host,
        "kv_nvme": tiers.kv_nvme,
    }


def refusal(question: Question, error: BudgetError, nearest: Nearest) -> str:
    """Say what is short, by how much, and what would be enough."""
    changed = _more(question.tiers, nearest.tiers)
    options = " ".join(f"--{name}-memory {now}" for name, (_, now) in changed.items())
    short = ", ".join(f"{format_size(now - before)} of {name} memory" for name, (before, now) in changed.items())
    return "\n\n".join(
        [
            _title(question),
            f"does not fit: {error}\nshort by about {short}; this would fit: {options}",
            _places(
                Question(question.anatomy, question.hardware, nearest.tiers, question.lengths), nearest.choice.plan
            ),
        ]
    )


def refusal_as_dict(question: Question, error: BudgetError, nearest: Nearest) -> dict[str, Any]:
    """Return a refusal for JSON."""
    return {
        **_asked(question),
        "fits": False,
        "error": str(error),
        "short_bytes": {name: now - before for name, (before, now) in _more(question.tiers, nearest.tiers).items()},
        "nearest": {"budgets": _tiers(nearest.tiers), "plan": nearest.choice.plan.as_dict()},
    }


def _more(before: MemoryTiers, now: MemoryTiers) -> dict[str, tuple[int, int]]:
    pairs = {"device": (before.device or 0, now.device or 0), "host": (before.host or 0, now.host or 0)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"
