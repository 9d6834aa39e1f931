"""Rooms for schedulers: memory for keys and values that nobody fills."""

from penstock.offload.homes import KVHomes
from penstock.offload.kv import KVCost, KVStore


def made_room(limit, *, cost=None, host_nbytes=0, kernels=None):
    """Return room for keys and values on the device, or there and in host RAM."""
    cost = cost or KVCost(1)
    return KVHomes(KVStore(limit_nbytes=limit, cost=cost), cost=cost, host_nbytes=host_nbytes, kernel_directory=kernels)
