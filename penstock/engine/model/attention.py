"""The one attention function: ragged, over the spans of the running micro-batch, with keys and values in the KV store.

transformers calls it for every layer of every family that uses its attention interface. It is not registered as a mask
function, so transformers builds no masks; positions and lengths come from the spans, which are Python numbers, so
nothing here waits for the device.

Shapes: T tokens of the micro-batch; Hq query heads, H key heads; D and Dv head sizes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from penstock.engine.batch import CURRENT, MicroBatch
from penstock.engine.model.hosted import attend_hosted
from penstock.engine.model.opaque import opaque
from penstock.errors import UnsupportedModelError
from penstock.kernels.attention import Rule, attend
from penstock.kernels.flash import attend_prompts, attend_together, can_attend_together
from penstock.kernels.paged import find_paged
from penstock.offload.host_kv import HostRows
from penstock.offload.kv import Rows
from penstock.offload.plan import SCORE_NBYTES

__all__ = ["ATTENTION", "attend_rows", "attend_spans", "penstock_attention", "rule_of"]

ATTENTION = "penstock"
"""The name under which transformers finds `penstock_attention`."""


@opaque
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
    if getattr(module, "is_kv_shared_layer", False):
        batch.note_window(module.kv_shared_layer_index, None)
        kept = batch.kv.read(module.kv_shared_layer_index, batch.places)
    else:
        number = module.layer_idx if layer is None else layer
        batch.note_window(number, rule.window if rule.chunk is None and rule.bias is None else None)
        kept = batch.kv.append(number, batch.places, key[0].transpose(0, 1), value[0].transpose(0, 1))
    return attend_rows(query[0], kept, rule)[None]


def attend_rows(query: Tensor, kept: Rows | HostRows, rule: Rule) -> Tensor:
    """Attend with query [Hq, T, D] over the keys and values that the store keeps -> [T, Hq, Dv].

    Sequences with one new token, which come first, go through a kernel for blocks where there is one; of the others
    many together through torch's, or each alone. Prompts that begin here see nothing but this micro-batch's own rows.
    """
    if isinstance(kept, HostRows):
        return attend_hosted(query, kept, rule)
    batch, singles = CURRENT.get(), kept.places.singles
    keys, values = kept.blocks
    made = query.new_empty((query.shape[1], query.shape[0], kept.value_size))
    flat, first = query.transpose(0, 1), 0
    limit = SCORE_NBYTES * batch.max_scores
    if singles.count and (paged := find_paged(flat, keys, values, rule, kept.value_size)):
        first = singles.count
        options: dict[str, Any] = {"rule": rule, "max_length": singles.max_length, "workspace_nbytes": limit}
        options |= zip(("key_scales", "value_scales"), kept.scales, strict=True)
        paged(flat[:first], keys, values, singles.table, singles.lengths, **options, out=made[:first])
    rest = range(first, len(batch.spans))
    if rest and _goes_together(batch, kept, rule) and can_attend_together(query, made):
        how: dict[str, Any] = {"scale": rule.scale, "window": rule.window}
        prompts = _prompts(batch, kept, rest, limit)
        if prompts:
            some = slice(kept.places.offsets[prompts.start], kept.places.offsets[prompts.stop])
            lengths = [batch.spans[index].length for index in prompts]
            keys, values = kept.of_new(some)
            attend_prompts(flat[some], keys, values, lengths, **how, out=made[some])
            rest = range(first, prompts.start)
        if rest and all(kept.copy_nbytes(index) <= limit for index in rest):
            some = slice(first, kept.places.offsets[rest.stop])
            lengths = [batch.spans[index].length for index in rest]
            rows = (kept.of(index) for index in rest)
            copied = any(kept.copy_nbytes(index) for index in rest)
            nbytes = limit // 2 if copied else limit  # what is copied together has been copied once then
            attend_together(flat[some], rows, lengths, **how, copy_nbytes=nbytes, out=made[some])
            return made
    for index in rest:
        _attend_alone(query, kept, index, rule, max_scores=batch.max_scores, out=made)
    return made


def _goes_together(batch: MicroBatch, kept: Rows, rule: Rule) -> bool:
    """Whether torch's kernel for many sequences knows the rule, and there are many."""
    chunked = rule.chunk is not None and max(kept.places.ends) > rule.chunk
    one_prompt = len(batch.spans) == 1 and batch.spans[0].start == 0  # torch picks the best kernel for it
    return rule.plain and not chunked and not one_prompt


def _prompts(batch: MicroBatch, kept: Rows, rest: range, limit_nbytes: int) -> range:
    """Return the last of these sequences, as far as all that they have is new, and can be had within the limit."""
    first = rest.stop
    while kept.new and first > rest.start and batch.spans[first - 1].start == 0:
        first -= 1
    num_tokens = sum(batch.spans[index].length for index in range(first, rest.stop))
    return range(first if kept.new_nbytes(num_tokens) <= limit_nbytes else rest.stop, rest.stop)


def _attend_alone(query: Tensor, kept: Rows, index: int, rule: Rule, *, max_scores: int, out: Tensor) -> None:
    """Attend for one sequence: by parts of the heads, where its keys must be copied together first."""
    begin, end = kept.places.offsets[index : index + 2]
    num_keys = kept.blocks[0].shape[2]
    scattered = kept.copy_nbytes(index) > 0
    scores = max_scores // 2 if scattered else max_scores
    for heads in kept.head_groups(index, SCORE_NBYTES * scores):
        group = query.shape[0] // num_keys
        part = slice(heads.start * group, heads.stop * group)
        keys, values = kept.of(index, heads)
        some = rule if part.stop - part.start == query.shape[0] else rule.of_heads(part)
        attend(query[part, begin:end], keys, values, some, max_scores=scores, out=out[begin:end, part])


AttentionInterface.register(ATTENTION, penstock_attention)
