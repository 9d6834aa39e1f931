"""Rows in one byte per element in Triton: the kernel beside `penstock.kernels.quant_kv`'s functions, with their bits.

One program takes some rows, each of which is one token's and head's. It writes codes and scales by themselves and,
where slots are given, into the blocks of a store as well: nothing else then touches new rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.sizes import LARGEST_FP8

__all__ = ["dequantise", "quantise"]

BLOCK = 2048
"""Elements of one program, sixteen for each thread: two loads of 16-bit rows, and one store."""

LARGEST = {torch.float8_e4m3fn: LARGEST_FP8, torch.int8: 127.0}


def quantise(
    rows: Tensor, dtype: torch.dtype, *, slots: Tensor | None = None, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Launch the kernel for `rows` [T, H, D]; return codes and scales, as `penstock.kernels.quant_kv.quantise` says."""
    num_tokens, num_heads, size = rows.shape
    unit = 1 if size % 16 else 16
    by_token, by_head, step = rows.stride()
    if size % 16 or step != 1 or by_token % 16 or by_head % 16:  # else code would depend on what divides the strides
        rows = rows.clone(memory_format=torch.contiguous_format)
        by_token, by_head, _ = rows.stride()
    codes = rows.new_empty(rows.shape, dtype=dtype)
    scales = rows.new_empty((num_tokens, num_heads), dtype=torch.float32)
    if not codes.numel():
        return codes, scales
    padded = triton.next_power_of_2(size)
    together = max(BLOCK // padded, 1)
    assert into is None or all(part.is_contiguous() for part in into), "slots are numbered without gaps"
    kept_codes, kept_scales = (codes, scales) if into is None else into
    with torch.cuda.device_of(rows):
        _quantise[triton.cdiv(num_tokens * num_heads, together),](
            rows,
            codes.view(torch.int8),
            scales,
            scales if slots is None else slots,
            kept_codes.view(torch.int8),
            kept_scales,
            num_tokens * num_heads,
            by_token // unit,
            by_head // unit,
            LARGEST=LARGEST[dtype],
            IS_FLOAT=dtype == torch.float8_e4m3fn,
            STORES=slots is not None,
            NUM_HEADS=num_heads,
            SIZE=size,
            SIZE_PAD=padded,
            UNIT=unit,
            ROWS=together,
            num_warps=4,
        )
    return codes, scales


@triton.jit(
    do_not_specialize=["num_rows", "by_token", "by_head"], do_not_specialize_on_alignment=["slots", "kept_scales"]
)
def _quantise(
    rows, codes, scales, slots, kept_codes, kept_scales,
    num_rows, by_token, by_head,
    LARGEST: tl.constexpr, IS_FLOAT: tl.constexpr, STORES: tl.constexpr,
    NUM_HEADS: tl.constexpr, SIZE: tl.constexpr, SIZE_PAD: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE_PAD)
    there = row < num_rows
    inside = there[:, None] & (column < SIZE)[None, :]
    token, head = row // NUM_HEADS, row % NUM_HEADS
    start = (token * by_token + head * by_head) * UNIT
    wide = tl.load(rows + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    whole = wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.max(whole, 1)  # of magnitudes, in the order of numbers: what is not finite is the largest
    top = bits.to(tl.float32, bitcast=True)
    scale = tl.where(bits < 0x7F800000, tl.div_rn(top, tl.full((ROWS,), LARGEST, tl.float32)), float("nan"))
    quotient = tl.div_rn(wide, tl.broadcast_to(tl.where(scale > 0, scale, 1.0)[:, None], (ROWS, SIZE_PAD)))
    quotient = tl.where(whole > 0x7F800000, 0.0, tl.minimum(tl.maximum(quotient, -LARGEST), LARGEST))
    code = _e4m3(quotient) if IS_FLOAT else _whole(quotient)
    tl.store(codes + row[:, None] * SIZE + column[None, :], code, mask=inside)
    tl.store(scales + row, scale, mask=there)
    if STORES:
        kept = tl.load(slots + token, mask=there, other=0) * NUM_HEADS + head
        tl.store(kept_codes + kept[:, None] * SIZE + column[None, :], code, mask=inside)
        tl.store(kept_scales + kept, scale, mask=there)


@triton.jit
def _whole(number):
    """Round numbers of at most 127 to whole ones, halves to even ones: they become the last digits of a larger one."""
    return (number + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _e4m3(number):
    """Return the bits of numbers of at most 448 in e4m3: not every GPU has an instruction for it."""
    bits = number.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size + 0x7FFFF + ((size >> 20) & 1) >> 20) - (120 << 3)
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)  # its last digit is e4m3's last
    return (tl.where(size < 0x3C800000, small - 0x46800000, normal) | (bits >> 24 & 0x80)).to(tl.int8)


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Launch the kernel that makes rows of `dtype` [T, H, D] of codes [T, H, D] and scales [T, H]."""
    codes, scales = codes.contiguous(), scales.contiguous()
    if codes.data_ptr() % 16:  # else code would depend on where a sequence's rows begin
        codes = codes.clone()
    rows = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if rows.numel():
        padded = triton.next_power_of_2(codes.shape[-1])
        together = max(BLOCK // padded, 1)
        with torch.cuda.device_of(rows):
            _dequantise[triton.cdiv(scales.numel(), together),](
                codes.view(torch.int8),
                scales,
                rows,
                scales.numel(),
                SIZE=codes.shape[-1],
                SIZE_PAD=padded,
                IS_FLOAT=codes.dtype == torch.float8_e4m3fn,
                ROWS=together,
                num_warps=4,
            )
    return rows


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["scales"])
def _dequantise(
    codes, scales, rows,
    num_rows,
    SIZE: tl.constexpr, SIZE_PAD: tl.constexpr, IS_FLOAT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE_PAD)
    there = row < num_rows
    inside = there[:, None] & (column < SIZE)[None, :]
    at = row[:, None] * SIZE + column[None, :]
    code = tl.load(codes + at, mask=inside, other=0)
    if IS_FLOAT:  # its bits are those of a float16 number that is 256 times smaller
        bits = ((code.to(tl.int16) & 0x7F) << 7) | ((code.to(tl.int16) & 0x80) << 8)
        number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        number = code.to(tl.float32)
    made = number * tl.load(scales + row, mask=there, other=0.0)[:, None]
    tl.store(rows + at, made.to(rows.dtype.element_ty), mask=inside)
