"""Decode matrices of quantised checkpoints; `forms` says how they are stored.

Shapes: a batch of B matrices [R, C]. Codes, scales and zero points have a leading dim [B, ...] of any stride.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels.forms import AWQ_SHIFTS, Form, Number
from penstock.kernels.gpu import triton_kernels

__all__ = ["Matrix", "decode", "decode_reference"]

_PIECE = 1 << 17
"""Values that the CPU takes at once, so that what lies between two steps stays in its cache."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """What is stored of a batch, turned so that rows come before columns; views of the stored tensors.

    codes [B, R / row_pack, C / column_pack], scale [B, row blocks, groups], zero [B, R / zero_pack, groups], or like
    the scales where zero_pack is 1, or None, index [B, C] int32 or None: each column's group, where negative ones mean
    that groups are runs of columns.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    index: Tensor | None
    row_pack: int
    column_pack: int
    zero_pack: int

    @classmethod
    def of(cls, form: Form, codes: Tensor, scale: Tensor, zero: Tensor | None, index: Tensor | None) -> Matrix:
        """Turn the stored parts of a batch."""
        scale = scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale
        if form.packing == "rows":
            column_pack = 8 // form.bits
            codes = codes.flatten(2).view(torch.int8 if codes.dtype == torch.int8 else torch.uint8)
            if zero is None or zero.dtype == torch.int8:
                return cls(codes, _grid(scale), None if zero is None else _grid(zero), index, 1, column_pack, 1)
            return cls(codes, _grid(scale), zero, index, 1, column_pack, form.per_word)
        words = form.packing == "words"
        turned = None if zero is None else zero.transpose(1, 2)
        return cls(
            codes.transpose(1, 2),
            scale.transpose(1, 2),
            turned,
            index,
            row_pack=1 if words else form.per_word,
            column_pack=form.per_word if words else 1,
            zero_pack=form.per_word,
        )

    def item(self, number: int) -> Matrix:
        """Return one matrix of the batch; its tensors have no leading dim."""
        return replace(
            self,
            codes=self.codes[number],
            scale=self.scale[number],
            zero=None if self.zero is None else self.zero[number],
            index=None if self.index is None else self.index[number],
        )


def decode(form: Form, codes: Tensor, scale: Tensor, zero: Tensor | None, index: Tensor | None, *, out: Tensor) -> None:
    """Decode a batch of matrices into `out` [B, R, C] of any float dtype and any strides.

    An index beyond the last group counts as the last.
    """
    matrix = Matrix.of(form, codes, scale, zero, index)
    if out.is_cuda and (kernels := triton_kernels("scaled_triton", out.device)) is not None:
        kernels.decode(form, matrix, out)
        return
    work = decode_reference if out.is_cuda else _decode_cpu
    for item in range(out.shape[0]):
        work(form, matrix.item(item), out[item])


def _grid(numbers: Tensor) -> Tensor:
    """Return [B, row blocks, groups]; one number for each row, or for the whole matrix, may come with fewer dims."""
    return numbers.reshape(numbers.shape[0], -1, numbers.shape[-1] if numbers.dim() > 2 else 1)


def decode_reference(form: Form, matrix: Matrix, out: Tensor) -> None:
    """Decode one matrix into `out` [R, C], in plain torch on any device."""
    rows, columns = out.shape
    codes = _unpack(form, matrix.codes, matrix.row_pack, 0)
    values = _numbers(form, _unpack(form, codes, matrix.column_pack, 1)[:rows, :columns])
    group = _groups(form, matrix, columns)
    row = torch.arange(rows, device=out.device) // form.block[0]
    if form.number == "int":
        values = values - _zeros(form, matrix, rows)[:, group]
    out.copy_(values * _factors(matrix.scale)[row][:, group])


def _unpack(form: Form, packed: Tensor, count: int, dim: int) -> Tensor:
    """Take `count` codes out of each element along `dim`; a count of 1 leaves them as they are."""
    if count == 1:
        return packed
    shifts = AWQ_SHIFTS if form.packing == "awq" else range(0, count * form.bits, form.bits)
    mask = (1 << form.bits) - 1
    return torch.stack([packed.int() >> shift & mask for shift in shifts], dim + 1).flatten(dim, dim + 1)


def _numbers(form: Form, codes: Tensor) -> Tensor:
    """Return what codes stand for, in float32."""
    if form.number == "int":
        return codes.float()
    table: Tensor = torch.from_numpy(_table(form.number)).to(codes.device)
    return table[codes.long()]


def _groups(form: Form, matrix: Matrix, columns: int) -> Tensor:
    """Return the group [C] of each column."""
    runs = torch.arange(columns, device=matrix.codes.device) // form.block[1]
    if matrix.index is None:
        return runs
    index = matrix.index.long()
    return torch.where(index < 0, runs, index.clamp(max=matrix.scale.shape[1] - 1))


