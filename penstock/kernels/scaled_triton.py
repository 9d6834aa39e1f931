"""Decode matrices of quantised checkpoints on CUDA: each program makes one tile of values and writes it once.

One kernel serves all forms: they differ in constants and strides. `scaled` holds the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.forms import Form
from penstock.kernels.scaled import Matrix

__all__ = ["decode"]

_MANTISSA = {"int": 0, "e2m1": 1, "e4m3": 3}
_BIAS = {"int": 0, "e2m1": 1, "e4m3": 7}


def decode(form: Form, matrix: Matrix, out: Tensor) -> None:
    """Launch the decoder of `scaled.decode`: `out` is [B, R, C]."""
    if not out.numel():
        return
    count, rows, columns = out.shape
    along_rows = form.packing == "rows" and out.stride(2) == 1
    tile_rows, tile_columns = (8, 256) if along_rows else (64, 64)
    across = triton.cdiv(columns, tile_columns)
    zero = matrix.scale if matrix.zero is None else matrix.zero
    index = matrix.scale if matrix.index is None else matrix.index
    with torch.cuda.device_of(out):
        _decode[triton.cdiv(rows, tile_rows) * across, count](
            matrix.codes,
            matrix.scale,
            zero,
            index,
            out,
            rows,
            columns,
            across,
            *form.block,
            matrix.scale.shape[2],
            form.zero,
            form.block[0] if matrix.zero_pack == 1 else matrix.zero_pack,
            *matrix.codes.stride(),
            *matrix.scale.stride(),
            *zero.stride(),
            index.stride(0),
            *out.stride(),
            BITS=form.bits,
            MANTISSA=_MANTISSA[form.number],
            BIAS=_BIAS[form.number],
            ROW_PACK=matrix.row_pack,
            COLUMN_PACK=matrix.column_pack,
            ZERO_PACK=matrix.zero_pack,
            AWQ=form.packing == "awq",
            HAS_ZERO=matrix.zero is not None,
            HAS_INDEX=matrix.index is not None,
            EXPONENTS=matrix.scale.dtype == torch.uint8,
            ROWS=tile_rows,
            COLUMNS=tile_columns,
        )


@triton.jit
def _wide(index):
    """A place in memory may be beyond 31 bits, a row or column is not."""
    return index.to(tl.int64)


@triton.jit
def _shift(place, BITS: tl.constexpr, AWQ: tl.constexpr):
    """Where in its word the `place`-th code lies, in bits."""
    if AWQ:
        return (place // 2 + (place % 2) * 4) * 4
    return place * BITS


@triton.jit
def _small_float(code, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Decode by integer arithmetic, which every GPU has: mantissa × a power of two, exact in float32."""
    exponent = (code >> MANTISSA) & ((1 << (BITS - 1 - MANTISSA)) - 1)
    fraction = code & ((1 << MANTISSA) - 1)
    whole = tl.where(exponent == 0, fraction, fraction + (1 << MANTISSA)).to(tl.float32)
    power = ((tl.maximum(exponent, 1) - BIAS - MANTISSA + 127) << 23).to(tl.float32, bitcast=True)
    value = tl.where((code >> (BITS - 1)) == 1, -whole * power, whole * power)
    if BITS == 8:
        value = tl.where((code & 127) == 127, float("nan"), value)
    return value


@triton.jit
def _decode(
    codes,
    scale,
    zero,
    index,
    out,
    rows,
    columns,
    across,
    block_rows,
    block_columns,
    num_groups,
    zero_shift,
    zero_rows,
    codes_item,
    codes_row,
    codes_column,
    scale_item,
    scale_row,
    scale_column,
    zero_item,
    zero_row,
    zero_column,
    index_item,
    out_item,
    out_row,
    out_column,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    ROW_PACK: tl.constexpr,
    COLUMN_PACK: tl.constexpr,
    ZERO_PACK: tl.constexpr,
    AWQ: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    EXPONENTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    item = tl.program_id(1).to(tl.int64)
    down = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    along = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    row, column = down[:, None], along[None, :]
    inside = (row < rows) & (column < columns)
    at = item * codes_item + _wide(row // ROW_PACK) * codes_row + _wide(column // COLUMN_PACK) * codes_column
    code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    if ROW_PACK > 1:
        code = (code >> _shift(row % ROW_PACK, BITS, AWQ)) & ((1 << BITS) - 1)
    if COLUMN_PACK > 1:
        code = (code >> _shift(column % COLUMN_PACK, BITS, False)) & ((1 << BITS) - 1)
    runs = along // block_columns
    if HAS_INDEX:
        named = tl.load(index + item * index_item + along, mask=along < columns, other=0)
        runs = tl.where(named < 0, runs, tl.minimum(named, num_groups - 1))
    group = runs[None, :]
    if MANTISSA > 0:
        value = _small_float(code, BITS, MANTISSA, BIAS)
    else:
        if HAS_ZERO:
            points = zero + item * zero_item + _wide(row // zero_rows) * zero_row + _wide(group) * zero_column
            point = tl.load(points, mask=inside, other=0).to(tl.int32)
            if ZERO_PACK > 1:
                point = (point >> _shift(row % ZERO_PACK, BITS, AWQ)) & ((1 << BITS) - 1)
            code -= point
        value = (code - zero_shift).to(tl.float32)
    stored = scale + item * scale_item + _wide(row // block_rows) * scale_row + _wide(group) * scale_column
    factor = tl.load(stored, mask=inside, other=0)
    if EXPONENTS:
        bits = factor.to(tl.int32)
        bits = tl.where(bits == 0, 1 << 22, tl.where(bits == 255, 0x7FC00000, bits << 23))
        factor = bits.to(tl.float32, bitcast=True)
    value = value * factor.to(tl.float32)
    at = item * out_item + _wide(row) * out_row + _wide(column) * out_column
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
