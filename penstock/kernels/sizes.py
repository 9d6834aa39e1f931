"""Sizes that formats fix: for kernels, and for code that counts bytes without torch."""

from __future__ import annotations

__all__ = ["ANS_CHUNK", "EXACT_BLOCK", "LARGEST_FP8", "int4_group_size"]

EXACT_BLOCK = 1024
"""Values of the `exact` codec that share an entry of `start`."""

ANS_CHUNK = 1 << 16
"""Values of the `exact-ans` codec whose exponents are compressed together."""

LARGEST_FP8 = 448.0
"""The largest number of e4m3."""

_INT4_GROUP = 32


def int4_group_size(size: int) -> int:
    """Return how many neighbours of a row of `size` share a step: an even number, so that two groups fill bytes."""
    even = -(-size // -(-size // _INT4_GROUP))
    return even + even % 2
