"""What a pass costs: the seconds that each resource is busy with it, from measured rates and the model's own numbers.

Weights move to the device beside the computing, and a processor attends over what lies in host RAM beside both, so a
pass takes as long as its busiest resource.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from penstock.errors import ProfileError
from penstock.offload.hardware import HardwareProfile
from penstock.offload.plan import Plan

__all__ = [
    "COMPUTING", "EXPANDING", "HOST_ATTENTION", "HOST_TO_DEVICE", "ISSUING", "NVME_TO_HOST", "OUTSIDE_SECONDS",
    "PACKED_ROWS", "PRODUCTS", "STORING", "HostAttention", "LayerTimes", "Machine", "PassCost", "pass_cost",
]  # fmt: skip

COMPUTING = "computing"
HOST_TO_DEVICE = "host_to_device"
NVME_TO_HOST = "nvme_to_host"
ISSUING = "issuing"
HOST_ATTENTION = "host_attention"

BESIDE_THE_LINK = 0.6
"""The share of its rate that host RAM keeps for a reader while the link takes what it can, where that was not measured:
82 of 138 GB/s beside a full-rate PCIe 5 stream."""

STORING = 3
"""How often host memory moves a row that a processor puts into host RAM: it is read, and written, which reads too. What
a GPU sends there it writes once."""

PRODUCTS = 0.97
"""The share of a GPU's rate for large products that layers reach, attention included, where reading the weights is
counted besides, as if nothing hid it: 0.9 to 0.97 for models of 8B to 70B in micro-batches of 1,024 to 8,192."""

OUTSIDE_SECONDS = 0.003
"""What a pass takes beside its layers where a GPU waits for the processor: scheduling it, and choosing tokens."""

EXPANDING = 3
"""What making parameters of packed layers takes of the device's memory: beside a pass's products int4 3.2 times what
reading them would on an H200. Alone int4 takes 1.95, int8 1.8 and exact 4."""

_MEASURE = "Measure with `penstock profile`, without --quick, on the machine and the disk of the model."


PACKED = 4.5
"""What products with packed weights take for each `PACKED_ROWS` tokens, over reading the bytes as they rest: in 4 bits
on an H200, where arithmetic sets their pace. On an H100 it is 3.2; slower memory hides more."""

PACKED_ROWS = 64


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Seconds that one layer takes for a micro-batch, measured: pairs of tokens and seconds, in order.

    `singles` are of as many sequences with one new token each, `prompts` of one sequence with so many.
    """

    singles: tuple[tuple[int, float], ...]
    prompts: tuple[tuple[int, float], ...]

    def of(self, num_tokens: int, *, single: bool) -> float:
        """Return the seconds for a number of tokens: between two that were measured, or on beyond the last."""
        known = self.singles if single else self.prompts
        (low, first), (high, last) = known[0], known[-1]
        for (low, first), (high, last) in pairwise(known):  # noqa: B007 - the last pair goes on
            if num_tokens <= high:
                break
        slope = (last - first) / (high - low) if high > low else 0.0
        return max(first + slope * (num_tokens - low), known[0][1])


