"""Facts from fake /proc and /sys trees, and the warning that each of them calls for."""

import os
import resource
from dataclasses import replace

import pytest

from penstock.io.advice import (
    device_warnings,
    file_warnings,
    host_warnings,
    path_warnings,
    target_warnings,
)
from penstock.io.blockdev import PcieLink, devices_under, sectors
from penstock.io.facts import DirectFacts, FileFacts, file_facts, host_facts, mount_of, target_facts
from penstock.io.files import SourceFile

GIB = 1 << 30


def write_tree(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


def link(root, name, target):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(root / target)


@pytest.fixture
def nvme(tmp_path):
    """A drive with a partition, on half of its PCIe lanes, at NUMA node 1."""
    bus = "sys/devices/pci0000:80/0000:81:00.0"
    disk = f"{bus}/nvme/nvme0/nvme0n1"
    write_tree(
        tmp_path,
        {
            f"{bus}/current_link_speed": "16.0 GT/s PCIe", f"{bus}/max_link_speed": "32.0 GT/s PCIe",
            f"{bus}/current_link_width": "4", f"{bus}/max_link_width": "4", f"{bus}/numa_node": "1",
            f"{disk}/queue/scheduler": "none [mq-deadline] kyber", f"{disk}/queue/nr_requests": "1023",
            f"{disk}/queue/max_sectors_kb": "512", f"{disk}/queue/max_segments": "127",
            f"{disk}/queue/rotational": "0", f"{disk}/device/model": "FAST 4TB   ",
            f"{disk}/nvme0n1p1/partition": "1",
            "proc/diskstats": " 259 0 nvme0n1 10 0 4000 5 7 0 600 3 0 1 1\n 259 1 nvme0n1p1 1 0 8 1 1 0 8 1 0 1 1",
        },
    )  # fmt: skip
    link(tmp_path, "sys/dev/block/259:1", f"{disk}/nvme0n1p1")
    link(tmp_path, "sys/class/block/nvme0n1", disk)
    link(tmp_path, "sys/class/block/nvme0n1p1", f"{disk}/nvme0n1p1")
    return tmp_path


def test_a_partition_leads_to_its_disk_and_bus(nvme):
    (device,) = devices_under(os.makedev(259, 1), root=nvme)
    assert (device.name, device.model, device.numa_node) == ("nvme0n1", "FAST 4TB", 1)
    assert (device.scheduler, device.nr_requests, device.max_segments) == ("mq-deadline", 1023, 127)
    assert device.max_request_nbytes == 512 * 1024
    assert device.pcie == PcieLink(16.0, 4, 32.0, 4)
    assert device.rotational is False
    assert {warning.code for warning in device_warnings(device)} == {"pcie_downgraded", "scheduler"}
    assert sectors("nvme0n1", root=nvme) == (4000 * 512, 600 * 512)
    assert sectors("sda", root=nvme) == (0, 0)


def test_an_array_leads_to_its_members(nvme):
    array = "sys/devices/virtual/block/md0"
    write_tree(nvme, {f"{array}/md/level": "raid0", f"{array}/md/chunk_size": "524288"})
    link(nvme, "sys/dev/block/9:0", array)
    link(nvme, f"{array}/slaves/nvme0n1p1", "sys/class/block/nvme0n1p1")
    outer, inner = devices_under(os.makedev(9, 0), root=nvme)
    assert (outer.name, outer.raid, outer.raid_chunk_nbytes, outer.members) == ("md0", "raid0", 524288, ("nvme0n1p1",))
    assert inner.name == "nvme0n1"


def test_a_file_system_with_its_own_device_number_is_found_by_its_source(nvme):
    (nvme / "dev").mkdir()
    (nvme / "dev/nvme0n1p1").write_text("")
    (device,) = devices_under(os.makedev(0, 44), "/dev/nvme0n1p1", root=nvme)
    assert device.name == "nvme0n1"
    assert devices_under(os.makedev(0, 44), "overlay", root=nvme) == ()


def test_a_disk_that_says_nothing(tmp_path):
    write_tree(tmp_path, {"sys/devices/virtual/block/vda/size": "1"})
    link(tmp_path, "sys/dev/block/254:0", "sys/devices/virtual/block/vda")
    (device,) = devices_under(os.makedev(254, 0), root=tmp_path)
    assert device.name == "vda"
    assert {device.model, device.pcie, device.numa_node, device.scheduler, device.rotational} == {None}
    assert list(device_warnings(device)) == []
    assert [warning.code for warning in device_warnings(replace(device, rotational=True))] == ["rotational"]


def test_mounts(tmp_path):
    write_tree(
        tmp_path,
        {
            "proc/self/mountinfo": "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
            "30 22 0:40 / /mnt rw - tmpfs tmpfs rw\n"
            "31 30 259:1 / /mnt/big\\040disk ro,noatime shared:3 - xfs /dev/nvme0n1p1 rw\nbroken"
        },
    )
    found = mount_of(tmp_path.__class__("/mnt/big disk/model"), root=tmp_path)
    assert (found.point, found.file_system, found.source, found.options) == (
        "/mnt/big disk", "xfs", "/dev/nvme0n1p1", "ro,noatime",
    )  # fmt: skip
    assert mount_of(tmp_path.__class__("/mnt/other"), root=tmp_path).file_system == "tmpfs"
    assert mount_of(tmp_path.__class__("/mntx"), root=tmp_path).file_system == "ext4"
    assert mount_of(tmp_path.__class__("/x"), device=os.makedev(259, 1), root=tmp_path).file_system == "xfs"
    assert mount_of(tmp_path.__class__("/x"), root=tmp_path / "none") is None


@pytest.fixture
def host(tmp_path):
    write_tree(
        tmp_path,
        {
            "proc/meminfo": "MemTotal:       65536 kB\nHugePages_Free:       7", "proc/self/cgroup": "0::/a",
            "proc/sys/fs/aio-nr": "60000", "proc/sys/fs/aio-max-nr": "65536",
            "proc/sys/kernel/io_uring_disabled": "2", "sys/fs/cgroup/a/memory.max": str(32 << 20),
            "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
            "sys/devices/system/node/node0/x": "", "sys/devices/system/node/node1/x": "",
        },
    )  # fmt: skip
    return host_facts(root=tmp_path)


def test_the_host(host):
    assert (host.memory_nbytes, host.free_huge_pages, host.numa_nodes) == (64 << 20, 7, 2)
    assert (host.aio_nr, host.aio_max_nr, host.io_uring_disabled) == (60000, 65536, 2)
    assert (host.transparent_huge_pages, host.cgroup_limit_nbytes) == ("never", 32 << 20)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert host.memlock_nbytes == (None if soft == resource.RLIM_INFINITY else soft)
    quiet = replace(host, transparent_huge_pages="madvise", aio_nr=0, memlock_nbytes=None, cgroup_limit_nbytes=None)
    assert list(host_warnings(quiet)) == []
    loud = replace(host, memlock_nbytes=65536)
    assert {warning.code for warning in host_warnings(loud)} == {
        "thp_never", "aio_nearly_used", "memlock_small", "cgroup_limit",
    }  # fmt: skip
    assert all(warning.text and warning.fix for warning in host_warnings(loud))


def test_a_host_that_says_nothing(tmp_path):
    host = host_facts(root=tmp_path)
    assert (host.memory_nbytes, host.aio_nr, host.transparent_huge_pages, host.numa_nodes) == (0, None, None, 1)


def test_the_target_and_its_warnings(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 8192)
    file = SourceFile.identify(path)
    target = target_facts(path, file, DirectFacts(works=True, reason=None, memory_alignment=512, offset_alignment=512))
    assert target.free_nbytes <= target.total_nbytes
    assert target.device == f"{os.major(file.device)}:{os.minor(file.device)}"
    target = replace(target, file_system="ext4", devices=(), total_nbytes=100 * GIB, free_nbytes=50 * GIB)
    assert list(target_warnings(target)) == []
    refused = DirectFacts(
        works=False, reason="open refuses O_DIRECT (EINVAL)", memory_alignment=None, offset_alignment=None
    )
    worst = replace(target, file_system="fuse.sshfs", free_nbytes=GIB, direct=refused)
    codes = {warning.code: warning for warning in target_warnings(worst)}
    assert set(codes) == {"no_direct", "file_system", "low_free_space"}
    assert "open refuses O_DIRECT (EINVAL)" in codes["no_direct"].text


def test_the_file_and_its_warnings(make_file):
    file, _ = make_file(3 << 20)
    facts = file_facts(file, created=False, written_nbytes=0)
    assert facts.nbytes == 3 << 20
    assert facts.extents is None or facts.extents >= 1
    assert facts.cached_share is None or 0 <= facts.cached_share <= 1
    codes = {warning.code for warning in file_warnings(FileFacts(True, GIB // 2, 0, extents=1000, cached_share=0.5))}
    assert codes == {"cached", "fragmented", "small_file"}
    assert list(file_warnings(FileFacts(True, 4 * GIB, 0, extents=40, cached_share=0.0))) == []


def test_what_only_disk_and_gpu_together_show():
    crossed = path_warnings("disk", rate=7e9, nodes={0}, host_to_device=6e9, device_node=1)
    assert [warning.code for warning in crossed] == ["numa_crossed", "copy_slower_than_disk"]
    assert list(path_warnings("disk", rate=7e9, nodes={1}, host_to_device=50e9, device_node=1)) == []
    assert list(path_warnings("disk", rate=None, nodes=set(), host_to_device=None, device_node=None)) == []
