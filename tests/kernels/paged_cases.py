"""Paged attention made small: random blocks, tables and arguments, and the reference's answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from penstock.kernels import paged_reference
from penstock.kernels.paged_cpu import AttendPaged

QUANTISED = {torch.int8, torch.float8_e4m3fn}


@dataclass(frozen=True)
class Case:
    """One call. `lengths` of sequences; the rest are sizes and what the arguments are called."""

    lengths: tuple[int, ...]
    heads: tuple[int, int] = (8, 2)
    sizes: tuple[int, int] = (64, 64)
    block_tokens: int = 16
    dtype: torch.dtype = torch.bfloat16
    query_dtype: torch.dtype | None = None
    out_dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Call:
    """The arguments of a call."""

    tensors: tuple[Tensor, ...]
    keywords: dict[str, Any]
    out: Tensor

    def run(self, attend: AttendPaged, **more: Any) -> Tensor:
        """Call it; the memory for the result is full of NaN before."""
        out = self.out.new_full(self.out.shape, float("nan"))
        attend(*self.tensors, **self.keywords, **more, out=out)
        return out

    def only(self, row: int) -> Call:
        """Return the same call for one sequence alone."""
        query, keys, values, table, lengths = self.tensors
        one = slice(row, row + 1)
        return replace(self, tensors=(query[one], keys, values, table[one], lengths[one]), out=self.out[one])


def make(case: Case) -> Call:
    """Make a call; every block that no sequence needs, and every slot after a sequence's end, is NaN or -128."""
    generator = torch.Generator().manual_seed(case.seed)
    (num_query_heads, num_heads), (size, value_size) = case.heads, case.sizes
    needed = [-(-length // case.block_tokens) for length in case.lengths]
    num_blocks = sum(needed) + 2
    order = torch.randperm(num_blocks, generator=generator)
    table = torch.full((len(needed), max(*needed, 1) + 1), -1, dtype=torch.int32)
    used = torch.zeros(num_blocks, case.block_tokens, dtype=torch.bool)
    begin = 0
    for row, (count, length) in enumerate(zip(needed, case.lengths, strict=True)):
        blocks = order[begin : begin + count]
        table[row, :count] = blocks
        flat = torch.arange(length)
        used[blocks[flat // case.block_tokens], flat % case.block_tokens] = True
        begin += count
    keywords: dict[str, Any] = {"scale": case.scale or size**-0.5, "window": case.window, "softcap": case.softcap}
    rows = []
    for name, each in (("key_scales", size), ("value_scales", value_size)):
        made = torch.randn(num_blocks, case.block_tokens, num_heads, each, generator=generator)
        if case.dtype in QUANTISED:
            made = (made * 40).clamp(-127, 127)
            keywords[name] = torch.rand(made.shape[:3], generator=generator) / 40
            keywords[name][~used] = float("nan")
        made[~used] = -128 if case.dtype == torch.int8 else float("nan")
        rows.append(made.to(case.dtype))
    if case.sinks:
        keywords["sinks"] = torch.randn(num_query_heads, generator=generator)
    query_dtype = case.query_dtype or (torch.bfloat16 if case.dtype in QUANTISED else case.dtype)
    query = torch.randn(len(needed), num_query_heads, size, generator=generator).to(query_dtype)
    out = torch.empty(len(needed), num_query_heads, value_size, dtype=case.out_dtype)
    return Call((query, *rows, table, torch.tensor(case.lengths, dtype=torch.int32)), keywords, out)


def wanted(call: Call) -> Tensor:
    """Return what the reference makes of it."""
    return call.run(paged_reference.attend_paged)
