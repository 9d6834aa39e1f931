"""What a model would do on a machine, before either is there: the plan, the refusal, and what other hardware would buy.

Everything is decided by `choose_plan`, as for a run; only the numbers come from descriptions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from penstock.engine.anatomy import Anatomy
from penstock.engine.forecast import Length
from penstock.engine.passes import KnownPasses
from penstock.engine.planner import LIMITS, Choice, Objective, choose_plan
from penstock.errors import BudgetError
from penstock.offload.codec import CodecName
from penstock.offload.machines import Hardware
from penstock.offload.plan import PassLimits
from penstock.offload.tiers import MemoryTiers, Size, format_size

__all__ = ["Nearest", "Question", "WhatIf", "budgets_of", "nearest_that_fits", "what_ifs"]

MAX_SAMPLE = 256
"""Requests that are forecast to compare hardware; the sample is spread over all of them."""

_ROUNDS = 1
"""How long the search goes on from the plan that was chosen."""

_STEP_NBYTES = 64 << 20
"""To which what would fit is rounded up."""


@dataclass(frozen=True, slots=True)
class Question:
    """A model, a machine, what may be used of it, and the work. Passes that are `known` serve changed questions too."""

    anatomy: Anatomy
    hardware: Hardware
    tiers: MemoryTiers
    lengths: Sequence[Length]
    objective: Objective = "throughput"
    known: KnownPasses = field(default_factory=KnownPasses, compare=False, repr=False)

    def answer(self, *, limits: PassLimits | None = None, max_rounds: int | None = None) -> Choice:
        """Choose the plan, starting from `limits`. Raises BudgetError and ProfileError."""
        on_cpu = self.hardware.on_cpu
        usual = LIMITS["cpu" if on_cpu else "cuda"]
        return choose_plan(
            self.anatomy.shape(on_cpu=on_cpu),
            self.tiers,
            limits or usual,
            machine=self.hardware.machine(self.anatomy.dtype),
            model=self.anatomy.flops,
            lengths=self.lengths,
            objective=self.objective,
            max_rounds=max_rounds,
            usual_slots=usual.num_slots,
            known=self.known,
        )


@dataclass(frozen=True, slots=True)
class WhatIf:
    """A change, and how many times as fast the job would be; `why_not` says why there is no answer."""

    name: str
    text: str
    speedup: float | None
    bottleneck: str | None
    why_not: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "name": self.name,
            "text": self.text,
            "speedup": self.speedup,
            "bottleneck": self.bottleneck,
            "why_not": self.why_not,
        }


def budgets_of(
    hardware: Hardware,
    *,
    device: str | None = None,
    host: str | None = None,
    nvme: str | None = None,
    kv_host: str | None = None,
    kv_nvme: Size = 0,
) -> MemoryTiers:
    """Return what a run may use of a machine: what is said, and else the shares that a run takes of what is free.

    Raises SizeError, and BudgetError for more than the machine has, or where its device's memory is not known.
    """
    said = MemoryTiers(device=device, host=host, nvme=nvme, kv_host=kv_host, kv_nvme=kv_nvme)
    whole = hardware.host_nbytes if hardware.on_cpu else hardware.device_nbytes
    if whole is None and said.device is None:
        fix = "Give --device-memory, or measure again with `penstock profile`."
        raise BudgetError("how much memory the device has is not known", fix=fix)
    usual = 0 if whole is None else whole // 2 if hardware.on_cpu else whole * 9 // 10
    wanted = usual if said.device is None else said.device
    left = max(hardware.host_nbytes - wanted, 0) if hardware.on_cpu else hardware.host_nbytes
    tiers = replace(said, device=wanted, host=left * 8 // 10 if said.host is None else said.host)
    for name, asked, there in (
        ("device", wanted, whole),
        ("host", tiers.host or 0, left),
        ("keys' and values' host", tiers.kv_host or 0, tiers.host),
    ):
        if there is not None and asked > there:
            raise BudgetError(
                f"the {name} memory budget is more than there is for it",
                wanted=format_size(asked),
                got=format_size(there),
                fix=f"Lower the {name} memory, or describe another machine.",
            )
    return tiers


def what_ifs(question: Question, chosen: Choice) -> list[WhatIf]:
    """Return changes of hardware and of weights, the one that buys most first."""
    lengths = question.lengths[:: -(-len(question.lengths) // MAX_SAMPLE)]
    base = replace(question, lengths=lengths)
    now = chosen if lengths == question.lengths else base.answer(limits=chosen.limits)
    made = [_tried(name, text, changed, now) for name, text, changed in _changes(base)]
    return sorted(made, key=lambda one: -(one.speedup or 0.0))


def _tried(name: str, text: str, changed: Question | str, now: Choice) -> WhatIf:
    if isinstance(changed, str):
        return WhatIf(name, text, None, None, changed)
    try:
        found = changed.answer(limits=now.limits, max_rounds=_ROUNDS)
    except BudgetError as error:
        return WhatIf(name, text, None, None, error.what)
    latency = changed.objective == "latency"
    before, after = (one.forecast.mean_seconds if latency else one.forecast.seconds for one in (now, found))
    return WhatIf(name, text, before / after, found.forecast.bottleneck)


def _changes(question: Question) -> Iterator[tuple[str, str, Question | str]]:
    hardware, tiers = question.hardware, question.tiers
    assert tiers.device is not None
    assert tiers.host is not None
    bigger = replace(hardware, host_nbytes=2 * hardware.host_nbytes)
    if hardware.on_cpu:
        grown = replace(tiers, host=tiers.host + hardware.host_nbytes * 8 // 10)
        yield "double_host", "twice the RAM", replace(question, hardware=bigger, tiers=grown)
    else:
        grown = replace(tiers, host=2 * tiers.host)
        yield "double_host", "twice the RAM", replace(question, hardware=bigger, tiers=grown)
        doubled = replace(tiers, device=2 * tiers.device)
        yield "double_device", "twice the memory of the device", replace(question, tiers=doubled)
        if rate := hardware.host_to_device:
            faster = replace(hardware, host_to_device=2 * rate)
            yield "next_pcie", "the next generation of PCIe", replace(question, hardware=faster)
        yield "second_gpu", "a second GPU", "Penstock runs on one"
    if rate := hardware.nvme_to_host:
        faster = replace(hardware, nvme_to_host=2 * rate)
        yield "second_nvme", "a second NVMe disk, read in turn with the first", replace(question, hardware=faster)
    codecs: tuple[tuple[CodecName, str], ...] = (
        ("exact", "packed bit for bit"),
        ("int8", "in 8 bits"),
        ("int4", "in 4 bits"),
    )
    for codec, text in codecs:
        other: Question | str | None = question.anatomy.why_not_coded(codec)
        if other is None:
            other = replace(question, anatomy=question.anatomy.coded(codec))
            if other == question:
                continue
        yield codec, f"weights {text} (penstock pack --codec {codec})", other


@dataclass(frozen=True, slots=True)
class Nearest:
    """The least memory with which a question has an answer, and that answer."""

    tiers: MemoryTiers
    choice: Choice


def nearest_that_fits(question: Question) -> Nearest | None:
    """Return an answer with the least more device memory, or else host memory; None where none helps.

    It is looked for with the longest request alone: the others can wait for it.
    """
    for name in ("device", "host"):
        start: int = getattr(question.tiers, name)
        low = high = -(-max(start, 1) // _STEP_NBYTES) * _STEP_NBYTES
        most = 64 * max(sum(question.anatomy.shape(on_cpu=False).layer_nbytes), start)
        found = None
        while found is None and high < most:
            low, high = high, 2 * high
            found = _with(question, name, high)
        if found is None:
            continue
        while high - low > _STEP_NBYTES:
            middle = -(-(low + high) // 2 // _STEP_NBYTES) * _STEP_NBYTES
            better = _with(question, name, middle)
            low, high, found = (low, middle, better) if better else (middle, high, found)
        return found
    return None


def _with(question: Question, name: str, nbytes: int) -> Nearest | None:
    changes: dict[str, Any] = {name: nbytes}
    changed = replace(question.tiers, **changes)
    longest = max(question.lengths, key=lambda length: length.prompt + length.generated)
    try:
        return Nearest(changed, replace(question, tiers=changed, lengths=[longest]).answer())
    except BudgetError:
        return None
