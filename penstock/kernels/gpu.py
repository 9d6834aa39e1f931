"""Find the Triton kernels, which only machines with a GPU need and have."""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from types import ModuleType

__all__ = ["triton_kernels"]

logger = logging.getLogger("penstock.kernels")


@lru_cache(maxsize=2)
def triton_kernels(name: str = "expand") -> ModuleType | None:
    """Return the module `penstock.kernels.{name}_triton`, or None, logged, without Triton: torch does it then."""
    try:
        return importlib.import_module(f"penstock.kernels.{name}_triton")
    except ImportError as error:
        logger.warning("weights are expanded with plain torch operations, which is slow: %s", error)
        return None
