"""The names of what keys and values may rest as."""

from __future__ import annotations

from penstock.errors import ConfigError

__all__ = ["KV_DTYPES", "check_kv_dtype"]

KV_DTYPES = ("auto", "bf16", "fp8", "int8", "int4")
"""`auto` keeps rows as they come, in the model's dtype; nothing is quantised unless it is asked for."""


def check_kv_dtype(name: str) -> str:
    """Return `name`. Raises ConfigError when it is no dtype of keys and values."""
    if name not in KV_DTYPES:
        raise ConfigError("not a dtype of keys and values", wanted=f"one of {', '.join(KV_DTYPES)}", got=repr(name))
    return name
