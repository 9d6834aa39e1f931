"""What the machine can do, measured once and kept: the numbers that plans are made from, as a frozen value and as JSON.

The file's schema is `penstock-profile/2`, described in docs/profile-schema.md. Rates are bytes per second, sizes bytes,
times seconds, matrix products FLOP per second. What was not measured is None; nothing is guessed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from penstock.errors import ProfileError
from penstock.io.advice import Warn
from penstock.io.atomic import write_whole
from penstock.io.blockdev import PcieLink
from penstock.io.facts import HostFacts
from penstock.io.plateau import Choice
from penstock.io.profiler import DiskProfile
from penstock.io.settings import ReadSettings
from penstock.offload.records import RecordError, from_plain, to_plain

__all__ = ["SCHEMA", "UNKNOWN_LINKS", "Change", "HardwareProfile", "Links", "compare", "profile_path", "settings_of"]

SCHEMA = "penstock-profile/2"
_MAX_BYTES = 64 << 20
_MEASURE_AGAIN = "Measure again with `penstock profile`."
_SAME = 0.03


@dataclass(frozen=True, slots=True)
class Links:
    """Everything but the disk. Without a GPU, all that concerns one is None, and `matmul` is the CPU's.

    `device` is "cpu" or a CUDA device's name. `both_directions` is the sum of both, at once. `device_memory` is what a
    copy on the device reads and writes. `read_and_copy` is disk → pinned memory → device, end to end. `host_copy`
    counts each byte once. `matmul` is FLOP per second by dtype, on `device`. `device_memory_nbytes` is a GPU's size.
    """

    device: str
    device_pcie: PcieLink | None
    device_numa_node: int | None
    host_to_device: float | None
    device_to_host: float | None
    both_directions: float | None
    pageable_to_device: float | None
    device_memory: float | None
    read_and_copy: float | None
    host_read: float | None
    host_copy: float | None
    pin_seconds_per_gib: float | None
    matmul: dict[str, float]
    complete: bool
    device_memory_nbytes: int | None = None


UNKNOWN_LINKS = Links(
    device="cpu", device_pcie=None, device_numa_node=None, host_to_device=None, device_to_host=None,
    both_directions=None, pageable_to_device=None, device_memory=None, read_and_copy=None, host_read=None,
    host_copy=None, pin_seconds_per_gib=None, matmul={}, complete=False,
)  # fmt: skip
"""What is known before anything was measured."""


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """One machine: its facts, its disks in the order in which they were named, its links, and what to doubt."""

    schema: str
    penstock: str
    started: str
    elapsed_seconds: float
    complete: bool
    host: HostFacts
    disks: tuple[DiskProfile, ...]
    links: Links
    warnings: tuple[Warn, ...]

    def disk_for(self, path: str | os.PathLike[str]) -> DiskProfile | None:
        """Return the disk that holds `path`, or None when it was not measured. Raises OSError when there is no path."""
        device = os.stat(path).st_dev
        name = f"{os.major(device)}:{os.minor(device)}"
        return next((disk for disk in self.disks if disk.target.device == name), None)

    def settings_for(self, path: str | os.PathLike[str]) -> ReadSettings | None:
        """Return how to read files on the disk of `path`, or None when it was not measured. Raises OSError."""
        disk = self.disk_for(path)
        return settings_of(disk.sweep.choice) if disk and disk.sweep.choice else None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return to_plain(self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a stored profile. Raises ProfileError when it is missing, damaged, or of another version."""
        try:
            if os.stat(path).st_size > _MAX_BYTES:
                raise ProfileError("too large for a profile", file=path, wanted=f"at most {_MAX_BYTES} bytes")
            text = Path(path).read_text(encoding="utf-8")
            plain = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        except OSError as error:
            raise ProfileError(f"cannot be read: {error.strerror}", file=path, fix=_MEASURE_AGAIN) from error
        except ProfileError:
            raise
        except (ValueError, RecursionError) as error:
            raise ProfileError(f"the profile is damaged: {error}", file=path, fix=_MEASURE_AGAIN) from error
        version = plain.get("schema") if type(plain) is dict else None
        if version != SCHEMA:
            raise ProfileError(
                "another version of the profile, or none", file=path, wanted=SCHEMA, got=repr(version)[:60],
                fix=_MEASURE_AGAIN,
            )  # fmt: skip
        try:
            return from_plain(cls, plain)
        except RecordError as error:
            raise ProfileError(f"the profile is damaged: {error}", file=path, fix=_MEASURE_AGAIN) from error

    def store(self, path: str | os.PathLike[str]) -> None:
        """Write it so that it appears whole under its name or not at all; makes the directory. Raises OutputError."""
        with contextlib.suppress(OSError):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(path), self.to_json())

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"

    def with_disks(self, *disks: DiskProfile) -> Self:
        """Return a copy with other disks."""
        return replace(self, disks=disks)


