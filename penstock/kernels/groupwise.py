"""Group-wise integer weights: 8 or 4 bits per value, and a scale for every run of values along the last dim.

    value = (code - zero) × scale, computed exactly in float32 and rounded once to the tensor's dtype

Symmetric groups have no zero of their own: it is 0 for 8 bits (codes are int8) and 8 for 4 bits. Asymmetric groups have
one (uint8), and codes are unsigned. Two 4-bit codes share a byte, the first in the low half; a row takes whole bytes.
Where a row is no multiple of the group size, its last group is shorter. Scales are bfloat16, whose range holds those of
any weights; codes are chosen for the rounded scale.

Shapes: values [R, C]; codes [R, C] or [R, ceil(C / 2)]; scale and zero [R, ceil(C / group_size)].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels.gpu import triton_kernels

__all__ = ["Quantised", "dequantise", "dequantise_reference", "quantise", "whole_codes"]

_PIECE = 1 << 17
"""Values that the CPU takes at once, so that what lies between two steps stays in its cache."""

_SHRINKS = tuple(1 - 0.04 * step for step in range(1, 8))
"""Factors on a group's range that the search for its scale tries: cutting the outermost values serves the others."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """What the values [R, C] became; `zero` is None for symmetric groups."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def quantise(values: Tensor, *, bits: int, group_size: int, symmetric: bool, search: bool = False) -> Quantised:
    """Quantise finite values [R, C], to the same bits on every device.

    With `search`, each group gets the scale of the least squared error.
    """
    rows, columns = values.shape
    groups = -(-columns // group_size)
    empty = partial(torch.empty, device=values.device)
    codes = empty(rows, columns, dtype=torch.int8 if symmetric and bits == 8 else torch.uint8)
    scale = empty(rows, groups, dtype=torch.bfloat16)
    zero = None if symmetric else empty(rows, groups, dtype=torch.uint8)
    at_once = values.numel() if values.is_cuda else _PIECE
    for part, its_groups, size in _parts(rows, columns, group_size, at_once):
        cells = values[part].float().unflatten(-1, (-1, size))
        best = _choose(cells, bits, symmetric=symmetric, shrink=1.0)
        for shrink in _SHRINKS if search else ():
            best = _better(cells, best, _choose(cells, bits, symmetric=symmetric, shrink=shrink))
        codes[part] = best.steps.flatten(1) if best.zero is None else best.steps.add_(best.zero).flatten(1)
        scale[part[0], its_groups] = best.scale.squeeze(-1)
        if zero is not None and isinstance(best.zero, Tensor):
            zero[part[0], its_groups] = best.zero.squeeze(-1)
    return Quantised(_pack(codes) if bits == 4 else codes, scale, zero)


def dequantise(codes: Tensor, scale: Tensor, zero: Tensor | None, out: Tensor, *, bits: int, group_size: int) -> None:
    """Make `out` [B, R, C] of a batch: every argument has a leading dim [B, ...] of any stride, and whole rows."""
    if out.is_cuda and (kernels := triton_kernels("expand_triton", out.device)) is not None:
        kernels.dequantise(codes, scale, zero, out, bits=bits, group_size=group_size)
        return
    work = dequantise_reference if out.is_cuda else _dequantise_cpu
    for item in range(out.shape[0]):
        its_zero = None if zero is None else zero[item]
        work(codes[item], scale[item], its_zero, out[item], bits=bits, group_size=group_size)


def dequantise_reference(
    codes: Tensor, scale: Tensor, zero: Tensor | None, out: Tensor, *, bits: int, group_size: int
) -> None:
    """Make `out` [R, C], in plain torch on any device."""
    columns = out.shape[1]
    whole = whole_codes(codes, bits=bits)[:, :columns]
    group = torch.arange(columns, device=out.device) // group_size
    shift = (8 if bits == 4 else 0) if zero is None else zero.int()[:, group]
    out.copy_((whole.int() - shift).float() * scale.float()[:, group])


def whole_codes(codes: Tensor, *, bits: int) -> Tensor:
    """Return codes [R, C] one by one, of 4 bits as of 8; where C is odd, one too many."""
    return torch.stack([codes & 15, codes >> 4], -1).flatten(1) if bits == 4 else codes


def _parts(
    rows: int, columns: int, group_size: int, at_once: int = _PIECE
) -> Iterator[tuple[tuple[slice, slice], slice, int]]:
    """Cut a matrix into parts of whole groups: (rows and columns, those groups, values in each)."""
    whole = columns // group_size
    step = max(at_once // max(columns, 1), 1)
    for begin in range(0, rows, step):
        down = slice(begin, min(begin + step, rows))
        if whole:
            yield (down, slice(0, whole * group_size)), slice(0, whole), group_size
        if columns % group_size:
            yield (down, slice(whole * group_size, columns)), slice(whole, whole + 1), columns % group_size


@dataclass(frozen=True, slots=True)
class _Choice:
    """Cells ≈ steps × scale; `steps` are whole numbers in float32, `zero` what, if anything, makes codes of them."""

    steps: Tensor
    scale: Tensor
    zero: Tensor | float | None


def _choose(cells: Tensor, bits: int, *, symmetric: bool, shrink: float) -> _Choice:
    """Choose codes for float32 cells [..., groups, size], whose range is cut to `shrink` of itself."""
    top = (1 << bits) - 1
    low, high = cells.amin(-1, keepdim=True), cells.amax(-1, keepdim=True)
    if not symmetric:
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        scale = ((high - low) * (shrink / top)).bfloat16()
        zero = (low * -shrink * _inverse(scale)).round_().clamp_(0, top)
        return _Choice((cells * _inverse(scale)).round_().add_(zero).clamp_(0, top).sub_(zero), scale, zero)
    half = top // 2
    if bits == 8:
        scale = (torch.maximum(-low, high) * (shrink / half)).bfloat16()
        steps = (cells * _inverse(scale)).round_()
        # With the whole range no step is beyond 127.5: rounding the scale moves the outermost by 0.4 % at most.
        return _Choice(steps if shrink == 1 else steps.clamp_(-half, half), scale, None)
    # Four bits have one step more below zero than above: the outermost value, of either sign, gets it.
    scale = (torch.where(high > -low, high, low) * (-shrink / (half + 1))).bfloat16()
    return _Choice((cells * _inverse(scale)).round_().clamp_(-half - 1, half), scale, half + 1.0)


def _inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale in float32, or 0 where that is no number: groups of zeros, or as good as zero."""
    inverse = scale.float().reciprocal_()
    return inverse.masked_fill_(~inverse.isfinite(), 0)


def _better(cells: Tensor, one: _Choice, other: _Choice) -> _Choice:
    """Return, group by group, the one with less squared error."""
    errors = [(made.steps * made.scale.float()).sub_(cells).square_().sum(-1, keepdim=True) for made in (one, other)]
    better = errors[1] < errors[0]
    zero = one.zero
    if isinstance(zero, Tensor) and isinstance(other.zero, Tensor):
        zero = torch.where(better, other.zero, zero)
    return _Choice(torch.where(better, other.steps, one.steps), torch.where(better, other.scale, one.scale), zero)


def _pack(codes: Tensor) -> Tensor:
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _dequantise_cpu(
    codes: Tensor, scale: Tensor, zero: Tensor | None, out: Tensor, *, bits: int, group_size: int
) -> None:
    """Products of small integers and bfloat16 scales are exact in float32, so bfloat16 arithmetic rounds them once."""
    rows, columns = out.shape
    work = torch.bfloat16 if out.dtype == torch.bfloat16 else torch.float32
    for (down, across), groups, size in _parts(rows, columns, group_size):
        whole = _unpack(codes[down], centred=zero is None)[:, across] if bits == 4 else codes[down, across]
        steps = whole.unflatten(1, (-1, size))
        if zero is not None:
            steps = steps.to(work) - zero[down, groups, None].to(work)
        made = out[down, across].unflatten(1, (-1, size))
        factor = scale[down, groups, None].to(work)
        if out.dtype == work:
            torch.mul(steps.to(work) if bits == 4 else steps, factor, out=made)
        else:
            made.copy_(steps.to(work) * factor)


def _unpack(packed: Tensor, *, centred: bool) -> Tensor:
    """Return rows of 4-bit codes as bfloat16, less 8 when `centred`. Where C is odd, one too many."""
    quads = packed.shape[1] % 2 == 0
    words = packed.numpy().view(np.uint16) if quads else packed.numpy()
    values = np.take(_code_table(quads=quads, centred=centred), words, mode="clip")
    return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)


@lru_cache(maxsize=4)
def _code_table(*, quads: bool, centred: bool) -> NDArray[Any]:
    """Return what each byte, or with `quads` each pair of bytes, unpacks to: 2 or 4 bfloat16 values as one integer."""
    number = np.arange(65536 if quads else 256)[:, None] >> (np.arange(4 if quads else 2) * 4) & 15
    values = torch.from_numpy(number - (8 if centred else 0)).bfloat16().view(torch.int16).numpy()
    table: NDArray[Any] = values.view(np.uint64 if quads else np.uint32)[:, 0]
    return table
