"""What stands between a disk and its rate, each with a code that scripts can rely on and a fix for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from penstock.io.blockdev import BlockDevice
from penstock.io.facts import FileFacts, HostFacts, TargetFacts

__all__ = ["Warn", "device_warnings", "file_warnings", "host_warnings", "path_warnings", "target_warnings"]

_GIB = 1 << 30
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "9p", "virtiofs", "gpfs", "beegfs"})
_SMALL_MEMLOCK = 8 << 20
_MANY_EXTENTS_PER_GIB = 256


@dataclass(frozen=True, slots=True)
class Warn:
    """One warning: a stable code, what was seen, and what to do about it."""

    code: str
    text: str
    fix: str


def host_warnings(host: HostFacts) -> Iterator[Warn]:
    """Look at the machine and this process's limits."""
    if host.transparent_huge_pages == "never":
        yield Warn(
            "thp_never",
            "transparent huge pages are off; reads into 4 KiB pages can be several times slower",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    if host.aio_nr is not None and host.aio_max_nr and host.aio_nr > 0.8 * host.aio_max_nr:
        yield Warn(
            "aio_nearly_used",
            f"{host.aio_nr} of {host.aio_max_nr} Linux AIO requests of the system are in use",
            "sysctl -w fs.aio-max-nr=1048576",
        )
    if host.memlock_nbytes is not None and host.memlock_nbytes < _SMALL_MEMLOCK:
        yield Warn(
            "memlock_small",
            f"only {host.memlock_nbytes} bytes may be locked; Penstock locks none, but drivers may count pinned memory",
            "ulimit -l unlimited, or LimitMEMLOCK=infinity in the service",
        )
    limit = host.cgroup_limit_nbytes
    if limit is not None and host.memory_nbytes and limit < host.memory_nbytes:
        yield Warn(
            "cgroup_limit",
            f"a control group allows {limit / _GIB:.1f} of the machine's {host.memory_nbytes / _GIB:.1f} GiB",
            "raise the container's memory limit if layers should rest in host RAM",
        )


def target_warnings(target: TargetFacts) -> Iterator[Warn]:
    """Look at the file system."""
    kind = target.file_system
    if not target.direct.works:
        yield Warn(
            "no_direct",
            f"O_DIRECT does not serve here: {target.direct.reason}; the rates are of buffered reads",
            "keep the model on ext4 or xfs",
        )
    if kind in _NETWORK or kind.startswith("fuse") or kind == "overlay":
        yield Warn(
            "file_system",
            f"{kind} stands between the reader and the disk",
            "keep the model on a local ext4 or xfs, in a container on a volume",
        )
    if target.total_nbytes and target.free_nbytes < 0.1 * target.total_nbytes:
        yield Warn(
            "low_free_space",
            f"{target.free_nbytes / _GIB:.1f} of {target.total_nbytes / _GIB:.1f} GiB are free; full drives slow down",
            "free some space",
        )
    for device in target.devices:
        yield from device_warnings(device)


def device_warnings(device: BlockDevice) -> Iterator[Warn]:
    """Look at one disk."""
    link = device.pcie
    if link and link.downgraded:
        yield Warn(
            "pcie_downgraded",
            f"{device.name}: the PCIe link runs at {link.speed:g} GT/s × {link.width}, the drive allows "
            f"{link.max_speed:g} GT/s × {link.max_width}",
            "use a slot with as many lanes, and look at the firmware's link settings",
        )
    if device.rotational:
        yield Warn(
            "rotational",
            f"{device.name} calls itself a rotating disk",
            "keep the model on flash; virtual disks often claim this wrongly",
        )
    elif device.scheduler not in {None, "none", "noop"}:
        yield Warn(
            "scheduler",
            f"{device.name}: the I/O scheduler {device.scheduler} costs CPU time and order",
            f"echo none > /sys/block/{device.name}/queue/scheduler",
        )


def file_warnings(file: FileFacts) -> Iterator[Warn]:
    """Look at the file that is read."""
    if file.cached_share is not None and file.cached_share > 0.1:
        yield Warn(
            "cached",
            f"{file.cached_share:.0%} of the file's start is in the page cache; O_DIRECT goes around it, but "
            "drives and hosts have caches too",
            "measure a file that was not read lately",
        )
    if file.extents is not None and file.extents > _MANY_EXTENTS_PER_GIB * max(1.0, file.nbytes / _GIB):
        yield Warn(
            "fragmented",
            f"the file lies in {file.extents} pieces of {file.nbytes / file.extents / 2**20:.1f} MiB on average",
            "copy it once on a file system with more free space",
        )
    if file.nbytes < _GIB:
        yield Warn(
            "small_file",
            f"the file of {file.nbytes / 2**20:.0f} MiB may fit into a cache of the drive or the host",
            "measure with --size 4GiB, or name a larger file",
        )


def path_warnings(
    name: str, *, rate: float | None, nodes: set[int], host_to_device: float | None, device_node: int | None
) -> Iterator[Warn]:
    """Look at the way from the disk called `name` to the GPU; rates in bytes per second, nodes of memory (NUMA)."""
    if device_node is not None and nodes and device_node not in nodes:
        yield Warn(
            "numa_crossed",
            f"{name}: the disk is at NUMA node {min(nodes)}, the GPU at node {device_node}",
            f"run with numactl --cpunodebind={device_node} --membind={device_node}, or move the drive",
        )
    if rate and host_to_device and host_to_device < rate:
        yield Warn(
            "copy_slower_than_disk",
            f"{name}: the copy to the device ({host_to_device / 1e9:.1f} GB/s) is slower than the disk "
            f"({rate / 1e9:.1f} GB/s)",
            "look at the GPU's PCIe link",
        )
