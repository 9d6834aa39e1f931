"""The one attention function: ragged, over the spans of the running micro-batch, with keys and values in the KV store.

transformers calls it for every layer of every family that uses its attention interface. It is not registered as a mask
function, so transformers builds no masks; positions and lengths come from the spans, which are Python numbers, so
nothing here waits for the device.

Shapes: T tokens of the micro-batch, n of one span, L keys; Hq query heads, H key heads; D and Dv head sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from penstock.engine.batch import CURRENT, Span
from penstock.engine.model.flash import MAX_HEAD_SIZE, attend_together, can_attend_together
from penstock.errors import UnsupportedModelError

__all__ = ["ATTENTION", "Rule", "attend", "attend_spans", "penstock_attention", "rule_of"]

ATTENTION = "penstock"
"""The name under which transformers finds `penstock_attention`."""

_SCORE_ELEMENTS = 1 << 24
"""Queries are taken in blocks so that scores and masks stay below this many elements (64 MiB of float32)."""


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

    def first_key(self, query: int) -> int:
        """The first key that the query at this position sees."""
        first = 0 if self.window is None else max(query - self.window + 1, 0)
        return first if self.chunk is None else max(first, query // self.chunk * self.chunk)


def penstock_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attend: query [1, Hq, T, D], key [1, H, T, D], value [1, H, T, Dv] of all spans -> [1, T, Hq, Dv].

    An adapter may have put its own function on the module as `penstock_attention`.
    """
    if attention_mask is not None:
        raise UnsupportedModelError(f"{type(module).__name__} computes attention masks of its own")
    own: Any = getattr(module, "penstock_attention", None)
    if own is not None:
        attended: Tensor = own(query, key, value, **arguments)
    else:
        attended = attend_spans(module, query, key, value, rule_of(module, query, **arguments))
    return attended, None


def rule_of(
    module: Any,
    query: Tensor,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Rule:
    """Make the rule from what transformers passes and, where a family does not pass it, from the layer's type."""
    config = getattr(module, "config", None)
    chunk = None
    if config is not None:
        config = config.get_text_config()
        kinds = getattr(config, "layer_types", None)
        kind = kinds[module.layer_idx] if kinds and module.layer_idx < len(kinds) else None
        if kind == "chunked_attention":
            chunk = config.attention_chunk_size
        elif kind == "sliding_attention" and sliding_window is None:
            sliding_window = config.sliding_window
    return Rule(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=sliding_window,
        chunk=chunk,
        softcap=softcap,
        sinks=s_aux,
    )


def attend_spans(
    module: Any, query: Tensor, key: Tensor, value: Tensor, rule: Rule, *, layer: int | None = None
) -> Tensor:
    """Store the new keys and values of every span and attend, sequence by sequence; same shapes as the interface.

    The store knows them by `layer`, the module's own number unless given.
    """
    batch = CURRENT.get()
    layer = module.layer_idx if layer is None else layer
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    shared = module.kv_shared_layer_index if getattr(module, "is_kv_shared_layer", False) else None
    made = query.new_empty((1, query.shape[2], query.shape[1], value.shape[-1]))
    ends = list(accumulate(span.length for span in batch.spans))
    if shared is None:
        rows = [
            batch.kv.append(
                layer, span.sequence, span.start, keys[end - span.length : end], values[end - span.length : end]
            )
            for span, end in zip(batch.spans, ends, strict=True)
        ]
    else:
        rows = [batch.kv.read(shared, span.sequence) for span in batch.spans]
    chunked = rule.chunk is not None and max(span.end for span in batch.spans) > rule.chunk
    one_prompt = len(batch.spans) == 1 and batch.spans[0].start == 0  # torch picks the best kernel for it
    if rule.plain and not chunked and not one_prompt and can_attend_together(query, value):
        flat = query[0].transpose(0, 1)
        attend_together(flat, rows, batch.spans, scale=rule.scale, window=rule.window, out=made[0])
        return made
    for span, end, kept in zip(batch.spans, ends, rows, strict=True):
        begin = end - span.length
        attend(query[0, :, begin:end], kept[0], kept[1], span, rule, out=made[0, begin:end])
    return made


def attend(query: Tensor, keys: Tensor, values: Tensor, span: Span, rule: Rule, *, out: Tensor) -> None:
    """Attend for one span: query [Hq, n, D], keys [L, H, D], values [L, H, Dv] into out [n, Hq, Dv]."""
    key, value = keys.transpose(0, 1), values.transpose(0, 1)
    fast = key.shape[-1] == value.shape[-1] <= MAX_HEAD_SIZE
    if fast and rule.plain and span.start == 0 and span.length > 1 and _sees_all(rule, span.end):
        grouped = query.shape[0] != key.shape[0]
        made = scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=rule.scale, enable_gqa=grouped
        )
        out.copy_(made[0].transpose(0, 1))
        return
    score = _plain if rule.plain else _scored
    num_rows = query.shape[0] // key.shape[0] if rule.plain and fast else query.shape[0]  # of the mask, or of scores
    begin = 0
    while begin < span.length:
        first = rule.first_key(span.start + begin)
        size = max(_SCORE_ELEMENTS // (num_rows * (span.end - first)), 1)
        end = min(begin + size, span.length)
        last = span.start + end
        part, seen = query[:, begin:end], slice(first, last)
        made = score(part, key[:, seen], value[:, seen], rule, start=span.start + begin, first=first)
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


AttentionInterface.register(ATTENTION, penstock_attention)
