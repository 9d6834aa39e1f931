"""Memory sizes, and how much of each tier a model may use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from penstock.errors import SizeError

__all__ = ["MemoryTiers", "Size", "Tier", "format_size", "parse_size"]

Size = int | str
"""Bytes, or text such as "20GiB", "600 MiB" or "1.5TB"; K, M, G, T alone mean KiB, MiB, GiB, TiB."""

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[_letter] = _UNITS[f"{_letter}IB"] = 1024**_power
    _UNITS[f"{_letter}B"] = 1000**_power

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)


class Tier(StrEnum):
    """Where a layer's bytes live between uses."""

    DEVICE = "device"
    HOST = "host"
    NVME = "nvme"


def parse_size(size: Size) -> int:
    """Return a size in bytes. Raises SizeError for what is not a size."""
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise SizeError("not a memory size", wanted="bytes, or a number with a unit such as 20GiB", got=repr(size))
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def format_size(nbytes: int) -> str:
    """Return a size for people, in binary units."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{int(value)} B" if unit == "B" else f"{value:.2f} {unit}"


@dataclass(frozen=True, slots=True, init=False)
class MemoryTiers:
    """Bytes that weights, keys, values and activations may take in each tier.

    `device`: on the GPU, or in RAM when the device is the CPU; None takes most of what is free.
    `host`: pinned RAM for whole layers; None takes most of what is free.
    `nvme`: how many bytes of layers may be left on disk and read in every pass; None sets no limit. The checkpoint is
    read where it lies, so this tier takes no space of its own.
    `kv_host`: the part of `host` that keys and values of further sequences may take; None leaves it to the plan.
    `kv_nvme`: a scratch file for those of still more sequences, on a disk; what they are read into is part of `host`.
    """

    device: int | None
    host: int | None
    nvme: int | None
    kv_host: int | None
    kv_nvme: int

    def __init__(
        self,
        *,
        device: Size | None = None,
        host: Size | None = None,
        nvme: Size | None = None,
        kv_host: Size | None = None,
        kv_nvme: Size = 0,
    ) -> None:
        for name, size in (("device", device), ("host", host), ("nvme", nvme), ("kv_host", kv_host)):
            object.__setattr__(self, name, None if size is None else parse_size(size))
        object.__setattr__(self, "kv_nvme", parse_size(kv_nvme))