@dataclass(frozen=True, slots=True)
class HostAttention:
    """Attention in host RAM, measured: bytes per second, alone and beside the link, and seconds that a layer waits.

    `turn_seconds` is what goes by in a layer before attention starts and after it ends: nothing is read meanwhile.
    """

    alone: float
    beside_link: float
    turn_seconds: float


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates that bound a pass, in bytes and FLOP per second. None: not measured, and fatal where it is needed.

    `device_memory` is how fast computing reads weights, keys and values, `host_read` how fast a processor reads host
    RAM; with `attention`, attention there takes what it says. `call_seconds` is what issuing one layer for one
    micro-batch takes the processor: a GPU computes meanwhile, and where the processor is the device, it comes on top of
    computing. With `layer_times`, layers take what they say.
    """

    host_to_device: float | None
    nvme_to_host: float | None
    flops: float | None
    device_memory: float | None
    host_read: float | None = None
    attention: HostAttention | None = None
    call_seconds: float = 0.0
    on_cpu: bool = False
    layer_times: LayerTimes | None = None

    @classmethod
    def of(cls, profile: HardwareProfile, path: str | os.PathLike[str], *, dtype: str, on_cpu: bool) -> Machine:
        """Return what a profile says of a device, the CPU or the GPU, and of the disk of `path`. Raises OSError."""
        links, disk = profile.links, profile.disk_for(path)
        choice = disk.sweep.choice if disk else None
        measured_here = on_cpu == (links.device == "cpu")
        return cls(
            host_to_device=links.host_copy if on_cpu else links.host_to_device,
            nvme_to_host=choice.bytes_per_second if choice else None,
            flops=links.matmul.get(dtype) if measured_here else None,
            device_memory=links.host_read if on_cpu else links.device_memory,
            host_read=links.host_read,
            on_cpu=on_cpu,
        )

    def attends(self, *, beside_link: bool) -> float | None:
        """Return the bytes of keys and values in host RAM that attention there reads in a second; None: not known."""
        if self.attention is not None:
            return self.attention.beside_link if beside_link else self.attention.alone
        return self.host_read and self.host_read * (BESIDE_THE_LINK if beside_link else 1.0)


@dataclass(frozen=True, slots=True)
class PassCost:
    """Seconds that each resource is busy in a pass: all at once, unless there is one slot, which computing holds.

    `outside` is what comes on top of that.
    """

    busy: Mapping[str, float]
    overlaps: bool = True
    outside: float = 0.0

    @property
    def bottleneck(self) -> str:
        """The resource that the others wait for."""
        return max(self.busy, key=lambda name: self.busy[name])

    @property
    def seconds(self) -> float:
        """How long the pass takes."""
        most = max(self.busy.values()) + self.outside
        if self.overlaps:
            return most
        computing = self.busy[COMPUTING] + self.outside
        return computing + max(seconds for name, seconds in self.busy.items() if name != COMPUTING)

    def towards(self, other: PassCost, share: float) -> PassCost:
        """Return the cost that lies between this one (`share` 0) and another (1)."""
        busy = {name: mine + share * (other.busy[name] - mine) for name, mine in self.busy.items()}
        return PassCost(busy, self.overlaps, self.outside)


def pass_cost(
    plan: Plan,
    machine: Machine,
    *,
    flops: float,
    weight_nbytes: float,
    num_calls: int = 0,
    num_parked: int = 1,
    num_packed: int = 0,
    layers_seconds: float = 0,
    host_kv_nbytes: float = 0,
    copied_kv_nbytes: float = 0,
    stored_kv_nbytes: float = 0,
    disk_kv_nbytes: float = 0,
) -> PassCost:
    """Return what a pass costs under a plan that computes `flops` and reads `weight_nbytes` of the device to do so.

    Computing takes as long as its arithmetic, its reading, `layers_seconds`, and expanding layers that are packed, one
    after the other: products of few tokens are all reading, those of many all arithmetic. Products with the packed
    weights that rest on the device read these `num_packed` times, if at all, and nothing of them is expanded then.
    `num_calls` are the layers of all micro-batches. A processor reads the `host_kv_nbytes` of keys and values that lie
    in host RAM, for `num_parked` micro-batches in turns, and stores `stored_kv_nbytes` of new ones, at what the link
    leaves of its rate; where the processor is the device, it computes nothing meanwhile, nor while it copies.
    `copied_kv_nbytes` of them go over the link. The disk moves `disk_kv_nbytes` of them besides the weights. Raises
    ProfileError when a rate that the pass depends on has not been measured.
    """
    reached = 1.0 if machine.on_cpu else PRODUCTS
    arithmetic = _seconds("arithmetic", flops / reached, machine.flops)
    reading = _seconds("the device's memory", weight_nbytes, machine.device_memory)
    expanded = plan.expanded_nbytes * (1 - plan.device_share if num_packed else 1)
    packed = PACKED * num_packed * plan.device_layer_nbytes
    expanding = _seconds("the device's memory", EXPANDING * expanded + packed, machine.device_memory)
    computing = arithmetic + reading + layers_seconds + expanding
    streamed = plan.host_nbytes + plan.nvme_nbytes
    busy = {
        COMPUTING: computing,
        HOST_TO_DEVICE: _seconds("host to device", streamed + copied_kv_nbytes, machine.host_to_device),
        NVME_TO_HOST: _seconds("the disk", plan.nvme_nbytes + disk_kv_nbytes, machine.nvme_to_host),
    }
    issuing = num_calls * machine.call_seconds
    if machine.on_cpu:
        busy[COMPUTING] += issuing + busy[HOST_TO_DEVICE]  # it is the processor that copies, too
    elif issuing:
        busy[ISSUING] = issuing
    if host_kv_nbytes or stored_kv_nbytes:
        moved = host_kv_nbytes + (STORING if machine.on_cpu else 1) * stored_kv_nbytes
        reading = _seconds("host memory", moved, machine.attends(beside_link=bool(streamed)))
        if host_kv_nbytes and machine.attention is not None:
            turns = len(plan.tiers) * machine.attention.turn_seconds
            alone = 1 / num_parked if plan.runs_ahead and num_parked else 1.0  # the others' attention goes on meanwhile
            reading = max(reading, alone * reading + turns)
        name = COMPUTING if machine.on_cpu else HOST_ATTENTION
        busy[name] = busy.get(name, 0.0) + reading
    return PassCost(busy, overlaps=plan.num_slots != 1, outside=0.0 if machine.on_cpu else OUTSIDE_SECONDS)


def _seconds(what: str, amount: float, rate: float | None) -> float:
    if not amount:
        return 0.0
    if rate is None:
        raise ProfileError(f"the rate of {what} is not known", fix=_MEASURE)
    return amount / rate
