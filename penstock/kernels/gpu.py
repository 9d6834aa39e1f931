"""Find the Triton kernels, which only machines with a GPU need and have."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from subprocess import SubprocessError
from types import ModuleType

import torch

__all__ = ["triton_kernels"]

logger = logging.getLogger("penstock.kernels")


@cache
def triton_kernels(name: str, device: torch.device) -> ModuleType | None:
    """Return the module `penstock.kernels.{name}`, or None where `device` does without: plain torch is slower."""
    return importlib.import_module(f"penstock.kernels.{name}") if _can_run(device) else None


@cache
def _can_run(device: torch.device) -> bool:
    """Say whether this machine can build Triton's kernels, and the GPU run them; if not, log why."""
    try:
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise RuntimeError("the GPU is older than compute capability 8.0")
        driver = importlib.import_module("triton.runtime").driver
        driver.active.get_current_target()  # builds what every kernel needs, with the machine's C compiler
    except (ImportError, OSError, RuntimeError, SubprocessError) as error:
        logger.warning("attention and coded weights go through plain torch, for want of Triton: %s", error)
        return False
    return True
