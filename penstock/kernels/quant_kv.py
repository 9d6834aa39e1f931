"""Rows of keys and values in fewer bits: what a row of one token and head becomes, and what comes back.

Rows are quantised when they are stored and never again, so a token's bytes depend on nothing but its own row.

    fp8    e4m3 numbers times one scale for the row, whose largest magnitude becomes e4m3's largest
    int8   integers -127 .. 127 times one scale, whose largest magnitude becomes 127
    int4   integers 0 .. 15 times a step, plus an offset, for each group of up to 32 neighbours

Groups of a row are as even as can be, so no head size wastes more than a few codes. A byte of int4 holds element d of
the padded row in its low half and, in its high half, the one half a row further on, so that unpacking moves no bytes.

Shapes: rows [..., D]; codes [..., D] or [..., bytes]; scales [...], or [..., groups, 2] with step and offset.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from penstock.kernels.gpu import triton_kernels
from penstock.kernels.sizes import LARGEST_FP8, int4_group_size

__all__ = ["QUANTISE", "dequantise", "quantise"]

FP8 = torch.float8_e4m3fn
_LARGEST_INT8 = 127.0
_LARGEST_INT4 = 15.0


def _scales(wide: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Return float32 scales [...] of float32 rows, NaN for rows that are not finite, and what to divide rows by."""
    top = wide.abs().amax(-1)
    by = torch.full_like(top, largest)  # by a number, CUDA would multiply with its reciprocal, which is rounded
    scales = (top / by).masked_fill_(~top.isfinite(), torch.nan)
    return scales, _divisors(scales)[..., None]


def _divisors(scales: Tensor) -> Tensor:
    """Return what to divide by: 1 for rows of zeros, or of no numbers."""
    return scales.float().masked_fill(~(scales > 0), 1.0)


def _quantise_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    wide = rows.float()
    scales, divisors = _scales(wide, LARGEST_FP8)
    scaled = (wide / divisors).nan_to_num_(0.0)  # a quotient just above the largest would become NaN
    return scaled.clamp_(-LARGEST_FP8, LARGEST_FP8).to(FP8), scales


def _quantise_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    wide = rows.float()
    scales, divisors = _scales(wide, _LARGEST_INT8)
    steps = (wide / divisors).round_().nan_to_num_(0.0)
    return steps.clamp_(-_LARGEST_INT8, _LARGEST_INT8).to(torch.int8), scales


def _quantise_int4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Steps and offsets are bfloat16; codes are chosen for the rounded ones. What is not finite makes its group NaN."""
    size = rows.shape[-1]
    group = int4_group_size(size)
    wide = pad(rows.float(), (0, -size % group)).unflatten(-1, (-1, group))
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    offset = low.bfloat16()
    step = ((high - offset.float()).clamp_(min=0) / _LARGEST_INT4).bfloat16()
    finite = (low - high).isfinite()
    scales = torch.cat([step, offset], -1).masked_fill_(~finite, torch.nan)
    steps = ((wide - offset.float()) / _divisors(step)).round_().nan_to_num_(0.0).clamp_(0, _LARGEST_INT4)
    low_half, high_half = steps.to(torch.uint8).flatten(-2).chunk(2, -1)
    return low_half | high_half << 4, scales


def quantise(
    rows: Tensor, kv_dtype: str, *, slots: Tensor | None = None, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return codes and scales of rows [T, H, D].

    With `slots` [T] int64, store them there too, `into` codes and scales whose first dims [num_blocks, block_tokens]
    are numbered as one. The bits are the same on every device, with a kernel or without.
    """
    kernels = triton_kernels("quant_kv_triton", rows.device) if rows.is_cuda and kv_dtype in _BYTES else None
    if kernels is not None:
        made: tuple[Tensor, Tensor] = kernels.quantise(rows, _BYTES[kv_dtype], slots=slots, into=into)
        return made
    made = QUANTISE[kv_dtype](rows)
    if slots is not None and into is not None:
        for kept, part in zip(into, made, strict=True):
            movable(kept).flatten(0, 1).index_copy_(0, slots, movable(part))
    return made


def movable(part: Tensor) -> Tensor:
    """Return a view that every indexing operation knows: some of them know no float8."""
    return part.view(torch.uint8) if part.element_size() == 1 else part


def dequantise(codes: Tensor, scales: Tensor, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return rows of codes and scales, or their first `size` elements, rounded once from float32 to `dtype`."""
    is_plain = codes.dtype in _BYTES.values() and codes.dim() == 3 and size == codes.shape[-1]
    if codes.is_cuda and is_plain and (kernels := triton_kernels("quant_kv_triton", codes.device)) is not None:
        whole: Tensor = kernels.dequantise(codes, scales, dtype)
        return whole
    return _dequantised(codes, scales, size).to(dtype)


def _dequantised(codes: Tensor, scales: Tensor, size: int) -> Tensor:
    if codes.dtype != torch.uint8:
        rows: Tensor = codes[..., :size].float().mul_(scales[..., None])
        return rows
    steps: Tensor = torch.cat([codes & 15, codes >> 4], -1).unflatten(-1, (scales.shape[-2], -1)).float()
    return steps.mul_(scales[..., :1]).add_(scales[..., 1:]).flatten(-2)[..., :size]


QUANTISE: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "fp8": _quantise_fp8,
    "int8": _quantise_int8,
    "int4": _quantise_int4,
}
"""By the name of the dtype, what makes codes and scales of rows: the reference."""

_BYTES = {"fp8": FP8, "int8": torch.int8}
"""What the kernel makes."""
