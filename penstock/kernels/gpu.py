"""Find the Triton kernels, which only machines with a GPU need and have."""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from types import ModuleType

__all__ = ["triton_kernels"]

logger = logging.getLogger("penstock.kernels")


@lru_cache(maxsize=2)
def triton_kernels(name: str = "expand_triton") -> ModuleType | None:
    """Return a module of kernels, or None, logged once, where Triton is missing: then plain torch does the work."""
    try:
        return importlib.import_module(f"penstock.kernels.{name}")
    except ImportError as error:
        logger.warning("weights are expanded with plain torch operations, which is slow: %s", error)
        return None
