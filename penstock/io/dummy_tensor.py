"""What a dummy checkpoint holds, without what makes its numbers: plans of models that are not there read this."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from penstock.io.files import DTYPE_BITS

__all__ = ["DummyTensor"]


@dataclass(frozen=True, slots=True)
class DummyTensor:
    """A tensor to make up; `dtype` is a safetensors dtype name such as "BF16".

    `fill` is a number that all values are, or "bits" for random ones, of which none makes an 8-bit float of 2 or more,
    or no number.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: float | Literal["bits"] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8
