"""The disks under a file, as /sys describes them: model, PCIe link, NUMA node, queue, RAID.

A file's device number leads to a disk, to a partition of one, or to something stacked on others (md, dm). File systems
such as btrfs and overlay have device numbers of their own; then the mount's source says which device is below.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BlockDevice", "PcieLink", "devices_under", "pcie_link", "read_line", "sectors"]

_FILESYSTEM_ROOT = Path("/")
_MAX_STACK = 8
_SECTOR = 512


@dataclass(frozen=True, slots=True)
class PcieLink:
    """A device's PCIe link as it is and as the device could: 10^9 transfers per second and lane, and lanes."""

    speed: float
    width: int
    max_speed: float
    max_width: int

    @property
    def downgraded(self) -> bool:
        """Whether it is slower than the device allows."""
        return self.speed * self.width < self.max_speed * self.max_width


@dataclass(frozen=True, slots=True)
class BlockDevice:
    """One disk, or one array of disks when `members` names some. What /sys does not say is None.

    `max_request_nbytes` and `max_segments` bound what the kernel sends to the device in one piece, in bytes and in
    pieces of memory; `nr_requests` how many at once.
    """

    name: str
    model: str | None
    pcie: PcieLink | None
    numa_node: int | None
    scheduler: str | None
    nr_requests: int | None
    max_request_nbytes: int | None
    max_segments: int | None
    rotational: bool | None
    raid: str | None
    raid_chunk_nbytes: int | None
    members: tuple[str, ...]


def devices_under(device: int, source: str | None = None, *, root: Path = _FILESYSTEM_ROOT) -> tuple[BlockDevice, ...]:
    """Return the device that holds files with device number `device`, and every device below it; () when unknown.

    `source` is the mount's, tried when there is no such block device. `root` stands for the file system's root.
    """
    found = _directory(device, root)
    if found is None and source and source.startswith("/dev/"):
        found = _by_name(Path(os.path.realpath(root / source.lstrip("/"))).name, root)
    seen: dict[str, BlockDevice] = {}
    waiting = [found] if found else []
    while waiting and len(seen) < _MAX_STACK:
        directory = _whole_disk(waiting.pop(0))
        if directory.name in seen:
            continue
        described = _describe(directory)
        seen[described.name] = described
        below = (_by_name(name, root) for name in described.members)
        waiting += [each for each in below if each is not None]
    return tuple(seen.values())


def _directory(device: int, root: Path) -> Path | None:
    link = root / "sys/dev/block" / f"{os.major(device)}:{os.minor(device)}"
    return Path(os.path.realpath(link)) if link.exists() else None


def _by_name(name: str, root: Path) -> Path | None:
    link = root / "sys/class/block" / name
    return Path(os.path.realpath(link)) if link.exists() else None


def _whole_disk(directory: Path) -> Path:
    return directory.parent if (directory / "partition").exists() else directory


def _describe(directory: Path) -> BlockDevice:
    queue = directory / "queue"
    max_kib = _number(queue / "max_sectors_kb")
    rotational = _number(queue / "rotational")
    raid = read_line(directory / "md/level")
    mapper = read_line(directory / "dm/uuid")
    return BlockDevice(
        name=directory.name,
        model=read_line(directory / "device/model"),
        pcie=_find_pcie(directory),
        numa_node=_numa_node(directory),
        scheduler=_selected(read_line(queue / "scheduler")),
        nr_requests=_number(queue / "nr_requests"),
        max_request_nbytes=None if max_kib is None else max_kib * 1024,
        max_segments=_number(queue / "max_segments"),
        rotational=None if rotational is None else rotational == 1,
        raid=raid or (f"dm ({mapper.split('-')[0]})" if mapper else None),
        raid_chunk_nbytes=_number(directory / "md/chunk_size") or None,
        members=_members(directory),
    )


def _members(directory: Path) -> tuple[str, ...]:
    slaves = directory / "slaves"
    return tuple(sorted(entry.name for entry in slaves.iterdir())) if slaves.is_dir() else ()


def _ancestors(directory: Path) -> list[Path]:
    """Return the directories that may describe a disk's bus: its parents, or, with multipath, its controllers."""
    controllers = sorted((directory / "device").glob("nvme*/device"))
    return [*directory.parents, *(Path(os.path.realpath(each)) for each in controllers)]


def _find_pcie(directory: Path) -> PcieLink | None:
    return next((link for link in map(pcie_link, _ancestors(directory)) if link), None)


def pcie_link(directory: Path) -> PcieLink | None:
    """Return the link of the PCI device that a /sys directory describes, or None."""
    speeds = [_leading(directory / name) for name in ("current_link_speed", "max_link_speed")]
    widths = [_leading(directory / name) for name in ("current_link_width", "max_link_width")]
    if not all(speeds) or not all(widths):
        return None
    speed, max_speed = (float(value or 0) for value in speeds)
    width, max_width = (int(value or 0) for value in widths)
    return PcieLink(speed, width, max_speed, max_width)


def _numa_node(directory: Path) -> int | None:
    for parent in _ancestors(directory):
        node = read_line(parent / "numa_node")
        if node is not None and re.fullmatch(r"-?\d+", node):
            return int(node) if int(node) >= 0 else None
    return None


def _selected(choices: str | None) -> str | None:
    """Return the word in brackets, as in "none [mq-deadline] kyber"; a single word stands for itself."""
    if choices is None:
        return None
    match = re.search(r"\[([^\]]+)\]", choices)
    return match[1] if match else choices


def _leading(path: Path) -> float:
    match = re.match(r"[\d.]+", read_line(path) or "")
    return float(match[0]) if match else 0.0


def _number(path: Path) -> int | None:
    text = read_line(path)
    return int(text) if text is not None and re.fullmatch(r"\d+", text) else None


def read_line(path: Path) -> str | None:
    """Return a small file's first line without white space at its ends; None when it is empty or cannot be read."""
    try:
        return path.read_text(errors="replace").partition("\n")[0].strip() or None
    except OSError:
        return None


def sectors(name: str, *, root: Path = _FILESYSTEM_ROOT) -> tuple[int, int]:
    """Return the bytes that a device has read and written since it appeared; zeros when /proc does not know it."""
    try:
        lines = (root / "proc/diskstats").read_text().splitlines()
    except OSError:
        return 0, 0
    for line in lines:
        fields = line.split()
        if len(fields) > 9 and fields[2] == name:
            return int(fields[5]) * _SECTOR, int(fields[9]) * _SECTOR
    return 0, 0
