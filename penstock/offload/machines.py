"""Machines to plan for: this one, as `penstock profile` has measured it, or one that is only described.

Descriptions are JSON files of the schema `penstock-hardware/1`: sizes of memory, and for each rate the data sheet's
number, the share of it that is counted with, and what it is of. Those that come with Penstock lie in data/hardware.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from penstock.errors import ConfigError, ProfileError
from penstock.offload.cost import Machine
from penstock.offload.hardware import SCHEMA, HardwareProfile
from penstock.offload.records import RecordError, from_plain

__all__ = ["DESCRIPTION_SCHEMA", "HARDWARE", "Hardware", "find_hardware"]

DESCRIPTION_SCHEMA = "penstock-hardware/1"

HARDWARE = Path(__file__).parents[1] / "data" / "hardware"
"""Descriptions of common machines, by name."""

_MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Rate:
    """Bytes or FLOP per second by data sheet, and the share of it that programs reach; `of` says what it is."""

    data_sheet: float
    share: float
    of: str

    @property
    def value(self) -> float:
        """What is counted with."""
        return self.data_sheet * self.share


@dataclass(frozen=True, slots=True)
class _Rates:
    host_to_device: Rate | None
    device_memory: Rate | None
    host_read: Rate | None
    host_copy: Rate | None
    nvme_to_host: Rate | None


@dataclass(frozen=True, slots=True)
class _Description:
    schema: str
    reference: bool
    title: str
    source: str
    device: Literal["cuda", "cpu"]
    device_memory_bytes: int | None
    host_memory_bytes: int
    rates: _Rates
    matmul: dict[str, Rate]


@dataclass(frozen=True, slots=True)
class Hardware:
    """A machine: its memory in bytes, and rates per second; None where it is not known.

    `measured` is false for one that is described. `flops` is by dtype. On a machine without a GPU the device is host
    memory: `device_nbytes` is None.
    """

    title: str
    source: str
    measured: bool
    on_cpu: bool
    device_nbytes: int | None
    host_nbytes: int
    host_to_device: float | None
    nvme_to_host: float | None
    device_memory: float | None
    host_read: float | None
    flops: dict[str, float]

    def machine(self, dtype: str) -> Machine:
        """Return the rates that bound passes of a dtype."""
        return Machine(
            host_to_device=self.host_to_device,
            nvme_to_host=self.nvme_to_host,
            flops=self.flops.get(dtype),
            device_memory=self.device_memory,
            host_read=self.host_read,
            on_cpu=self.on_cpu,
        )

    @classmethod
    def of(cls, profile: HardwareProfile, *, path: str | os.PathLike[str] | None = None) -> Self:
        """Return what a profile has measured; of several disks that of `path`, or else the first."""
        links = profile.links
        on_cpu = links.device == "cpu"
        disk = profile.disk_for(path) if path is not None else next(iter(profile.disks), None)
        choice = disk.sweep.choice if disk else None
        return cls(
            title=f"{links.device}, {profile.host.cpus} processors",
            source=f"measured by penstock profile, {profile.started}",
            measured=True,
            on_cpu=on_cpu,
            device_nbytes=None if on_cpu else links.device_memory_nbytes,
            host_nbytes=min(profile.host.memory_nbytes, profile.host.cgroup_limit_nbytes or profile.host.memory_nbytes),
            host_to_device=links.host_copy if on_cpu else links.host_to_device,
            nvme_to_host=choice.bytes_per_second if choice else None,
            device_memory=links.host_read if on_cpu else links.device_memory,
            host_read=links.host_read,
            flops=links.matmul,
        )

    @classmethod
    def load(cls, file: str | os.PathLike[str], *, path: str | os.PathLike[str] | None = None) -> Self:
        """Read a description, or a profile of which `path` names the disk. Raises ProfileError."""
        plain = _read(Path(file))
        schema = plain.get("schema")
        if schema == SCHEMA:
            return cls.of(HardwareProfile.load(file), path=path)
        if schema != DESCRIPTION_SCHEMA:
            wanted = f"{DESCRIPTION_SCHEMA} or {SCHEMA}"
            raise ProfileError("not a machine", file=file, wanted=wanted, got=repr(schema)[:60])
        try:
            said = from_plain(_Description, plain)
        except RecordError as error:
            raise ProfileError(f"the description is damaged: {error}", file=file) from error
        return cls._described(said)

    @classmethod
    def _described(cls, said: _Description) -> Self:
        on_cpu, rates = said.device == "cpu", said.rates
        return cls(
            title=said.title,
            source=said.source,
            measured=not said.reference,
            on_cpu=on_cpu,
            device_nbytes=None if on_cpu else said.device_memory_bytes,
            host_nbytes=said.host_memory_bytes,
            host_to_device=_value(rates.host_copy if on_cpu else rates.host_to_device),
            nvme_to_host=_value(rates.nvme_to_host),
            device_memory=_value(rates.host_read if on_cpu else rates.device_memory),
            host_read=_value(rates.host_read),
            flops={dtype: rate.value for dtype, rate in said.matmul.items()},
        )


def find_hardware(name: str, *, path: str | os.PathLike[str] | None = None) -> Hardware:
    """Return the machine of a name or of a file. Raises ConfigError, with the names there are, and ProfileError."""
    known = {file.stem: file for file in sorted(HARDWARE.glob("*.json"))}
    if name in known:
        return Hardware.load(known[name])
    if not os.path.exists(name):
        wanted = f"a file of `penstock profile`, or one of {', '.join(known)}"
        raise ConfigError("no such machine", wanted=wanted, got=name)
    return Hardware.load(name, path=path)


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            plain = json.loads(stream.read(_MAX_BYTES).decode())
    except OSError as error:
        raise ProfileError(f"cannot be read: {error.strerror}", file=file) from error
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"not the JSON of a machine: {error}", file=file) from error
    if not isinstance(plain, dict):
        raise ProfileError("not a machine", file=file, wanted="an object", got=type(plain).__name__)
    return plain


def _value(rate: Rate | None) -> float | None:
    return None if rate is None else rate.value