def settings_of(choice: Choice) -> ReadSettings:
    """Return a recommendation as the runtime's settings.

    Never fewer bytes in flight than the default: the memory is small, and layers come in large pieces.
    """
    flight = max(ReadSettings().in_flight_nbytes, choice.cell.in_flight_nbytes)
    return ReadSettings(block_nbytes=choice.cell.block_nbytes, in_flight_nbytes=flight)


def profile_path(cache_home: str | None) -> Path:
    """Return where profiles are kept; `cache_home` is $XDG_CACHE_HOME, which counts only when it is absolute."""
    base = Path(cache_home) if cache_home and os.path.isabs(cache_home) else Path.home() / ".cache"
    return base / "penstock" / "profile.json"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a key appears twice")
    return members


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


@dataclass(frozen=True, slots=True)
class Change:
    """One figure in two profiles; `ratio` is new ÷ old, `significant` when that is more than the noise explains."""

    name: str
    unit: str
    old: float
    new: float
    ratio: float
    significant: bool


def compare(old: HardwareProfile, new: HardwareProfile) -> list[Change]:
    """Compare every figure that both have; disks are paired by device, or when each has just one."""
    changes = []
    for before, after in _pairs(old, new):
        noise = max(_SAME, *(disk.sweep.choice.noise or 0.0 for disk in (before, after) if disk.sweep.choice))
        values = dict(_disk_figures(before)), dict(_disk_figures(after))
        changes += _changes(*values, noise, prefix=f"{after.target.path}: ")
    return changes + _changes(dict(_link_figures(old.links)), dict(_link_figures(new.links)), _SAME)


def _pairs(old: HardwareProfile, new: HardwareProfile) -> list[tuple[DiskProfile, DiskProfile]]:
    by_device = {disk.target.device: disk for disk in old.disks}
    pairs = [(by_device[disk.target.device], disk) for disk in new.disks if disk.target.device in by_device]
    if not pairs and len(old.disks) == len(new.disks) == 1:
        pairs = [(old.disks[0], new.disks[0])]
    return pairs


def _disk_figures(disk: DiskProfile) -> Iterator[tuple[str, tuple[float | None, str]]]:
    sweep = disk.sweep
    if sweep.choice:
        yield "disk read, recommended", (sweep.choice.bytes_per_second, "B/s")
        yield "disk read, best", (sweep.choice.best_bytes_per_second, "B/s")
        yield "recommended bytes in flight", (float(sweep.choice.cell.in_flight_nbytes), "B")
    yield "disk read, depth 1", (sweep.depth_one, "B/s")
    yield "disk read, whole layers", (sweep.layer, "B/s")
    yield "disk read, sustained", (sweep.sustained, "B/s")


def _link_figures(links: Links) -> Iterator[tuple[str, tuple[float | None, str]]]:
    yield "host → device", (links.host_to_device, "B/s")
    yield "device → host", (links.device_to_host, "B/s")
    yield "both directions", (links.both_directions, "B/s")
    yield "pageable → device", (links.pageable_to_device, "B/s")
    yield "device memory", (links.device_memory, "B/s")
    yield "disk → host → device", (links.read_and_copy, "B/s")
    yield "host memory, read", (links.host_read, "B/s")
    yield "host memory, copy", (links.host_copy, "B/s")
    yield "pinning", (links.pin_seconds_per_gib, "s/GiB")
    for dtype, flops in links.matmul.items():
        yield f"matrix product, {dtype}", (flops, "FLOP/s")


def _changes(
    old: dict[str, tuple[float | None, str]],
    new: dict[str, tuple[float | None, str]],
    noise: float,
    *,
    prefix: str = "",
) -> list[Change]:
    changes = []
    for name, (after, unit) in new.items():
        before = old.get(name, (None, unit))[0]
        if before and after:
            ratio = after / before
            changes.append(Change(prefix + name, unit, before, after, ratio, abs(math.log(ratio)) > noise))
    return changes
