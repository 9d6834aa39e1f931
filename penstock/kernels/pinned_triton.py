"""Reading pinned host memory on CUDA: programs copy one run of bytes each. The reference is a plain copy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["read_pinned"]

BLOCK = 2048
WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def read_pinned(source: Tensor, *, out: Tensor) -> None:
    """Launch the copy of `source`, which the device can address, onto `out`, in words as long as can be."""
    assert source.shape == out.shape, "each byte has its place"
    assert all(one.is_contiguous() for one in (source, out)), "runs of bytes are copied"
    if not out.numel():
        return
    borders = (out.nbytes, *(one.storage_offset() * one.element_size() for one in (source, out)), source.data_ptr())
    word = next(dtype for dtype in WORDS if all(border % dtype.itemsize == 0 for border in borders))
    words, made = (one.reshape(-1).view(word) for one in (source, out))
    with torch.cuda.device_of(out):
        _read_pinned[triton.cdiv(made.numel(), BLOCK),](words, made, made.numel(), BLOCK=BLOCK)


@triton.jit(do_not_specialize=["size"])
def _read_pinned(source, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    tl.store(out + at, tl.load(source + at, mask=inside, other=0), mask=inside)
