"""How the rows of keys and values rest: as they come, cast, or quantised. The store knows no dtype; this file does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from penstock.kernels.quant_kv import QUANTISE, dequantise, movable, quantise

__all__ = ["CodedRows", "KeptRows", "encode"]

_WORK_NBYTES = 5
"""What an element takes while it is dequantised, beside what comes out: a float32, and its code by itself."""


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Rows [T, H, `size`] of `dtype` as they rest.

    That is `codes` [T, H, ...] and, where they are quantised, `scales` [T, H, ...]; `penstock.kernels.quant_kv` says
    what these hold.
    """

    codes: Tensor
    scales: Tensor | None
    size: int
    dtype: torch.dtype

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What is in memory."""
        return (self.codes,) if self.scales is None else (self.codes, self.scales)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    @property
    def rests_as_it_came(self) -> bool:
        """Whether what is in memory are the rows themselves."""
        return self.scales is None and self.codes.dtype == self.dtype

    def map(self, change: Callable[[Tensor], Tensor]) -> CodedRows:
        """Return rows of which each part has been changed, codes first: copied elsewhere, or some tokens selected."""
        codes = change(self.codes)
        return CodedRows(codes, None if self.scales is None else change(self.scales), self.size, self.dtype)

    def select(self, tokens: Tensor) -> CodedRows:
        """Return the rows of some tokens [n], by their numbers."""
        return self.map(lambda part: movable(part).index_select(0, tokens).view(part.dtype))

    def whole(self) -> Tensor:
        """Return the rows [T, H, size] that these codes stand for; themselves, where they rest as they came."""
        return self._decode(self.parts)

    def _decode(self, parts: Iterable[Tensor]) -> Tensor:
        codes, *scales = parts
        return dequantise(codes, scales[0], self.size, self.dtype) if scales else codes.to(self.dtype)


@dataclass(frozen=True, slots=True)
class KeptRows(CodedRows):
    """The same as one layer keeps them, in blocks: [num_blocks, block_tokens, H, ...]. Keys, values, or latents."""

    @classmethod
    def made_of(cls, rows: CodedRows, carve: Callable[[Tensor], Tensor]) -> KeptRows:
        """Return what keeps rows like these, in blocks that `carve` makes for tensors like the one it gets."""
        made = rows.map(carve)
        return cls(made.codes, made.scales, made.size, made.dtype)

    @property
    def token_nbytes(self) -> int:
        """Bytes that one token takes."""
        return sum(prod(part.shape[2:]) * part.element_size() for part in self.parts)

    def first(self, size: int) -> Tensor:
        """Return the codes of each row's first `size` elements; all of them where elements share bytes."""
        return self.codes if self.codes.dtype == torch.uint8 else self.codes[..., :size]

    def copy_nbytes(self, *, scattered: bool) -> int:
        """Bytes that reading takes for each token: 0 where rows lie together and need no conversion."""
        gathered = self.token_nbytes if scattered else 0
        converted = prod(self.codes.shape[2:3]) * self.size * (self.dtype.itemsize + _WORK_NBYTES)
        return gathered if self.rests_as_it_came else gathered + converted

    def encode(self, slots: Tensor, row: Tensor, kv_dtype: str) -> CodedRows:
        """Store new rows [T, H, size] at these tokens [T] of all blocks, and return them as they rest."""
        if self.scales is None:
            new = encode(row, kv_dtype)
            self.write(slots, new)
            return new
        codes, scales = quantise(row, kv_dtype, slots=slots, into=(self.codes, self.scales))
        return CodedRows(codes, scales, self.size, row.dtype)

    def write(self, slots: Tensor, new: CodedRows) -> None:
        """Store rows at these tokens [T] of all blocks."""
        for part, rows in zip(self.parts, new.parts, strict=True):
            movable(part).flatten(0, 1).index_copy_(0, slots, movable(rows))

    def write_runs(self, runs: Iterable[tuple[int, int, int]], new: CodedRows) -> None:
        """Store the rows of tokens `begin` .. `end` - 1 in neighbouring slots from `slot` on, for each of `runs`.

        From a GPU into pinned memory, nobody waits for it.
        """
        for part, rows in zip(self.parts, new.parts, strict=True):
            into, source = movable(part).flatten(0, 1), movable(rows)
            for begin, end, slot in runs:
                into[slot : slot + end - begin].copy_(source[begin:end], non_blocking=True)

    def put(self, blocks: Tensor, tokens: Tensor, new: CodedRows) -> None:
        """Store rows at these tokens [T] of these blocks [T], whatever lies between blocks."""
        for part, rows in zip(self.parts, new.parts, strict=True):
            movable(part)[blocks, tokens] = movable(rows)

    def leading(self, count: int) -> KeptRows:
        """Return the first blocks; scales as a copy, because kernels want them without gaps."""
        scales = None if self.scales is None else self.scales[:count].contiguous()
        return replace(self, codes=self.codes[:count], scales=scales)

    def read_run(self, first: int, length: int, heads: slice) -> Tensor:
        """Return tokens that lie one behind the other, [length, H, size]: a view where that is possible."""
        return self._decode(part.flatten(0, 1)[first : first + length, heads] for part in self.parts)

    def read_blocks(self, blocks: Tensor, length: int, heads: slice) -> Tensor:
        """Return the first `length` tokens of these blocks [n], [length, H, size]: a copy."""
        gathered = (movable(part)[:, :, heads].index_select(0, blocks).view(part.dtype) for part in self.parts)
        return self._decode(part.flatten(0, 1)[:length] for part in gathered)

    def take(self, other: KeptRows) -> None:
        """Copy the blocks of an older and smaller keeper of the same rows."""
        for part, old in zip(self.parts, other.parts, strict=True):
            part[: old.shape[0]] = old


def encode(row: Tensor, kv_dtype: str) -> CodedRows:
    """Return rows [T, H, size] as they will rest."""
    size = row.shape[-1]
    if kv_dtype in QUANTISE:
        return CodedRows(*quantise(row, kv_dtype), size, row.dtype)
    return CodedRows(row.to(torch.bfloat16) if kv_dtype == "bf16" else row, None, size, row.dtype)
