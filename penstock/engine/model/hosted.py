"""Attention of a micro-batch whose keys and values are in host RAM.

- Sequences with one new token: beside their keys, on the CPU, while the forward is parked.
- Prompts from their first token on: on the device, with the keys that were just computed.
- Everything else: on the device, with keys that are copied from host RAM, one sequence and some heads after the other.

Shapes: T tokens of the micro-batch; Hq query heads, H key heads; D and Dv head sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from penstock.engine.batch import CURRENT
from penstock.engine.parking import park
from penstock.kernels.attention import Rule, attend
from penstock.kernels.flash import attend_prompts, can_attend_together
from penstock.offload.host_kv import HostRows
from penstock.offload.plan import SCORE_NBYTES

__all__ = ["attend_hosted"]

logger = logging.getLogger("penstock.engine")


def attend_hosted(query: Tensor, kept: HostRows, rule: Rule) -> Tensor:
    """Attend with query [Hq, T, D] over the keys and values that are kept in host RAM -> [T, Hq, Dv] on the device."""
    places, scores = kept.places, CURRENT.get().max_scores
    rule = _without_chunks(rule, max(places.ends))
    made = query.new_empty((query.shape[1], query.shape[0], kept.value_size))
    count = places.singles.count
    if count and not _runs_beside(rule, kept):
        count = 0
    beside = kept.home.attend(kept, query[:, :count].transpose(0, 1), rule) if count else None
    rest = range(count, len(places.ends))
    late = [index for index in rest if kept.known(index)]
    parts = [(index, heads) for index in late for heads in _head_groups(kept, index, SCORE_NBYTES * scores // 2)]
    fetched = _fetched(kept, parts)
    ahead = next(fetched, None)
    _attend_new(query, kept, [index for index in rest if not kept.known(index)], rule, max_scores=scores, out=made)
    if beside is not None or ahead is not None:
        park()
    if beside is not None:
        kept.home.send(kept.home.wait(beside), out=made[:count])
    for part in parts:
        assert ahead is not None
        known = kept.home.wait(ahead)
        ahead = next(fetched, None)
        _attend_part(query, kept, part, known, rule, max_scores=scores // 2, out=made)
    return made


def _without_chunks(rule: Rule, length: int) -> Rule:
    """Return the same rule, which says nothing of chunks where no sequence is longer than one."""
    if rule.chunk is None or length > rule.chunk:
        return rule
    return replace(rule, chunk=None)


def _runs_beside(rule: Rule, kept: HostRows) -> bool:
    """Say whether the CPU's kernel can follow this rule, and read these rows."""
    reason = "scores have a bias" if rule.bias is not None else "keys are seen in chunks" if rule.chunk else None
    reason = reason if kept.home.has_kernel else "the kernel reads no 4-bit rows"
    if reason is not None:
        _say_once(reason)
    return reason is None


@cache
def _say_once(reason: str) -> None:
    logger.info("keys and values in host RAM are copied to the device for attention: %s", reason)


def _head_groups(kept: HostRows, index: int, limit_nbytes: int) -> Iterator[slice]:
    """Yield all heads, in parts whose rows of one sequence take at most `limit_nbytes`, or one head's."""
    size = max(min(limit_nbytes // (kept.head_nbytes * kept.places.ends[index]), kept.num_heads), 1)
    for first in range(0, kept.num_heads, size):
        yield slice(first, min(first + size, kept.num_heads))


def _fetched(kept: HostRows, parts: Sequence[tuple[int, slice]]) -> Iterator[Future[tuple[Tensor, ...]]]:
    """Yield the copies of these heads of sequences, each when it has been asked for."""
    for index, heads in parts:
        yield kept.home.fetch(kept, index, heads)


def _joined(
    kept: HostRows, index: int, heads: slice, known: tuple[Tensor, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Put all keys and values of some heads of a sequence together on the device: what is known, and the new rows."""
    begin, end = kept.places.offsets[index : index + 2]
    whole = []
    for number, rows in enumerate(known):
        new = kept.new[number][begin:end, heads] if kept.new else rows[:0]
        made = torch.empty((len(rows) + len(new), *rows.shape[1:]), dtype=rows.dtype, device=device)
        kept.home.send(rows, out=made[: len(rows)])
        made[len(rows) :] = new
        whole.append(made)
    return kept.both(tuple(whole))


def _attend_new(
    query: Tensor, kept: HostRows, indices: Sequence[int], rule: Rule, *, max_scores: int, out: Tensor
) -> None:
    """Attend for sequences whose first tokens these are."""
    if not indices:
        return
    keys, values = kept.both(kept.new)
    borders = kept.places.offsets
    spans = [slice(borders[index], borders[index + 1]) for index in indices]
    neighbours = indices[-1] - indices[0] == len(indices) - 1
    if len(spans) > 1 and neighbours and rule.plain and rule.chunk is None and can_attend_together(query, values):
        every = slice(spans[0].start, spans[-1].stop)
        attend_prompts(
            query[:, every].transpose(0, 1),
            keys[every],
            values[every],
            [span.stop - span.start for span in spans],
            scale=rule.scale,
            window=rule.window,
            out=out[every],
        )
        return
    for span in spans:
        attend(query[:, span], keys[span], values[span], rule, max_scores=max_scores, out=out[span])


def _attend_part(
    query: Tensor,
    kept: HostRows,
    part: tuple[int, slice],
    known: tuple[Tensor, ...],
    rule: Rule,
    *,
    max_scores: int,
    out: Tensor,
) -> None:
    """Attend for one sequence and the query heads of some key heads, of which the `known` rows are copied there."""
    index, heads = part
    begin, end = kept.places.offsets[index : index + 2]
    keys, values = _joined(kept, index, heads, known, query.device)
    group = query.shape[0] // kept.num_heads
    asking = slice(heads.start * group, heads.stop * group)
    some = rule if asking.stop - asking.start == query.shape[0] else rule.of_heads(asking)
    attend(query[asking, begin:end], keys, values, some, max_scores=max_scores, out=out[begin:end, asking])
