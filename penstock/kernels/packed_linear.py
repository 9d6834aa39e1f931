"""Products with weights that stay packed: a linear layer for few tokens, which reads codes and writes no weights.

Expanding a layer writes and reads its weights in full, four times its bytes in 4 bits each way. For thousands of tokens
that is nothing beside the products; for those of a decode pass it is most of the time. Weights have the same bits as
expanded ones, so results differ in the order of sums only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.gpu import triton_kernels
from penstock.kernels.groupwise import dequantise

__all__ = ["FEW_ROWS", "PackedWeight", "packed_linear"]

FEW_ROWS = 16
"""Up to so many rows the GPU's kernel does smaller pieces of work; from twice as many on, the largest."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [N, K] as `groupwise.quantise` makes it.

    Codes [N, K] or, two in a byte, [N, ceil(K / 2)]; scale and zero [N, groups].
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    columns: int
    bits: int
    group_size: int

    @property
    def suits_kernel(self) -> bool:
        """Whether the GPU's kernel takes it: whole groups, of a size that lies evenly in what it reads at once."""
        whole = self.columns % self.group_size == 0 and self.columns % 128 == 0
        return whole and self.group_size in {32, 64, 128}

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [N, K], made for the occasion."""
        out = torch.empty(1, self.codes.shape[0], self.columns, dtype=dtype, device=self.codes.device)
        zero = None if self.zero is None else self.zero[None]
        dequantise(self.codes[None], self.scale[None], zero, out, bits=self.bits, group_size=self.group_size)
        return out[0]


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Return `x` [..., K] times the weight's transpose, plus `bias` [N]: [..., N] in x's dtype.

    For few rows: each 64 of them read the codes once.
    """
    kernels = triton_kernels("packed_linear_triton", x.device) if x.is_cuda and x.dtype != torch.float32 else None
    if kernels is None or not weight.suits_kernel:
        return torch.nn.functional.linear(x, weight.expanded(x.dtype), bias)
    made: Tensor = kernels.packed_linear(x.reshape(-1, weight.columns), weight, bias)
    return made.view(*x.shape[:-1], made.shape[-1])
