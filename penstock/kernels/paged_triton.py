"""Paged decode attention in Triton: the kernel beside `penstock.kernels.paged.attend_paged`, same signature.

One program takes the query heads of one key head (or a tile of them), so that keys are read once, and one part of one
sequence, so that a few long sequences fill the card too; a second kernel joins the parts. How a sequence is cut depends
on its own length alone, so its result does not depend on its neighbours. Sums and softmax are in float32. Where values
are the first elements of the keys, as in latent attention, they are read once. Rows of one byte per element are
multiplied as the small numbers they are, which 16-bit ones hold exactly; their scales are a factor of scores and of
weights. Where two elements share a byte, each group has a scale, so elements are made whole first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.attention import Rule
from penstock.kernels.paged_codes_triton import attend_codes, takes_codes
from penstock.kernels.paged_parts_triton import first_key, part_size

__all__ = ["attend_paged"]

PART_TOKENS = 512
"""The fewest keys of a part: joining costs as much as reading some percent of them."""

MAX_PARTS = 32

MAX_SEQUENCES = 65_535
"""What CUDA allows in the second and third dim of a grid."""


def attend_paged(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    rule: Rule,
    max_length: int,
    workspace_nbytes: int,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    out: Tensor,
) -> None:
    """Attend as `penstock.kernels.paged.attend_paged` says, without waiting for the device. The rule has no bias."""
    num_heads, value_size = query.shape[1], out.shape[-1]
    seen = max_length if rule.window is None else min(max_length, rule.window)
    seen = seen if rule.chunk is None else min(seen, rule.chunk)
    num_parts = min(-(-seen // PART_TOKENS), MAX_PARTS)
    several = num_parts > 1
    sequence_nbytes = 4 * num_heads * num_parts * (value_size + 1)
    size = min(max(workspace_nbytes // sequence_nbytes, 1) if several else query.shape[0], MAX_SEQUENCES)
    if query.shape[2] % 16:  # else strides would depend on the number of tokens, and code on whether 16 divides them
        query = query.clone(memory_format=torch.contiguous_format)  # `contiguous` leaves one sequence's strides alone
    with torch.cuda.device_of(query):
        for first in range(0, query.shape[0], size):
            part = slice(first, first + size)
            _launch(
                query[part],
                keys,
                values,
                block_table[part],
                lengths[part],
                rule=rule,
                num_parts=num_parts,
                key_scales=key_scales,
                value_scales=value_scales,
                out=out[part],
            )


def _launch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    rule: Rule,
    num_parts: int,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    out: Tensor,
) -> None:
    """Attend some sequences in at most `num_parts` parts each."""
    num_sequences, num_heads, _ = query.shape
    value_size = out.shape[-1]
    assert query.stride(2) == out.stride(2) == block_table.stride(1) == 1
    assert all(scales is None or scales.is_contiguous() for scales in (key_scales, value_scales))
    several = num_parts > 1
    parts = query.new_empty((num_sequences, num_heads, num_parts, value_size), dtype=torch.float32) if several else out
    weights = query.new_empty((num_sequences, num_heads, num_parts), dtype=torch.float32) if several else out
    places: dict[str, Any] = {"rule": rule, "num_parts": num_parts, "out": out, "parts": parts, "weights": weights}
    if key_scales is not None and value_scales is not None and takes_codes(keys, values, num_heads // keys.shape[2]):
        places |= {"part_tokens": PART_TOKENS, "max_parts": MAX_PARTS}
        attend_codes(query, keys, values, key_scales, value_scales, block_table, lengths, **places)
    else:
        _launch_parts(query, keys, values, block_table, lengths, key_scales, value_scales, **places)
    if several:
        _join_parts[num_heads, num_sequences](
            lengths,
            out,
            parts,
            weights,
            out.stride(0),
            out.stride(1),
            num_parts,
            rule.window or 0,
            rule.chunk or 0,
            NUM_HEADS=num_heads,
            num_warps=4,
            VALUE_SIZE=value_size,
            VALUE_PAD=triton.next_power_of_2(value_size),
            PART_TOKENS=PART_TOKENS,
            MAX_PARTS=MAX_PARTS,
        )


def _launch_parts(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    *,
    rule: Rule,
    num_parts: int,
    out: Tensor,
    parts: Tensor,
    weights: Tensor,
) -> None:
    """Attend some sequences in at most `num_parts` parts each: into `out`, or several into `parts` and `weights`."""
    num_sequences, num_heads, size = query.shape
    num_keys, value_size = keys.shape[2], out.shape[-1]
    quantised = key_scales is not None
    group = num_heads // num_keys
    latent = keys.data_ptr() == values.data_ptr()
    whole = value_size if latent else size
    heads = min(max(triton.next_power_of_2(group), 16), 32 if latent else 64)  # what fits every card's shared memory
    tiles = triton.cdiv(group, heads)
    padded = triton.next_power_of_2(max(whole, value_size))
    _attend_part[num_parts, num_keys * tiles, num_sequences](
        query,
        keys,
        values,
        key_scales if quantised else query,
        value_scales if quantised else query,
        block_table,
        lengths,
        rule.sinks if rule.sinks is not None else query,
        out,
        parts,
        weights,
        block_table.stride(0),
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        float(rule.scale),
        float(rule.softcap or 0.0),
        rule.window or 0,
        rule.chunk or 0,
        HAS_SINKS=rule.sinks is not None,
        HAS_SOFTCAP=rule.softcap is not None,
        SCALED=quantised and keys.dtype != torch.uint8,
        KEY_GROUPS=_groups(key_scales),
        KEY_GROUP=_group_size(keys, key_scales),
        VALUE_GROUPS=_groups(value_scales),
        VALUE_GROUP=_group_size(values, value_scales),
        SEVERAL=num_parts > 1,
        BLOCK_TOKENS=keys.shape[1],
        NUM_KEYS=num_keys,
        GROUP=group,
        HEADS=heads,
        TILES=tiles,
        LATENT=latent,
        SIZE=whole,
        SIZE_PAD=max(triton.next_power_of_2(whole), 16),
        REST=size - whole,
        REST_PAD=max(triton.next_power_of_2(size - whole), 16),
        TILE=64 if padded <= 128 else 16 if latent and _groups(key_scales) else 32,  # steps need shared memory too
        num_warps=4 if heads * padded <= 4096 else 8,
        num_stages=3 if padded <= 128 else 2,
        VALUE_SIZE=value_size,
        VALUE_PAD=triton.next_power_of_2(value_size),
        PART_TOKENS=PART_TOKENS,
        MAX_PARTS=MAX_PARTS,
    )


def _groups(scales: Tensor | None) -> int:
    """Return how many groups a row of packed codes has; 0 for other rows."""
    return scales.shape[3] if scales is not None and scales.dim() > 3 else 0


def _group_size(codes: Tensor, scales: Tensor | None) -> int:
    return 2 * codes.shape[-1] // _groups(scales) if _groups(scales) else 0


@triton.jit
def _elements(rows, scales, row, place, real, like, ROW_SIZE: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """Load elements `place` of rows `row` in the dtype of `like`, still to be multiplied where a row has one scale."""
    if GROUPS == 0:
        made = tl.load(rows + row * ROW_SIZE + place, mask=real, other=0.0)
        if made.dtype == tl.float8e4nv:
            made = made.to(tl.float32)  # not every GPU makes bfloat16 of float8 directly
    else:
        half = GROUPS * GROUP // 2
        packed = tl.load(rows + row * half + place % half, mask=real, other=0)
        code = (packed >> (place // half * 4).to(tl.uint8)) & 15
        pair = scales + (row * GROUPS + place // GROUP) * 2
        step, offset = tl.load(pair, mask=real, other=0.0), tl.load(pair + 1, mask=real, other=0.0)
        made = code.to(tl.float32) * step.to(tl.float32) + offset.to(tl.float32)
    return made.to(like.dtype)


@triton.jit
def _scaled(numbers, places, there, SCALED: tl.constexpr):
    """Multiply each column with the scale of its token's row."""
    if SCALED:
        numbers *= tl.load(places, mask=there, other=0.0)[None, :]
    return numbers


