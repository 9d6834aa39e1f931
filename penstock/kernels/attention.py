"""Attention of one sequence, by torch's kernel where scores are plain and step by step where they are not.

Keys and values are token-major, as a cache keeps them. Queries are taken in blocks, so that masks and scores stay
small.
Shapes: n queries, L keys; Hq query heads, H key heads; D and Dv head sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from penstock.kernels.flash import MAX_HEAD_SIZE

__all__ = ["Rule", "attend"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Which keys a query sees, and how scores are made.

    A query at position p sees keys up to p; only the last `window` of them; only those of its `chunk`. `softcap`,
    `sinks` [Hq] and `bias` (positions of the keys [L] -> [Hq, 1, L], added to the scaled scores) change the scores.
    """

    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Callable[[Tensor], Tensor] | None = None

    @property
    def plain(self) -> bool:
        """Whether the scores are those of plain attention."""
        return self.softcap is None and self.sinks is None and self.bias is None

    def of_heads(self, heads: slice) -> Rule:
        """Return the same rule for some of the query heads."""
        bias, sinks = self.bias, self.sinks
        return replace(
            self,
            sinks=None if sinks is None else sinks[heads],
            bias=None if bias is None else lambda positions: bias(positions)[heads],
        )

    def first_key(self, query: int) -> int:
        """The first key that the query at this position sees."""
        first = 0 if self.window is None else max(query - self.window + 1, 0)
        return first if self.chunk is None else max(first, query // self.chunk * self.chunk)


def attend(query: Tensor, keys: Tensor, values: Tensor, rule: Rule, *, max_scores: int, out: Tensor) -> None:
    """Attend for one sequence: query [Hq, n, D], keys [L, H, D], values [L, H, Dv] into out [n, Hq, Dv].

    The queries are those of the last n of the L positions. They are taken in blocks, so that scores and masks stay
    below `max_scores` elements, or those of one query; that takes up to 16 bytes for each.
    """
    length, end_position = query.shape[1], keys.shape[0]
    start = end_position - length
    key, value = keys.transpose(0, 1), values.transpose(0, 1)
    fast = key.shape[-1] == value.shape[-1] <= MAX_HEAD_SIZE
    if fast and rule.plain and start == 0 and length > 1 and _sees_all(rule, length):
        grouped = query.shape[0] != key.shape[0]
        made = scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=rule.scale, enable_gqa=grouped
        )
        out.copy_(made[0].transpose(0, 1))
        return
    score = _plain if rule.plain else _scored
    num_rows = query.shape[0] // key.shape[0] if rule.plain and fast else query.shape[0]  # of the mask, or of scores
    begin = 0
    while begin < length:
        first = rule.first_key(start + begin)
        size = max(max_scores // (num_rows * (end_position - first)), 1)
        end = min(begin + size, length)
        last = start + end
        part, seen = query[:, begin:end], slice(first, last)
        made = score(part, key[:, seen], value[:, seen], rule, start=start + begin, first=first)
        out[begin:end].copy_(made.transpose(0, 1))
        begin = end


def _sees_all(rule: Rule, length: int) -> bool:
    """Whether every query of a sequence of `length` tokens sees all keys before it."""
    return (rule.window is None or length <= rule.window) and (rule.chunk is None or length <= rule.chunk)


def _plain(query: Tensor, key: Tensor, value: Tensor, rule: Rule, *, start: int, first: int) -> Tensor:
    """Attend with torch's kernel. The query heads of a key head become its rows, so that keys need no repetition."""
    num_heads, num_queries, size = query.shape
    groups = num_heads // key.shape[0]
    mask = _visible(num_queries, key.shape[1], rule, start=start, first=first, device=query.device)
    if mask is not None and groups > 1:
        mask = mask.repeat(groups, 1)
    made = scaled_dot_product_attention(
        query.reshape(1, key.shape[0], groups * num_queries, size), key[None], value[None], mask, scale=rule.scale
    )
    return made.reshape(num_heads, num_queries, value.shape[-1])


def _scored(query: Tensor, key: Tensor, value: Tensor, rule: Rule, *, start: int, first: int) -> Tensor:
    """Attend step by step, in the order of operations of transformers' eager attention; softmax in float32."""
    num_heads, num_queries, size = query.shape
    num_keys = key.shape[1]
    folded = query.reshape(key.shape[0], -1, size)
    scores = (folded @ key.transpose(1, 2)).view(num_heads, num_queries, num_keys) * rule.scale
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if rule.bias is not None:
        scores = scores + rule.bias(torch.arange(first, first + num_keys, device=query.device))
    visible = _visible(num_queries, num_keys, rule, start=start, first=first, device=query.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if rule.sinks is not None:
        sinks = rule.sinks.to(scores.dtype).view(-1, 1, 1).expand(-1, num_queries, 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1, dtype=torch.float32)[..., :-1]
    else:
        weights = scores.softmax(-1, dtype=torch.float32)
    made = weights.to(value.dtype).view(key.shape[0], -1, num_keys) @ value
    return made.view(num_heads, num_queries, -1)


def _visible(
    num_queries: int, num_keys: int, rule: Rule, *, start: int, first: int, device: torch.device
) -> Tensor | None:
    """Return [num_queries, num_keys], true where a query sees a key; None where the one query sees all of them.

    Queries are at positions `start` on and keys at `first` on; the keys end with the last query's.
    """
    if num_queries == 1:
        return None
    queries = torch.arange(start, start + num_queries, device=device)[:, None]
    keys = torch.arange(first, first + num_keys, device=device)
    visible = keys <= queries
    if rule.window is not None:
        visible &= keys > queries - rule.window
    if rule.chunk is not None:
        visible &= keys >= queries // rule.chunk * rule.chunk
    return visible
