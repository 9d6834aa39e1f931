"""Expansion of coded weights on CUDA: each program makes one run of values and writes it once.

Batches are the leading dim of every tensor, with any stride, so that hundreds of experts are one launch. `exact` and
`groupwise` hold the references with the same arguments. Arguments of kernels have no types: Triton looks them up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["decode_exact", "dequantise", "join_exponents"]

EXACT_BLOCK = 1024
JOIN_BLOCK = 2048
MAX_COLUMNS = 1024


def decode_exact(low: Tensor, code: Tensor, table: Tensor, start: Tensor, extra: Tensor, *, out: Tensor) -> None:
    """Launch the decoder of `exact.decode`."""
    if not out.numel():
        return
    count, size = out.shape
    grid = (triton.cdiv(size, EXACT_BLOCK), count)
    with torch.cuda.device_of(out):
        _decode_exact[grid](
            low,
            code,
            table,
            start,
            extra,
            out.view(torch.int16),
            size,
            extra.shape[1],
            low.stride(0),
            code.stride(0),
            table.stride(0),
            start.stride(0),
            extra.stride(0),
            out.stride(0),
            BLOCK=EXACT_BLOCK,
        )


@triton.jit(do_not_specialize=["num_extra", "table_step", "start_step", "extra_step"])  # other numbers in every layer
def _decode_exact(
    low, code, table, start, extra, out,
    size, num_extra, low_step, code_step, table_step, start_step, extra_step, out_step,
    BLOCK: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    rest = tl.load(low + item * low_step + at, mask=inside, other=0).to(tl.int32)
    pair = tl.load(code + item * code_step + at // 2, mask=inside, other=0).to(tl.int32)
    one = (pair >> ((at % 2) * 4).to(tl.int32)) & 15
    exponent = tl.load(table + item * table_step + one).to(tl.int32)
    escaped = (one == 15) & inside
    before = tl.load(start + item * start_step + block)
    place = before + tl.cumsum(escaped.to(tl.int32), 0) - 1
    stored = escaped & (place >= 0) & (place < num_extra)
    exponent = tl.where(
        escaped, tl.load(extra + item * extra_step + place, mask=stored, other=0).to(tl.int32), exponent
    )
    bits = ((rest & 0x80) << 8) | (exponent << 7) | (rest & 0x7F)
    tl.store(out + item * out_step + at, bits.to(tl.int16), mask=inside)


def join_exponents(low: Tensor, exponents: Tensor, failed: Tensor, first: int, *, out: Tensor) -> None:
    """Make bfloat16 of `low` [B, n] and the exponents [chunks, CHUNK] of chunk `first` and those after it.

    Chunks are counted through the batch; those that have `failed` [chunks] become NaNs. `out` is [B, n].
    """
    count, chunk = exponents.shape
    grid = (count, triton.cdiv(chunk, JOIN_BLOCK))
    with torch.cuda.device_of(out):
        _join_exponents[grid](
            low,
            exponents,
            failed,
            out.view(torch.int16),
            out.shape[1],
            first,
            triton.cdiv(out.shape[1], chunk),
            low.stride(0),
            out.stride(0),
            CHUNK=chunk,
            BLOCK=JOIN_BLOCK,
        )


@triton.jit(do_not_specialize=["first", "per_row"])  # other numbers for every size of tensor
def _join_exponents(
    low, exponents, failed, out,
    size, first, per_row, low_step, out_step,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    item = (first + index) // per_row
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = (first + index) % per_row * CHUNK + place
    inside = at < size
    rest = tl.load(low + item * low_step + at, mask=inside, other=0).to(tl.int32)
    exponent = tl.load(exponents + index * CHUNK + place, mask=inside, other=0).to(tl.int32)
    bits = ((rest & 0x80) << 8) | (exponent << 7) | (rest & 0x7F)
    bits = tl.where(tl.load(failed + index) != 0, 0x7FFF, bits)
    tl.store(out + item * out_step + at, bits.to(tl.int16), mask=inside)


def dequantise(codes: Tensor, scale: Tensor, zero: Tensor | None, out: Tensor, *, bits: int, group_size: int) -> None:
    """Launch the decoder of `groupwise.dequantise`."""
    if not out.numel():
        return
    count, rows, columns = out.shape
    block = max(min(MAX_COLUMNS, triton.next_power_of_2(columns)), 2)
    across = triton.cdiv(columns, block)
    with torch.cuda.device_of(out):
        _dequantise[rows * across, count](
            codes,
            scale,
            scale if zero is None else zero,
            out,
            columns,
            across,
            codes.shape[2],
            scale.shape[2],
            codes.stride(0),
            scale.stride(0),
            0 if zero is None else zero.stride(0),
            out.stride(0),
            BITS=bits,
            PER_BYTE=8 // bits,
            GROUP=group_size,
            HAS_ZERO=zero is not None,
            BLOCK=block,
        )


@triton.jit
def _dequantise(
    codes, scale, zero, out,
    columns, across, code_columns, num_groups, codes_step, scale_step, zero_step, out_step,
    BITS: tl.constexpr, PER_BYTE: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // across).to(tl.int64)
    part = tl.program_id(0) % across
    column = part * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    byte = part * (BLOCK // PER_BYTE) + tl.arange(0, BLOCK // PER_BYTE)
    there = byte < code_columns
    code = tl.load(codes + item * codes_step + row * code_columns + byte, mask=there, other=0).to(tl.int32)
    group = row * num_groups + byte * PER_BYTE // GROUP  # a byte's values are in one
    times = tl.load(scale + item * scale_step + group, mask=there, other=0).to(tl.float32)
    less = 8 if BITS == 4 else 0
    if HAS_ZERO:
        less = tl.load(zero + item * zero_step + group, mask=there, other=0).to(tl.int32)
    if BITS == 4:
        low = ((code & 15) - less).to(tl.float32) * times
        high = ((code >> 4) - less).to(tl.float32) * times
        value = tl.reshape(tl.join(low, high), (BLOCK,))
    else:
        value = (code - less).to(tl.float32) * times
    tl.store(out + item * out_step + row * columns + column, value.to(out.dtype.element_ty), mask=inside)