@triton.jit(do_not_specialize=["table_stride", "window", "chunk"], do_not_specialize_on_alignment=["table", "lengths"])
def _attend_part(
    query, keys, values, key_scales, value_scales, table, lengths, sinks, out, parts, weights,
    table_stride, query_stride, query_head_stride, out_stride, out_head_stride,
    scale, softcap, window, chunk,
    HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr, SEVERAL: tl.constexpr,
    KEY_GROUPS: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUPS: tl.constexpr, VALUE_GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, NUM_KEYS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr,
    LATENT: tl.constexpr, SIZE: tl.constexpr, SIZE_PAD: tl.constexpr, REST: tl.constexpr, REST_PAD: tl.constexpr,
    VALUE_SIZE: tl.constexpr, VALUE_PAD: tl.constexpr,
    TILE: tl.constexpr, PART_TOKENS: tl.constexpr, MAX_PARTS: tl.constexpr,
):  # fmt: skip
    """Attend one part of one sequence, for the query heads of one key head, or a tile of them."""
    part, head, sequence = tl.program_id(0), tl.program_id(1) // TILES, tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + sequence)
    first = first_key(length, window, chunk)
    size = part_size(length - first, PART_TOKENS, MAX_PARTS)
    begin = first + part * size
    end = tl.minimum(begin + size, length)
    if begin >= length:
        return
    rows = tl.program_id(1) % TILES * HEADS + tl.arange(0, HEADS)
    columns, others, places = tl.arange(0, SIZE_PAD), tl.arange(0, REST_PAD), tl.arange(0, VALUE_PAD)
    heads = (head * GROUP + rows).to(tl.int64)
    real = rows < GROUP
    start = query + sequence * query_stride + heads[:, None] * query_head_stride
    asked = tl.load(start + columns[None, :], mask=real[:, None] & (columns < SIZE)[None, :], other=0.0)
    if REST > 0:
        asked_rest = tl.load(start + SIZE + others[None, :], mask=real[:, None] & (others < REST)[None, :], other=0.0)
    best = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    made = tl.zeros([HEADS, VALUE_PAD], tl.float32)
    if HAS_SINKS:
        if part == 0:  # a sink is a score without a value
            best = tl.load(sinks + heads, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
            total += 1.0
    for tile in range(begin, end, TILE):
        tokens = tile + tl.arange(0, TILE)
        there = tokens < end
        block = tl.load(table + sequence * table_stride + tokens // BLOCK_TOKENS, mask=there, other=0).to(tl.int64)
        row = (block * BLOCK_TOKENS + tokens % BLOCK_TOKENS) * NUM_KEYS + head
        real_key = there[None, :] & (columns < SIZE)[:, None]
        key = _elements(
            keys, key_scales, row[None, :], columns[:, None], real_key, asked, SIZE + REST, KEY_GROUPS, KEY_GROUP
        )
        scores = tl.dot(asked, key)
        if REST > 0:
            real_rest = there[None, :] & (others < REST)[:, None]
            rest = _elements(
                keys, key_scales, row[None, :], SIZE + others[:, None], real_rest, asked, SIZE + REST,
                KEY_GROUPS, KEY_GROUP,
            )  # fmt: skip
            scores = tl.dot(asked_rest, rest, scores)
        scores = _scaled(scores * scale, key_scales + row, there, SCALED)
        if HAS_SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(there[None, :], scores * 1.4426950408889634, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        weight = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(weight, 1)
        if LATENT:
            value = tl.trans(key)
        else:
            real_value = there[:, None] & (places < VALUE_SIZE)[None, :]
            value = _elements(
                values, value_scales, row[:, None], places[None, :], real_value, asked, VALUE_SIZE,
                VALUE_GROUPS, VALUE_GROUP,
            )  # fmt: skip
        weight = _scaled(weight, value_scales + row, there, SCALED)
        made = made * shrink[:, None] + tl.dot(weight.to(value.dtype), value)
        best = higher
    made = made / total[:, None]
    kept = real[:, None] & (places < VALUE_SIZE)[None, :]
    if SEVERAL:
        number = (sequence * NUM_KEYS * GROUP + heads) * tl.num_programs(0) + part
        tl.store(parts + number[:, None] * VALUE_SIZE + places[None, :], made, mask=kept)
        tl.store(weights + number, best + tl.log2(total), mask=real)
    else:
        target = out + sequence * out_stride + heads[:, None] * out_head_stride + places[None, :]
        tl.store(target, made.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["num_parts", "window", "chunk"], do_not_specialize_on_alignment=["lengths"])
def _join_parts(
    lengths, out, parts, weights, out_stride, out_head_stride, num_parts, window, chunk,
    NUM_HEADS: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_PAD: tl.constexpr,
    PART_TOKENS: tl.constexpr, MAX_PARTS: tl.constexpr,
):  # fmt: skip
    """Join the parts of one query head of one sequence by the sums of their weights (as logarithms to base 2)."""
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + sequence)
    seen = length - first_key(length, window, chunk)
    count = tl.cdiv(seen, part_size(seen, PART_TOKENS, MAX_PARTS))
    rows, places = tl.arange(0, MAX_PARTS), tl.arange(0, VALUE_PAD)
    real = rows < count
    number = (sequence * NUM_HEADS + head) * num_parts + rows
    log = tl.load(weights + number, mask=real, other=float("-inf"))
    share = tl.exp2(log - tl.max(log, 0))
    made = tl.load(
        parts + number[:, None] * VALUE_SIZE + places[None, :],
        mask=real[:, None] & (places < VALUE_SIZE)[None, :],
        other=0.0,
    )
    joined = tl.sum(made * share[:, None], 0) / tl.sum(share, 0)
    target = out + sequence * out_stride + head * out_head_stride + places
    tl.store(target, joined.to(out.dtype.element_ty), mask=places < VALUE_SIZE)
