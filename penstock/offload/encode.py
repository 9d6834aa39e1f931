"""Encode one tensor piece by piece, in memory that does not grow with it."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels import exact, groupwise
from penstock.offload.buffers import DTYPES
from penstock.offload.codec import Coding

__all__ = ["PIECE_NBYTES", "DoesNotPay", "Encoder", "ExactEncoder", "GroupwiseEncoder", "encoder_for", "piece_nbytes"]

PIECE_NBYTES = 8 << 20
"""How much of a tensor is encoded at once: what is in flight then fits a few MiB, and reads are long."""

_SAMPLE = 1 << 20
"""The exact codec's table comes from about this many values of the first piece."""


class DoesNotPay(Exception):  # noqa: N818 (a signal to the caller, not a fault)
    """The tensor is better stored as it is; the message says why."""


class ExactEncoder:
    """Lossless bfloat16; pieces are multiples of 1024 values."""

    def __init__(self, coding: Coding) -> None:
        self._coding = coding
        self._table: Tensor | None = None
        self._escapes = 0

    def encode(self, piece: Tensor) -> tuple[Tensor, ...]:
        """Return what each part goes on with. Raises DoesNotPay when too few exponents have codes."""
        if self._table is None:
            # An odd stride, so that every column is seen.
            self._table = exact.choose_table(piece[:: max(piece.numel() // _SAMPLE, 1) | 1])
            table = self._table
        else:
            table = torch.empty(0, dtype=torch.uint8)
        made = exact.encode(piece, self._table)
        start = made.start + self._escapes
        self._escapes += made.extra.numel()
        size = self._coding.size
        if 2 * size <= size + -(-size // 2) + 16 + 4 * -(-size // exact.BLOCK) + self._escapes:
            raise DoesNotPay(f"{self._escapes} of {size} exponents have no code")
        return (made.low, made.code, table, start.to(torch.int32), made.extra)


class GroupwiseEncoder:
    """Integers with scales; pieces are whole rows."""

    def __init__(self, coding: Coding, *, search: bool) -> None:
        self._coding = coding
        self._search = search

    def encode(self, piece: Tensor) -> tuple[Tensor, ...]:
        """Return what each part goes on with. Raises DoesNotPay for values that are no finite numbers."""
        coding = self._coding
        assert coding.group_size is not None
        assert coding.symmetric is not None
        made = groupwise.quantise(
            piece.view(-1, coding.matrix[1]),
            bits=8 if coding.codec == "int8" else 4,
            group_size=coding.group_size,
            symmetric=coding.symmetric,
            search=self._search,
        )
        if not bool(made.scale.isfinite().all()):
            raise DoesNotPay("it holds values that are infinite or no numbers")
        return (made.codes, made.scale) if made.zero is None else (made.codes, made.scale, made.zero)


Encoder = ExactEncoder | GroupwiseEncoder


def encoder_for(coding: Coding, *, search: bool) -> Encoder:
    """Return a fresh encoder for one tensor."""
    return ExactEncoder(coding) if coding.codec == "exact" else GroupwiseEncoder(coding, search=search)


def piece_nbytes(coding: Coding | None) -> int:
    """Return how many bytes a piece of a tensor has, all but the last: whole rows where there are groups."""
    if coding is None or coding.codec == "exact":
        return PIECE_NBYTES
    row = max(coding.matrix[1] * DTYPES[coding.dtype].itemsize, 1)
    return max(PIECE_NBYTES // row, 1) * row
