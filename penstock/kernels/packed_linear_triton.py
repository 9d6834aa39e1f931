"""`packed_linear` in Triton: codes become weights in registers, on their way into matrix products.

One program makes some columns of the result for up to 64 rows, from a part of the inner dim; a second kernel adds the
parts in order, so results do not depend on which came first. Codes are taken out of words of 32 bits, so elements at
the same place of their words are multiplied together: the rows are sorted by that place first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.packed_linear import FEW_ROWS, PackedWeight

__all__ = ["packed_linear"]

COLUMNS = 128
"""Of the result, in one program. With the other numbers: the best of those that were tried on an H100."""

STEP_WORDS = 32
"""Words of codes of each of them that are multiplied at a time."""

WARPS, STAGES = 8, 2

FEW_COLUMNS, FEW_WARPS = 64, 4
"""For `FEW_ROWS` rows programs are smaller."""

MAX_ROWS = 64

PROGRAMS = 2
"""For each multiprocessor: their loads are what keeps memory busy. Smaller programs are four times as many."""

IN_PAIRS = True
"""Make two bfloat16 numbers of codes of four bits at a time."""

ADD_BLOCK = 1024


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Launch the kernels for rows `x` [M, K] of 16 bits; return [M, N]."""
    (rows, columns), out_columns = x.shape, weight.codes.shape[0]
    out = x.new_empty(rows, out_columns)
    if not out.numel():
        return out
    per_word = 32 // weight.bits
    words = columns // per_word
    step = min(STEP_WORDS, words & -words)  # whole groups, or the other way round: they are powers of two, too
    padded = min(max(triton.next_power_of_2(rows), 16), MAX_ROWS)
    few = padded <= FEW_ROWS
    wide = FEW_COLUMNS if few else COLUMNS
    across, down = triton.cdiv(out_columns, wide), triton.cdiv(rows, padded)
    with torch.cuda.device_of(x):
        parts = _num_parts(x, across * down, words // step, (4 if few else 1) * PROGRAMS)
        ordered = x.reshape(rows, words, per_word).permute(2, 0, 1).contiguous()
        several = parts > 1
        made = x.new_empty(parts, rows, out_columns, dtype=torch.float32) if several else out
        _multiply[across, parts, down](
            ordered,
            weight.codes.view(torch.int32),
            weight.scale,
            weight.scale if weight.zero is None else weight.zero,
            x if bias is None else bias,
            made,
            rows,
            out_columns,
            words,
            triton.cdiv(words // step, parts),
            BITS=weight.bits,
            GROUP=weight.group_size // per_word,
            IS_SIGNED=weight.codes.dtype == torch.int8,
            IN_PAIRS=IN_PAIRS and weight.bits == 4 and x.dtype == torch.bfloat16,
            HAS_ZERO=weight.zero is not None,
            HAS_BIAS=bias is not None and not several,
            STEP=step,
            GROUPS=max(step * per_word // weight.group_size, 1),
            COLUMNS=wide,
            ROWS=padded,
            num_warps=FEW_WARPS if few else WARPS,
            num_stages=STAGES,
        )
        if several:
            _add[triton.cdiv(rows * out_columns, ADD_BLOCK),](
                made,
                x if bias is None else bias,
                out,
                rows * out_columns,
                out_columns,
                parts,
                HAS_BIAS=bias is not None,
                BLOCK=ADD_BLOCK,
            )
    return out


def _num_parts(x: Tensor, programs: int, steps: int, wanted: int) -> int:
    """Return into how many parts the inner dim is cut: as many as give every multiprocessor its programs."""
    if not x.is_cuda:  # Triton's interpreter
        return min(2, steps)
    wanted *= torch.cuda.get_device_properties(x.device).multi_processor_count
    return max(min(wanted // programs, steps // 2, 16), 1)


@triton.jit(do_not_specialize=["rows", "steps"])
def _multiply(
    x, codes, scale, zero, bias, out,
    rows, out_columns, words, steps,
    BITS: tl.constexpr, GROUP: tl.constexpr, IS_SIGNED: tl.constexpr, IN_PAIRS: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    STEP: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = tl.minimum(column, out_columns - 1).to(tl.int64)
    part = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    num_groups = words // GROUP
    one: tl.constexpr = 1 << BITS
    code_row, scale_row = codes + there[:, None] * words, scale + there[:, None] * num_groups
    zero_row = zero + there[:, None] * num_groups
    sums = tl.zeros((COLUMNS, ROWS), tl.float32)
    first = part * steps * STEP
    last = tl.minimum(first + steps * STEP, words)
    for begin in range(first, last, STEP):
        word = begin + tl.arange(0, STEP)
        code = tl.load(code_row + word[None, :])
        if IS_SIGNED:
            code = code ^ -0x7F7F7F80  # 0x80 in each byte: 128 more than they are
        group = begin // GROUP + tl.arange(0, GROUPS)
        times = tl.load(scale_row + group[None, :])
        less = tl.full((COLUMNS, GROUPS), 8.0 if BITS == 4 else 128.0, tl.float32)
        if HAS_ZERO:
            less = tl.load(zero_row + group[None, :]).to(tl.float32)
        those = x + row[None, :] * words + word[:, None]
        if IN_PAIRS:
            add = _spread((-(128.0 + less)).to(tl.bfloat16), COLUMNS, GROUPS, STEP)
            times = _spread(times, COLUMNS, GROUPS, STEP)
            for place in tl.static_range(4):
                low, high = _pair(code >> 4 * place, add, times)
                rest = those + place * rows * words
                sums = tl.dot(low, tl.load(rest, mask=inside[None, :], other=0.0), sums)
                rest = those + (place + 4) * rows * words
                sums = tl.dot(high, tl.load(rest, mask=inside[None, :], other=0.0), sums)
        else:
            times = times.to(tl.float32) * one
            add = _spread(-(one + less) * (times / one), COLUMNS, GROUPS, STEP)
            times = _spread(times, COLUMNS, GROUPS, STEP)
            for place in tl.static_range(32 // BITS):
                # The code becomes the first digits of a number from 1 to 2. What follows is exact until it is rounded.
                bits = _lift(code, 23 - BITS - place * BITS)
                number = ((bits & ((one - 1) << (23 - BITS))) | 0x3F800000).to(tl.float32, bitcast=True)
                value = (number * times + add).to(x.dtype.element_ty)
                rest = those + place * rows * words
                sums = tl.dot(value, tl.load(rest, mask=inside[None, :], other=0.0), sums)
    if HAS_BIAS:
        sums += tl.load(bias + there).to(tl.float32)[:, None]
    place = (part * rows + row[None, :]).to(tl.int64) * out_columns + column[:, None]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=inside[None, :] & (column < out_columns)[:, None])


@triton.jit
def _pair(code, add, times):
    """Make bfloat16 of the lowest four bits of each half of a word: (number + add) × times, in pairs.

    The bits become the last digits of a number from 128 to 256. Adding is exact, and the product is rounded once.
    """
    return tl.inline_asm_elementwise(
        """
        {
            .reg .b32 first, second, low, high, one, zero;
            mov.b32 one, 0x3F803F80;
            mov.b32 zero, 0x80008000;
            lop3.b32 first, $2, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 second, $3, 0x000F000F, 0x43004300, 0xEA;
            prmt.b32 low, first, second, 0x5410;
            prmt.b32 high, first, second, 0x7632;
            fma.rn.bf16x2 low, low, one, $4;
            fma.rn.bf16x2 high, high, one, $4;
            fma.rn.bf16x2 $0, low, $5, zero;
            fma.rn.bf16x2 $1, high, $5, zero;
        }
        """,
        "=r,=r,r,r,r,r",
        [code, add, times],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _lift(code, BY: tl.constexpr):
    """Shift to the left, or, where that is negative, to the right."""
    return code << BY if BY >= 0 else code >> -BY


@triton.jit
def _spread(values, DOWN: tl.constexpr, ACROSS: tl.constexpr, SIZE: tl.constexpr):
    """Repeat each column of [DOWN, ACROSS] as often as makes SIZE columns."""
    return tl.reshape(tl.broadcast_to(values[:, :, None], (DOWN, ACROSS, SIZE // ACROSS)), (DOWN, SIZE))


@triton.jit(do_not_specialize=["size", "parts"])
def _add(
    made, bias, out,
    size, out_columns, parts,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    sums = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        sums += tl.load(made + part * size + at, mask=inside, other=0.0)
    if HAS_BIAS:
        sums += tl.load(bias + at % out_columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=inside)
