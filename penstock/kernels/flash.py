"""Plain attention of many sequences in one call of torch's flash kernel, on CUDA.

The kernel takes sequences of different lengths back to back. Keys that lie in different places are copied together
first, a bounded number of bytes at a time: that costs less than a call for each sequence. On one H100, with 64 query
and 8 key heads of size 128: decode of 64 sequences of 1,024 tokens 12.5 -> 3.5 ms, 4,096 tokens after 4,096 others
32 -> 2.6 ms (`attend` with masks -> this).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

__all__ = ["MAX_HEAD_SIZE", "attend_prompts", "attend_together", "can_attend_together"]

MAX_HEAD_SIZE = 256
"""Head sizes up to this have kernels that keep no scores in memory."""


def can_attend_together(query: Tensor, value: Tensor) -> bool:
    """Say whether the kernel takes these heads: query [..., D], value [..., Dv]."""
    size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in {torch.float16, torch.bfloat16}
        and size == value.shape[-1] <= MAX_HEAD_SIZE
        and size % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def attend_prompts(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None,
    out: Tensor,
) -> None:
    """Attend causally where all that sequences have is new, and lies back to back: nothing is copied together.

    query [T, Hq, D], keys [T, H, D] and values [T, H, D] of sequences of these lengths, into out [T, Hq, D]. A query
    sees the last `window` keys up to its own position, or all of them.
    """
    sizes = tuple(lengths)
    out.copy_(_flash(query, keys, values, sizes, sizes, scale=scale, window=window))


def attend_together(
    query: Tensor,
    rows: Iterable[tuple[Tensor, ...]],
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None,
    copy_nbytes: int,
    out: Tensor,
) -> None:
    """Attend causally: query [T, Hq, D] of all sequences, rows (keys, values) [L, H, D] of each, into out [T, Hq, D].

    `lengths` says how many queries each sequence has; they are those of the last of its L positions.
    At most `copy_nbytes` bytes of keys and values are copied together for one call; a sequence with more goes alone,
    without a copy. A query sees the last `window` keys up to its own position, or all of them.
    """
    first_token = 0
    for group in _groups(lengths, rows, window, copy_nbytes):
        queries = tuple(length for length, _, _ in group)
        num_keys = tuple(keys.shape[0] for _, keys, _ in group)
        end = first_token + sum(queries)
        keys = group[0][1] if len(group) == 1 else torch.cat([one for _, one, _ in group])
        values = group[0][2] if len(group) == 1 else torch.cat([one for _, _, one in group])
        made = _flash(query[first_token:end], keys, values, queries, num_keys, scale=scale, window=window)
        out[first_token:end].copy_(made)
        first_token = end


def _flash(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    queries: tuple[int, ...],
    num_keys: tuple[int, ...],
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """Call torch's kernel for sequences of so many queries and keys each, back to back."""
    made: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        keys,
        values,
        _offsets(queries, query.device),
        _offsets(num_keys, query.device),
        max(queries),
        max(num_keys),
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )[0]
    return made


def _groups(
    lengths: Sequence[int], rows: Iterable[tuple[Tensor, ...]], window: int | None, copy_nbytes: int
) -> Iterator[list[tuple[int, Tensor, Tensor]]]:
    """Cut off keys that no query sees, and group sequences whose keys together stay below the limit."""
    group: list[tuple[int, Tensor, Tensor]] = []
    nbytes = 0
    for length, (keys, values) in zip(lengths, rows, strict=True):
        first = 0 if window is None else max(keys.shape[0] - length - window + 1, 0)
        seen = (length, keys[first:], values[first:])
        needed = 2 * seen[1].numel() * keys.element_size()
        if group and nbytes + needed > copy_nbytes:
            yield group
            group, nbytes = [], 0
        group.append(seen)
        nbytes += needed
    yield group


@lru_cache(maxsize=256)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where each sequence begins, and the end [N + 1]; the same for all layers of a pass, so kept."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
