"""The one attention function: ragged, over the spans of the running micro-batch, with keys and values in the KV store.

transformers calls it for every layer of every family that uses its attention interface. It is not registered as a mask
function, so transformers builds no masks; positions and lengths come from the spans, which are Python numbers, so
nothing here waits for the device.

Shapes: T tokens of the micro-batch; Hq query heads, H key heads; D and Dv head sizes.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from penstock.engine.batch import CURRENT
from penstock.errors import UnsupportedModelError
from penstock.kernels.attention import Rule, attend
from penstock.kernels.flash import attend_together, can_attend_together

__all__ = ["ATTENTION", "attend_spans", "penstock_attention", "rule_of"]

ATTENTION = "penstock"
"""The name under which transformers finds `penstock_attention`."""


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
        rows = [  # the owner may have stored later tokens, of the next micro-batch of the same pass
            tuple(kept[: span.end] for kept in batch.kv.read(shared, span.sequence)) for span in batch.spans
        ]
    chunked = rule.chunk is not None and max(span.end for span in batch.spans) > rule.chunk
    one_prompt = len(batch.spans) == 1 and batch.spans[0].start == 0  # torch picks the best kernel for it
    if rule.plain and not chunked and not one_prompt and can_attend_together(query, value):
        flat = query[0].transpose(0, 1)
        lengths = [span.length for span in batch.spans]
        limit = 16 * batch.max_scores
        attend_together(flat, rows, lengths, scale=rule.scale, window=rule.window, copy_nbytes=limit, out=made[0])
        return made
    for span, end, kept in zip(batch.spans, ends, rows, strict=True):
        begin = end - span.length
        attend(query[0, :, begin:end], kept[0], kept[1], rule, max_scores=batch.max_scores, out=made[0, begin:end])
    return made


AttentionInterface.register(ATTENTION, penstock_attention)
