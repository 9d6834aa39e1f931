"""How the rows of keys and values rest: as they come, cast, or quantised. The store knows no dtype; this file does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from penstock.kernels.quant_kv import QUANTISE, dequantise

__all__ = ["KeptRows", "open_rows"]

_WORK_NBYTES = 5
"""What an element takes while it is dequantised, beside what comes out: a float32, and its code by itself."""


@dataclass(frozen=True, slots=True)
class KeptRows:
    """Rows [num_blocks, block_tokens, H, `size`] of `dtype` as one layer keeps them: keys, values, or latents.

    They rest as `codes` [num_blocks, block_tokens, H, ...] and, where they are quantised, with `scales`
    [num_blocks, block_tokens, H, ...]; `penstock.kernels.quant_kv` says what these hold, and makes them by `quantise`.
    """

    codes: Tensor
    scales: Tensor | None
    size: int
    dtype: torch.dtype
    quantise: Callable[[Tensor], tuple[Tensor, Tensor]] | None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What is in memory."""
        return (self.codes,) if self.scales is None else (self.codes, self.scales)

    @property
    def token_nbytes(self) -> int:
        """Bytes that one token takes."""
        return sum(prod(part.shape[2:]) * part.element_size() for part in self.parts)

    @property
    def rests_as_it_came(self) -> bool:
        """Whether what is in memory are the rows themselves."""
        return self.scales is None and self.codes.dtype == self.dtype

    def first(self, size: int) -> Tensor:
        """Return the codes of each row's first `size` elements; all of them where elements share bytes."""
        return self.codes if self.codes.dtype == torch.uint8 else self.codes[..., :size]

    def copy_nbytes(self, *, scattered: bool) -> int:
        """Bytes that reading takes for each token: 0 where rows lie together and need no conversion."""
        gathered = self.token_nbytes if scattered else 0
        converted = prod(self.codes.shape[2:3]) * self.size * (self.dtype.itemsize + _WORK_NBYTES)
        return gathered if self.rests_as_it_came else gathered + converted

    def write(self, slots: Tensor, new: Tensor) -> None:
        """Store rows [T, H, size] at these tokens [T] of all blocks."""
        made = (new.to(self.codes.dtype),) if self.quantise is None else self.quantise(new)
        for part, rows in zip(self.parts, made, strict=True):
            _movable(part).flatten(0, 1).index_copy_(0, slots, _movable(rows))

    def read_run(self, first: int, length: int, heads: slice) -> Tensor:
        """Return tokens that lie one behind the other, [length, H, size]: a view where that is possible."""
        return self._decode(part.flatten(0, 1)[first : first + length, heads] for part in self.parts)

    def read_blocks(self, blocks: Tensor, length: int, heads: slice) -> Tensor:
        """Return the first `length` tokens of these blocks [n], [length, H, size]: a copy."""
        gathered = (_movable(part)[:, :, heads].index_select(0, blocks).view(part.dtype) for part in self.parts)
        return self._decode(part.flatten(0, 1)[:length] for part in gathered)

    def take(self, other: KeptRows) -> None:
        """Copy the blocks of an older and smaller keeper of the same rows."""
        for part, old in zip(self.parts, other.parts, strict=True):
            part[: old.shape[0]] = old

    def _decode(self, parts: Iterable[Tensor]) -> Tensor:
        codes, *scales = parts
        return (dequantise(codes, scales[0], self.size) if scales else codes).to(self.dtype)


def open_rows(row: Tensor, kv_dtype: str, carve: Callable[[Tensor], Tensor]) -> KeptRows:
    """Make room for rows like `row` [T, H, size] as `kv_dtype`; `carve` makes blocks for tensors like the one it gets.

    What rows become is seen by quantising none of them, so no formula has to know it.
    """
    quantise = QUANTISE.get(kv_dtype)
    like = row[:0]
    if quantise is not None:
        codes, scales = quantise(like)
        return KeptRows(carve(codes), carve(scales), row.shape[-1], row.dtype, quantise)
    like = like.to(torch.bfloat16) if kv_dtype == "bf16" else like
    return KeptRows(carve(like), None, row.shape[-1], row.dtype, None)


def _movable(part: Tensor) -> Tensor:
    """Return a view that every indexing operation knows: some of them know no float8."""
    return part.view(torch.uint8) if part.element_size() == 1 else part
