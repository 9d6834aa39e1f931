"""What a run may use: the device, and the bytes of each tier. Left open, they are filled in; not there, refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from penstock.engine.model.build import StreamedModel
from penstock.engine.planner import LIMITS
from penstock.errors import BudgetError, ConfigError, DeviceError
from penstock.io.limits import available_memory
from penstock.kernels.fp8_linear import check_fp8
from penstock.offload.codec import ACTIVATION_DTYPES
from penstock.offload.plan import PassLimits
from penstock.offload.tiers import MemoryTiers, format_size

__all__ = ["check_activation_dtype", "check_rehearsal_fits", "find_device", "limits_of", "resolve"]

LIBRARIES_NBYTES = 128 << 20
"""What torch, transformers and the kernels' libraries take in RAM once they are used, at most, measured."""

logger = logging.getLogger("penstock.engine")


def find_device(name: str) -> torch.device:
    """Return the device of that name; "auto" takes a GPU where there is one. Raises DeviceError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        logger.info("device %s: torch %s", name, "sees a GPU" if name == "cuda" else "sees no GPU")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError("not a device", wanted="auto, cpu, cuda or cuda:N", got=name) from None
    if device.type not in LIMITS:
        raise DeviceError("a device that Penstock does not run on", wanted="cpu or cuda", got=name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise DeviceError("this machine has no such GPU", wanted=f"one of {torch.cuda.device_count()}", got=name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def check_activation_dtype(name: str, device: torch.device) -> bool:
    """Return whether products are in FP8. Raises ConfigError for an unknown name, DeviceError where it cannot be."""
    if name not in ACTIVATION_DTYPES:
        wanted = f"one of {', '.join(ACTIVATION_DTYPES)}"
        raise ConfigError("not a dtype of activations", wanted=wanted, got=repr(name))
    if name == "fp8":
        check_fp8(device)
    return name == "fp8"


def check_rehearsal_fits(model: StreamedModel, device: torch.device) -> None:
    """Refuse a model of which not even one layer and the resident unit fit, before anything is allocated."""
    needed = model.resident.nbytes + max(layout.nbytes for layout in model.layer_layouts)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if needed > free:
        raise BudgetError(
            "one layer plus the resident unit are more than the device has",
            wanted=f"more than {format_size(needed)}",
            got=f"{format_size(free)} free",
            fix="Use a device with more memory, or --dtype bfloat16 where the checkpoint is wider.",
        )


def limits_of(device: torch.device, asked: Mapping[str, int]) -> PassLimits:
    """Return the device's limits, but for those that were asked for, by their names."""
    for name, value in asked.items():
        least = 0 if name == "device_layers" else 1
        if value < least:
            raise ConfigError(f"{name} is out of range", wanted=f"at least {least}", got=value)
    return replace(LIMITS[device.type], **asked)


def resolve(tiers: MemoryTiers, device: torch.device, *, staging_nbytes: int, pretended: bool) -> MemoryTiers:
    """Fill in what the caller left open, and refuse what is not there. Raises BudgetError.

    Of free RAM, what reads land in (`staging_nbytes`) and what libraries will take is for no budget.

    A pretended host budget, of a checkpoint whose layers share bytes, may be any: what is really taken is less, and
    checked when it is allocated.
    """
    host = max(available_memory() - staging_nbytes - LIBRARIES_NBYTES, 0)
    on_cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_cuda else host
    wanted = tiers.device if tiers.device is not None else free * 9 // 10 if on_cuda else free // 2
    left = host if on_cuda else max(host - wanted, 0)
    host_wanted = tiers.host if tiers.host is not None else left * 8 // 10
    for name, asked, there in (("device", wanted, free), ("host", host_wanted, left)):
        if asked > there and not (pretended and name == "host"):
            raise BudgetError(
                f"the {name} memory budget is more than what is free",
                wanted=format_size(asked),
                got=f"{format_size(there)} free, without what the process needs besides",
                fix=f"Lower the {name} memory.",
            )
    kv_host = tiers.kv_host
    if host_wanted > left and kv_host is None:
        logger.info("the host budget is more than there is, so it has no keys and values unless they are asked for")
        kv_host = 0
    return replace(tiers, device=wanted, host=host_wanted, kv_host=kv_host)
