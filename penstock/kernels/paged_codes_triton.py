"""Attention over rows of one byte per element in Triton: what `penstock.kernels.paged_triton` launches for these.

Here reading is so fast that every instruction counts, so the other way round than there: keys and values are the left
sides of products, which hardware takes in sixteens, and query heads the right ones, of which it takes eight. Codes
become float16 numbers, which is exact; so queries are divided by powers of two, and so are values' scales, whose
exponents add to the scores: weights then are at most 2, whatever the scales. Products with values need two tokens'
elements side by side, so values are read as words of four, and the first, second, third and fourth bytes of words make
results of their own. Tokens that are not there are read as the last one, without a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.attention import Rule
from penstock.kernels.paged_parts_triton import first_key, part_size

__all__ = ["attend_codes", "takes_codes"]

TILE = 32
"""Tokens at a time. With the other numbers: the fastest of those that were tried on an H200."""

WARPS = 2
"""As many as have a part of their own in products with a quarter of the values."""

STAGES = 1
"""More of them read ahead into shared memory, and take half as many instructions more."""

REGISTERS: int | None = None
"""The most that a thread may have, where fewer let more programs run at once."""

IN_WORDS = not triton.knobs.runtime.interpret
"""Convert codes by instructions of the GPU, several at a time."""

MOST_HEADS = 16
"""Query heads of a key head: for more, codes are better made numbers once for all of them."""


def takes_codes(keys: Tensor, values: Tensor, group: int) -> bool:
    """Say whether the kernel reads these codes, for a `group` of query heads to a key head."""
    latent = keys.data_ptr() == values.data_ptr()
    if keys.dtype == torch.uint8:
        return False
    return group <= MOST_HEADS and not latent and not keys.shape[-1] % 16 and not values.shape[-1] % 16


def attend_codes(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    rule: Rule,
    num_parts: int,
    part_tokens: int,
    max_parts: int,
    out: Tensor,
    parts: Tensor,
    weights: Tensor,
) -> None:
    """Attend some sequences in at most `num_parts` parts each: into `out`, or several into `parts` and `weights`."""
    num_sequences, num_heads, size = query.shape
    num_keys, value_size = keys.shape[2], out.shape[-1]
    group = num_heads // num_keys
    _attend_codes[num_parts, num_keys, num_sequences](
        query,
        keys,
        values.view(torch.int32),
        key_scales,
        value_scales,
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
        SEVERAL=num_parts > 1,
        IS_FLOAT=keys.dtype == torch.float8_e4m3fn,
        IN_WORDS=IN_WORDS,
        BLOCK_TOKENS=keys.shape[1],
        NUM_KEYS=num_keys,
        GROUP=group,
        HEADS=max(triton.next_power_of_2(group), 8),
        SIZE=size,
        SIZE_PAD=triton.next_power_of_2(size),
        WORDS=value_size // 4,
        WORDS_PAD=max(triton.next_power_of_2(value_size // 4), 16),
        TILE=TILE,
        STAGES=STAGES,
        PART_TOKENS=part_tokens,
        MAX_PARTS=max_parts,
        num_warps=WARPS,
        maxnreg=REGISTERS,
    )


@triton.jit
def _half(codes, IN_WORDS: tl.constexpr):
    """Make float16 numbers of codes, which is exact."""
    if codes.dtype == tl.int8 and IN_WORDS:
        made = tl.inline_asm_elementwise(
            """
            {
                .reg .b32 lifted, less;
                mov.b32 less, 0xE480E480;
                xor.b32 lifted, $2, 0x80808080;
                prmt.b32 $0, lifted, 0x64646464, 0x4140;
                prmt.b32 $1, lifted, 0x64646464, 0x4342;
                add.rn.f16x2 $0, $0, less;
                add.rn.f16x2 $1, $1, less;
            }
            """,
            "=&r,=&r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        made = codes.to(tl.float16)
    return made


@triton.jit
def _four(words, IS_FLOAT: tl.constexpr, IN_WORDS: tl.constexpr):
    """Make float16 numbers of the four codes in each word; those at the same place of two words share a register."""
    if IN_WORDS and IS_FLOAT:
        return tl.inline_asm_elementwise(
            """
            {
                .reg .b32 low, high;
                .reg .b16 a, b, c, d;
                prmt.b32 low, $4, $5, 0x5140;
                prmt.b32 high, $4, $5, 0x7362;
                mov.b32 {a, b}, low;
                mov.b32 {c, d}, high;
                cvt.rn.f16x2.e4m3x2 $0, a;
                cvt.rn.f16x2.e4m3x2 $1, b;
                cvt.rn.f16x2.e4m3x2 $2, c;
                cvt.rn.f16x2.e4m3x2 $3, d;
            }
            """,
            "=r,=r,=r,=r,r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    if IN_WORDS:
        return tl.inline_asm_elementwise(
            """
            {
                .reg .b32 low, high, less;
                mov.b32 less, 0xE480E480;
                prmt.b32 low, $4, $5, 0x5140;
                prmt.b32 high, $4, $5, 0x7362;
                xor.b32 low, low, 0x80808080;
                xor.b32 high, high, 0x80808080;
                prmt.b32 $0, low, 0x64646464, 0x4140;
                prmt.b32 $1, low, 0x64646464, 0x4342;
                prmt.b32 $2, high, 0x64646464, 0x4140;
                prmt.b32 $3, high, 0x64646464, 0x4342;
                add.rn.f16x2 $0, $0, less;
                add.rn.f16x2 $1, $1, less;
                add.rn.f16x2 $2, $2, less;
                add.rn.f16x2 $3, $3, less;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    low, high = words & 0xFFFF, words >> 16
    return _byte(low, IS_FLOAT), _byte(low >> 8, IS_FLOAT), _byte(high, IS_FLOAT), _byte(high >> 8, IS_FLOAT)


@triton.jit
def _byte(words, IS_FLOAT: tl.constexpr):
    codes = words.to(tl.int8)
    if IS_FLOAT:
        codes = codes.to(tl.float8e4nv, bitcast=True)
    return codes.to(tl.float16)


@triton.jit
def _power_of_two(number):
    """Return the largest power of two up to a number, from 2^-100 to 2^100, and its inverse."""
    bits = number.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 27 << 23), 227 << 23)
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["table_stride", "window", "chunk"], do_not_specialize_on_alignment=["table", "lengths"])
def _attend_codes(
    query, keys, values, key_scales, value_scales, table, lengths, sinks, out, parts, weights,
    table_stride, query_stride, query_head_stride, out_stride, out_head_stride,
    scale, softcap, window, chunk,
    HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SEVERAL: tl.constexpr,
    IS_FLOAT: tl.constexpr, IN_WORDS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, NUM_KEYS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    SIZE: tl.constexpr, SIZE_PAD: tl.constexpr, WORDS: tl.constexpr, WORDS_PAD: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, PART_TOKENS: tl.constexpr, MAX_PARTS: tl.constexpr,
):  # fmt: skip
    """Attend one part of one sequence, for the query heads of one key head."""
    part, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + sequence)
    first = first_key(length, window, chunk)
    size = part_size(length - first, PART_TOKENS, MAX_PARTS)
    begin = first + part * size
    end = tl.minimum(begin + size, length)
    if begin >= length:
        return
    rows = tl.arange(0, HEADS)
    columns, places = tl.arange(0, SIZE_PAD), tl.arange(0, WORDS_PAD)
    heads = (head * GROUP + rows).to(tl.int64)
    real = rows < GROUP
    start = query + sequence * query_stride + heads[None, :] * query_head_stride
    asked = tl.load(start + columns[:, None], mask=real[None, :] & (columns < SIZE)[:, None], other=0.0).to(tl.float32)
    power, inverse = _power_of_two(tl.max(tl.abs(asked), 0))
    asked = (asked * inverse[None, :]).to(tl.float16)
    best = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    made_0 = tl.zeros([WORDS_PAD, HEADS], tl.float32)
    made_1, made_2, made_3 = made_0, made_0, made_0
    if HAS_SINKS:
        if part == 0:  # a sink is a score without a value
            best = tl.load(sinks + heads, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
            total += 1.0
    times = power * scale
    row_table = table + sequence * table_stride
    for tile in tl.range(begin, end, TILE, num_stages=STAGES):
        tokens = tile + tl.arange(0, TILE)
        there = tokens < end
        tokens = tl.minimum(tokens, end - 1)
        block = tl.load(row_table + tokens // BLOCK_TOKENS).to(tl.int64)
        inside = tokens % BLOCK_TOKENS * NUM_KEYS + head
        key_row = keys + (block * (BLOCK_TOKENS * NUM_KEYS * SIZE) + inside * SIZE)
        value_row = values + (block * (BLOCK_TOKENS * NUM_KEYS * WORDS) + inside * WORDS)
        scale_row = block * (BLOCK_TOKENS * NUM_KEYS) + inside
        if SIZE == SIZE_PAD:
            key = tl.load(key_row[:, None] + columns[None, :])
        else:
            key = tl.load(key_row[:, None] + columns[None, :], mask=(columns < SIZE)[None, :], other=0.0)
        if WORDS == WORDS_PAD:
            value = tl.load(value_row[:, None] + places[None, :])
        else:
            value = tl.load(value_row[:, None] + places[None, :], mask=(places < WORDS)[None, :], other=0)
        key_scale = tl.load(key_scales + scale_row)
        value_scale = tl.load(value_scales + scale_row)
        scores = tl.dot(_half(key, IN_WORDS), asked) * times[None, :] * key_scale[:, None]
        if HAS_SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        value_power, value_inverse = _power_of_two(value_scale)
        exponent = (value_power.to(tl.int32, bitcast=True) >> 23) - 127
        scores = tl.where(there[:, None], scores * 1.4426950408889634 + exponent.to(tl.float32)[:, None], float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 0))
        weight = tl.exp2(scores - higher[None, :])
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(weight * value_inverse[:, None], 0)
        best = higher
        weight = weight * (value_scale * value_inverse)[:, None]
        value_0, value_1, value_2, value_3 = _four(value, IS_FLOAT, IN_WORDS)
        half = weight.to(tl.float16)
        made_0 = tl.dot(tl.trans(value_0), half, made_0 * shrink[None, :])
        made_1 = tl.dot(tl.trans(value_1), half, made_1 * shrink[None, :])
        made_2 = tl.dot(tl.trans(value_2), half, made_2 * shrink[None, :])
        made_3 = tl.dot(tl.trans(value_3), half, made_3 * shrink[None, :])
    made = tl.join(tl.join(made_0, made_2), tl.join(made_1, made_3))  # [WORDS_PAD, HEADS, 2, 2]
    made = tl.permute(made, (1, 0, 2, 3)).reshape(HEADS, 4 * WORDS_PAD) / total[:, None]
    each = tl.arange(0, 4 * WORDS_PAD)
    kept = real[:, None] & (each < (4 * WORDS))[None, :]
    if SEVERAL:
        number = (sequence * NUM_KEYS * GROUP + heads) * tl.num_programs(0) + part
        tl.store(parts + number[:, None] * (4 * WORDS) + each[None, :], made, mask=kept)
        tl.store(weights + number, best + tl.log2(total), mask=real)
    else:
        target = out + sequence * out_stride + heads[:, None] * out_head_stride + each[None, :]
        tl.store(target, made.to(out.dtype.element_ty), mask=kept)
