"""What `fp8_linear` does beside the product, in Triton: rows become e4m3 in one pass, and so do packed weights.

Both have a row for each program, so that a row's scale needs no second kernel. Integers become float32 numbers by their
bits, since converting them takes a GPU longer than all the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.packed_linear import PackedWeight

__all__ = ["expand_rows", "quantise_rows"]

EXPAND_WARPS = 2
"""Of a program that expands a row: each thread has two words of codes, of 32 bits, at a time. The best on an H200."""

UNIT = 16
"""Strides of rows come in so many elements, if they can: loads are of 16 bytes then."""

ROW_ELEMENTS = 1024
"""For each warp of a program that quantises a row."""


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel of `fp8_linear.quantise_rows` for rows [T, K], of any stride between them."""
    count, columns = rows.shape
    step, last = rows.stride()
    if last != 1 or step % UNIT or rows.data_ptr() % 16:  # else code would depend on what divides the stride
        rows = rows.clone(memory_format=torch.contiguous_format)
        step = columns
    unit = 1 if step % UNIT else UNIT
    codes = torch.empty(count, columns, dtype=torch.float8_e4m3fn, device=rows.device)
    scale = torch.empty(count, 1, device=rows.device)
    if codes.numel():
        block = triton.next_power_of_2(columns)
        with torch.cuda.device_of(rows):
            _quantise[count,](
                rows,
                codes,
                scale,
                step // unit,
                columns,
                UNIT=unit,
                BLOCK=block,
                num_warps=min(max(block // ROW_ELEMENTS, 1), 16),
            )
    return codes, scale


@triton.jit(do_not_specialize=["row_step"])
def _quantise(rows, codes, scale, row_step, columns, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    wide = tl.load(rows + row * row_step * UNIT + column, mask=inside, other=0.0).to(tl.float32)
    top = tl.max(tl.abs(wide), 0)
    tl.store(scale + row, top * (1 / 448.0))
    inverse = tl.where(top > 0, 448.0 / tl.where(top > 0, top, 1.0), 0.0)
    tl.store(codes + row * columns + column, (wide * inverse).to(codes.dtype.element_ty), mask=inside)


def expand_rows(weight: PackedWeight, out: Tensor, factors: Tensor) -> None:
    """Launch the kernel of `fp8_linear.expand_rows`."""
    count, columns = out.shape
    if not out.numel():
        return
    per_word = 32 // weight.bits
    words, groups = columns // per_word, columns // weight.group_size
    is_signed = weight.codes.dtype == torch.int8
    with torch.cuda.device_of(out):
        _expand[count,](
            weight.codes.view(torch.int32),
            weight.scale,
            weight.scale if weight.zero is None else weight.zero,
            out,
            factors,
            words,
            groups,
            BITS=weight.bits,
            PER_WORD=per_word,
            GROUP=weight.group_size // per_word,
            IS_SIGNED=is_signed,
            HAS_ZERO=weight.zero is not None,
            GROUPS=triton.next_power_of_2(groups),
            BLOCK=32 * EXPAND_WARPS,
            num_warps=EXPAND_WARPS,
        )


@triton.jit
def _expand(
    codes, scale, zero, out, factors,
    words, groups,
    BITS: tl.constexpr, PER_WORD: tl.constexpr, GROUP: tl.constexpr,
    IS_SIGNED: tl.constexpr, HAS_ZERO: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top: tl.constexpr = (1 << BITS) - 1
    middle: tl.constexpr = 1 << (BITS - 1)
    group = tl.arange(0, GROUPS)
    real = group < groups
    largest = tl.full((GROUPS,), middle, tl.float32)
    if HAS_ZERO:
        less = tl.load(zero + row * groups + group, mask=real, other=0).to(tl.float32)
        largest = tl.maximum(less, top - less)
    bound = tl.max(tl.abs(tl.load(scale + row * groups + group, mask=real, other=0.0).to(tl.float32)) * largest, 0)
    tl.store(factors + row, bound * (1 / 448.0))
    inverse = tl.where(bound > 0, 448.0 / tl.where(bound > 0, bound, 1.0), 0.0)
    both, place = tl.arange(0, 2), tl.arange(0, PER_WORD)
    for begin in range(0, words // 2, BLOCK):  # two words at a time, which are of one group: they are 16 bytes of `out`
        pair = begin + tl.arange(0, BLOCK)
        inside = pair < words // 2
        word = pair[:, None] * 2 + both[None, :]
        code = tl.load(codes + row * words + word, mask=inside[:, None], other=0)
        if IS_SIGNED:
            code = code ^ -0x7F7F7F80  # 0x80 in each byte: 128 more than they are
        its_group = row * groups + pair * 2 // GROUP
        times = tl.load(scale + its_group, mask=inside, other=0.0).to(tl.float32) * inverse
        start = tl.full((BLOCK,), middle, tl.float32)
        if HAS_ZERO:
            start = tl.load(zero + its_group, mask=inside, other=0).to(tl.float32)
        # The code becomes the last digits of a number from 2^23 to 2^24, of which taking that away is exact.
        bits = ((code[:, :, None] >> (place * BITS)[None, None, :]) & top) | 0x4B000000
        steps = bits.to(tl.float32, bitcast=True) - (8388608.0 + start)[:, None, None]
        value = steps * times[:, None, None]
        made = tl.reshape(value.to(out.dtype.element_ty), (BLOCK, 2 * PER_WORD))
        there = out + row * words * PER_WORD + (pair[:, None] * 2 * PER_WORD + tl.arange(0, 2 * PER_WORD)[None, :])
        tl.store(there, made, mask=inside[:, None])
