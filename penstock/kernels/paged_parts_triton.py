"""Into which parts paged attention cuts a sequence, in Triton: the same for every kernel and for what joins them."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["first_key", "part_size"]


@triton.jit
def first_key(length, window, chunk):
    """Return the first key that the last token sees."""
    first = length * 0
    if window > 0:
        first = tl.maximum(length - window, 0)
    if chunk > 0:
        first = tl.maximum(first, (length - 1) // chunk * chunk)
    return first


@triton.jit
def part_size(num_seen, PART_TOKENS: tl.constexpr, MAX_PARTS: tl.constexpr):
    """Return how many keys a part of so many has."""
    even = tl.cdiv(tl.cdiv(num_seen, MAX_PARTS), 64) * 64
    return tl.maximum(even, PART_TOKENS)
