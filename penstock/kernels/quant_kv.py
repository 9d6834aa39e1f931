"""Keys and values in int8, with one factor for each token and head: half the bytes of bfloat16, and rows stay apart.

Rows are quantised when they are appended and never again, so a token's bytes do not depend on what comes after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dequantise_rows", "quantise_rows"]

_LARGEST = 127


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 [..., D] and float32 factors [...] of floating-point rows [..., D].

    A row's largest magnitude becomes 127, so every element is off by at most half of the row's factor, and a little
    rounding. Rows of zeros have the factor 0; rows that hold infinities or NaN have NaN, and stay no numbers.
    """
    wide = rows.float()
    largest = wide.abs().amax(-1)
    factors = torch.where(largest.isfinite(), largest / _LARGEST, torch.nan)
    steps = wide / torch.where(factors > 0, factors, 1.0)[..., None]
    return steps.round().nan_to_num(0.0).clamp(-_LARGEST, _LARGEST).to(torch.int8), factors


def dequantise_rows(rows: Tensor, factors: Tensor) -> Tensor:
    """Return float32 rows [..., D] of int8 rows [..., D] and their factors [...]."""
    return rows.float() * factors[..., None]
