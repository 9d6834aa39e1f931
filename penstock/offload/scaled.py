"""Codings of checkpoints that come quantised: which stored tensors stand for a weight, and how they are decoded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from penstock.io.files import DTYPE_BITS
from penstock.kernels.forms import Form

__all__ = ["ScaledCoding"]


@dataclass(frozen=True, slots=True)
class ScaledCoding:
    """How one tensor is stored: matrices of one form, decoded to `dtype` and `shape`, two dims or [E, ., .].

    Its parts are codes, scales, then zero points and the index of groups where it has them. With `transposed`, what is
    stored are the transposed matrices. Equal codings have parts of equal shapes.
    """

    form: Form
    dtype: str
    shape: tuple[int, ...]
    transposed: bool = False
    has_zero: bool = False
    has_index: bool = False

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.size * DTYPE_BITS[self.dtype] // 8
