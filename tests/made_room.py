"""Rooms for schedulers: memory for keys and values that nobody fills."""

from pathlib import Path

from penstock.io.settings import ReadSettings
from penstock.offload.disk_kv import DiskRoom
from penstock.offload.homes import KVHomes
from penstock.offload.kv import KVCost, KVStore


def made_room(limit, *, cost=None, host_nbytes=0, disk_blocks=0, kernels=None):
    """Return room for keys and values on the device, or also in host RAM and on the disk that the kernels are on."""
    cost = cost or KVCost(1)
    nvme = disk_blocks and DiskRoom(
        disk_blocks * cost.on_disk.block_nbytes,
        disk_blocks * cost.stride_nbytes,
        directory=Path(kernels).parent,
        settings=ReadSettings(backend="threads"),
    )
    store = KVStore(limit_nbytes=limit, cost=cost)
    return KVHomes(store, cost=cost, host_nbytes=host_nbytes, nvme=nvme or None, kernel_directory=kernels)
