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
    BITS: tl.constexpr, GROUP: tl.constexpr, IS_SIGNED: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
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
        times = tl.load(scale_row + group[None, :]).to(tl.float32) * one
        less = 8.0 if BITS == 4 else 128.0
        if HAS_ZERO:
            less = tl.load(zero_row + group[None, :]).to(tl.float32)
        add = _spread(-(one + less) * (times / one), COLUMNS, GROUPS, STEP)
        times = _spread(times, COLUMNS, GROUPS, STEP)
        for place in tl.static_range(32 // BITS):
            # The code becomes the first digits of a number from 1 to 2. All that follows is exact until it is rounded.
            bits = _lift(code, 23 - BITS - place * BITS)
            number = ((bits & ((one - 1) << (23 - BITS))) | 0x3F800000).to(tl.float32, bitcast=True)
            value = (number * times + add).to(x.dtype.element_ty)
            those = x + place * rows * words + (row[None, :] * words + word[:, None])
            sums = tl.dot(value, tl.load(those, mask=inside[None, :], other=0.0), sums)
    if HAS_BIAS:
        sums += tl.load(bias + there).to(tl.float32)[:, None]
    place = (part * rows + row[None, :]).to(tl.int64) * out_columns + column[:, None]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=inside[None, :] & (column < out_columns)[:, None])


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