def _zeros(form: Form, matrix: Matrix, rows: int) -> Tensor:
    """Return the zero points [R, groups] in float32."""
    if matrix.zero is None:
        return torch.full((rows, matrix.scale.shape[1]), float(form.zero), device=matrix.scale.device)
    if matrix.zero_pack == 1:
        return matrix.zero.float()[torch.arange(rows, device=matrix.zero.device) // form.block[0]] + form.zero
    return _unpack(form, matrix.zero, matrix.zero_pack, 0)[:rows].float() + form.zero


def _factors(scale: Tensor) -> Tensor:
    """Return scales in float32; bytes are exponents of two."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()


def _decode_cpu(form: Form, matrix: Matrix, out: Tensor) -> None:
    """Decode some rows at a time: codes through a table, then zero points and scales group by group."""
    rows, columns = out.shape
    row = torch.arange(rows) // form.block[0]
    factors = _factors(matrix.scale)
    zeros = _zeros(form, matrix, rows) if form.number == "int" and (matrix.zero is not None or form.zero) else None
    index = None if matrix.index is None else _groups(form, matrix, columns)
    if index is not None and torch.equal(index, torch.arange(columns) // form.block[1]):
        index = None
    for some in _pieces(rows, columns):
        values = _numbers_cpu(form, matrix, some)[:, :columns]
        if index is not None:
            if zeros is not None:
                values.sub_(zeros[some][:, index])
            values.mul_(factors[row[some]][:, index])
        for across, groups, size in () if index is not None else _runs(columns, form.block[1]):
            cells = values[:, across].unflatten(1, (-1, size))
            if zeros is not None:
                cells.sub_(zeros[some, groups, None])
            cells.mul_(factors[row[some], groups, None])
        if out.stride(1) == 1:
            out[some].copy_(values)
        else:  # turned in the cache, so that runs of memory are written
            out.T[:, some].copy_(values.to(out.dtype).T.contiguous())


def _pieces(rows: int, columns: int) -> Iterator[slice]:
    """Cut rows into pieces of whole words."""
    step = -(-max(_PIECE // max(columns, 1), 1) // 8) * 8
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def _runs(columns: int, size: int) -> Iterator[tuple[slice, slice, int]]:
    """Cut a row into runs of equal groups: (columns, those groups, columns in each)."""
    whole = columns // size
    if whole:
        yield slice(0, whole * size), slice(0, whole), size
    if columns % size:
        yield slice(whole * size, columns), slice(whole, whole + 1), columns % size


def _numbers_cpu(form: Form, matrix: Matrix, some: slice) -> Tensor:
    """Return what the codes of some rows stand for, in float32 [rows, C or a few more]."""
    if form.packing == "awq":
        words = matrix.codes[some.start // 8 : -(-some.stop // 8)].clone(memory_format=torch.contiguous_format)
        codes = torch.empty(words.shape[0], 8, words.shape[1], dtype=torch.uint8)
        for place, shift in enumerate(AWQ_SHIFTS):
            byte = words.view(torch.uint8)[:, shift // 8 :: 4]
            codes[:, place] = byte >> 4 if shift % 8 else byte & 15
        return codes.flatten(0, 1)[: some.stop - some.start].float()
    stored = matrix.codes[some]
    if form.packing == "words":
        stored = stored.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if form.bits == 8 and form.number == "int":
        return stored.float()
    if form.bits == 4:
        return _looked_up(_pair_table(form.number, bits=4), stored.numpy())
    if stored.shape[1] % 2:
        return _looked_up(_table(form.number), stored.numpy())
    return _looked_up(_pair_table(form.number, bits=8), stored.numpy().view(np.uint16))


def _looked_up(table: NDArray[Any], codes: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.take(table, codes, mode="clip").view(np.float32))


@lru_cache(maxsize=3)
def _table(number: Number) -> NDArray[np.float32]:
    """Return what each code stands for."""
    if number == "e2m1":
        magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        return np.array(magnitudes + [-one for one in magnitudes], np.float32)
    codes = np.arange(256, dtype=np.uint8)
    if number == "e4m3":
        return torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    return codes.astype(np.float32)


@lru_cache(maxsize=3)
def _pair_table(number: Number, *, bits: int) -> NDArray[Any]:
    """Return what each two codes that follow each other, the first in the low bits, stand for, as one integer."""
    codes, table = np.arange(1 << 2 * bits), _table(number)
    return np.stack([table[codes & (1 << bits) - 1], table[codes >> bits]], 1).view(np.uint64)[:, 0]
