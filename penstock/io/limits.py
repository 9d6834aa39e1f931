"""How much memory this process may still take, and how many cores: the machine's, and every control group's around it.

In a container /proc/meminfo is the host's, so the control groups are asked too: version 2 (`memory.max`, `memory.high`)
and version 1 (`memory.limit_in_bytes`). File pages count as free, because the kernel gives them up under pressure;
tmpfs pages do not, which is why the LRU counters are added up instead of taking `file` or `cache`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

__all__ = ["available_cores", "available_memory", "memory_limit", "peak_memory"]

_FILESYSTEM_ROOT = Path("/")


def available_memory(*, root: Path = _FILESYSTEM_ROOT) -> int:
    """Return the bytes that can be allocated before the machine or a control group runs out; never negative.

    `root` stands for the root of the file system under which /proc/self/cgroup and /sys/fs/cgroup are looked up.
    """
    limits = [int(psutil.virtual_memory().available)]
    for group in _groups(root):
        headroom = _headroom(group)
        if headroom is not None:
            limits.append(headroom)
    return max(0, min(limits))


def peak_memory(*, root: Path = _FILESYSTEM_ROOT) -> int:
    """Return the most bytes of RAM that this process has held, from /proc/self/status.

    `ru_maxrss` is no substitute: it starts with what the parent had when it started this process.
    """
    lines = (root / "proc/self/status").read_text().splitlines()
    found = next(line for line in lines if line.startswith("VmHWM:"))
    return int(found.split()[1]) << 10


def memory_limit(*, root: Path = _FILESYSTEM_ROOT) -> int | None:
    """Return the bytes that the tightest enclosing control group allows, or None where none sets a limit."""
    return min((limit for group in _groups(root) for limit in _limits(group)), default=None)


def available_cores(*, root: Path = _FILESYSTEM_ROOT) -> int:
    """Return how many threads can run at once: those that the scheduler allows, and every control group's quota."""
    quotas = (quota for group in _groups(root, "cpu") if (quota := _quota(group)) is not None)
    return max(int(min(len(os.sched_getaffinity(0)), *quotas, 1 << 20)), 1)


def _quota(group: Path) -> float | None:
    """Return the cores whose time a control group may take, or None when it sets no limit."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        known = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        return known[0] / known[1] if known[0] and known[1] else None
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _groups(root: Path, controller: str = "memory") -> Iterator[Path]:
    """Yield the directories of this process's control groups for memory, or else, and of all that enclose them.

    Inside a container the path in /proc/self/cgroup may be the host's, of which only the end or nothing is mounted;
    directories that are not there are skipped, and the mount's root is always looked at.
    """
    mounts = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" and not controllers:
            bases = [mounts, mounts / "unified"]
        elif controller in controllers.split(","):
            bases = [mounts / controller, mounts / controllers]
        else:
            continue
        inner = Path(path.lstrip("/"))
        for base in bases:
            for group in (inner, *inner.parents):
                # A process outside its cgroup namespace's root sees "/../..".
                if ".." not in group.parts:
                    yield base / group


def _headroom(group: Path) -> int | None:
    """Return limit - (usage - file pages) of one control group, or None when it sets no limit."""
    known = _limits(group)
    usage = _number(group / "memory.current")
    if usage is None:
        usage = _number(group / "memory.usage_in_bytes")
    if not known or usage is None:
        return None
    return min(known) - (usage - min(usage, _file_bytes(group)))


def _limits(group: Path) -> list[int]:
    limits = [_number(group / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    # Version 1 writes "no limit" as the greatest multiple of a page.
    return [limit for limit in limits if limit is not None and limit < 1 << 62]


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _file_bytes(group: Path) -> int:
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    counters = {name: int(value) for name, _, value in (line.partition(" ") for line in lines) if value.isdigit()}
    # Version 1 has both the group's own counters and, with "total_", those that include its children.
    return sum(counters.get(f"total_{name}", counters.get(name, 0)) for name in ("active_file", "inactive_file"))
