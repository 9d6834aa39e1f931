"""The names of what keys and values may rest as, and how many bytes that takes."""

from __future__ import annotations

from penstock.errors import ConfigError
from penstock.kernels.sizes import int4_group_size

__all__ = ["KV_DTYPES", "check_kv_dtype", "row_nbytes"]

KV_DTYPES = ("auto", "bf16", "fp8", "int8", "int4")
"""`auto` keeps rows as they come, in the model's dtype; nothing is quantised unless it is asked for."""


def check_kv_dtype(name: str) -> str:
    """Return `name`. Raises ConfigError when it is no dtype of keys and values."""
    if name not in KV_DTYPES:
        raise ConfigError("not a dtype of keys and values", wanted=f"one of {', '.join(KV_DTYPES)}", got=repr(name))
    return name


def row_nbytes(size: int, kv_dtype: str, *, itemsize: int) -> int:
    """Return what a row of `size` elements of `itemsize` bytes rests in, scales included, as `kernels.quant_kv` has it.

    A row is what one layer keeps of one token and head.
    """
    match check_kv_dtype(kv_dtype):
        case "auto":
            return size * itemsize
        case "bf16":
            return size * 2
        case "int4":
            group = int4_group_size(size)
            return -(-size // group) * (group // 2 + 2 * 2)
        case _:
            return size + 4
